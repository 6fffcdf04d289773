"""The unimodal baseline: the same encoder and head, a linear classifier, cross-entropy."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_files import CLASSES, write_all

import actionclip
from actionclip import VideoClassifier, load
from actionclip.annotations import read_video_list
from actionclip.cli import train
from actionclip.errors import InputError
from actionclip.models.actionclip import ActionCLIP
from actionclip.recipe import Recipe
from actionclip.runs import RunFolder
from actionclip.train import Running, Trainer
from actionclip.weights import digest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


def unimodal(data: Path, name: str = "plain") -> ActionCLIP:
    torch.manual_seed(3)
    model = load(data / f"{name}.safetensors", device="cpu")
    model.classify_linearly(CLASSES)
    return model


def build(data: Path, folder: Path, **changes: object) -> Trainer:
    recipe = Recipe(epochs=1, batch_size=10, learning_rate=1e-3, warmup_epochs=0)
    return Trainer(
        unimodal(data),
        read_video_list(data / "train"),
        replace(recipe, **changes),
        RunFolder(folder),
        running=Running(workers=0, max_bad=1),
    )


def finish(trainer: Trainer) -> str:
    trainer.folder.start({}, CLASSES)
    assert list(trainer.run())
    return digest(trainer.model)


def test_scores_are_the_softmax_of_a_linear_layer(data: Path) -> None:
    model = unimodal(data)
    frames = torch.randint(256, (5, 3, 40, 40), dtype=torch.uint8)
    seen: list[Tensor] = []
    model.temporal.register_forward_hook(lambda *call: seen.append(call[-1]))
    with pytest.warns(UserWarning, match=r"linear\.weight"):
        classifier = VideoClassifier(model, CLASSES)
    scores = classifier(frames).scores
    logits = seen[0].double() @ model.linear.weight.T.double() + model.linear.bias.double()
    torch.testing.assert_close(scores.double(), logits[0].softmax(0), atol=1e-6, rtol=0)
    assert scores.max() > 0.26  # not uniform, or the order below could not be told

    with pytest.warns(UserWarning, match=r"linear\.weight"):
        few = VideoClassifier(model, [CLASSES[3], CLASSES[0]])(frames).scores
    torch.testing.assert_close(few.double(), logits[0, [3, 0]].softmax(0), atol=1e-6, rtol=0)


def test_other_labels_and_sentences_are_refused(data: Path) -> None:
    with pytest.raises(InputError, match="label 'archery' is none of the 4 classes"):
        VideoClassifier(unimodal(data), ["archery"])
    model = unimodal(data)
    model.untrained = ("clip.ln_final.weight",)  # which no prediction depends on
    VideoClassifier(model, [name.replace(" ", "_").upper() for name in CLASSES])
    for options in ({"templates": "none"}, {"raw_labels": True}):
        with pytest.raises(InputError, match="reads no sentences"):
            VideoClassifier(unimodal(data), CLASSES, **options)


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_it_is_saved_with_its_classes(data: Path, tmp_path: Path, ending: str) -> None:
    model = unimodal(data, "model")
    path = tmp_path / f"model.{ending}"
    actionclip.save(model, path)
    back = load(path, device="cpu")
    assert back.config == model.config
    assert back.config.class_names == CLASSES
    assert digest(back) == digest(model)
    new = load(path, device="cpu", new_head=True, temporal="meanp")
    assert new.linear is None
    assert new.config.class_names is None


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_the_loss_is_the_cross_entropy_of_the_batch(
    data: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    trainer = build(data, tmp_path, micro_batch=micro_batch)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (10, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    batch = next(iter(trainer.clips[0, i] for i in range(1)))
    labels = torch.arange(10) % len(CLASSES)
    batch = replace(
        batch, frames=frames, labels=labels, tokens=batch.tokens.expand(10, -1), paths=["a"] * 10
    )
    loss = trainer._backward(batch)

    model = unimodal(data)
    mean = torch.tensor(model.pixel_mean).view(3, 1, 1)
    std = torch.tensor(model.pixel_std).view(3, 1, 1)
    video = model.encode_video((frames / 255 - mean) / std)
    expected = F.cross_entropy(video @ model.linear.weight.T + model.linear.bias, labels)
    torch.testing.assert_close(loss, expected.detach(), atol=1e-6, rtol=1e-5)
    expected.backward()
    for name in ("linear.weight", "linear.bias", "clip.visual.proj"):
        ours, theirs = (m.get_parameter(name).grad for m in (trainer.model, model))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_only_what_sees_is_trained(data: Path, tmp_path: Path) -> None:
    trainer = build(data, tmp_path)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    groups = {group.name: group for group in trainer.groups}
    assert groups["text"].trained == ()
    assert {id(p) for p in groups["head"].trained} == {
        id(p) for p in trainer.model.linear.parameters()
    }
    finish(trainer)
    changed = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if k.startswith(("clip.visual.", "linear."))}
    best = load(trainer.folder.best, device="cpu")
    assert best.untrained == ()
    assert digest(best) == digest(trainer.model)


def test_several_labels_a_video_and_other_classes_are_refused(data: Path, tmp_path: Path) -> None:
    videos = read_video_list(data / "train")
    recipe = Recipe(epochs=1, batch_size=4)
    with pytest.raises(InputError, match="several labels a video"):
        Trainer(
            unimodal(data), replace(videos, multi_label=True), recipe, RunFolder(tmp_path / "run")
        )
    renamed = replace(videos, class_names=tuple(f"{name} fast" for name in CLASSES))
    with pytest.raises(InputError, match="for other classes"):
        Trainer(unimodal(data), renamed, recipe, RunFolder(tmp_path / "run"))


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> int:
        return train.main(
            [*options, "--train", str(data / "train"), "--output", str(tmp_path / "run")]
        )

    common = (
        *("--epochs", "1", "--batch-size", "6", "--workers", "0", "--max-bad", "1"),
        *("--device", "cpu", "--val", str(data / "val")),
    )
    model = ("--model", str(data / "plain.safetensors"))
    assert run(*common, *model, "--unimodal") == 0
    trained = load(tmp_path / "run" / "best.safetensors", device="cpu")
    assert trained.config.class_names == CLASSES
    capsys.readouterr()

    again = ("--model", str(tmp_path / "run" / "best.safetensors"))
    for state in ("last.pt", "previous.pt"):
        (tmp_path / "run" / state).unlink()
    few = tmp_path / "few.txt"
    few.write_text("\n".join(CLASSES[1:]))
    assert run(*common, *again, "--unimodal", "--classes", str(few), "--seed", "4") == 0
    assert "a new one is started" in capsys.readouterr().err
    retrained = load(tmp_path / "run" / "best.safetensors", device="cpu")
    assert retrained.config.class_names == CLASSES[1:]
    for state in ("last.pt", "previous.pt"):
        (tmp_path / "run" / state).unlink()
    assert run(*common, *again) == 2
    assert "train it on with --unimodal" in capsys.readouterr().err
    useless = (
        ("--templates", "none"),
        ("--lock-text",),
        ("--from-scratch", "text"),
        ("--raw-labels",),
    )
    for options in useless:
        assert run(*common, *model, "--unimodal", *options) == 2
        message = f"--unimodal reads no sentences; drop {' '.join(options).removesuffix(' none')}"
        assert message in capsys.readouterr().err

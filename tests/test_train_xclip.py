"""The loss over classes, mixing and distillation in the loop, with X-CLIP and with ActionCLIP."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_files import CLASSES, CLIP, write_all

from actionclip import distributed, prompt_encoding
from actionclip.annotations import Sample, VideoList, read_video_list
from actionclip.augment import Augmentation
from actionclip.dataset import Batch
from actionclip.errors import InputError, TrainingError
from actionclip.mixing import Mixing, Mixture, draw_mixture
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.models.xclip import XCLIP, XCLIPConfig
from actionclip.recipe import RECIPES, Recipe
from actionclip.runs import RunFolder
from actionclip.tokenizer import tokenize
from actionclip.train import Running, Trainer
from actionclip.weights import digest

pytestmark = pytest.mark.usefixtures("one_thread")

# Names that are other words when they are not raw.
NAMES = ("brush_hair", "ApplyMakeup", "archery", "juggling balls", "golf")
RECIPE = replace(
    RECIPES["xclip"], epochs=2, batch_size=6, learning_rate=1e-3, warmup_epochs=0, augmentation=None
)
FREE = replace(RECIPE, mixing=None, lock_text=None, lock_scale=False)


def build_model(kind: str = "xclip") -> VideoTextModel:
    torch.manual_seed(3)
    if kind == "xclip":
        return XCLIP(XCLIPConfig(CLIP, num_frames=3))
    return ActionCLIP(ActionCLIPConfig(CLIP, temporal=kind, num_frames=3))


def build(
    folder: Path,
    recipe: Recipe,
    model: VideoTextModel | None = None,
    names: tuple[str, ...] = NAMES,
    *,
    multi_label: bool = False,
) -> Trainer:
    """A trainer for batches that no file holds."""
    samples = tuple(Sample(f"{i}.mp4", (i % len(names),)) for i in range(12))
    videos = VideoList("made up", "a list", names, samples, (), "", multi_label)
    return Trainer(model or build_model(), videos, recipe, RunFolder(folder))


def draw_batch(size: int = 6, *, multi_label: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(5)
    frames = torch.randint(256, (size, 3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    # Frames of one colour, each its own: what tells one video from another.
    frames = (
        frames // 8 + torch.arange(0, 37 * size, 37, dtype=torch.uint8)[:, None, None, None, None]
    )
    labels = torch.arange(size) % len(NAMES)
    if multi_label:
        labels = F.one_hot(labels, len(NAMES)).bool() | F.one_hot((labels + 2) % 5, 5).bool()
    tokens = tokenize(["an action"], CLIP.context_length).expand(size, -1)
    return Batch(frames, tokens, labels, [f"{i}.mp4" for i in range(size)])


def gradients(model: VideoTextModel) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def mix_by_hand(batch: Batch, mixture: Mixture, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mix frames and smoothed labels as the papers define it."""
    frames, targets = [], []
    hot = F.one_hot(batch.labels, len(NAMES)) * (1 - smoothing) + smoothing / len(NAMES)
    for i, (j, share, box) in enumerate(
        zip(mixture.partner, mixture.share.tolist(), mixture.box.tolist(), strict=True)
    ):
        mine, other = batch.frames[i].double(), batch.frames[j].double()
        mask = torch.full((32, 32), share, dtype=torch.float64)
        if box[0] < box[1]:
            mask = torch.ones(32, 32, dtype=torch.float64)
            mask[box[0] : box[1], box[2] : box[3]] = 0
        frames.append(mask * mine + (1 - mask) * other)
        targets.append(share * hot[i] + (1 - share) * hot[j])
    return torch.stack(frames), torch.stack(targets)


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("kind", ["xclip", "lstm"])
def test_the_loss_is_the_cross_entropy_over_classes(
    kind: str, micro_batch: int | None, tmp_path: Path
) -> None:
    mixing = Mixing(group_size=3)  # of six videos, so that both kinds may occur
    recipe = replace(FREE, mixing=mixing, micro_batch=micro_batch)
    trainer = build(tmp_path, recipe, build_model(kind))
    trainer.progress.step = 3
    batch = draw_batch()
    share = trainer._backward(batch)

    mixture = draw_mixture(6, 32, mixing, np.random.Generator(np.random.PCG64([2, 0, 3, 0])))
    assert bool((mixture.partner != torch.arange(6)).any())
    frames, targets = mix_by_hand(batch, mixture, 0.1)
    model = build_model(kind)
    model.eval()
    mean = torch.tensor(model.pixel_mean).view(3, 1, 1)
    std = torch.tensor(model.pixel_std).view(3, 1, 1)
    logits = model(((frames / 255 - mean) / std).float(), tokenize(NAMES, CLIP.context_length))
    expected = -(targets * logits.double().log_softmax(1)).sum() / 6
    torch.testing.assert_close(share.double(), expected.detach(), rtol=1e-4, atol=1e-5)
    expected.backward()
    assert_close(gradients(trainer.model), gradients(model))


def test_a_locked_text_encoder_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = ("{}", "a video of {}", "watch {}")
    asked: list[int] = []
    encode = VideoTextModel.encode_text

    def noted(model: VideoTextModel, tokens: Tensor) -> Tensor:
        asked.append(len(tokens))
        return encode(model, tokens)

    def noted_together(clip: nn.Module, tokens: Tensor) -> Tensor:
        asked.append(len(tokens))
        return together(clip, tokens)

    monkeypatch.setattr(VideoTextModel, "encode_text", noted)
    together = prompt_encoding.encode_tokens
    monkeypatch.setattr(prompt_encoding, "encode_tokens", noted_together)
    locked = build(tmp_path, replace(RECIPE, templates=templates))
    free = build(tmp_path, replace(FREE, mixing=Mixing(), templates=templates))
    chosen = set()
    for step in range(6):
        losses = []
        for trainer in (locked, free):
            trainer.progress.step = step
            trainer.model.zero_grad()
            losses.append(float(trainer._backward(draw_batch())))
        # As long as no weights change, it does not matter whether they may.
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        chosen.add(trainer._class_prompts().start // len(NAMES))
        common = gradients(free.model)
        assert_close(gradients(locked.model), {k: common[k] for k in gradients(locked.model)})
    assert chosen == {0, 1, 2}
    assert sum(asked) == 15 + 6 * 5
    # Another trainer of the same model has other classes.
    other = build(tmp_path, RECIPE, locked.model, names=NAMES[::-1])
    texts = [trainer._known_text[: len(NAMES)] for trainer in (locked, other)]
    torch.testing.assert_close(texts[1], texts[0].flip(0))


def test_several_labels_share_the_target(tmp_path: Path) -> None:
    recipe = replace(FREE, label_smoothing=0.2)
    trainer = build(tmp_path, recipe, multi_label=True)
    batch = draw_batch(multi_label=True)
    (part,) = trainer._parts(batch, None)
    expected = batch.labels * 0.8 / 2 + 0.2 / 5
    torch.testing.assert_close(part[1], expected)
    assert trainer._backward(batch) > 0


def test_a_video_that_makes_no_number_is_named_with_its_partner(tmp_path: Path) -> None:
    trainer = build(tmp_path, replace(RECIPE, micro_batch=4))
    start = digest(trainer.model)
    batch = draw_batch()
    mixture = trainer._mixture(batch)
    assert mixture is not None
    row = 4
    compare = trainer._compare

    def poisoned(module: torch.nn.Module, part: int, frames: Tensor) -> tuple[Tensor, ...]:
        logits, video, text = compare(module, part, frames)
        hit = part * 4 + torch.arange(len(frames)) == row
        return torch.where(hit[:, None], logits * math.nan, logits), video, text

    trainer._compare = poisoned  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match="the loss is not finite in step 1") as caught:
        trainer._step(batch)
    partner = int(mixture.partner[row])
    assert partner != row
    assert f"(rank 0: {row}.mp4, {partner}.mp4);" in str(caught.value)
    assert digest(trainer.model) == start


def test_x_clip_has_no_contrastive_loss(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss is 'contrastive', and X-CLIP .*--recipe xclip"):
        build(tmp_path, Recipe(batch_size=6))


def test_the_model_remembers_how_labels_became_sentences(tmp_path: Path) -> None:
    for recipe in (RECIPE, replace(RECIPES["vifi"], batch_size=6, augmentation=None)):
        model = build_model("meanp")
        assert model.config.raw_labels is False
        build(tmp_path, recipe, model)
        assert model.config.raw_labels is recipe.raw_labels
        assert model.config.templates == recipe.templates


# Distillation.


def distance(embeddings: Tensor, taught: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(embeddings, taught)).mean()


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("loss", ["classes", "contrastive"])
def test_the_distance_to_the_teacher_is_added(
    loss: str, micro_batch: int | None, tmp_path: Path
) -> None:
    model = build_model("meanp")
    if loss == "contrastive":
        recipe = Recipe(batch_size=6, templates=("{}", "a video of {}"), raw_labels=True)
    else:
        recipe = FREE
    batch = draw_batch()
    batch.tokens = tokenize([NAMES[i] for i in batch.labels.tolist()], CLIP.context_length)
    results = []
    for weight in (0.0, 2.0):
        trainer = build(
            tmp_path, replace(recipe, distillation=weight, micro_batch=micro_batch), model
        )
        torch.manual_seed(8)
        for parameter in model.parameters():  # training has changed it since
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.zero_grad()
        share = trainer._backward(batch)
        results.append((float(share), gradients(model)))
        if not weight:
            model = build_model("meanp")
    start = build_model("meanp")
    mean = torch.tensor(model.pixel_mean).view(3, 1, 1)
    std = torch.tensor(model.pixel_std).view(3, 1, 1)
    videos = (batch.frames / 255 - mean) / std
    texts = batch.tokens if loss == "contrastive" else tokenize(NAMES, CLIP.context_length)
    model.zero_grad()
    with torch.no_grad():
        taught = start.encode_video(videos), start.encode_text(texts)
    expected = distance(model.encode_video(videos), taught[0])
    expected = expected + distance(model.encode_text(texts), taught[1])
    assert expected > 1e-3
    assert results[1][0] - results[0][0] == pytest.approx(2 * float(expected.detach()), rel=1e-3)
    expected.backward()
    more = {
        name: gradient - results[0][1][name] if name in results[0][1] else gradient
        for name, gradient in results[1][1].items()
    }
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(more[name], 2 * gradient, rtol=1e-2, atol=1e-5, msg=name)


@pytest.mark.parametrize("lock_text", [None, 0])
def test_a_heavy_teacher_keeps_the_embeddings(lock_text: int | None, tmp_path: Path) -> None:
    batch = draw_batch()
    mean = torch.tensor(build_model().pixel_mean).view(3, 1, 1)
    std = torch.tensor(build_model().pixel_std).view(3, 1, 1)
    videos = (batch.frames / 255 - mean) / std
    start = build_model()
    moved = {}
    for weight in (0.0, 1000.0):
        recipe = replace(
            RECIPE, distillation=weight, lock_text=lock_text, mixing=None, schedule="constant"
        )
        trainer = build(tmp_path, recipe)
        trainer.model.train()
        for _ in range(8):
            trainer._step(batch)
        with torch.no_grad():
            moved[weight] = distance(trainer.model.encode_video(videos), start.encode_video(videos))
    assert moved[0] > 0.02
    assert moved[1000] < moved[0] / 10


# Whole runs.

RUN = replace(
    RECIPE,
    batch_size=5,
    micro_batch=2,
    drop_path=0.3,
    distillation=0.5,
    warmup_epochs=0.5,
    augmentation=Augmentation(resolution=32, randaugment_ops=0, crop_positions=5),
    templates=("{}", "a video of {}"),
)
RUNNING = Running(workers=0, log_every=1, max_bad=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


def start_run(
    data: Path,
    folder: Path,
    recipe: Recipe = RUN,
    *,
    kind: str = "xclip",
    val: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    return Trainer(
        build_model(kind),
        read_video_list(data / "train"),
        recipe,
        RunFolder(folder),
        val=read_video_list(data / "val") if val else None,
        running=RUNNING,
        should_stop=should_stop,
    )


def finish(trainer: Trainer) -> list[dict[str, Any]]:
    if trainer.folder.last.exists():
        trainer.resume()
    elif distributed.rank() == 0:
        trainer.folder.start({}, CLASSES)
    return [{**record, "clips_per_second": 0} for record in trainer.run()]


@pytest.mark.parametrize("lock_text", [None, 0])
def test_stopped_and_resumed(lock_text: int | None, data: Path, tmp_path: Path) -> None:
    recipe = replace(RUN, lock_text=lock_text)
    whole = start_run(data, tmp_path / "whole", recipe)
    records = finish(whole)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]
    calls = iter(range(100))
    cut = start_run(data, tmp_path / "cut", recipe, should_stop=lambda: next(calls) >= 2)
    first = finish(cut)
    resumed = start_run(data, tmp_path / "cut", recipe)
    assert first + finish(resumed) == records
    assert digest(resumed.model) == digest(whole.model)
    other = start_run(data, tmp_path / "cut", recipe)
    other.teacher_digest = "that of other weights to start from"
    with pytest.raises(InputError, match=r"start was .*, is that of other weights to start"):
        other.resume()


PLAIN = replace(
    RUN,
    micro_batch=None,
    drop_path=0.0,
    mixing=None,
    augmentation=None,
    lock_text=None,
    head_ratio=1.0,
)
CASES = {
    "xclip": ("xclip", PLAIN),
    "parts": ("xclip", replace(PLAIN, micro_batch=2)),
    "contrastive": ("meanp", replace(PLAIN, loss="contrastive", label_smoothing=0.0)),
}


def losses_and_weights(data: Path, folder: Path, name: str) -> tuple[list[float], Any]:
    kind, recipe = CASES[name]
    trainer = start_run(data, folder / name, recipe, kind=kind, val=False)
    losses = [record["loss"] for record in finish(trainer)]
    return losses, trainer.model.state_dict()


def work(rank: int, port: int, data: Path, folder: Path) -> None:
    import os

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    distributed.start("cpu")
    results = {name: losses_and_weights(data, folder, name) for name in CASES}
    mixed = start_run(data, folder / "mixed", val=False)
    finish(mixed)
    results["mixed"] = digest(mixed.model)
    torch.save(results, folder / f"{rank}.pt")
    distributed.stop()


def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path) -> None:
    processes.run(2, work, processes.free_port(), data, tmp_path, seconds=90)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert ranks[0]["mixed"] == ranks[1]["mixed"]
    for name in CASES:
        expected, state = losses_and_weights(data, tmp_path / "one", name)
        for result in ranks:
            losses, weights = result[name]
            assert losses == pytest.approx(expected, abs=1e-4), name
            for key, value in state.items():
                if key.endswith("in_proj_bias"):
                    continue  # the keys' bias has no gradient but rounding, which Adam scales up
                assert (weights[key] - value).abs().max() < 1e-4, (name, key)

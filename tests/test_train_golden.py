"""Four optimisation steps of the whole model against the reference, by the trainer's own step."""

import json
from pathlib import Path

import filled
import pytest
import torch
from golden_files import clip_config, load_golden

from actionclip.annotations import Sample, VideoList
from actionclip.dataset import Batch
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.recipe import Recipe, set_train_mode
from actionclip.runs import RunFolder
from actionclip.train import Trainer

STEPS = 4


def build_trainer(folder: Path, micro_batch: int | None = None) -> Trainer:
    golden = load_golden("end_to_end.npz")
    solver = json.loads(str(golden["train/solver"]))
    # The reference frames are floats; with these statistics `normalize` leaves them as they are.
    config = ActionCLIPConfig(
        clip_config("tiny"),
        temporal="transf",
        num_frames=4,
        pixel_mean=(0, 0, 0),
        pixel_std=(1 / 255,) * 3,
    )
    model = ActionCLIP(config)
    filled.fill_(model.clip)
    filled.fill_(model.temporal)
    recipe = Recipe(
        target="official",
        epochs=solver["epochs"],
        batch_size=4,
        micro_batch=micro_batch,
        learning_rate=solver["lr"],
        visual_ratio=solver["ratio"],
        head_ratio=solver["f_ratio"],
        weight_decay=solver["weight_decay"],
        warmup_epochs=solver["lr_warmup_step"],
    )
    # Four batches an epoch, so that steps 20 to 23 are the epochs 5 to 5.75 of the reference.
    samples = tuple(Sample(f"{i}.mp4", (i % 6,)) for i in range(4 * STEPS))
    names = tuple(golden["classes"].tolist())
    videos = VideoList("golden", "a list", names, samples, (), "", False)
    trainer = Trainer(model, videos, recipe, RunFolder(folder))
    trainer.progress.step = 5 * STEPS
    set_train_mode(model)
    return trainer


def batches() -> list[Batch]:
    golden = load_golden("end_to_end.npz")
    frames = filled.frames("train:tiny", tuple(golden["train/frames_shape"]))
    labels = torch.from_numpy(golden["train/labels"])
    tokens = torch.from_numpy(golden["tokens"]).long().unflatten(0, (16, 6))
    return [
        Batch(frames, tokens[templates, labels], labels, ["a", "b", "c", "d"])
        for templates in torch.from_numpy(golden["train/template_ids"])
    ]


def test_gradients_of_the_first_step(tmp_path: Path) -> None:
    golden = load_golden("end_to_end.npz")
    trainer = build_trainer(tmp_path)
    trainer._backward(batches()[0])
    norms = {}
    for name, parameter in trainer.model.named_parameters():
        official = name.replace("temporal.", "head.", 1) if "temporal." in name else name[5:]
        norms[official] = float(parameter.grad.norm())
    keys = golden["train/step0_grad_norm_keys"].tolist()
    assert sorted(norms) == sorted(keys)
    expected = dict(zip(keys, golden["train/step0_grad_norms"].tolist(), strict=True))
    assert norms == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_losses_rates_and_weights_of_four_steps(tmp_path: Path, micro_batch: int | None) -> None:
    golden = load_golden("end_to_end.npz")
    trainer = build_trainer(tmp_path, micro_batch)
    losses, rates = [], []
    for batch in batches():
        before = trainer.progress.loss_sum
        assert not trainer._step(batch)
        losses.append(trainer.progress.loss_sum - before)
        rates.append({g["name"]: g["lr"] for g in trainer.optimizer.param_groups})
    expected = golden["train/losses_video_text_total_lr"]
    assert losses == pytest.approx(expected[:, 2].tolist(), abs=5e-5)
    for rate, lr in zip(rates, expected[:, 3].tolist(), strict=True):
        assert rate == pytest.approx({"text": lr, "visual": lr, "head": 10 * lr}, rel=1e-8)
    model = trainer.model.eval()
    assert model.clip.logit_scale.item() == pytest.approx(
        float(golden["train/logit_scale_after"]), abs=1e-6
    )
    last = batches()[-1]
    with torch.inference_mode():
        embeddings = {
            "train/video_embed_after": model.encode_video(last.frames),
            "train/text_embed_after": model.encode_text(last.tokens),
        }
    for key, actual in embeddings.items():
        torch.testing.assert_close(actual, torch.from_numpy(golden[key]), rtol=0, atol=3e-3)

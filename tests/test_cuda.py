"""On a CUDA card everything says what it says on the CPU; skipped where there is none.

With FAIL_WITHOUT_CUDA in the environment a missing card is a failure instead, so that a machine
that should have one cannot pass by skipping all of this.
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

import filled
import pytest
import torch
import torch.nn.functional as F
from golden_files import build_xclip, clip_config, load_golden, xclip_frames
from test_losses import all_labels, all_targets, draw, draw_labels
from torch import Tensor
from training_files import CLASSES, write_all

import actionclip
from actionclip.annotations import read_video_list
from actionclip.classifier import VideoClassifier
from actionclip.inference import pack
from actionclip.losses import Target, contrastive_kl
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import cast_encoders
from actionclip.recipe import Precision, Recipe
from actionclip.runs import RunFolder
from actionclip.synthetic import render, sentences, write_clip
from actionclip.train import Running, Trainer

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() and "FAIL_WITHOUT_CUDA" not in os.environ,
        reason="no CUDA card",
    ),
]


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Iterator[None]:
    """Keep cuDNN from rounding fp32 to TF32, as the matrix products do not by default either."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def build(temporal: str = "meanp", clip: str = "tiny") -> ActionCLIP:
    model = ActionCLIP(ActionCLIPConfig(clip_config(clip), temporal=temporal, num_frames=4))
    filled.fill_(model)
    return model


def videos(model: ActionCLIP, count: int = 3) -> Tensor:
    side = model.input_resolution
    return filled.frames("cuda", (count, model.num_frames, 3, side, side))


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare with a tolerance relative to the largest number expected."""
    assert found.device.type == DEVICE.type
    atol = tolerance * expected.abs().max().item()
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=atol)


def least_cosine(found: Tensor, expected: Tensor) -> float:
    return F.cosine_similarity(found.float().cpu(), expected.float(), dim=-1).min().item()


@pytest.mark.parametrize("clip", ["tiny", "tiny-rn"])
@pytest.mark.parametrize("temporal", TEMPORAL)
@torch.inference_mode()
def test_a_model_says_the_same(temporal: str, clip: str) -> None:
    if clip == "tiny-rn" and temporal in ("joint", "shift"):
        pytest.skip("for vision transformers only")
    model = build(temporal, clip)
    frames = videos(model)
    tokens = actionclip.tokenize(["archery", "a video of juggling balls"])
    expected = model.encode_video(frames), model.encode_text(tokens), model(frames, tokens)
    model.to(DEVICE)
    frames, tokens = frames.to(DEVICE), tokens.to(DEVICE)
    found = model.encode_video(frames), model.encode_text(tokens), model(frames, tokens)
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, 1e-4)


@torch.inference_mode()
def test_xclip_says_the_same() -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    tokens = torch.from_numpy(load_golden("xclip_small.npz")["token_ids"]).long()
    expected = model.encode_video(frames), model(frames, tokens)
    model = copy.deepcopy(model).to(DEVICE)
    frames, tokens = frames.to(DEVICE), tokens.to(DEVICE)
    assert_close(model.encode_video(frames), expected[0], 1e-4)
    assert_close(model(frames, tokens), expected[1], 1e-4)


@torch.inference_mode()
def test_bf16_embeddings_point_the_same_way() -> None:
    model = build()
    frames, tokens = videos(model), actionclip.tokenize(list(CLASSES))
    expected = model.encode_video(frames), model.encode_text(tokens)
    cast_encoders(model.to(DEVICE).clip, torch.bfloat16)
    assert least_cosine(model.encode_video(frames.to(DEVICE)), expected[0]) >= 0.9995
    assert least_cosine(model.encode_text(tokens.to(DEVICE)), expected[1]) >= 0.9995


@pytest.mark.parametrize(
    ("name", "compile"), [("meanp", False), ("shift", False), ("xclip", False), ("meanp", True)]
)
def test_the_packed_form_says_the_same(name: str, compile: bool) -> None:
    if name == "xclip":
        model, frames = copy.deepcopy(build_xclip("small")), xclip_frames("small")
    else:
        model = build(name)
        frames = videos(model)
    with torch.inference_mode():
        expected = model.video_features(frames)
    for dtype in (torch.float32, torch.bfloat16):
        cast_encoders(model.to(DEVICE).clip, dtype)
        packed = pack(model, compile=compile)
        # Compiled code warms up, then records a CUDA graph, then replays it.
        for _ in range(3):
            with torch.inference_mode():
                found = [x.clone() for x in packed.video_features(frames.to(DEVICE))]
        for mine, theirs in zip(found, expected, strict=True):
            if dtype == torch.float32:
                assert_close(mine, theirs, 1e-4)
            else:
                assert least_cosine(mine, theirs) >= 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_classifier_recognises_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    texts = sentences()[::30]
    clips = [torch.from_numpy(render(text, (8, 8))) for text in texts]
    expected = VideoClassifier(actionclip.load("tiny", device="cpu"), sentences())(clips)
    classifier = VideoClassifier(
        actionclip.load("tiny", device=DEVICE, dtype=dtype), sentences(), batch_size=3
    )
    found = classifier(clips)
    assert [top[0][0] for top in found.top(1)] == [top[0][0] for top in expected.top(1)]
    path = tmp_path / "clip.mp4"
    write_clip(path, texts[0], (8, 8))
    assert classifier(path).top(1)[0][0] == texts[0]


@pytest.mark.parametrize("fused", [False, True])
@all_targets
@all_labels
def test_losses_and_their_gradients_agree(kind: str, target: Target, fused: bool) -> None:
    def learn(device: str | torch.device, dtype: torch.dtype) -> list[Tensor]:
        # More than a tile in both directions where the loss works tile by tile.
        leaves = [x.detach().to(device).requires_grad_() for x in draw(2100, 16, dtype)]
        leaves.append(torch.tensor(50.0, dtype=dtype, device=device, requires_grad=True))
        video, text, scale = leaves
        labels = draw_labels(kind, 2100).to(device)
        loss = contrastive_kl(video, text, labels, scale, target=target, fused=fused)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    expected = learn("cpu", torch.float64)
    for mine, theirs in zip(learn(DEVICE, torch.float64), expected, strict=True):
        assert_close(mine, theirs, 1e-11)
    for mine, theirs in zip(learn(DEVICE, torch.float32), expected, strict=True):
        assert_close(mine.double(), theirs, 1e-4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


def build_trainer(
    data: Path, folder: Path, device: str | torch.device, precision: Precision, micro_batch: int
) -> Trainer:
    """Prepare a run whose first step has a learning rate above 0."""
    recipe = Recipe(
        epochs=6,
        batch_size=5,
        micro_batch=micro_batch,
        learning_rate=1e-3,
        warmup_epochs=0,
        precision=precision,
    )
    trainer = Trainer(
        actionclip.load(data / "plain.safetensors", device=device),
        read_video_list(data / "train"),
        recipe,
        RunFolder(folder),
        running=Running(workers=0, log_every=1, max_bad=1, recompute=micro_batch < 5),
    )
    trainer.folder.start({}, CLASSES)
    return trainer


@pytest.mark.parametrize("micro_batch", [5, 2])
def test_a_step_learns_the_same(data: Path, tmp_path: Path, micro_batch: int) -> None:
    records, weights = [], []
    for device in ("cpu", DEVICE):
        trainer = build_trainer(data, tmp_path / str(device), device, "fp32", micro_batch)
        records.append(next(trainer.run()))
        weights.append({name: w.cpu() for name, w in trainer.model.state_dict().items()})
    assert records[1]["loss"] == pytest.approx(records[0]["loss"], rel=1e-4)
    start = actionclip.load(data / "plain.safetensors", device="cpu").state_dict()
    for name, before in start.items():
        theirs, ours = (after[name] - before for after in weights)
        # Not equal: Adam divides a gradient by its size, so that one which is 0 but for rounding
        # moves its weight as far as any other, either way.
        same = F.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
        assert same > 0.98 or not theirs.any(), name


@pytest.mark.parametrize("micro_batch", [5, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns(
    data: Path, tmp_path: Path, precision: Precision, micro_batch: int
) -> None:
    trainer = build_trainer(data, tmp_path / "half", DEVICE, precision, micro_batch)
    losses = [record["loss"] for record in trainer.run()]
    exact = build_trainer(data, tmp_path / "exact", "cpu", "fp32", micro_batch)
    assert losses[0] == pytest.approx(next(exact.run())["loss"], rel=0.02)
    assert min(losses) < 0.9 * losses[0]
    for name, weight in trainer.model.state_dict().items():
        assert weight.dtype == torch.float32, name
        assert weight.isfinite().all(), name

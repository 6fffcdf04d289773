"""The packed form of a model: the reference's numbers, nothing of the model changed."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import filled
import pytest
import torch
import torch.nn.functional as F
from golden_files import build_xclip, clip_config, clip_state, load_golden, xclip_frames
from torch import Tensor

from actionclip import inference
from actionclip.classifier import VideoClassifier
from actionclip.errors import InputError
from actionclip.inference import Product, pack
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import CLIPConfig, cast_encoders
from actionclip.models.xclip import XCLIP, XCLIPConfig
from actionclip.similarity import fuse_templates
from actionclip.synthetic import render, sentences
from actionclip.transforms import normalize
from actionclip.weights import load, save

SMALL = CLIPConfig(
    embed_dim=32,
    image_resolution=32,
    vision_layers=3,
    vision_width=64,
    vision_patch_size=8,
    vision_heads=2,
    context_length=16,
    vocab_size=64,
    text_width=64,
    text_heads=1,
    text_layers=1,
)
KINDS = (*TEMPORAL, "xclip")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def small(kind: str, **changes: object) -> VideoTextModel:
    config = CLIPConfig(**{**vars(SMALL), **changes})  # type: ignore[arg-type]
    torch.manual_seed(0)
    if kind == "xclip":
        return XCLIP(XCLIPConfig(config, num_frames=4)).eval()
    return ActionCLIP(ActionCLIPConfig(config, temporal=kind, num_frames=4)).eval()


def videos(side: int = 32) -> Tensor:
    return torch.randn(3, 4, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["tiny", "ViT-B/32", "tiny-rn"])
def test_the_image_encoder_against_the_reference(name: str) -> None:
    golden = load_golden(f"clip_{name.replace('/', '-')}.npz")
    with torch.device("meta"):
        model = ActionCLIP(ActionCLIPConfig(clip_config(name)))
    model.clip.load_state_dict(clip_state(name), assign=True)
    frames = filled.frames(name, tuple(golden["frames_shape"])).flatten(0, 1)
    actual = pack(model).encode_image(frames)
    expected = torch.from_numpy(golden["image_embed"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["joint", "shift"])
def test_prompts_inside_the_encoder_against_the_reference(kind: str) -> None:
    golden = load_golden("joint_shift.npz")
    with torch.device("meta"):
        model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), temporal=kind, num_frames=4))
    shapes = {key: tuple(value.shape) for key, value in model.clip.state_dict().items()}
    model.clip.load_state_dict(filled.state_dict(shapes), assign=True)
    frames = filled.frames("jt:tiny", (2, 4, 3, 64, 64))
    actual = pack(model).encode_frames(frames).flatten(0, 1)
    expected = torch.from_numpy(golden[f"tiny_b2_t4/{kind}"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_xclip_against_the_reference() -> None:
    golden = load_golden("xclip_small.npz")
    packed = pack(build_xclip("small"))
    logits = packed(xclip_frames("small"), torch.from_numpy(golden["token_ids"]).long())
    expected = torch.from_numpy(golden["logits"]).view_as(logits)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_double_precision_it_is_the_same_function(kind: str, activation: str) -> None:
    model = small(kind, activation=activation).double()
    x = videos().double()
    ours, theirs = pack(model).encode_frames(x), model.encode_frames(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_points_the_same_way(kind: str, dtype: torch.dtype) -> None:
    model = small(kind)
    exact = model.encode_video(videos())
    cast_encoders(model.clip, dtype)
    ours = pack(model).encode_video(videos())
    assert ours.dtype == model.encode_video(videos()).dtype
    assert F.cosine_similarity(ours.float(), exact).min() >= 0.9995


def test_bf16_of_a_whole_encoder() -> None:
    golden = load_golden("clip_ViT-B-32.npz")
    with torch.device("meta"):
        model = ActionCLIP(ActionCLIPConfig(clip_config("ViT-B/32")))
    model.clip.load_state_dict(
        {k: v.clone() for k, v in clip_state("ViT-B/32").items()}, assign=True
    )
    cast_encoders(model.clip, torch.bfloat16)
    frames = filled.frames("ViT-B/32", tuple(golden["frames_shape"])).flatten(0, 1)[:2]
    actual = pack(model).encode_image(frames).float()
    expected = torch.from_numpy(golden["image_embed"])[:2]
    assert F.cosine_similarity(actual, expected).min() >= 0.9995


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_as_it_is(kind: str) -> None:
    model = small(kind)
    before = copy.deepcopy(model.state_dict())
    names, expected = [n for n, _ in model.named_modules()], model.video_features(videos())
    pack(model).video_features(videos())
    assert [n for n, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(map(torch.equal, model.video_features(videos()), expected))


def test_weights_are_shared() -> None:
    model = small("meanp")
    packed = pack(model)
    model.clip.visual.transformer.resblocks[0].mlp.c_fc.weight.mul_(0.5)
    ours, theirs = packed.encode_video(videos()), model.encode_video(videos())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_changing_size(kind: str) -> None:
    model = small(kind)
    packed = pack(model)
    for count in (1, 1, 1, 3, 2, 2, 2, 1, 1):  # packed for one video, then for two, then one
        ours, theirs = packed.encode_video(videos()[:count]), model.encode_video(videos()[:count])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# 12 images, 4 in a video, of 17 tokens with 64 channels, 4 times as many in the MLP, 4 bytes.
@pytest.mark.parametrize(
    ("largest", "parts"), [(10**6, [4, 4, 4]), (60_000, [3, 3, 3, 3]), (0, [1] * 12)]
)
def test_images_are_taken_a_video_at_a_time(
    largest: int, parts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small("meanp")
    whole = pack(model).encode_image(videos().flatten(0, 1))
    monkeypatch.setattr(inference, "LARGEST_BYTES", largest)
    seen = []
    packed = pack(model)
    packed.clip.visual.transformer.resblocks[0].register_forward_pre_hook(
        lambda _, args: seen.append(len(args[0]))
    )
    torch.testing.assert_close(packed.encode_image(videos().flatten(0, 1)), whole)
    assert seen == parts


def test_inputs_are_not_overwritten() -> None:
    x = videos()
    pack(small("meanp")).encode_video(x)
    assert torch.equal(x, videos())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)]
)
def test_packed_weights_do_what_the_public_operator_does(
    dtype: torch.dtype, tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((24, 16), (24,)))
    product = Product(weight, bias, 1.5, 0.5)
    for rows in (5, 5, 5, 7):
        x = torch.randn(2, rows, 16, generator=generator).to(dtype)
        exact = 1.5 * x.double() @ weight.double().T + 0.5 * bias.double()
        torch.testing.assert_close(
            product(x).double(), exact, rtol=tolerance / 5, atol=tolerance, check_stride=False
        )
    assert (product.packed is not None) == (dtype != torch.float16)


def test_without_private_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model = small("meanp")
    exact = model.encode_video(videos())
    for dtype in (torch.float32, torch.bfloat16):
        cast_encoders(model.clip, dtype)
        packed = pack(model)
        for _ in range(3):
            actual = packed.encode_video(videos()).float()
        assert F.cosine_similarity(actual, exact).min() >= 0.9995
        assert all(m.packed is None for m in packed.modules() if isinstance(m, Product))


def test_sizes_that_alternate_are_laid_out_once() -> None:
    product = Product(torch.randn(24, 16), torch.randn(24))
    for rows in (7, 7):
        product(torch.randn(rows, 16))
    packed = product.packed
    for rows in (7, 3, 7, 3, 7):
        product(torch.randn(rows, 16))
    assert product.packed is packed


def test_autocast_after_fp32() -> None:
    model = small("meanp")
    packed = pack(model)
    for _ in range(2):
        exact = packed.encode_video(videos())
    with torch.autocast("cpu", torch.bfloat16):
        halved = packed.encode_video(videos())
    assert F.cosine_similarity(halved.float(), exact).min() >= 0.9995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top1_on_rendered_clips_is_unchanged(dtype: torch.dtype) -> None:
    labels = sentences()
    clips = [torch.from_numpy(render(text, 0)) for text in labels[::10]]
    model = load("tiny", device="cpu")
    classifier = VideoClassifier(model, labels)
    pixels = torch.stack(
        [torch.from_numpy(classifier._reader.read_frames(clip).views[0]) for clip in clips]
    )
    pixels = normalize(pixels, model.pixel_mean, model.pixel_std)
    texts = classifier.text_embeddings.flatten(0, 1)
    exact = model.compare(model.video_features(pixels), texts, 100.0)
    fast = VideoClassifier(load("tiny", device="cpu", dtype=dtype), labels)(clips).scores
    assert torch.equal(fast.argmax(1), fuse_templates(exact.unflatten(1, (-1, 240))).argmax(1))


@pytest.mark.parametrize("kind", ["transf", pytest.param("xclip", marks=pytest.mark.slow)])
def test_compiled(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler's front alone, which needs no C++ compiler.
    eager = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    model = small(kind)
    packed = pack(model, compile=True)
    for batch in (videos(), videos()[:1]):
        for ours, theirs in zip(
            packed.video_features(batch), model.video_features(batch), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    packed = pack(small("meanp"), compile=True)
    with pytest.raises(InputError, match=r"cannot be compiled here \(no compiler found\)"):
        packed.video_features(videos())


def test_a_packed_model_is_not_packed_or_saved(tmp_path: Path) -> None:
    packed = pack(small("meanp"))
    with pytest.raises(InputError, match="packed already"):
        pack(packed)
    with pytest.raises(InputError, match="cannot be saved"):
        save(packed, tmp_path / "model.safetensors")

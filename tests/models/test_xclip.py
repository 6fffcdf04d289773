"""X-CLIP against the outputs of the original code, and against itself."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from golden_files import build_xclip, load_golden, xclip_config, xclip_frames
from torch import Tensor

from actionclip.models import xclip
from actionclip.models.xclip import XCLIP, CrossFrameBlock, XCLIPConfig
from actionclip.published import MODELS

NAMES = [("small", 1e-5), ("b32_t8", 1e-5)]


def tokens(name: str) -> Tensor:
    return torch.from_numpy(load_golden(f"xclip_{name}.npz")["token_ids"]).long()


@pytest.mark.parametrize("name", ["small", "b32_t8"])
@torch.inference_mode()
def test_every_step_against_the_reference(name: str) -> None:
    model, frames = build_xclip(name), xclip_frames(name)
    golden = load_golden(f"xclip_{name}.npz")
    videos, patches = model.video_features(frames)
    texts = model.encode_text(tokens(name))
    prompted = model.prompt_text(texts, patches)
    delta = model.prompts_generator(texts, patches)
    found = {
        "frame_features": model.encode_frames(frames),
        "img_features": patches,
        "video_features": videos,
        "text_features": texts,
        "prompt_decoder_out": delta / model.prompts_generator.alpha,
        "prompt_delta": delta,
        "text_features_prompted": prompted,
        "logits": model(frames, tokens(name)),
    }
    for key, value in found.items():
        expected = torch.from_numpy(golden[key])
        torch.testing.assert_close(
            value, expected, rtol=1e-4, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    for key, value in (
        ("video_features_norm", videos),
        ("text_features_prompted_norm", prompted),
    ):
        expected = torch.from_numpy(golden[key])
        torch.testing.assert_close(F.normalize(value, dim=-1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model.encode_video(frames), videos)


@torch.inference_mode()
def test_videos_do_not_see_each_other() -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    together = model(frames, tokens("small"))
    alone = torch.cat([model(video[None], tokens("small")) for video in frames])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    swapped = model(frames.flip(0), tokens("small"))
    torch.testing.assert_close(together, swapped.flip(0), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_frames_see_each_other_only_by_messages() -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    other = frames.clone()
    other[:, 3] = 0
    before, after = model.encode_frames(frames), model.encode_frames(other)
    assert (before[:, :3] - after[:, :3]).abs().max() > 1e-3
    for block in model.clip.visual.transformer.resblocks:
        # Without the mixing of messages each frame has a message of its own alone.
        block.message_attn.out_proj.weight.zero_()
    before, after = model.encode_frames(frames), model.encode_frames(other)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_an_image_is_a_video_of_one_frame() -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    images = frames[0]
    expected = torch.cat([model.encode_frames(image[None, None])[:, 0] for image in images])
    torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("at_a_time", [1, 3, 7, 13])
def test_labels_in_parts_give_the_same(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    texts = torch.randn(7, 128, generator=torch.Generator().manual_seed(0))
    features = model.video_features(frames)

    def run() -> tuple[Tensor, list[Tensor]]:
        logits = model.compare(features, texts)
        parameters = list(model.prompts_generator.parameters())
        return logits, list(torch.autograd.grad(logits.square().sum(), parameters))

    features = tuple(x.detach() for x in features)
    logits, gradients = run()
    calls = []
    prompt_text = model.prompt_text
    monkeypatch.setattr(
        model, "prompt_text", lambda t, p: (calls.append((len(p), len(t))), prompt_text(t, p))[1]
    )
    monkeypatch.setattr(xclip, "PROMPTED_AT_A_TIME", at_a_time)
    in_parts, gradients_in_parts = run()
    # One of the two videos at a time, with as many texts as may be.
    assert max(calls) == (1, min(at_a_time, 7))
    torch.testing.assert_close(logits, in_parts, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients, gradients_in_parts, rtol=1e-4, atol=1e-4)


def test_memory_of_prompts_does_not_grow_with_the_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that appears while texts are prompted, in numbers."""
    model = build_xclip("small")
    monkeypatch.setattr(xclip, "PROMPTED_AT_A_TIME", 16)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and not func.is_view:
                largest.append(result.numel())
            return result

    peaks = []
    for labels in (32, 320):
        videos, patches = torch.randn(4, 128), torch.randn(4, 16, 128)
        texts = torch.randn(labels, 128)
        largest.clear()
        with torch.inference_mode(), Watch():
            model.compare((videos, patches), texts)
        peaks.append(max(largest))
    # The inside of the MLP, four times as wide as an embedding.
    assert peaks[0] == peaks[1] == 16 * 4 * 128


@torch.inference_mode()
def test_float64_agrees() -> None:
    model, frames = build_xclip("small"), xclip_frames("small")
    single = model(frames, tokens("small"))
    double = model.double()(frames.double(), tokens("small"))
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_drop_path_skips_branches_of_whole_videos() -> None:
    torch.manual_seed(0)
    block = CrossFrameBlock(64, 1, "quick_gelu").train()
    block.drop_path = 0.5
    x = torch.randn(1, 4, 5, 64).expand(64, -1, -1, -1)
    outputs = block(x)
    # Equal videos: their branches are there or not, for all frames and tokens alike. Messages
    # are not seen where the attention that reads them is skipped: 2 x (2 + 1) ways.
    distinct = {tuple(video.flatten()[:3].tolist()) for video in outputs.detach()}
    assert len(distinct) == 6
    skipped = (outputs == x).flatten(1).all(1)
    assert 0 < skipped.sum() < 64
    assert torch.equal(block.eval()(x)[0], block(x)[-1])


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = XCLIP(xclip_config("small"))
    state = model.state_dict()
    assert state["prompts_visual_proj"].std() == pytest.approx(1, rel=0.02)
    assert torch.equal(state["prompts_generator.alpha"], torch.full((128,), 0.1))
    assert state["mit.positional_embedding"].std() == pytest.approx(0.02, rel=0.1)
    for key in (
        "mit.resblocks.0.attn.out_proj",
        "mit.resblocks.0.mlp.c_fc",
        "prompts_generator.decoder.1.mlp.3",
        "prompts_generator.decoder.0.cross_attn.proj",
    ):
        assert state[f"{key}.weight"].std() == pytest.approx(0.02, rel=0.05), key
        assert not state[f"{key}.bias"].any()
    # Xavier, and PyTorch's own for a linear layer: uniform, of standard deviation bound / sqrt(3).
    in_proj = state["mit.resblocks.0.attn.in_proj_weight"]
    assert in_proj.abs().max() <= (6 / (4 * 128)) ** 0.5
    assert in_proj.std() == pytest.approx((2 / (4 * 128)) ** 0.5, rel=0.02)
    message = state["clip.visual.transformer.resblocks.0.message_fc.weight"]
    assert message.abs().max() <= 192**-0.5
    assert message.std() == pytest.approx((3 * 192) ** -0.5, rel=0.02)


def test_wrong_numbers_of_frames_are_refused() -> None:
    model = build_xclip("small")
    with pytest.raises(ValueError, match=r"videos have 3 frames.*for 4; load it with num_frames=3"):
        model.encode_video(torch.zeros(1, 3, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected \(B, T, 3, 64, 64\)"):
        model.video_features(torch.zeros(1, 4, 3, 32, 32))


def test_shapes_that_cannot_be_are_refused() -> None:
    config = xclip_config("small")
    with pytest.raises(ValueError, match="do not split into 3 heads"):
        XCLIP(replace(config, heads=3))
    with pytest.raises(ValueError, match="this image encoder is a ResNet"):
        XCLIP(replace(config, clip=replace(config.clip, vision_patch_size=None)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("xclip-base-patch32", 196_585_729),
        ("xclip-base-patch16", 194_929_153),
        ("xclip-base-patch16-16-frames", 194_929_153 + 8 * 512),
        ("xclip-large-patch14", 575_673_601),
        ("xclip-large-patch14-16-frames", 576_001_281 + 8 * 768),
    ],
)
def test_parameter_counts(name: str, parameters: int) -> None:
    config = MODELS[name].config
    assert isinstance(config, XCLIPConfig)
    with torch.device("meta"):
        model = XCLIP(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_keys_and_shapes_are_the_official_ones() -> None:
    expected = load_golden("xclip_state_keys.json")["keys"]
    with torch.device("meta"):
        state = XCLIP(xclip_config("b32_t8")).state_dict()
    found = {key.removeprefix("clip."): list(value.shape) for key, value in state.items()}
    assert len(found) == 443
    assert found == {
        key: entry.get("shape", entry) if isinstance(entry, dict) else entry
        for key, entry in expected.items()
    }


def test_an_embedding_alone_is_no_feature() -> None:
    model = build_xclip("small")
    with pytest.raises(TypeError, match="features are a Tensor; pass the tuple"):
        model.compare(torch.zeros(2, 128), torch.zeros(3, 128))

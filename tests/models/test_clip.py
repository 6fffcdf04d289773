"""CLIP's towers against the reference outputs, the peers and the published numbers."""

import json
import math
from dataclasses import replace

import filled
import numpy as np
import pytest
import torch
from golden_files import clip_config, clip_state, load_golden, state_shapes

from actionclip.models.clip import CLIP, cast_encoders, temporal_shift
from actionclip.published import MODELS

GOLDEN = ("tiny", "tiny-rn", "ViT-B/32", pytest.param("ViT-B/16", marks=pytest.mark.slow), "RN50")


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(
        actual, torch.from_numpy(expected), rtol=tolerance, atol=tolerance, check_dtype=False
    )


@pytest.fixture(scope="module")
def tiny() -> CLIP:
    return filled.fill_(CLIP(clip_config("tiny")))


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_outputs(name: str) -> None:
    golden = load_golden(f"clip_{name.replace('/', '-')}.npz")
    with torch.device("meta"):
        model = CLIP(clip_config(name)).eval()
    model.load_state_dict(clip_state(name), assign=True)
    for key, first in zip(golden["weight_check_keys"], golden["weight_check_first4"], strict=True):
        close(model.state_dict()[str(key)].flatten()[:4], first, 1e-7)
    frames = filled.frames(name, tuple(golden["frames_shape"])).flatten(0, 1)
    close(frames.flatten()[:8], golden["frames_head"], 1e-7)
    tokens = torch.from_numpy(golden["tokens"]).long()
    with torch.inference_mode():
        close(model.encode_image(frames), golden["image_embed"])
        close(model.encode_text(tokens), golden["text_embed"])
        close(model(frames, tokens), golden["logits_per_image"])
        close(model(frames, tokens).T, golden["logits_per_text"])


def test_reference_intermediate_values_of_the_vision_transformer(tiny: CLIP) -> None:
    golden = load_golden("clip_tiny.npz")
    frames = filled.frames("tiny", tuple(golden["frames_shape"])).flatten(0, 1)
    visual = tiny.visual
    with torch.inference_mode():
        tokens = visual.embed(frames)
        close(tokens[:2], golden["mid_visual_embed_before_ln_pre"])
        tokens = visual.ln_pre(tokens)
        close(tokens[:2], golden["mid_visual_after_ln_pre"])
        for i, block in enumerate(visual.transformer.resblocks):
            tokens = block(tokens)
            close(tokens[:, 0], golden[f"mid_visual_block{i}_cls"])


def test_reference_intermediate_values_of_the_resnet() -> None:
    golden = load_golden("clip_tiny-rn.npz")
    model = filled.fill_(CLIP(clip_config("tiny-rn")))
    seen = {}
    for i in (1, 2, 3, 4):
        stage = getattr(model.visual, f"layer{i}")
        stage.register_forward_hook(lambda _m, _i, out, i=i: seen.update({i: out.mean((2, 3))}))
    with torch.inference_mode():
        model.encode_image(filled.frames("tiny-rn", tuple(golden["frames_shape"])).flatten(0, 1))
    for i in (1, 2, 3, 4):
        close(seen[i], golden[f"mid_visual_layer{i}_mean_hw"])


@pytest.mark.parametrize("name", list(load_golden("state_keys.json")["clip"]))
def test_state_dict_has_the_published_keys_and_shapes(name: str) -> None:
    config = MODELS[name].config.clip if name in MODELS else clip_config(name)
    with torch.device("meta"):
        model = CLIP(config)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == state_shapes("clip", name)


@pytest.mark.parametrize(
    ("name", "parameters", "visual"),
    [
        ("RN50", 102_007_137, 38_316_896),
        ("ViT-B/32", 151_277_313, 87_849_216),
        ("ViT-B/16", 149_620_737, 86_192_640),
        ("ViT-L/14", 427_616_513, 303_966_208),
        ("ViT-L/14@336px", 427_944_193, 304_293_888),
    ],
)
def test_parameter_counts(name: str, parameters: int, visual: int) -> None:
    with torch.device("meta"):
        model = CLIP(MODELS[name].config.clip)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in model.visual.parameters()) == visual


@pytest.mark.parametrize("name", ["RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_every_published_resnet_can_be_built(name: str) -> None:
    config = MODELS[name].config.clip
    with torch.device("meta"):
        model = CLIP(config)
        images = torch.empty(1, 3, config.image_resolution, config.image_resolution)
        assert model.encode_image(images).shape == (1, config.embed_dim)


def test_text_after_the_last_end_of_text_changes_nothing(tiny: CLIP) -> None:
    tokens = torch.from_numpy(load_golden("clip_tiny.npz")["tokens"]).long()
    double = CLIP(clip_config("tiny")).double().eval()
    double.load_state_dict(tiny.state_dict())
    padded = tokens.clone()
    padded[:, -1] = 1  # junk behind the end: must be cut off, or be invisible to causal attention
    with torch.inference_mode():
        whole = double.encode_text(padded)
        one_by_one = torch.cat([double.encode_text(row[None]) for row in padded])
        torch.testing.assert_close(whole, one_by_one, rtol=0, atol=1e-13)
        torch.testing.assert_close(whole.float(), tiny.encode_text(tokens), rtol=1e-4, atol=1e-5)


def test_attention_agrees_with_multihead_attention() -> None:
    from actionclip.models.layers import SelfAttention

    ours = SelfAttention(128, heads=2).double()
    peer = torch.nn.MultiheadAttention(128, 2, batch_first=True).double()
    peer.load_state_dict(ours.state_dict())
    x = torch.randn(3, 7, 128, dtype=torch.float64)
    mask = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    for causal in (False, True):
        expected = peer(x, x, x, attn_mask=mask if causal else None, need_weights=False)[0]
        torch.testing.assert_close(ours(x, causal), expected, rtol=0, atol=1e-12)


def test_layer_norm_computes_in_fp32() -> None:
    from actionclip.models.layers import LayerNorm

    norm = LayerNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = (1000 + torch.randn(5, 64)).bfloat16()
    expected = torch.nn.functional.layer_norm(x.float(), (64,), norm.weight, norm.bias).bfloat16()
    assert torch.equal(norm(x), expected)
    assert norm(x).dtype == torch.bfloat16


def test_gelu_is_another_model(tiny: CLIP) -> None:
    gelu = CLIP(replace(clip_config("tiny"), activation="gelu")).eval()
    gelu.load_state_dict(tiny.state_dict())
    frames = filled.frames("tiny", (1, 1, 3, 64, 64))[0]
    with torch.inference_mode():
        difference = (gelu.encode_image(frames) - tiny.encode_image(frames)).abs().max()
    assert 1e-3 < difference < 1


@pytest.mark.parametrize("name", ["tiny", "tiny-rn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_as_published(name: str, dtype: torch.dtype) -> None:
    model = filled.fill_(CLIP(clip_config(name)))
    frames = filled.frames(name, (2, 1, 3, 64, 64)).flatten(0, 1)
    tokens = torch.from_numpy(load_golden("clip_tiny.npz")["tokens"]).long()
    with torch.inference_mode():
        expected = model.encode_image(frames), model.encode_text(tokens)
        cast_encoders(model, dtype)
        actual = model.encode_image(frames), model.encode_text(tokens)
    for ours, reference in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert torch.cosine_similarity(ours.float(), reference).min() > 0.999
    kept = {k for k, v in model.state_dict().items() if v.dtype == torch.float32}
    assert "logit_scale" in kept
    assert "token_embedding.weight" in kept
    assert "ln_final.weight" in kept
    assert not any("attn.in_proj" in key or "mlp" in key or key.endswith("proj") for key in kept)


def test_initialisation_follows_the_published_spreads() -> None:
    torch.manual_seed(0)
    config = replace(clip_config("tiny"), text_width=512, text_heads=8)
    model = CLIP(config)
    block = model.transformer.resblocks[0]
    spreads = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        model.text_projection: 512**-0.5,
        block.attn.in_proj_weight: 512**-0.5,
        block.attn.out_proj.weight: 512**-0.5 * (2 * config.text_layers) ** -0.5,
        block.mlp.c_fc.weight: (2 * 512) ** -0.5,
        block.mlp.c_proj.weight: 512**-0.5 * (2 * config.text_layers) ** -0.5,
        model.visual.proj: 128**-0.5,
    }
    for weight, spread in spreads.items():
        assert float(weight.detach().std()) == pytest.approx(spread, rel=0.05)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    resnet = CLIP(clip_config("tiny-rn")).visual
    assert not resnet.layer1[0].bn3.weight.any()
    assert float(resnet.attnpool.q_proj.weight.detach().std()) == pytest.approx(512**-0.5, rel=0.05)


def test_temporal_shift_against_the_reference() -> None:
    golden = load_golden("joint_shift.npz")
    tokens = torch.from_numpy(golden["shiftop/input"]).transpose(0, 1)
    shifted = temporal_shift(tokens, num_frames=int(golden["shiftop/T"]))
    assert torch.equal(shifted.transpose(0, 1), torch.from_numpy(golden["shiftop/output"]))


def test_golden_configurations_are_the_published_ones() -> None:
    for name in ("ViT-B/32", "ViT-B/16", "RN50"):
        assert clip_config(name) == MODELS[name].config.clip
        stored = json.loads(str(load_golden(f"clip_{name.replace('/', '-')}.npz")["config"]))
        assert stored["embed_dim"] == MODELS[name].config.clip.embed_dim

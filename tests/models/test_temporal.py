"""The temporal heads against the reference outputs, and what they promise."""

from dataclasses import replace

import filled
import pytest
import torch
from golden_files import clip_config, load_golden, state_shapes
from torch import nn

from actionclip.conversion import POSITIONS
from actionclip.models.actionclip import HEADS, ActionCLIPConfig, build_head
from actionclip.models.temporal import TemporalConv, interpolate_positions, remainder_normal_

TAG = "d512_w512_t8_b3"
OFFICIAL = {
    "meanp": "meanP",
    "conv1d": "Conv_1D",
    "lstm": "LSTM",
    "transf": "Transf",
    "transf_cls": "Transf_cls",
}


def head(name: str, num_frames: int = 8) -> nn.Module:
    return build_head(
        ActionCLIPConfig(clip_config("ViT-B/32"), temporal=name, num_frames=num_frames)
    ).eval()


@pytest.fixture(scope="module")
def frame_embeddings() -> torch.Tensor:
    x = torch.from_numpy(filled.normal(f"heads:{TAG}", (3, 8, 512)))
    assert torch.equal(x.flatten()[:8], torch.from_numpy(load_golden("heads.npz")[f"{TAG}/x_head"]))
    return x


@pytest.mark.parametrize("name", HEADS)
def test_reference_outputs(name: str, frame_embeddings: torch.Tensor) -> None:
    golden = load_golden("heads.npz")
    suffix = "_correct" if name == "conv1d" else ""
    module = filled.fill_(head(name))
    with torch.inference_mode():
        out = module(frame_embeddings)
        half = module(frame_embeddings.half())
    expected = torch.from_numpy(golden[f"{TAG}/{OFFICIAL[name]}{suffix}"])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert half.dtype == torch.float16
    if name == "conv1d":
        # The reference for fp16 was made with the official reshape.
        module.official_reshape = True
        half = module(frame_embeddings.half()).detach()
    expected = torch.from_numpy(golden[f"{TAG}/{OFFICIAL[name]}_fp16_input"])
    torch.testing.assert_close(half, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("start", ["filled", "initial"])
def test_convolution_of_the_official_code_on_request(
    start: str, frame_embeddings: torch.Tensor
) -> None:
    golden = load_golden("heads.npz")
    suffix = "" if start == "filled" else "_default_init"
    for official, key in ((True, "Conv_1D_as_coded"), (False, "Conv_1D_correct")):
        module = TemporalConv(512, official_reshape=official)
        if start == "filled":
            filled.fill_(module)
        expected = torch.from_numpy(golden[f"{TAG}/{key}{suffix}"])
        torch.testing.assert_close(module(frame_embeddings), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_state_dict_has_the_official_keys(name: str) -> None:
    official = state_shapes("heads", OFFICIAL[name])
    if name != "transf":
        official.pop(POSITIONS, None)  # held by every official head, used by Transf alone
    assert {k: list(v.shape) for k, v in head(name).state_dict().items()} == official


def test_parameters_of_the_six_blocks_of_transf() -> None:
    blocks = head("transf").transformer.parameters()
    assert sum(p.numel() for p in blocks) == 18_914_304


@pytest.mark.parametrize("name", HEADS)
def test_a_batch_is_its_videos_one_by_one(name: str, frame_embeddings: torch.Tensor) -> None:
    module = filled.fill_(head(name))
    with torch.inference_mode():
        together = module(frame_embeddings)
        alone = torch.cat([module(video[None]) for video in frame_embeddings])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lstm", "transf", "transf_cls", "conv1d"])
def test_the_order_of_frames_matters(name: str, frame_embeddings: torch.Tensor) -> None:
    module = filled.fill_(head(name))
    with torch.inference_mode():
        difference = (module(frame_embeddings) - module(frame_embeddings.flip(1))).abs().max()
    assert difference > 1e-3


def test_too_many_frames_are_refused() -> None:
    with pytest.raises(ValueError, match=r"78 frames.*positions for 77"):
        head("transf")(torch.zeros(1, 78, 512))
    with pytest.raises(ValueError, match=r"9 frames.*positions for 8.*num_frames=9"):
        head("transf_cls")(torch.zeros(1, 9, 512))


def test_unknown_head() -> None:
    config = replace(ActionCLIPConfig(clip_config("tiny")), temporal="mean")
    with pytest.raises(ValueError, match=r"'mean'; choose from meanp, conv1d"):
        build_head(config)


def test_initialisation() -> None:
    torch.manual_seed(0)
    transf = head("transf")
    assert float(transf.frame_position_embeddings.weight.detach().std()) == pytest.approx(
        0.02, rel=0.05
    )
    block = transf.transformer.resblocks[0]
    assert float(block.mlp.c_fc.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert float(block.attn.out_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    xavier = (6 / (4 * 512)) ** 0.5
    assert float(block.attn.in_proj_weight.detach().abs().max()) == pytest.approx(xavier, rel=1e-3)
    layers = head("transf_cls").transformer.transformer_enc.layers
    assert torch.equal(layers[0].self_attn.in_proj_weight, layers[5].self_attn.in_proj_weight)
    assert not torch.equal(layers[0].linear1.weight, layers[5].linear1.weight)
    x = remainder_normal_(torch.empty(100_000))
    assert float(x.abs().max()) <= 0.04
    # Var(fmod(z, 2)) by quadrature: the two tails fold onto [-1, 1] or so.
    z = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    density = torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5
    variance = torch.trapezoid(torch.fmod(z, 2) ** 2 * density, z)
    assert float(x.std()) == pytest.approx(0.02 * float(variance) ** 0.5, rel=0.01)


def test_interpolated_positions() -> None:
    line = torch.arange(8.0)[:, None].repeat(1, 3)
    assert interpolate_positions(line, 8) is line
    # A linear table stays linear away from its ends, at the centres of the new cells.
    longer = interpolate_positions(line, 16)
    expected = (torch.arange(16.0) + 0.5) / 2 - 0.5
    torch.testing.assert_close(longer[:, 0], expected.clamp(0, 7))
    assert interpolate_positions(line, 4)[:, 1].tolist() == [0.5, 2.5, 4.5, 6.5]

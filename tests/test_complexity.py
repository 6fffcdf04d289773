"""Multiply-adds against hand formulas, PyTorch's own counter and published numbers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_files import CLIP as TINY

from actionclip.complexity import multiply_adds
from actionclip.models.actionclip import TEMPORAL, ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import CLIP
from actionclip.published import MODELS


def peer(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


def build(name: str, temporal: str, num_frames: int) -> tuple[ActionCLIP, torch.Tensor]:
    """Return a published model without weights, and a video for it."""
    with torch.device("meta"):
        model = ActionCLIP(
            ActionCLIPConfig(MODELS[name].config.clip, temporal=temporal, num_frames=num_frames)
        ).eval()
        return model, torch.empty(1, num_frames, 3, 224, 224)


def total(run: Callable[[], object]) -> int:
    return sum(multiply_adds(run).values())


A = torch.ones
LSTM = nn.LSTM(5, 7, batch_first=True)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda: A(3, 4) @ A(4, 5), {"mm": 3 * 4 * 5}),
        (lambda: A(2, 3, 4) @ A(2, 4, 5), {"bmm": 2 * 3 * 4 * 5}),
        (lambda: torch.baddbmm(A(2, 3, 5), A(2, 3, 4), A(2, 4, 5)), {"baddbmm": 2 * 3 * 4 * 5}),
        (lambda: F.linear(A(2, 3, 4), A(5, 4), A(5)), {"addmm": 2 * 3 * 4 * 5}),
        # 3 to 5 channels, 3 x 2 kernel, 4 x 5 outputs (stride 2, padding 1 down)
        (
            lambda: F.conv2d(A(2, 3, 7, 10), A(5, 3, 3, 2), stride=2, padding=(1, 0)),
            {"convolution": 2 * 5 * 4 * 5 * 3 * 3 * 2},
        ),
        (
            lambda: F.conv2d(A(2, 6, 5, 5), A(4, 3, 3, 3), A(4), groups=2),
            {"convolution": 2 * 4 * 3 * 3 * 3 * 3 * 3},
        ),
        (lambda: F.conv1d(A(2, 6, 5), A(6, 1, 3), groups=6), {"convolution": 2 * 6 * 3 * 3}),
        (lambda: F.conv1d(A(2, 6, 9), A(4, 6, 3), dilation=2), {"convolution": 2 * 4 * 5 * 6 * 3}),
        # Each of 2 x 3 x 5 inputs meets 4 channels x 3 taps.
        (
            lambda: F.conv_transpose1d(A(2, 3, 5), A(3, 4, 3), stride=2),
            {"convolution": 2 * 3 * 5 * 4 * 3},
        ),
        (
            lambda: F.scaled_dot_product_attention(*A(3, 2, 4, 6, 8)),
            {"_scaled_dot_product_flash_attention_for_cpu": 2 * 4 * 6 * 6 * (8 + 8)},
        ),
        # A causal mask leaves half of the pairs, which counts as all of them.
        (
            lambda: F.scaled_dot_product_attention(*A(3, 2, 4, 6, 8), is_causal=True),
            {"_scaled_dot_product_flash_attention_for_cpu": 2 * 4 * 6 * 6 * (8 + 8)},
        ),
        (
            lambda: F.scaled_dot_product_attention(A(2, 4, 1, 8), *A(2, 2, 4, 6, 8)),
            {"_scaled_dot_product_flash_attention_for_cpu": 2 * 4 * 1 * 6 * (8 + 8)},
        ),
        # Values of another width, for which there is no fused kernel.
        (
            lambda: F.scaled_dot_product_attention(
                A(2, 4, 3, 8), A(2, 4, 6, 8), A(2, 4, 6, 5), is_causal=True
            ),
            {"bmm": 2 * 4 * 3 * 6 * (8 + 5)},
        ),
        (lambda: LSTM(A(2, 3, 5)), {"mkldnn_rnn_layer": 2 * 3 * 4 * 7 * (5 + 7)}),
        (lambda: (A(3, 4) + 1).softmax(1).sigmoid().relu().transpose(0, 1).mean(0) * 2, {}),
        (lambda: F.avg_pool2d(F.batch_norm(A(1, 2, 4, 4), A(2), A(2)), 2), {}),
        (lambda: F.layer_norm(torch.cat([A(2, 3), A(2, 3)]), (3,)), {}),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_operators_by_hand(
    run: Callable[[], object], expected: dict[str, int], mode: type[torch.no_grad]
) -> None:
    with mode():
        assert multiply_adds(run) == expected


def test_the_largest_comes_first_and_calls_add_up() -> None:
    def run() -> None:
        for _ in range(3):
            A(2, 2) @ A(2, 2)
            A(1, 2, 9) @ A(1, 9, 2)

    counts = multiply_adds(run)
    assert list(counts.items()) == [("bmm", 3 * 36), ("mm", 3 * 8)]
    assert multiply_adds(run) == counts  # nothing is left of the first time


def test_what_it_does_not_know_is_an_error() -> None:
    x = A(1, 1, 3, requires_grad=True)
    for run, name in (
        (lambda: torch.cdist(A(3, 4), A(5, 4)), "_cdist_forward"),
        (lambda: torch.fft.rfft(A(8)), "_fft_r2c"),
        (lambda: F.conv1d(x, A(1, 1, 3)).backward(A(1, 1, 1)), "convolution_backward"),
    ):
        message = f"multiply-adds of aten.{name}.default; add one"
        with pytest.raises(NotImplementedError, match=message):
            multiply_adds(run)


def test_errors_of_the_call_come_through() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        multiply_adds(lambda: A(2, 3) @ A(2, 3))


@pytest.mark.parametrize("temporal", TEMPORAL)
def test_every_visual_prompt_counts_the_same_wherever_it_runs(temporal: str) -> None:
    config = ActionCLIPConfig(
        replace(TINY, embed_dim=64, text_width=64), temporal=temporal, num_frames=3
    )
    videos = torch.zeros(2, 3, 3, 32, 32)
    model = ActionCLIP(config).eval()
    totals = set()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            totals.add(total(lambda: model.encode_video(videos)))
    model.clip.to(torch.bfloat16)
    totals.add(total(lambda: model.encode_video(videos)))
    model, videos = model.to("meta"), videos.to("meta")
    totals.add(total(lambda: model.temporal(model.encode_frames(videos))))
    totals.add(peer(lambda: model.temporal(model.encode_frames(videos))))
    assert len(totals) == 1
    assert totals.pop() > 0


def test_a_text_encoder_by_hand() -> None:
    model = CLIP(TINY)
    length, width = 7, TINY.text_width
    tokens = torch.arange(length).repeat(2, 1)
    block = 12 * length * width**2 + 2 * length**2 * width
    expected = 2 * (TINY.text_layers * block + width * TINY.embed_dim)
    assert total(lambda: model.encode_text(tokens)) == expected


@pytest.mark.parametrize(
    ("name", "num_frames", "paper"),
    [
        ("ViT-B/32", 8, 35.4),
        ("ViT-B/16", 8, 140.8),
        ("ViT-B/16", 16, 281.6),
        ("ViT-B/16", 32, 563.1),
    ],
)
def test_table_7(name: str, num_frames: int, paper: float) -> None:
    model, videos = build(name, "transf", num_frames)
    counts = multiply_adds(lambda: model.temporal(model.encode_frames(videos)))
    # Within 1 %, head included; the paper's counter took in some more than multiply-adds.
    assert sum(counts.values()) / 1e9 == pytest.approx(paper, rel=0.0015)
    config, width, dim = MODELS[name].config.clip, 768, 512
    patches = (224 // config.vision_patch_size) ** 2
    tokens = patches + 1
    by_hand = {
        "convolution": patches * 3 * config.vision_patch_size**2 * width * num_frames,
        "addmm": 12 * 12 * tokens * width**2 * num_frames + 6 * 12 * num_frames * dim**2,
        "bmm": 12 * 2 * tokens**2 * width * num_frames + 6 * 2 * num_frames**2 * dim,
        "mm": width * dim * num_frames,
    }
    assert counts == by_hand


# GFLOPs, twice the multiply-adds, of docs/model_profile.csv of open_clip.
@pytest.mark.parametrize(
    ("name", "gflops"),
    [("ViT-B/32", 8.82), ("ViT-B/16", 35.13), ("RN50", 12.22)],
)
def test_published_numbers_of_image_encoders(name: str, gflops: float) -> None:
    model, videos = build(name, "meanp", 1)
    counted = total(lambda: model.encode_frames(videos))
    if name == "RN50":
        # There the attention pool has 50 queries, of which the result of the first is used.
        counted += 49 * (2048 * (2048 + 1024) + 2 * 50 * 2048)
    assert round(2 * counted / 1e9, 2) == gflops


def test_parameters_of_table_7() -> None:
    """The sums of the published sizes, and what the paper may have added up instead."""
    sums, others = {}, {}
    for name in ("ViT-B/32", "ViT-B/16"):
        model, _ = build(name, "transf", 8)
        blocks = [model.clip.transformer, model.temporal.transformer]
        sums[name] = sum(p.numel() for m in (model.clip.visual, *blocks) for p in m.parameters())
        blocks.append(model.clip.visual.transformer)
        named = [pair for module in blocks for pair in module.named_parameters()]
        others[name] = sum(p.numel() for key, p in named if ".ln_" not in key)
        assert sum(p.numel() for p in model.clip.transformer.parameters()) == 37_828_608
        assert model.clip.token_embedding.weight.numel() == 25_296_896
    assert sums == {"ViT-B/32": 144_592_128, "ViT-B/16": 142_935_552}
    # Attention and MLPs of all 30 blocks are the 141.7M of ViT-B/16; ViT-B/32's patch
    # convolution makes that 144.1M, but ViT-B/16's own is missing.
    assert others == {"ViT-B/32": 141_723_648, "ViT-B/16": 141_723_648}
    assert 141_723_648 + 768 * 3 * 32**2 == 144_082_944

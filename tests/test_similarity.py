import math
from pathlib import Path

import numpy as np
import pytest
import torch

from actionclip.similarity import (
    EVALUATION_SCALE,
    cosine_logits,
    fuse_logits,
    fuse_templates,
    fuse_views,
    normalize,
)


def test_logits_by_hand():
    videos = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    texts = torch.tensor([[1.0, 0.0], [5.0, 12.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 63 / 65], [0.0, 12 / 13]], dtype=torch.float64) * 10
    for scale in (10.0, torch.tensor(10.0, dtype=torch.float64)):
        torch.testing.assert_close(
            cosine_logits(videos, texts, scale), expected, rtol=1e-15, atol=0
        )


def test_probabilities_by_hand():
    # Two templates, two classes: softmax of (0, ln 3) and of (ln 9, 0). The mean before the
    # softmax would give 0.634 to class 0, not 0.575.
    logits = torch.tensor([[0.0, math.log(3)], [math.log(9), 0.0]], dtype=torch.float64)
    expected = torch.tensor([(0.25 + 0.9) / 2, (0.75 + 0.1) / 2], dtype=torch.float64)
    torch.testing.assert_close(fuse_templates(logits), expected, rtol=1e-15, atol=0)

    views = torch.stack([logits.softmax(dim=-1)[0], expected]).unsqueeze(0)
    by_view = torch.tensor([[(0.25 + 0.575) / 2, (0.75 + 0.425) / 2]], dtype=torch.float64)
    torch.testing.assert_close(fuse_views(views), by_view, rtol=1e-15, atol=0)


def test_views_and_templates_are_fused_together():
    # Two views, one template, two classes: softmax of (0, ln 3) and of (ln 9, 0).
    logits = torch.tensor([[[0.0, math.log(3), 7.0]], [[math.log(9), 0.0, 7.0]]])
    expected = torch.tensor([(0.25 + 0.9) / 2, (0.75 + 0.1) / 2])
    torch.testing.assert_close(fuse_logits(logits[..., :2]), expected)
    many = torch.randn(4, 3, 2, 5)
    for one, fused in zip(many, fuse_logits(many), strict=True):
        mean = sum(one[v, p].softmax(0) for v in range(3) for p in range(2)) / 6
        torch.testing.assert_close(fused, mean)


def test_golden_probabilities():
    golden = np.load(Path(__file__).parent / "golden" / "end_to_end.npz")
    videos, texts = torch.from_numpy(golden["video_embed"]), torch.from_numpy(golden["text_embed"])
    logits = cosine_logits(videos, texts, EVALUATION_SCALE)
    probs = fuse_templates(logits.view(3, int(golden["num_templates"]), len(golden["classes"])))
    np.testing.assert_allclose(probs, golden["probabilities"], rtol=0, atol=1e-5)


def test_length_and_scale_of_embeddings_do_not_matter():
    torch.manual_seed(0)
    videos, texts = torch.randn(4, 32), torch.randn(5, 32)
    logits = cosine_logits(videos * 1000, texts / 1000, 1.0)
    torch.testing.assert_close(logits, cosine_logits(videos, texts, 1.0))
    expected = torch.nn.functional.cosine_similarity(videos[:, None], texts[None], dim=-1)
    torch.testing.assert_close(logits, expected)


def test_views_and_batches_are_independent():
    logits = torch.randn(2, 3, 4, 5)
    probs = fuse_templates(logits)
    assert probs.shape == (2, 3, 5)
    torch.testing.assert_close(probs.sum(dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(fuse_templates(logits[1, 2]), probs[1, 2])
    assert fuse_views(probs).shape == (2, 5)
    torch.testing.assert_close(fuse_views(probs)[1], probs[1].mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_are_compared_in_fp32(dtype):
    torch.manual_seed(0)
    videos, texts = (100 * torch.randn(4, 512)).to(dtype), torch.randn(5, 512).to(dtype)
    # In fp16 the squares of these would overflow.
    assert normalize(videos).dtype == torch.float32
    exact = cosine_logits(videos.double(), texts.double(), EVALUATION_SCALE)
    assert exact.dtype == torch.float64
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = cosine_logits(videos, texts, EVALUATION_SCALE)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_normalize():
    torch.testing.assert_close(normalize(torch.tensor([[3.0, -4.0]])), torch.tensor([[0.6, -0.8]]))
    assert normalize(torch.zeros(1, 2)).isnan().all()  # as in CLIP


def test_gradients_flow_to_both_sides():
    videos = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    texts = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cosine_logits, (videos, texts, scale))

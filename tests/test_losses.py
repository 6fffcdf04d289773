"""The losses: their definitions against golden values, hand calculations and torch's own."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from filled import normal
from golden_files import load_golden
from torch import Tensor

from actionclip import losses
from actionclip.errors import InputError
from actionclip.losses import (
    class_cross_entropy,
    class_targets,
    contrastive_kl,
    cosine_distance,
    match_targets,
)

both_ways = pytest.mark.parametrize("fused", [False, True], ids=["dense", "fused"])
all_targets = pytest.mark.parametrize("target", ["uniform", "official"])


def draw(count: int, dim: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    video, text = torch.randn(2, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    return video.clone().requires_grad_(), text.clone().requires_grad_()


def draw_labels(kind: str, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    if kind == "single":
        return torch.randint(0, 4, (count,), generator=generator)
    labels = torch.rand(count, 6, generator=generator) < 0.2
    labels[count // 2] = False
    assert (labels.sum(1) > 1).any()
    return labels


all_labels = pytest.mark.parametrize("kind", ["single", "multi-hot"])


@both_ways
@pytest.mark.parametrize("case", range(4))
def test_golden(case: int, fused: bool) -> None:
    golden = {
        key.partition("/")[2]: torch.from_numpy(value)
        for key, value in load_golden("loss.npz").items()
        if key.startswith(f"{case}/")
    }
    shape = tuple(golden["shape"].tolist())
    video, text = (
        torch.from_numpy(normal(f"loss:{case}:{name}", shape)).requires_grad_()
        for name in ("video", "text")
    )
    parameter = golden["logit_scale_param"].clone().requires_grad_()
    loss = contrastive_kl(
        video, text, golden["labels"], parameter.exp(), target="official", fused=fused
    )
    loss.backward()
    close = {"rtol": 1e-5, "atol": 0}
    torch.testing.assert_close(loss, golden["loss"], **close)
    torch.testing.assert_close(parameter.grad, golden["grad_logit_scale"], **close)
    for name, grad in (("video", video.grad), ("text", text.grad)):
        expected = golden[f"grad_{name}"]
        atol = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=0, atol=atol)
    targets = match_targets(golden["labels"], "official")
    torch.testing.assert_close(targets[0], golden["target_row0"], **close)


@both_ways
def test_two_videos_by_hand(fused: bool) -> None:
    # Logits are [[ln 3, 0], [0, ln 3]], so each softmax is (3/4, 1/4).
    embeddings = torch.eye(2, dtype=torch.float64)

    def loss(labels: list[int], target: losses.Target) -> float:
        scale = math.log(3)
        return contrastive_kl(
            5 * embeddings, embeddings, torch.tensor(labels), scale, target=target, fused=fused
        ).item()

    assert loss([0, 1], "uniform") == pytest.approx(math.log(4 / 3), rel=1e-14)
    assert loss([7, 7], "uniform") == pytest.approx(math.log(4 / 3) / 2, rel=1e-14)
    assert loss([7, 7], "official") == pytest.approx(math.log(4 / 3) / 2, rel=1e-14)
    q = 1 / (1 + math.exp(-10))
    by_hand = q * math.log(q / 0.75) + (1 - q) * math.log((1 - q) / 0.25)
    assert loss([0, 1], "official") == pytest.approx(by_hand, rel=1e-14)


@both_ways
@all_targets
@all_labels
def test_equals_kl_div(kind: str, target: losses.Target, fused: bool) -> None:
    video, text = draw(23, 8)
    labels = draw_labels(kind, 23)
    q = torch.zeros(23, 23, dtype=torch.float64)
    for i in range(23):
        for j in range(23):
            if kind == "single":
                match = labels[i] == labels[j]
            else:
                match = i == j or (labels[i] & labels[j]).any()
            q[i, j] = float(match)
    q = F.normalize(q, p=1) if target == "uniform" else F.softmax(10 * q, 1)
    cosines = F.cosine_similarity(video[:, None], text[None], dim=-1)
    one, other = (
        F.kl_div((9 * logits).log_softmax(1), q, reduction="batchmean")
        for logits in (cosines, cosines.T)
    )
    expected = (one + other) / 2
    loss = contrastive_kl(video, text, labels, 9, target=target, fused=fused)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)
    grads = torch.autograd.grad(loss, (video, text))
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (video, text)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


@both_ways
@all_targets
@all_labels
def test_shares_of_the_rows_sum_to_the_whole(kind: str, target: losses.Target, fused: bool) -> None:
    video, text = draw(23, 8)
    labels = draw_labels(kind, 23)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)

    def run(rows: slice | None) -> list[Tensor]:
        loss = contrastive_kl(video, text, labels, scale, target=target, fused=fused, rows=rows)
        return [loss, *torch.autograd.grad(loss, (video, text, scale))]

    shares = [run(rows) for rows in (slice(0, 10), slice(10, 10), slice(10, 11), slice(11, 23))]
    assert shares[1][0] == 0
    for whole, *parts in zip(run(None), *shares, strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-13, atol=1e-14)


@both_ways
def test_one_hot_rows_are_classes(fused: bool) -> None:
    video, text = draw(23, 8)
    classes = draw_labels("single", 23)
    single, multi = (
        contrastive_kl(video, text, labels, 9, fused=fused)
        for labels in (classes, F.one_hot(classes))
    )
    assert single.item() == pytest.approx(multi.item(), rel=1e-13)


@both_ways
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
@pytest.mark.parametrize("same", [False, True], ids=["random", "identical"])
def test_finite_at_any_scale(scale: float, same: bool, fused: bool) -> None:
    video, text = draw(23, 8, torch.float32)
    if same:
        video = torch.ones(23, 8, requires_grad=True)
        text = torch.ones(23, 8, requires_grad=True)
    loss = contrastive_kl(video, text, draw_labels("single", 23), scale, fused=fused)
    loss.backward()
    assert loss.isfinite()
    assert video.grad is not None
    assert video.grad.isfinite().all()
    assert text.grad is not None
    assert text.grad.isfinite().all()


@both_ways
def test_a_zero_vector_is_not_hidden(fused: bool) -> None:
    video, text = (x.detach() for x in draw(4, 8))
    video[2] = 0
    assert contrastive_kl(video, text, torch.arange(4), 9, fused=fused).isnan()


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_computes_in_fp32_also_under_autocast(dtype: torch.dtype, fused: bool) -> None:
    video, text = (x.detach().requires_grad_() for x in draw(23, 8, dtype))
    labels = draw_labels("single", 23)
    expected = contrastive_kl(video.float(), text.float(), labels, 100.0, fused=fused)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_kl(video, text, labels, 100.0, fused=fused)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss, (video, text))
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (video, text)), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("count", "expected"), [(999, "dense"), (1100, "fused")])
def test_chooses_by_the_size_of_the_batch(
    count: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = []

    def record(name: str) -> Callable[..., Tensor]:
        return lambda *_: chosen.append(name) or torch.zeros(())

    monkeypatch.setattr(losses, "fused_contrastive_kl", record("fused"))
    monkeypatch.setattr(losses, "_dense_contrastive_kl", record("dense"))
    contrastive_kl(*draw(count, 2), torch.arange(count), 1.0)
    assert chosen == [expected]


def test_errors_name_what_is_wrong() -> None:
    video, text = draw(4, 8)
    classes = torch.arange(4)
    with pytest.raises(InputError, match=r"shapes \(4, 8\) and \(3, 8\)"):
        contrastive_kl(video, text[:3], classes, 1.0)
    with pytest.raises(InputError, match=r"shapes \(0, 8\) and \(0, 8\)"):
        contrastive_kl(video[:0], text[:0], classes[:0], 1.0)
    with pytest.raises(InputError, match=r"labels have shape \(3,\) and type torch.int64"):
        contrastive_kl(video, text, classes[:3], 1.0)
    with pytest.raises(InputError, match=r"type torch.float32: pass \(4,\) integer classes"):
        contrastive_kl(video, text, classes.float(), 1.0)
    with pytest.raises(InputError, match="target is 'paper': pass"):
        contrastive_kl(video, text, classes, 1.0, target="paper")  # type: ignore[arg-type]


def test_class_targets_by_hand() -> None:
    targets = class_targets(torch.tensor([2, 0]), 4, 0.1)
    assert targets.dtype == torch.float32
    off, on = 0.1 / 4, 0.9 + 0.1 / 4
    expected = torch.tensor([[off, off, on, off], [on, off, off, off]])
    torch.testing.assert_close(targets, expected)
    several = torch.tensor([[True, False, True, False], [False, True, False, False]])
    expected = torch.tensor([[0.45 + off, off, 0.45 + off, off], [off, on, off, off]])
    torch.testing.assert_close(class_targets(several, 4, 0.1), expected)
    assert class_targets(several, 4, 0.0).tolist() == [[0.5, 0, 0.5, 0], [0, 1, 0, 0]]
    assert class_targets(several, 4, 1.0).tolist() == [[0.25] * 4] * 2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_class_cross_entropy_equals_torch_with_label_smoothing(smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(64, 30, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    labels = torch.randint(30, (64,), generator=generator)
    reference = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected = torch.autograd.grad(reference, logits)[0]
    for dtype, rtol, atol in ((torch.float64, 1e-7, 1e-7), (torch.float32, 1e-6, 1e-6)):
        given = logits.detach().to(dtype).requires_grad_()
        loss = class_cross_entropy(given, class_targets(labels, 30, smoothing))
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(reference.item(), rel=rtol)
        (gradient,) = torch.autograd.grad(loss, given)
        assert (gradient - expected).abs().max() < atol


def test_class_cross_entropy_of_soft_targets() -> None:
    # softmax is (3/4, 1/4) in both rows; the sum over rows, not their mean.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    targets = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    by_hand = -0.75 * math.log(3 / 4) - 1.25 * math.log(1 / 4)
    assert class_cross_entropy(logits, targets).item() == pytest.approx(by_hand, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_cross_entropy_is_fp32_also_under_autocast(dtype: torch.dtype) -> None:
    logits = (10 * draw(23, 23)[0].detach()).to(dtype)
    targets = class_targets(torch.arange(23), 23, 0.1)
    expected = class_cross_entropy(logits.float(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = class_cross_entropy(logits, targets.to(torch.float64))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_cosine_distance_by_hand() -> None:
    embeddings = torch.tensor([[2.0, 0], [2, 0], [2, 0], [3, 4]])
    teacher = torch.tensor([[5.0, 0], [0, 1], [-1, 0], [4, 3]])
    expected = torch.tensor([0, 1, 2, 1 - 24 / 25])
    torch.testing.assert_close(cosine_distance(embeddings, teacher), expected)


def test_cosine_distance_equals_torch_and_moves_only_the_student() -> None:
    embeddings, teacher = draw(23, 8)
    distance = cosine_distance(embeddings, teacher)
    assert distance.shape == (23,)
    expected = 1 - F.cosine_similarity(embeddings, teacher)
    torch.testing.assert_close(distance, expected, rtol=0, atol=1e-14)
    distance.sum().backward()
    assert teacher.grad is None
    (gradient,) = torch.autograd.grad(expected.sum(), embeddings)
    torch.testing.assert_close(embeddings.grad, gradient, rtol=0, atol=1e-14)


def test_cosine_distance_is_fp32_and_does_not_cancel() -> None:
    embeddings = draw(23, 512, torch.float32)[0].detach()
    near = embeddings + 1e-4 * draw(23, 512, torch.float32)[1].detach()
    exact = cosine_distance(embeddings.double(), near.double())
    assert exact.max() < 1e-6
    torch.testing.assert_close(cosine_distance(embeddings, near).double(), exact, rtol=1e-2, atol=0)
    assert (cosine_distance(embeddings, embeddings) == 0).all()
    half, other = embeddings.bfloat16(), near.flip(0).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = cosine_distance(half, other)
    assert distance.dtype == torch.float32
    assert torch.equal(distance, cosine_distance(half.float(), other.float()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 4]), "labels reach from 0 to 4: use classes from 0 to 3"),
        (torch.tensor([-1, 2]), "labels reach from -1 to 2: use"),
        (torch.tensor([0.0, 1]), r"shape \(2,\) and type torch.float32: pass \(N,\) integer"),
        (torch.ones(2, 5), r"labels have shape \(2, 5\) .* or \(N, 4\) multi-hot"),
        (torch.eye(4) * torch.tensor([1, 1, 0, 1]), "video 2 of the labels has no class"),
    ],
)
def test_labels_that_are_no_targets(labels: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        class_targets(labels, 4, 0.1)


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_smoothing_is_a_part(smoothing: float) -> None:
    with pytest.raises(InputError, match=rf"smoothing is {smoothing}; use a number in \[0, 1\]"):
        class_targets(torch.arange(2), 4, smoothing)

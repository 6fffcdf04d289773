"""The loss: its definition against golden values, hand calculations and torch's kl_div."""

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
from actionclip.losses import contrastive_kl, match_targets

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


@pytest.mark.parametrize(("count", "expected"), [(499, "dense"), (600, "fused")])
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

"""The fused loss against the dense definition, and what it must not do: hold N x N numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_losses import all_labels, all_targets, draw, draw_labels
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from actionclip import fused_loss
from actionclip.errors import InputError
from actionclip.losses import Target, contrastive_kl


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give 5 x 7 tiles, of which a batch of 23 has many, some of them cut off."""
    monkeypatch.setattr(fused_loss, "TILE_ROWS", 5)
    monkeypatch.setattr(fused_loss, "TILE_COLUMNS", 7)


def run(
    video: Tensor, text: Tensor, labels: Tensor, scale: float, target: Target, fused: bool
) -> list[Tensor]:
    parameter = torch.tensor(scale, dtype=video.dtype, requires_grad=True)
    loss = contrastive_kl(video, text, labels, parameter, target=target, fused=fused)
    return [loss, *torch.autograd.grad(loss, (video, text, parameter))]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@all_targets
@all_labels
def test_equals_the_definition_in_fp64(kind: str, target: Target, scale: float) -> None:
    inputs = (*draw(23, 8), draw_labels(kind, 23), scale, target)
    for fused, dense in zip(run(*inputs, True), run(*inputs, False), strict=True):
        atol = 1e-12 * max(1.0, dense.abs().max().item())
        torch.testing.assert_close(fused, dense, rtol=0, atol=atol)


@pytest.mark.usefixtures("small_tiles")
@all_targets
@all_labels
def test_as_exact_as_the_definition_in_fp32(kind: str, target: Target) -> None:
    labels = draw_labels(kind, 23)
    exact = run(*draw(23, 8), labels, 50.0, target, False)
    single = run(*draw(23, 8, torch.float32), labels, 50.0, target, True)
    for mine, theirs in zip(single, exact, strict=True):
        assert mine.dtype == torch.float32
        atol = 2e-6 * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=atol)


def alike(sign: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw videos that resemble one another, and texts that do, or all are their opposites."""
    noise, other = draw(23, 8)
    base = torch.linspace(1, 2, 8, dtype=torch.float64)
    pair = base + noise.detach() / 5, sign * (base + other.detach() / 5)
    video, text = (x.to(dtype).requires_grad_() for x in pair)
    return video, text


# In fp32 exp of these logits, near 100 and -100, leaves the range of the type.
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exact_where_exp_alone_would_overflow_or_vanish(sign: float) -> None:
    labels = draw_labels("single", 23)
    exact = run(*alike(sign, torch.float64), labels, 100.0, "official", False)
    single = run(*alike(sign, torch.float32), labels, 100.0, "official", True)
    # The gradient of the scale is a difference of large numbers here, which fp32 cannot tell.
    for mine, theirs in zip(single[:3], exact[:3], strict=True):
        atol = 2e-5 * theirs.abs().max().item()
        torch.testing.assert_close(mine.double(), theirs, rtol=0, atol=atol)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.detach())


def test_a_common_shift_only_where_it_suits_all() -> None:
    video, text = map(unit, draw(23, 8, torch.float32))
    assert fused_loss._common_shift(20 * video, text) == 0
    shift = fused_loss._common_shift(100 * video, text)
    assert shift is not None
    assert 100 - shift + math.log(23) < math.log(torch.finfo(torch.float32).max)
    near, far = (list(map(unit, alike(sign, torch.float32))) for sign in (1.0, -1.0))
    assert fused_loss._common_shift(100 * near[0], near[1]) == pytest.approx(shift)
    assert fused_loss._common_shift(100 * far[0], far[1]) is None
    # One text that no video resembles is enough, and so is one video.
    odd = near[1].clone()
    odd[3] = -odd[3]
    assert fused_loss._common_shift(100 * near[0], odd) is None
    assert fused_loss._common_shift(100 * odd, near[0]) is None
    assert fused_loss._common_shift(100 * near[0].double(), odd.double()) == 0
    assert fused_loss._common_shift(near[0] * math.nan, text) is None


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rows", [None, slice(2, 7)])
@all_labels
def test_gradients_are_those_of_the_value(kind: str, rows: slice | None) -> None:
    def loss(video: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_kl(video, text, labels, scale, fused=True, rows=rows)

    labels = draw_labels(kind, 13)
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (*draw(13, 2), scale))


class Costs(TorchDispatchMode):
    """Record the largest tensor made and the multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products = 0
        self.exponentials = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]  # type: ignore[attr-defined]
        if name in ("mm", "addmm_"):
            a, b = args[-2:]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        if name in ("exp", "exp_"):
            self.exponentials += out.numel()
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def costs(
    labels: Tensor, dim: int, fused: bool, rows: slice | None = None, scale: float = 9.0
) -> Costs:
    video, text = draw(len(labels), dim)
    with Costs() as measured:
        contrastive_kl(video, text, labels, scale, fused=fused, rows=rows).backward()
    return measured


@pytest.mark.usefixtures("small_tiles")
@all_labels
def test_never_holds_all_pairs(kind: str) -> None:
    labels = draw_labels(kind, 40)
    assert costs(labels, 8, fused=False).largest == 40 * 40
    assert costs(labels, 8, fused=True).largest <= 40 * 8


@pytest.mark.usefixtures("small_tiles")
def test_takes_four_products() -> None:
    labels = draw_labels("single", 40)
    square = 40 * 40 * 8
    assert costs(labels, 8, fused=False).products == 3 * square
    assert costs(labels, 8, fused=True).products == 4 * square
    # A share takes its rows of both directions, each product once.
    assert costs(labels, 8, fused=True, rows=slice(10, 30)).products == 4 * square
    # No common shift suits logits that far apart.
    assert costs(labels, 8, fused=True, scale=1e5).products == 8 * square


@pytest.mark.usefixtures("small_tiles")
def test_takes_one_exponential_of_each_logit_and_pass() -> None:
    exponentials = costs(draw_labels("single", 40), 8, fused=True).exponentials
    assert exponentials == 2 * 40 * 40 + 2 * 40


def test_a_second_derivative_is_refused() -> None:
    video, text = draw(12, 3)
    loss = contrastive_kl(video, text, torch.arange(12), 9.0, fused=True)
    with pytest.raises(InputError, match="no second derivative: pass fused=False"):
        torch.autograd.grad(loss, video, create_graph=True)


@all_labels
def test_an_autocast_around_the_backward_pass_changes_nothing(kind: str) -> None:
    inputs = (*draw(23, 8, torch.float32), draw_labels(kind, 23), 50.0, "uniform", True)
    expected = run(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, run(*inputs), expected))

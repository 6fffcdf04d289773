"""Mixup and CutMix: hand-made cases, the distributions they are drawn from, and the sums."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from actionclip.errors import InputError
from actionclip.mixing import Mixing, Mixture, draw_mixture, mix_frames, mix_targets

SIDE = 32
MIXUP = Mixing(cutmix_share=0)
CUTMIX = Mixing(cutmix_share=1)


def draw(num_videos: int, mixing: Mixing, seed: int = 0, side: int = SIDE) -> Mixture:
    return draw_mixture(num_videos, side, mixing, np.random.default_rng(seed))


def columns(mixture: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    return mixture.partner, mixture.share, mixture.box


def equal(one: Mixture, other: Mixture) -> bool:
    return all(torch.equal(a, b) for a, b in zip(columns(one), columns(other), strict=True))


def videos(num_videos: int, side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(num_videos)
    shape = (num_videos, 2, 3, side, side)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def by_hand(*rows: tuple[int, float, tuple[int, int, int, int]]) -> Mixture:
    partner, share, box = zip(*rows, strict=True)
    return Mixture(torch.tensor(partner), torch.tensor(share), torch.tensor(box))


def test_a_mixture_by_hand() -> None:
    frames = torch.stack([torch.full((2, 3, 4, 4), value) for value in (0, 100, 200)])
    mixture = by_hand(
        (1, 0.25, (0, 0, 0, 0)),  # Mixup
        (2, 0.625, (1, 4, 2, 4)),  # CutMix: 6 of 16 pixels
        (0, 1.0, (2, 2, 0, 4)),  # CutMix with a box that rounding has emptied
    )
    empty = [by_hand((0, 0.25, box)) for box in ((2, 2, 0, 4), (0, 4, 3, 3))]
    assert all((mix_frames(frames[:1], frames[1:2], one) == 75).all() for one in empty)
    for given in (frames.to(torch.uint8), frames.float(), frames.to(torch.bfloat16)):
        before = given.clone()
        mixed = mix_frames(given, given[mixture.partner], mixture)
        assert mixed.dtype == torch.float32
        assert (mixed[0] == 75).all()
        pasted = torch.tensor([[100] * 4] + [[100, 100, 200, 200]] * 3)
        assert (mixed[1] == pasted).all()
        assert (mixed[2] == 200).all()
        assert torch.equal(given, before)
    targets = torch.eye(3)
    expected = torch.tensor([[0.25, 0.75, 0], [0, 0.625, 0.375], [0, 0, 1]])
    assert torch.equal(mix_targets(targets, targets[mixture.partner], mixture), expected)


def test_mixup_is_the_weighted_mean() -> None:
    frames, mixture = videos(8), draw(8, MIXUP)
    mixed = mix_frames(frames, frames[mixture.partner], mixture)
    weight = mixture.share.double()[:, None, None, None, None]
    expected = weight * frames + (1 - weight) * frames[mixture.partner]
    assert (mixed - expected).abs().max() < 1e-4
    assert mixed.min() >= 0
    assert mixed.max() <= 255


@pytest.mark.parametrize("side", [15, 32])
def test_cutmix_keeps_exactly_its_share_of_every_frame(side: int) -> None:
    dark = torch.zeros(8, 2, 3, side, side)
    areas = set()
    for seed in range(60):
        mixture = draw(8, CUTMIX, seed, side)
        mixed = mix_frames(dark, dark + 1, mixture)
        kept = (mixed == 0).double().mean((-1, -2))
        assert torch.equal(kept.float(), mixture.share[:, None, None].expand(-1, 2, 3))
        assert ((mixed == 0) | (mixed == 1)).all()
        areas.add(mixture.share[0].item())
    assert len(areas) > 30


def test_boxes_are_squares_around_a_uniform_centre_cut_by_the_edges() -> None:
    side, count = 1000, 4000
    drawn = draw(2 * count, Mixing(cutmix_share=1, group_size=2), side=side).box[::2].double()
    assert drawn.min() >= 0
    assert drawn.max() <= side
    top, bottom, left, right = drawn.T
    inside = (drawn > 0).all(1) & (drawn < side).all(1)
    assert inside.sum() > 500
    # Rounding favours no side.
    small = draw(2 * count, Mixing(cutmix_share=1, group_size=2), side=4).box[::2]
    touching = (small == torch.tensor([0, 4, 0, 4])).double().mean(0)
    assert touching.max() - touching.min() < 0.05
    assert ((bottom - top) - (right - left))[inside].abs().max() <= 1
    # A point at (x, y) is in the box where both distances from the centre are below half the
    # side s: in the middle with probability E[s^2] = E[1 - lambda] = 1/2, in a corner of the
    # image, where a quarter of that remains, with 1/8.
    for x, expected in ((500, 1 / 2), (1, 1 / 8), (999, 1 / 8)):
        hit = (top < x) & (x <= bottom) & (left < x) & (x <= right)
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert abs(hit.double().mean() - expected) < 4 * deviation


@pytest.mark.parametrize("alpha", [0.2, 0.8, 3.0])
def test_mixup_draws_from_beta(alpha: float) -> None:
    count = 20_000
    mixing = Mixing(mixup_alpha=alpha, cutmix_share=0, group_size=2)
    share = draw(2 * count, mixing).share[::2].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean() - 0.5) < 4 * math.sqrt(variance / count)
    assert share.var().item() == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_cutmix_draws_from_beta(alpha: float) -> None:
    # Two points that are half the image apart are both in a box of the side s with probability
    # s * (s - 1/2), where 1 - s^2 is drawn from Beta(a, a); 0.177 and 0.158.
    side, count = 1000, 10_000
    mixing = Mixing(cutmix_alpha=alpha, cutmix_share=1, group_size=2)
    top, bottom, left, right = draw(2 * count, mixing, side=side).box[::2].T
    both = (top < 500) & (bottom >= 500) & (left < 250) & (right >= 750)
    area = (np.arange(10_000) + 0.5) / 10_000
    density = (area * (1 - area)) ** (alpha - 1)
    chance = np.sqrt(area) * (np.sqrt(area) - 0.5).clip(0)
    expected = (density * chance).sum() / density.sum()
    deviation = math.sqrt(expected * (1 - expected) / count)
    assert abs(both.double().mean() - expected) < 4 * deviation


def test_half_of_the_groups_are_cutmix() -> None:
    def cut(share: float) -> float:
        mixture = draw(8 * 1000, Mixing(cutmix_share=share))
        return mixture.box.any(1).double().mean().item()

    assert cut(0) == 0
    assert cut(1) > 0.98
    assert abs(cut(0.5) - 0.5) < 0.07
    assert abs(cut(0.2) - 0.2) < 0.06


@pytest.mark.parametrize(("num_videos", "group_size"), [(16, 8), (13, 5), (3, 8), (9, 4), (1, 2)])
def test_a_group_is_permuted_and_shares_one_draw(num_videos: int, group_size: int) -> None:
    draws = []
    for seed in range(20):
        mixture = draw(num_videos, Mixing(group_size=group_size), seed)
        for start in range(0, num_videos, group_size):
            rows = list(range(num_videos))[start : start + group_size]
            assert sorted(mixture.partner[rows].tolist()) == rows
            assert (mixture.share[rows] == mixture.share[start]).all()
            assert (mixture.box[rows] == mixture.box[start]).all()
            draws.append(mixture.share[start].item())
        assert [c.dtype for c in columns(mixture)] == [torch.int64, torch.float32, torch.int64]
        assert [c.shape for c in columns(mixture)] == [
            (num_videos,),
            (num_videos,),
            (num_videos, 4),
        ]
    # All groups differ, but for boxes that have the same area.
    assert len(set(draws)) > 0.9 * len(draws)


def test_every_permutation_comes() -> None:
    seen = {tuple(draw(3, Mixing(), seed).partner.tolist()) for seed in range(100)}
    assert len(seen) == 6


def test_targets_still_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(64, 10, generator=generator).softmax(1)
    for mixing in (MIXUP, CUTMIX):
        mixture = draw(64, mixing)
        mixed = mix_targets(targets, targets[mixture.partner], mixture)
        torch.testing.assert_close(mixed.sum(1), torch.ones(64))
        for i, (j, share) in enumerate(zip(mixture.partner, mixture.share, strict=True)):
            expected = float(share) * targets[i].double() + (1 - float(share)) * targets[j].double()
            torch.testing.assert_close(mixed[i].double(), expected, rtol=0, atol=1e-6)


def test_the_generator_alone_decides() -> None:
    first = draw(64, Mixing(), seed=3)
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(first, draw(64, Mixing(), seed=3))
    assert not equal(first, draw(64, Mixing(), seed=4))


@pytest.mark.parametrize("size", [1, 3, 8, 20, None])
def test_parts_are_mixed_as_the_whole(size: int | None) -> None:
    frames, targets = videos(20), torch.eye(20)
    mixture = draw(20, Mixing())
    assert mixture.box.any()
    assert not mixture.box.any(1).all()
    parts = mixture.split(size)
    assert [len(part.partner) for part in parts[:-1]] == [size] * (len(parts) - 1)
    joined = Mixture(*map(torch.cat, zip(*map(columns, parts), strict=True)))
    assert equal(joined, mixture)
    step = size or 20
    for mix, whole in ((mix_frames, frames), (mix_targets, targets)):
        pieces = zip(whole.split(step), parts, strict=True)
        mixed = [mix(piece, whole[part.partner], part) for piece, part in pieces]
        assert torch.equal(torch.cat(mixed), mix(whole, whole[mixture.partner], mixture))


def test_a_share_of_one_changes_nothing() -> None:
    frames, targets = videos(3), torch.eye(3)
    mixture = by_hand(*((2 - i, 1.0, (0, 0, 0, 0)) for i in range(3)))
    assert torch.equal(mix_frames(frames, frames.flip(0), mixture), frames.float())
    assert torch.equal(mix_targets(targets, targets.flip(0), mixture), targets)


def test_as_many_partners_as_videos() -> None:
    mixture = draw(4, Mixing())
    with pytest.raises(ValueError, match="shorter"):
        mix_frames(videos(4), videos(3), mixture)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup_alpha": 0}, "mixup_alpha is 0; use a finite number above 0"),
        ({"mixup_alpha": float("nan")}, "mixup_alpha is nan; use"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha is inf; use"),
        ({"cutmix_share": 1.5}, "cutmix_share is 1.5; use a probability, 0 to 1"),
        ({"group_size": 1}, "group_size is 1; use at least 2 videos"),
    ],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        Mixing(**options)  # type: ignore[arg-type]

"""Mix the videos of a training batch with one another: Mixup and CutMix over whole clips.

Stands between the augmented frames of a batch and their normalisation. One mixture is drawn
for all videos that a process has in a step, from the generator that the caller gives, and then
cut into the parts that are encoded at a time, so that it does not depend on their size. Mixes
labels in the same shares. Reads no videos, normalises no pixels, computes no loss.

Source: Mixup (arXiv:1710.09412) and CutMix (arXiv:1905.04899), as X-CLIP (arXiv:2208.02816)
trains with them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actionclip.errors import InputError


@dataclass(frozen=True)
class Mixing:
    """How the videos of a batch are mixed.

    Attributes:
        mixup_alpha: a of the Beta(a, a) that Mixup's share of a video is drawn from.
        cutmix_alpha: likewise for CutMix.
        cutmix_share: probability of CutMix; otherwise it is Mixup.
        group_size: videos that are permuted among themselves and share one draw; 8 is what
            one GPU has at a time in X-CLIP's code.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    cutmix_share: float = 0.5
    group_size: int = 8

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            alpha = getattr(self, name)
            if not 0 < alpha < float("inf"):
                raise InputError(f"{name} is {alpha}; use a finite number above 0")
        if not 0 <= self.cutmix_share <= 1:
            raise InputError(f"cutmix_share is {self.cutmix_share}; use a probability, 0 to 1")
        if self.group_size < 2:
            raise InputError(f"group_size is {self.group_size}; use at least 2 videos")


@dataclass(frozen=True)
class Mixture:
    """Who is mixed with whom, and how much: drawn for B videos, or a part of such a draw.

    Attributes:
        partner: (B,) int64, the row of the whole draw that each video is mixed with, which may
            be its own.
        share: (B,) float32 in [0, 1], what remains of each video, and of its labels.
        box: (B, 4) int64 pixels (top, bottom, left, right) that CutMix takes from the partner,
            the ends not included; empty for Mixup.
    """

    partner: Tensor
    share: Tensor
    box: Tensor

    def split(self, size: int | None) -> "list[Mixture]":
        """Cut into parts of at most `size` videos; partners stay rows of the whole draw."""
        size = size or len(self.partner)
        columns = (self.partner.split(size), self.share.split(size), self.box.split(size))
        return [Mixture(*part) for part in zip(*columns, strict=True)]


def draw_mixture(
    num_videos: int, resolution: int, mixing: Mixing, generator: np.random.Generator
) -> Mixture:
    """Draw who is mixed with whom; the last group has the videos that remain.

    Args:
        num_videos: B, at least 1.
        resolution: side of the frames, in pixels.
        mixing: how much to mix.
        generator: the only source of randomness.

    Returns:
        The mixture of the B videos, on the CPU.

    Source: spec 5. A box that the edges of the image have cut gives the share of its area.
    """
    partner = np.empty(num_videos, dtype=np.int64)
    share = np.empty(num_videos, dtype=np.float32)
    box = np.zeros((num_videos, 4), dtype=np.int64)
    for start in range(0, num_videos, mixing.group_size):
        group = slice(start, min(start + mixing.group_size, num_videos))
        partner[group] = start + generator.permutation(group.stop - start)
        if generator.random() < mixing.cutmix_share:
            kept = generator.beta(mixing.cutmix_alpha, mixing.cutmix_alpha)
            top, bottom, left, right = box[group] = _draw_box(kept, resolution, generator)
            share[group] = 1 - (bottom - top) * (right - left) / resolution**2
        else:
            share[group] = generator.beta(mixing.mixup_alpha, mixing.mixup_alpha)
    return Mixture(*(torch.from_numpy(column) for column in (partner, share, box)))


def mix_frames(frames: Tensor, partners: Tensor, mixture: Mixture) -> Tensor:
    """Blend every video with its partner, or paste the partner's box into all its frames.

    Args:
        frames: (B, T, 3, R, R) uint8 or float in [0, 255], with the R of the draw; not changed.
        partners: likewise and on the same device: `whole[mixture.partner]`.
        mixture: of these B videos.

    Returns:
        (B, T, 3, R, R) float32 in [0, 255].
    """
    mixed = frames.to(torch.float32, copy=True)
    shares, boxes = mixture.share.tolist(), mixture.box.tolist()
    for video, partner, share, box in zip(mixed, partners, shares, boxes, strict=True):
        top, bottom, left, right = box
        if top < bottom and left < right:
            video[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
        else:
            video.mul_(share).add_(partner, alpha=1 - share)
    return mixed


def mix_targets(targets: Tensor, partners: Tensor, mixture: Mixture) -> Tensor:
    """Mix the targets in the shares of the videos.

    Args:
        targets: (B, K) float, from `losses.class_targets`.
        partners: (B, K), those of the videos' partners.
        mixture: of these B videos.

    Returns:
        (B, K); rows that summed to 1 still do.
    """
    share = mixture.share.to(targets.device)[:, None]
    return share * targets + (1 - share) * partners


def _draw_box(kept: float, resolution: int, generator: np.random.Generator) -> np.ndarray:
    """Draw (top, bottom, left, right) of a square that leaves about `kept` of the image."""
    half = resolution * (1 - kept) ** 0.5 / 2
    y, x = generator.uniform(0, resolution, size=2)
    edges = np.array([y - half, y + half, x - half, x + half])
    return np.rint(edges.clip(0, resolution)).astype(np.int64)

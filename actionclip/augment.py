"""Augment the frames of one training video: decoded frames -> varied frames of one size.

Stands where `transforms.views` stands in evaluation, between the decoder and the image
encoder. Everything stays uint8, on the CPU. Every random choice comes from the generator
that the caller gives, so a sample looks the same in whichever process it is read.
Chooses no frames, opens no files, does not normalise.

Source: spec 3.3, ActionCLIP's training, which uses Pillow.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.errors import InputError
from actionclip.randaugment import (
    MAX_MAGNITUDE,
    FrameOperation,
    brightness,
    color,
    contrast,
    draw_operations,
    grayscale,
    hue,
)

# Ranges of the colour jitter, from the official training code.
_BRIGHTNESS = 0.4
_CONTRAST = 0.4
_SATURATION = 0.2
_HUE = 0.1

_DIRECTION = re.compile(
    r"\b(left|right)(wards?|most)?\b|\b(anti|counter)?clockwise\b", re.IGNORECASE
)
_WORD_JOIN = re.compile(r"_|(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True)
class Augmentation:
    """How much the frames of a training video are varied.

    The random choices are the same for all frames of a video, except with `per_frame`.

    Attributes:
        resolution: side of the square that the encoder takes, in pixels.
        scales: sides of the crop, as parts of the frame's short side, from large to small.
        crop_positions: how many places a crop may have, 13, or X-CLIP's 5; see `crop_offsets`.
        flip: probability of mirroring; 0 where left and right matter (`has_direction`).
        jitter: probability of changing brightness, contrast, saturation and hue.
        grayscale: probability of removing colour.
        randaugment_ops: how many operations RandAugment applies; 0 for none.
        randaugment_magnitude: their strength, 0 to 30. Posterize, at 9, keeps one bit a channel.
        per_frame: draw RandAugment's operations and the jitter's factors for every frame
            anew, as the official code does.
    """

    resolution: int
    scales: tuple[float, ...] = (1, 0.875, 0.75, 0.66)
    crop_positions: int = 13
    flip: float = 0.5
    jitter: float = 0.8
    grayscale: float = 0.2
    randaugment_ops: int = 2
    randaugment_magnitude: int = 9
    per_frame: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise InputError(f"resolution is {self.resolution}; use at least 1 pixel")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise InputError(f"scales are {self.scales}; use one or more in (0, 1]")
        if self.crop_positions not in (5, 13):
            raise InputError(f"crop_positions is {self.crop_positions}; use 5 or 13")
        for name in ("flip", "jitter", "grayscale"):
            probability = getattr(self, name)
            if not 0 <= probability <= 1:
                raise InputError(f"{name} is {probability}; use a probability, 0 to 1")
        if self.randaugment_ops < 0:
            raise InputError(f"randaugment_ops is {self.randaugment_ops}; use 0 or more")
        if not 0 <= self.randaugment_magnitude <= MAX_MAGNITUDE:
            raise InputError(
                f"randaugment_magnitude is {self.randaugment_magnitude}; use 0 to {MAX_MAGNITUDE}"
            )


def augment(frames: Tensor, augmentation: Augmentation, generator: np.random.Generator) -> Tensor:
    """Apply RandAugment, crop and resize, mirror, jitter the colours, remove the colour.

    Args:
        frames: (T, 3, H, W) uint8 RGB on the CPU, of any size; not changed.
        augmentation: what to apply, and how much.
        generator: the only source of randomness.

    Returns:
        (T, 3, resolution, resolution) uint8, contiguous.

    Raises:
        InputError: if the frames are not (T, 3, H, W) uint8 with at least one pixel.

    Source: spec 3.3, training, steps 1 to 5 in this order.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[1] != 3:
        raise InputError(
            f"frames are {tuple(frames.shape)} {frames.dtype}; use (T, 3, H, W) torch.uint8"
        )
    if frames.numel() == 0:
        raise InputError(f"frames are {tuple(frames.shape)}; give at least one pixel")
    height, width = frames.shape[2:]
    draw_distortion = partial(
        draw_operations,
        augmentation.randaugment_ops,
        augmentation.randaugment_magnitude,
        width,
        height,
        generator,
    )
    box = _draw_crop(width, height, augmentation, generator)
    distorted = _apply(draw_distortion, frames, augmentation.per_frame)
    result = _crop_and_resize(distorted, box, augmentation.resolution)
    if generator.random() < augmentation.flip:
        result = result.flip(-1)
    if generator.random() < augmentation.jitter:
        draw_jitter = partial(_draw_jitter, generator)
        result = torch.stack(list(_apply(draw_jitter, result, augmentation.per_frame)))
    if generator.random() < augmentation.grayscale:
        result = torch.stack([grayscale(frame) for frame in result])
    return result.contiguous()


def crop_sizes(
    width: int, height: int, scales: Sequence[float], resolution: int
) -> list[tuple[int, int]]:
    """Return the (width, height) that a training crop may have.

    Sides are `scales` of the short side of the frame, rounded down; one that is within 2
    pixels of `resolution` becomes it, so that nothing needs to be resized. The two sides
    differ by one step of `scales` at most. All sizes are equally likely.

    Args:
        width: of the frame, in pixels.
        height: likewise.
        scales: parts of the short side, in (0, 1], from large to small.
        resolution: what the crop will be resized to.
    """
    short = min(width, height)
    sides = [max(1, int(short * scale)) for scale in scales]
    # A frame that is a pixel too small is not padded, as the official code does.
    sides = [
        resolution if abs(side - resolution) <= 2 and resolution <= short else side
        for side in sides
    ]
    return [
        (crop_width, crop_height)
        for row, crop_height in enumerate(sides)
        for column, crop_width in enumerate(sides)
        if abs(row - column) <= 1
    ]


def crop_offsets(
    width: int, height: int, crop_width: int, crop_height: int, positions: int = 13
) -> list[tuple[int, int]]:
    """Return the equally likely (left, top) of a training crop.

    The first 5 are corners and centre, the other 8 middles of the edges and centres of the
    quarters of the frame, on a grid of a quarter of what the crop leaves, rounded down.
    """
    step_x, step_y = (width - crop_width) // 4, (height - crop_height) // 4
    # fmt: off
    grid = (
        (0, 0), (4, 0), (0, 4), (4, 4), (2, 2),
        (0, 2), (4, 2), (2, 4), (2, 0),
        (1, 1), (3, 1), (1, 3), (3, 3),
    )
    # fmt: on
    return [(x * step_x, y * step_y) for x, y in grid[:positions]]


def has_direction(class_names: Iterable[str]) -> bool:
    """Return whether a mirror image would turn one class into another, or into nonsense.

    Looks for English words such as left, rightwards and clockwise in any of the names;
    `moving_left` and `MovingLeft` count.
    """
    return any(_DIRECTION.search(_WORD_JOIN.sub(" ", name)) for name in class_names)


def _apply(
    draw: Callable[[], list[FrameOperation]], frames: Tensor, per_frame: bool
) -> Iterator[Tensor]:
    """Yield the (3, H, W) frames after operations drawn once, or for every frame anew."""
    operations = draw()
    for number, frame in enumerate(frames):
        if per_frame and number > 0:
            operations = draw()
        if operations:
            # Decoded frames have the channels innermost; planes are faster to work on.
            frame = frame.contiguous()
        for operation in operations:
            frame = operation(frame)
        yield frame


def _draw_crop(
    width: int, height: int, augmentation: Augmentation, generator: np.random.Generator
) -> tuple[slice, slice]:
    """Draw the rows and the columns to keep."""
    sizes = crop_sizes(width, height, augmentation.scales, augmentation.resolution)
    crop_width, crop_height = sizes[generator.integers(len(sizes))]
    offsets = crop_offsets(width, height, crop_width, crop_height, augmentation.crop_positions)
    left, top = offsets[generator.integers(len(offsets))]
    return slice(top, top + crop_height), slice(left, left + crop_width)


def _crop_and_resize(frames: Iterable[Tensor], box: tuple[slice, slice], resolution: int) -> Tensor:
    """Cut the box from every frame: (T, 3, resolution, resolution), bilinear as in Pillow."""
    # Channels last, as the fast resize for uint8 wants them.
    cropped = torch.stack([frame.permute(1, 2, 0)[box] for frame in frames]).permute(0, 3, 1, 2)
    return F.interpolate(cropped, (resolution, resolution), mode="bilinear", antialias=True)


def _draw_jitter(generator: np.random.Generator) -> list[FrameOperation]:
    """Draw the four changes of colour and their order, as torchvision's ColorJitter does."""
    shift = int(255 * generator.uniform(-_HUE, _HUE))
    operations: list[FrameOperation] = [
        partial(brightness, factor=_near_one(_BRIGHTNESS, generator)),
        partial(contrast, factor=_near_one(_CONTRAST, generator)),
        partial(color, factor=_near_one(_SATURATION, generator)),
        partial(hue, shift=shift),
    ]
    return [operations[i] for i in generator.permutation(len(operations))]


def _near_one(distance: float, generator: np.random.Generator) -> float:
    return generator.uniform(1 - distance, 1 + distance)

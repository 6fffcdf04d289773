"""Distort whole frames: RandAugment's sixteen operations, and which of them to apply.

Used by `augment` on the way from video file to frames, in training only. A frame is
(3, H, W) uint8 RGB on the CPU, in any memory layout; contiguous ones are fastest. Each
operation returns a new frame of that size, equal to Pillow's in every grey level (but see
`hue`). Knows nothing of videos.

Source: spec 3.3, training, step 1 (RandAugment, Cubuk et al. 2020).
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FrameOperation = Callable[[Tensor], Tensor]

MAX_MAGNITUDE = 30
OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "cutout",
    "translate_x",
    "translate_y",
)

# RGB, close to the mean of ImageNet.
_CUTOUT_GREY = (125, 123, 114)
# ITU-R 601 luma in 1/65536, as in Pillow's conversion to grey.
_LUMA = (19595, 38470, 7471)


def draw_operations(
    num_ops: int, magnitude: float, width: int, height: int, generator: np.random.Generator
) -> list[FrameOperation]:
    """Draw operations with replacement; geometric ones get a random sign or place.

    Args:
        num_ops: how many to draw, N of the paper.
        magnitude: strength of all of them, M of the paper, in [0, MAX_MAGNITUDE].
        width: of the frames they will be applied to, in pixels.
        height: likewise.
        generator: the only source of randomness.

    Returns:
        Functions to be applied one after the other; each may be used on many frames.
    """
    level = magnitude / MAX_MAGNITUDE
    names = [OPERATIONS[generator.integers(len(OPERATIONS))] for _ in range(num_ops)]
    return [_operation(name, level, width, height, generator) for name in names]


def _operation(
    name: str, level: float, width: int, height: int, generator: np.random.Generator
) -> FrameOperation:
    """Return one operation at `level` (0 to 1) of the range that its strength has."""
    sign = generator.choice((-1, 1))
    factor = 0.1 + 1.8 * level
    match name:
        case "auto_contrast":
            return auto_contrast
        case "equalize":
            return equalize
        case "invert":
            return invert
        case "posterize":
            return partial(posterize, bits=max(1, int(4 * level)))
        case "solarize":
            return partial(solarize, threshold=256 * level)
        case "solarize_add":
            return partial(solarize_add, addition=int(110 * level))
        case "color":
            return partial(color, factor=factor)
        case "contrast":
            return partial(contrast, factor=factor)
        case "brightness":
            return partial(brightness, factor=factor)
        case "sharpness":
            return partial(sharpness, factor=factor)
        case "cutout":
            center = generator.uniform(0, width), generator.uniform(0, height)
            return partial(cutout, center=center, size=int(40 * level))
        case "rotate":
            matrix = rotation(width, height, sign * 30 * level)
        case "shear_x":
            matrix = (1, sign * 0.3 * level, 0, 0, 1, 0)
        case "shear_y":
            matrix = (1, 0, 0, sign * 0.3 * level, 1, 0)
        case "translate_x":
            matrix = (1, 0, sign * 100 * level, 0, 1, 0)
        case "translate_y":
            matrix = (1, 0, 0, 0, 1, sign * 100 * level)
        case _:
            raise AssertionError(name)
    return partial(warp, source=source_pixels(width, height, matrix))


# Operations on single pixels


def invert(frame: Tensor) -> Tensor:
    """Return the negative."""
    return 255 - frame


def posterize(frame: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` (1 to 8) of every channel."""
    return frame & (256 - 2 ** (8 - bits))


def solarize(frame: Tensor, threshold: float) -> Tensor:
    """Invert the grey levels that are not below `threshold`."""
    # Inverting is flipping all bits; many times faster than torch.where.
    return frame ^ (frame >= float(threshold)).to(torch.uint8).neg_()


def solarize_add(frame: Tensor, addition: int) -> Tensor:
    """Add to all grey levels, at most up to 255, then invert those not below 128."""
    return solarize(frame.clamp(max=255 - addition) + addition, 128)


def brightness(frame: Tensor, factor: float) -> Tensor:
    """Multiply by `factor`; 1 changes nothing."""
    return _blend(0, frame, factor)


def contrast(frame: Tensor, factor: float) -> Tensor:
    """Multiply the distance from the frame's mean luma by `factor`."""
    mean = int(luma(frame).mean(dtype=torch.float64) + 0.5)
    return _blend(mean, frame, factor)


def color(frame: Tensor, factor: float) -> Tensor:
    """Multiply the distance of every pixel from its luma, the saturation, by `factor`."""
    return _blend(luma(frame), frame, factor)


def auto_contrast(frame: Tensor) -> Tensor:
    """Stretch every channel to reach from 0 to 255."""
    darkest = frame.amin((1, 2))[:, None].double()
    brightest = frame.amax((1, 2))[:, None].double()
    levels = torch.arange(256, dtype=torch.float64)
    scale = torch.tensor(255.0).div(brightest - darkest)
    # Pillow's very terms, because the fraction is cut off.
    stretched = (levels * scale + -darkest * scale).clamp(0, 255)
    return _look_up(frame, torch.where(brightest > darkest, stretched, levels))


def equalize(frame: Tensor) -> Tensor:
    """Spread the grey levels of every channel so that all are about equally frequent."""
    histogram = torch.stack([torch.bincount(p.flatten(), minlength=256) for p in frame])
    # The brightest level's count is left out, so that this level becomes 255.
    brightest = frame.amax((1, 2))[:, None].long()
    step = (histogram.sum(1, keepdim=True) - histogram.gather(1, brightest)) // 255
    below = histogram.cumsum(1) - histogram
    levels = (below + step // 2) // step.clamp(min=1)
    return _look_up(frame, torch.where(step > 0, levels.clamp(max=255), torch.arange(256)))


def luma(frame: Tensor) -> Tensor:
    """Return the brightness that the eye sees: (H, W) float32, whole numbers in [0, 255]."""
    red, green, blue = frame.float()
    # All sums are below 2 ** 24, so they are exact.
    total = red.mul_(_LUMA[0]).add_(green.mul_(_LUMA[1])).add_(blue.mul_(_LUMA[2]))
    return total.add_(32768).div_(65536).floor_()


def grayscale(frame: Tensor) -> Tensor:
    """Return the luma in all three channels."""
    return luma(frame).to(torch.uint8).expand(3, -1, -1)


def hue(frame: Tensor, shift: int) -> Tensor:
    """Turn the colour circle by shift / 255 of a turn.

    Goes through hue and saturation of 8 bits, as Pillow does, so even a shift of 0
    changes some pixels by a few grey levels. One pixel in 5000 gets a hue next to Pillow's.
    """
    pixels = frame.float()
    value = pixels.amax(0)
    spread = value - pixels.amin(0)
    # How far every channel is from the brightest one.
    red, green, blue = (value - pixels) / spread.clamp(min=1)
    # Choose by the brightest channel; lerp and ceil are many times faster than torch.where.
    sixths = torch.lerp(2 + (red - blue), 4 + (green - red), green.ceil())
    sixths = torch.lerp(blue - green, sixths, red.ceil())
    turn = sixths / 6
    turn -= turn.floor()
    angle = ((turn * 255).to(torch.uint8) + shift % 256).float() * (6 / 255)
    saturation = (spread / value.clamp(min=1) * 255).floor_()
    # How far every channel falls from `value`, between the colour circle's six corners.
    falls = [2 - (angle - 3).abs_(), (angle - 2).abs_() - 1, (angle - 4).abs_() - 1]
    fall = torch.stack(falls).clamp_(0, 1)
    return (value - value * saturation / 255 * fall + 0.5).to(torch.uint8)


# Operations on neighbourhoods and places


def sharpness(frame: Tensor, factor: float) -> Tensor:
    """Multiply the distance from a smoothed frame by `factor`; the border stays as it is."""
    wide = frame.to(torch.int16)
    columns = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:] + 4 * wide[:, 1:-1, 1:-1]
    smooth = frame.float()
    smooth[:, 1:-1, 1:-1] = (total.float() / 13 + 0.5).floor_()
    return _blend(smooth, frame, factor)


def cutout(frame: Tensor, center: tuple[float, float], size: int) -> Tensor:
    """Paint a grey square, at most `size` pixels wide, around `center` (x, y)."""
    left, top = (max(0, int(position - size / 2)) for position in center)
    painted = frame.clone()
    painted[:, top : top + size, left : left + size] = frame.new_tensor(_CUTOUT_GREY).view(3, 1, 1)
    return painted


def rotation(width: int, height: int, degrees: float) -> tuple[float, ...]:
    """Return the matrix for `source_pixels` that turns counter-clockwise about the centre."""
    angle = -math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


def source_pixels(width: int, height: int, matrix: tuple[float, ...]) -> Tensor:
    """Return where the pixels of an affinely moved frame come from, for `warp`.

    Args:
        width: of the frame, in pixels.
        height: likewise.
        matrix: (a, b, c, d, e, f); the pixel at (x, y) comes from the nearest to
            (a x + b y + c, d x + e y + f), measured between centres of pixels.

    Returns:
        (H, W) int64 position in the flattened frame; H W where there is no such pixel.
    """
    # In 1/65536 pixels, as Pillow computes.
    a, b, c, d, e, f = (
        math.floor(65536 * term + 0.5)
        for term in (
            matrix[0],
            matrix[1],
            matrix[2] + (matrix[0] + matrix[1]) / 2,
            matrix[3],
            matrix[4],
            matrix[5] + (matrix[3] + matrix[4]) / 2,
        )
    )
    x, y = torch.arange(width), torch.arange(height)[:, None]
    column = (a * x + b * y + c) >> 16
    row = (d * x + e * y + f) >> 16
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, height * width)


def warp(frame: Tensor, source: Tensor) -> Tensor:
    """Take every pixel from where `source` says, and black where it says nowhere."""
    planes = F.pad(frame.flatten(1), (0, 1))
    # One plane at a time: twice as fast as along the second dimension of all three.
    moved = [plane.index_select(0, source.flatten()) for plane in planes]
    return torch.stack(moved).view(frame.shape)


def _look_up(frame: Tensor, levels: Tensor) -> Tensor:
    """Replace grey levels by those of a table: (256,), or (3, 256) for each channel its own."""
    tables = levels.to(torch.uint8).expand(3, 256)
    planes = zip(frame, tables, strict=True)
    replaced = [table.index_select(0, plane.flatten().int()) for plane, table in planes]
    return torch.stack(replaced).view(frame.shape)


def _blend(base: Tensor | float, pixels: Tensor, factor: float) -> Tensor:
    """Multiply the distance from `base` to `pixels`; the fraction is cut off as in Pillow."""
    return pixels.float().sub_(base).mul_(factor).add_(base).clamp_(0, 255).to(torch.uint8)

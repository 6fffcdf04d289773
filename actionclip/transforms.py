"""Resize, crop and normalise frames: decoded frames of any size -> the encoder's pixels.

Follows the decoder, which calls `views` on every frame as it comes, and
precedes the image encoder. Everything up to `normalize` stays uint8, on the
CPU. Chooses no frames and opens no files.

Source: CLIP's preprocessing and ActionCLIP's evaluation, which use Pillow.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from actionclip.errors import InputError

Interpolation = Literal["bicubic", "bilinear"]

# The statistics of CLIP's training images, RGB in [0, 1], as OpenAI published them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Those of ImageNet, by which X-CLIP and what is built on its code normalise.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How frames become the pixels that a model was trained on.

    Attributes:
        resolution: side of the square that the encoder takes, in pixels.
        resize: short side before a centre crop. CLIP uses `resolution` itself,
            ActionCLIP `resolution * 256 // 224`.
        mean: of the three channels, in [0, 1].
        std: of the three channels, in [0, 1].
        interpolation: as the model was trained.
    """

    resolution: int
    resize: int
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if not 0 < self.resolution <= self.resize:
            raise InputError(
                f"resize {self.resize} is smaller than the crop of {self.resolution} pixels; "
                "use at least the resolution"
            )


def views(frames: Tensor, preprocessing: Preprocessing, num_crops: int = 1) -> Tensor:
    """Cut one or three square views from a frame, or from every frame of a stack.

    Args:
        frames: (..., 3, H, W) uint8 on the CPU, of any size; small frames are enlarged.
        preprocessing: sizes and interpolation.
        num_crops: 1 for the centre; 3 for three squares along the longer side.

    Returns:
        (num_crops, ..., 3, resolution, resolution) uint8.

    Raises:
        InputError: if the frames are not (..., 3, H, W) uint8, or `num_crops` is not 1 or 3.
    """
    if frames.dtype != torch.uint8 or frames.dim() < 3 or frames.shape[-3] != 3:
        raise InputError(
            f"frames are {tuple(frames.shape)} {frames.dtype}; use (..., 3, H, W) torch.uint8"
        )
    size = preprocessing.resolution
    if num_crops == 1:
        return _resized_center(frames, preprocessing).unsqueeze(0)
    if num_crops == 3:
        # The three squares span the whole short side, so nothing is cut from it.
        resized = resize_short_side(frames, size, preprocessing.interpolation)
        return three_crops(resized)
    raise InputError(f"num_crops is {num_crops}; use 1 or 3")


def _resized_center(frames: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return the centre crop of the resized frames, with little resized that is cut off."""
    height, width = _resized(frames, preprocessing.resize)
    size = preprocessing.resolution
    # Resizing goes along the rows first, with rounded pixels in between, and so does this.
    rows = _resize(frames, (frames.shape[-2], width), preprocessing.interpolation)
    columns = _center(rows, -1, size)
    resized = _resize(columns, (height, size), preprocessing.interpolation)
    # A copy, because a crop would keep the whole resized frame in memory.
    pixels = _center(resized, -2, size).movedim(-3, -1).numpy().copy()
    return torch.from_numpy(pixels).movedim(-1, -3)


def resize_short_side(
    frames: Tensor, size: int, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Resize frames so that their short side has `size` pixels, keeping the aspect ratio.

    Differs from Pillow by at most 2 grey levels, less than 0.02 on average.

    Args:
        frames: (..., 3, H, W) uint8 on the CPU.
        size: the new short side; the long side is `size * long / short`, rounded down.
        interpolation: with antialiasing, as in Pillow.

    Returns:
        (..., 3, h, w) uint8; the input itself if it has the size already.
    """
    return _resize(frames, _resized(frames, size), interpolation)


def _resized(frames: Tensor, size: int) -> tuple[int, int]:
    """Return the height and width at which the short side has `size` pixels."""
    height, width = frames.shape[-2:]
    new_long = int(size * max(height, width) / min(height, width))
    return (size, new_long) if height <= width else (new_long, size)


def _resize(frames: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    """Resize frames (..., 3, H, W) to a height and width."""
    if frames.shape[-2:] == size:
        return frames
    # With the channels innermost, as the decoder leaves them, this is twice as fast. The strides
    # have to say so even of a single frame, or it is laid out anew. NumPy copies on one thread:
    # PyTorch would start threads of its own beside each of those that decode.
    pixels = np.ascontiguousarray(frames.movedim(-3, -1).numpy())
    images = torch.from_numpy(pixels).reshape(-1, *pixels.shape[-3:]).permute(0, 3, 1, 2)
    resized = F.interpolate(images, size, mode=interpolation, antialias=True)
    return resized.reshape(*frames.shape[:-2], *size)


def center_crop(frames: Tensor, size: int) -> Tensor:
    """Return the (..., 3, size, size) centre of frames (..., 3, H, W), as a view of them.

    Raises:
        InputError: if the frames are smaller than that.
    """
    height, width = frames.shape[-2:]
    if min(height, width) < size:
        raise InputError(
            f"frames of {width}x{height} pixels are too small for a crop of {size}; resize them"
        )
    return _center(_center(frames, -2, size), -1, size)


def _center(frames: Tensor, dim: int, size: int) -> Tensor:
    """Return the middle `size` rows or columns of frames, as a view of them."""
    # Python rounds halves to even, and so do CLIP and ActionCLIP.
    return frames.narrow(dim, round((frames.shape[dim] - size) / 2), size)


def three_crops(frames: Tensor) -> Tensor:
    """Cut the left, centre and right square of frames; top, centre and bottom of upright ones.

    The offsets are 0, 1 and 2 times (long - short) // 2 as in ActionCLIP's helper, so the last
    crop ends one pixel before the border if the difference is odd.

    Args:
        frames: (..., 3, H, W).

    Returns:
        (3, ..., 3, S, S) with S the short side.
    """
    height, width = frames.shape[-2:]
    size = min(height, width)
    step = (max(height, width) - size) // 2
    along = -1 if width >= height else -2
    return torch.stack([frames.narrow(along, i * step, size) for i in range(3)])


def normalize(
    frames: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return (frames / 255 - mean) / std.

    Args:
        frames: (..., 3, H, W), uint8 or float in [0, 255], on any device.
        mean: of the three channels, in [0, 1].
        std: of the three channels, in [0, 1].
        dtype: of the result; the arithmetic is in fp32 at least.

    Returns:
        (..., 3, H, W) on the device of the input.
    """
    compute = torch.promote_types(dtype, torch.float32)
    mean_, std_ = (
        torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (mean, std)
    )
    # One multiplication and one addition for every pixel, instead of three operations.
    scale, shift = (
        values.to(frames.device, compute, non_blocking=True)
        for values in (1 / (255 * std_), -mean_ / std_)
    )
    return torch.addcmul(shift, frames.to(compute), scale).to(dtype)

"""How long do 8 decoded frames take to become the encoder's pixels, and what do others need?

    python benchmarks/bench_preprocess.py [--repeats 15] [--json FILE]

Bicubic with antialiasing to a short side of 224 (CLIP) or 256 (ActionCLIP), then the centre 224 x
224, frame by frame as they come from the decoder, on one thread. Peers: Pillow, which the models
were trained with; torchvision, whose arithmetic is PyTorch's; PyTorch's own resize of the whole
frame, with the channels outermost in memory as most code has them. The pixels of ours are
compared with Pillow's first.
"""

import argparse
from collections.abc import Callable, Sequence

import measure
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from actionclip.transforms import Preprocessing, center_crop, views

NUM_FRAMES = 8
OURS = "actionclip"
# The sizes of the goals, and what CLIP and ActionCLIP make of them.
SIZES = {"340x256": (340, 256), "720p": (1280, 720)}
MODELS = {"CLIP": Preprocessing(224, 224), "ActionCLIP": Preprocessing(224, 256)}
# As published, against Pillow: grey levels at most and on average.
MAX_LEVELS, MEAN_LEVELS = 2, 0.01


def draw_frames(width: int, height: int) -> np.ndarray:
    """Return (T, H, W, 3) uint8: smooth colours under noise, which is harder than film."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 128, (NUM_FRAMES, height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 127, width, dtype=np.uint8)[:, None]
    return noise + ramp


def new_size(width: int, height: int, short: int) -> tuple[int, int]:
    long = short * max(width, height) // min(width, height)
    return (long, short) if width >= height else (short, long)


def with_pillow(frames: np.ndarray, preprocessing: Preprocessing) -> Callable[[], list]:
    images = [Image.fromarray(frame) for frame in frames]
    size = preprocessing.resolution
    width, height = new_size(*images[0].size, preprocessing.resize)
    left, top = round((width - size) / 2), round((height - size) / 2)

    def run() -> list[Image.Image]:
        box = (left, top, left + size, top + size)
        return [
            image.resize((width, height), Image.Resampling.BICUBIC).crop(box) for image in images
        ]

    return run


def with_torch(frames: np.ndarray, preprocessing: Preprocessing) -> Callable[[], list]:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    width, height = new_size(frames.shape[2], frames.shape[1], preprocessing.resize)

    def resize(image: Tensor) -> Tensor:
        whole = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)
        return center_crop(whole[0], preprocessing.resolution)

    return lambda: [resize(image) for image in images]


def with_torchvision(frames: np.ndarray, preprocessing: Preprocessing) -> Callable[[], list]:
    from torchvision.transforms import v2

    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    transform = v2.Compose(
        [
            v2.Resize(preprocessing.resize, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(preprocessing.resolution),
        ]
    )
    return lambda: [transform(image) for image in images]


def with_ours(frames: np.ndarray, preprocessing: Preprocessing) -> Callable[[], list]:
    images = torch.from_numpy(frames).permute(0, 3, 1, 2)
    return lambda: [views(image, preprocessing)[0] for image in images]


def build_contestants(
    frames: np.ndarray, preprocessing: Preprocessing
) -> dict[str, Callable[[], list]]:
    contestants = {
        OURS: with_ours(frames, preprocessing),
        "PIL": with_pillow(frames, preprocessing),
        "F.interpolate, whole frames": with_torch(frames, preprocessing),
    }
    try:
        contestants["torchvision v2"] = with_torchvision(frames, preprocessing)
    except (ImportError, RuntimeError):  # one of another PyTorch does not load
        print("  torchvision: absent")
    return contestants


def as_pixels(frames: Sequence) -> np.ndarray:
    """Return (T, H, W, 3) of Pillow's images or of tensors (3, H, W)."""
    return np.stack(
        [np.asarray(f.permute(1, 2, 0) if isinstance(f, Tensor) else f) for f in frames]
    )


def examine(size: str, model: str, repeats: int) -> dict:
    """Compare with Pillow, then time."""
    contestants = build_contestants(draw_frames(*SIZES[size]), MODELS[model])
    right = as_pixels(contestants["PIL"]()).astype(int)
    levels = {name: np.abs(as_pixels(run()) - right) for name, run in contestants.items()}
    for name, difference in levels.items():
        assert difference.max() <= MAX_LEVELS, f"{name}: {difference.max()} levels from Pillow"
        assert difference.mean() <= MEAN_LEVELS, f"{name}: {difference.mean()} levels from Pillow"
    rounds = measure.interleave(contestants, repeats)
    summary = measure.compare(rounds, OURS)
    measure.print_table(f"{size}, {model}", summary)
    for name, difference in levels.items():
        summary[name] |= {
            "levels_at_most": int(difference.max()),
            "levels_on_average": round(float(difference.mean()), 4),
        }
    return {"summary": summary, "ratios": measure.ratios(rounds, OURS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    # All contestants resize a frame on one core; a second thread would only wait.
    torch.set_num_threads(1)
    found = {
        f"{size}, {model}": examine(size, model, arguments.repeats)
        for size in SIZES
        for model in MODELS
    }
    # The goals were measured with CLIP's sizes.
    rows = [measure.row(f"preprocess, {size}", found[f"{size}, CLIP"]["ratios"]) for size in SIZES]
    if arguments.json:
        summaries = {name: result["summary"] for name, result in found.items()}
        measure.write_json(arguments.json, {"rows": rows, "sizes": summaries})


if __name__ == "__main__":
    main()

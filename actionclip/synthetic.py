"""Render the short clips that the embedded model `tiny` learns from, and their sentences.

A coloured shape moves, grows, spins or bounces in front of a drifting texture, and a
sentence such as "a red circle moving left" says so: sentence + seed -> frames
(T, 3, H, W) uint8 -> an H.264 file like any other video. Everything before the file is a
pure function of the sentence and the seed. Shapes at rest, "a big red circle at the top
left", stand in for the images from which CLIP learns before it sees a video. Trains
nothing and decodes nothing.
"""

import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import av
import numpy as np
from numpy.typing import NDArray

from actionclip.errors import InputError

Floats = NDArray[np.floating]
Part = Literal["still", "train", "seen", "unseen"]
Seed = int | Sequence[int]

# Far apart in hue, so that compression and noise leave them what they are.
COLOURS = {
    "red": (215, 35, 35),
    "green": (40, 185, 60),
    "blue": (45, 75, 225),
    "yellow": (235, 215, 40),
    "purple": (165, 50, 195),
    "white": (245, 245, 245),
}
MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning",
    "bouncing",
)
# The radius of shapes at rest as a part of the side, and where their centres are.
SIZES = {"small": (0.12, 0.16), "big": (0.2, 0.27)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
PARTS = get_args(Part)

SIDE = 64  # pixels; even, as 4:2:0 video needs
FRAMES_PER_SECOND = 12
# A centre crop as in evaluation (224 of 256) shows the middle 7/8; shapes stay inside it.
MARGIN = 1 / 16


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 0.9


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(abs(x), abs(y)) - 0.75


def _triangle(x: Floats, y: Floats) -> Floats:
    return _pointed(x, y, points=3, side=0.5)


def _star(x: Floats, y: Floats) -> Floats:
    return _pointed(x, y, points=5, side=0.36)


def _pointed(x: Floats, y: Floats, points: int, side: float) -> Floats:
    """Return the distance to the lines that, `side` away from the centre, join at the points."""
    sector = 2 * np.pi / points
    from_point = abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    # A line leans away from its point by 60 degrees in a triangle, 72 in a pentagram.
    lean = np.pi / 3 if points == 3 else sector
    return np.hypot(x, y) * np.cos(from_point - lean) - side


def _cross(x: Floats, y: Floats) -> Floats:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.maximum(long - 0.95, short - 0.3)


# Signed distance to the outline, negative inside, of a shape of radius 1 with its top at y = -1.
SHAPES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
}


def sentence(colour: str, shape: str, motion: str) -> str:
    """Say what a clip shows."""
    return f"a {colour} {shape} {motion}"


def sentences() -> list[str]:
    """Return the sentences of all combinations, always in the same order."""
    return [sentence(*words) for words in itertools.product(COLOURS, SHAPES, MOTIONS)]


def still_sentence(size: str, colour: str, shape: str, row: str, column: str) -> str:
    """Say what a clip of a shape at rest shows."""
    return f"a {size} {colour} {shape} at the {row} {column}"


def still_sentences() -> list[str]:
    """Return the sentences of all shapes at rest, always in the same order."""
    every = itertools.product(SIZES, COLOURS, SHAPES, ROWS, COLUMNS)
    return [still_sentence(*words) for words in every]


def held_out(seed: int) -> set[str]:
    """Return a fifth of `sentences()`, never to be trained on.

    Every pair of colour and motion lacks exactly one shape, so each word is still seen
    with nearly all others.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    by_colour = dict(zip(COLOURS, rng.permutation(len(COLOURS)), strict=True))
    by_motion = dict(zip(MOTIONS, rng.permutation(len(MOTIONS)), strict=True))
    shapes = list(SHAPES)
    return {
        sentence(c, shapes[(by_colour[c] + by_motion[m]) % len(shapes)], m)
        for c, m in itertools.product(COLOURS, MOTIONS)
    }


@dataclass(frozen=True)
class Track:
    """Where the shape is in each of T frames, every field (T,).

    Attributes:
        x: centre, 0 the left and 1 the right edge.
        y: centre, 0 the top and 1 the bottom edge.
        radius: as a part of the side.
        angle: in radians, clockwise.
    """

    x: Floats
    y: Floats
    radius: Floats
    angle: Floats


def track(motion: str, num_frames: int, rng: np.random.Generator) -> Track:
    """Draw how a shape moves.

    Opposite motions drawn from the same random state are each other's reverse in
    time: neither a single frame nor the mean of all can tell them apart.
    """
    times = np.linspace(0, 1, num_frames, dtype=np.float32)
    # The motion begins up to a seventh of the clip late and may end early.
    done = np.clip((times - rng.uniform(0, 0.15)) / rng.uniform(0.75, 0.9), 0, 1)
    if motion in ("moving left", "moving up", "shrinking"):
        done = done[::-1]
    small, large = rng.uniform(0.08, 0.11), rng.uniform(0.22, 0.28)
    radius = np.full(num_frames, rng.uniform(0.17, 0.22))
    tilt = rng.uniform(-0.25, 0.25)
    if motion in ("growing", "shrinking"):
        radius = small + (large - small) * done
    near, far = MARGIN + float(radius.max()), 1 - MARGIN - float(radius.max())
    x, y = rng.uniform(near, far, (2, 1)).repeat(num_frames, 1)
    travel = (far - near) * rng.uniform(0.75, 1)
    line = rng.uniform(near, far - travel) + travel * done
    turns, hops, phase = rng.uniform(0.75, 1.5), rng.uniform(1.5, 2.5), rng.uniform(0, 1)
    angle = np.full(num_frames, tilt)
    match motion:
        case "moving left" | "moving right":
            x = line
        case "moving up" | "moving down":
            y = line
        case "spinning":
            angle = tilt + rng.choice([-1, 1]) * 2 * np.pi * (turns * times + phase)
        case "bouncing":
            floor = rng.uniform(near + travel, far)
            y = floor - travel * abs(np.sin(np.pi * (hops * times + phase)))
    return Track(*(field.astype(np.float32) for field in (x, y, radius, angle)))


def place(size: str, row: str, column: str, num_frames: int, rng: np.random.Generator) -> Track:
    """Draw where a shape at rest is."""
    radius = rng.uniform(*SIZES[size])
    near, far = MARGIN + radius, 1 - MARGIN - radius
    # The middle third is narrow, because big shapes have little room beside it.
    thirds = ((near, 0.42), (0.45, 0.55), (0.58, far))
    x = rng.uniform(*thirds[COLUMNS.index(column)])
    y = rng.uniform(*thirds[ROWS.index(row)])
    tilt = rng.uniform(-0.25, 0.25)
    return Track(*(np.full(num_frames, v, np.float32) for v in (x, y, radius, tilt)))


def render(text: str, seed: Seed) -> NDArray[np.uint8]:
    """Draw the clip that a sentence describes.

    Args:
        text: one of `sentences()` or `still_sentences()`.
        seed: one non-negative integer or several; another one gives another size, place, speed,
            background, light, noise and length.

    Returns:
        (T, 3, SIDE, SIDE) uint8 RGB, T from 16 to 24, or 4 for a shape at rest.

    Raises:
        InputError: if the sentence is not one of them.
    """
    seeds = [seed] if isinstance(seed, int) else seed
    rng = np.random.Generator(np.random.PCG64([*seeds, *text.encode()]))
    colour, shape, where = _scene(text, rng)
    frames = _background(len(where.x), rng)
    paint = np.array(COLOURS[colour], np.float32) * rng.uniform(0.85, 1.05)
    # The mark lets the eye see even a circle spin.
    inside, mark = _coverage(SHAPES[shape], where)
    for opacity, rgb in ((inside, paint), (inside * mark, 0.3 * paint)):
        frames += opacity[:, None] * (rgb[:, None, None] - frames)
    frames += np.float32(rng.uniform(2, 8)) * rng.standard_normal(frames.shape, np.float32)
    return frames.clip(0, 255).round().astype(np.uint8)


def _scene(text: str, rng: np.random.Generator) -> tuple[str, str, Track]:
    """Return the colour and the shape that a sentence names, and draw its track."""
    for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS):
        if text == sentence(colour, shape, motion):
            return colour, shape, track(motion, int(rng.integers(16, 25)), rng)
    for size, colour, shape, row, column in itertools.product(
        SIZES, COLOURS, SHAPES, ROWS, COLUMNS
    ):
        if text == still_sentence(size, colour, shape, row, column):
            return colour, shape, place(size, row, column, 4, rng)
    raise InputError(
        f"cannot render {text!r}; say {sentences()[0]!r} or another colour "
        f"({', '.join(COLOURS)}), shape ({', '.join(SHAPES)}) and motion ({', '.join(MOTIONS)})"
    )


def _background(num_frames: int, rng: np.random.Generator) -> Floats:
    """Return a smooth texture that drifts: (T, 3, SIDE, SIDE) float32 in [0, 255]."""
    cells = rng.uniform(4, 10)  # of the coarse noise, across the picture
    speed = rng.uniform(-2.5, 2.5, 2).tolist()  # cells a clip, down and right
    noise = rng.uniform(6, 20) * rng.standard_normal((16, 16)) + rng.uniform(50, 130)
    tint = rng.uniform(2, 8) * rng.standard_normal((3, 16, 16)) + rng.uniform(-12, 12, (3, 1, 1))
    places = np.linspace(0, cells, SIDE, dtype=np.float32) + 2.75
    times = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None]
    down, right = (
        np.maximum(0, 1 - abs((places + s * times)[..., None] - np.arange(16, dtype=np.float32)))
        for s in speed
    )  # (T, SIDE, 16) weights of linear interpolation
    return down[:, None] @ (noise + tint).astype(np.float32) @ right[:, None].swapaxes(-1, -2)


def _coverage(distance: Callable[[Floats, Floats], Floats], where: Track) -> tuple[Floats, Floats]:
    """Return how much of every pixel the shape and its mark cover: (T, SIDE, SIDE) each."""
    pixels = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    radius = where.radius[:, None, None]
    dx = (pixels - where.x[:, None, None]) / radius
    dy = (pixels[:, None] - where.y[:, None, None]) / radius
    cos, sin = np.cos(where.angle)[:, None, None], np.sin(where.angle)[:, None, None]
    x, y = dx * cos + dy * sin, dy * cos - dx * sin
    inside, mark = (
        np.clip(0.5 - d * radius * SIDE, 0, 1)
        for d in (distance(x, y), np.hypot(x, y + 0.42) - 0.25)
    )
    return inside, mark


def write_clip(path: str | os.PathLike[str], text: str, seed: Seed) -> None:
    """Render a sentence into an H.264 video file.

    Raises:
        InputError: if `render` refuses the sentence, or the name does not end in .mp4, .mkv,
            .mov or .avi.
        OSError: if the file cannot be written.
    """
    if Path(path).suffix.lower() not in (".mp4", ".mkv", ".mov", ".avi"):
        raise InputError(f"cannot write {str(path)!r}: end the name in .mp4")
    write_frames(path, render(text, seed))


def write_frames(path: str | os.PathLike[str], frames: NDArray[np.uint8]) -> None:
    """Encode frames (T, 3, SIDE, SIDE) uint8 RGB into an H.264 video file."""
    with av.open(str(path), "w") as output:
        # Slower presets track macroblocks ("mbtree"), and x264's bytes then vary from run to run.
        options = {"crf": "23", "preset": "superfast"}
        stream = output.add_stream("libx264", rate=FRAMES_PER_SECOND, options=options)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames.transpose(0, 2, 3, 1):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def part_sentences(part: Part, seed: int) -> list[str]:
    """Return the sentences of a part of the data, see `write_dataset`."""
    if part == "still":
        return still_sentences()
    rest = held_out(seed)
    return [text for text in sentences() if (text in rest) == (part == "unseen")]


def write_dataset(
    folder: str | os.PathLike[str],
    part: Part,
    clips_per_sentence: int,
    seed: int,
    *,
    processes: int = 1,
) -> Iterator[str]:
    """Write a folder per sentence, and `labels.txt` with all that a model may choose from.

    Args:
        folder: where; it may exist. Clips of the same names are written again.
        part: "train" has four fifths of `sentences()`, "seen" other clips of the same
            ones, "unseen" clips of the rest, `held_out(seed)`; "still" has
            `still_sentences()`.
        clips_per_sentence: how many.
        seed: of the split and of every clip; the parts of a seed belong together.
        processes: that render side by side.

    Yields:
        The path of every clip, in order, once it is written.

    Raises:
        OSError: if a file cannot be written.
    """
    chosen = part_sentences(part, seed)
    for text in chosen:
        Path(folder, text).mkdir(parents=True, exist_ok=True)
    candidates = chosen if part == "still" else sentences()
    Path(folder, "labels.txt").write_text("".join(f"{text}\n" for text in candidates))
    # All sentences of a round come before the next round: a run cut short is balanced.
    rounds = list(itertools.product(range(clips_per_sentence), chosen))
    paths = [str(Path(folder, text, f"{number:05d}.mp4")) for number, text in rounds]
    texts = [text for _, text in rounds]
    seeds = [(seed, PARTS.index(part), number) for number, _ in rounds]
    if processes == 1:
        jobs: Iterable[None] = map(write_clip, paths, texts, seeds)
        yield from (path for path, _ in zip(paths, jobs, strict=True))
        return
    # A forked child would inherit locks of the parent's threads.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        jobs = pool.map(write_clip, paths, texts, seeds, chunksize=16)
        yield from (path for path, _ in zip(paths, jobs, strict=True))

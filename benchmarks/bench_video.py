"""How long does it take to get 8 frames of a video, and what do others need for the same?

    python benchmarks/bench_video.py [VIDEO...] [--repeats 7] [--json FILE]

Each reader opens the file and returns the frames at the evaluation positions as RGB. Without
videos, clips are rendered. Peers that are not installed are reported as absent. The frames
of each reader are compared with decoding everything first: one that returns other frames is
reported and not timed. "other rounding" means the right frames, converted to RGB by another
swscale. Peers may use all cores, ours uses one: the ratio of processor time says what many
files at once would cost.
"""

import argparse
import importlib
import os
import sys
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import measure
import numpy as np

from actionclip.sampling import segment_indices
from actionclip.video import decode

NUM_FRAMES = 8
CORES = os.cpu_count() or 1
OURS = "actionclip"

# A reader maps (path, frames in the file, positions) to (T, H, W, 3) uint8.
Reader = Callable[[str, int, list[int]], np.ndarray]


def read_ours(path: str, count: int, positions: list[int]) -> np.ndarray:
    frames = decode(path, lambda n: segment_indices(n, NUM_FRAMES)).frames
    return frames.numpy().transpose(0, 2, 3, 1)


def decode_everything(path: str, wanted: set[int], threads: str) -> tuple[int, dict]:
    """Return the number of frames and the wanted ones, rotated."""
    kept = {}
    count = 0
    with av.open(path) as container:
        stream = container.streams.best("video")
        stream.thread_type = threads
        stream.thread_count = 1 if threads == "NONE" else 0
        for count, frame in enumerate(container.decode(stream), 1):
            if count - 1 in wanted:
                turns = round(frame.rotation / 90)
                kept[count - 1] = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    return count, kept


def read_pyav(threads: str) -> Reader:
    def read(path: str, count: int, positions: list[int]) -> np.ndarray:
        kept = decode_everything(path, set(positions), threads)[1]
        return np.stack([kept[position] for position in positions])

    return read


def read_decord(path: str, count: int, positions: list[int]) -> np.ndarray:
    import decord

    return decord.VideoReader(path, num_threads=CORES).get_batch(positions).asnumpy()


def read_torchcodec(mode: str) -> Reader:
    def read(path: str, count: int, positions: list[int]) -> np.ndarray:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(
            path, seek_mode=mode, num_ffmpeg_threads=CORES, dimension_order="NHWC"
        )
        return decoder.get_frames_at(positions).data.numpy()

    return read


def read_opencv(path: str, count: int, positions: list[int]) -> np.ndarray:
    import cv2

    capture = cv2.VideoCapture(path)
    kept = {}
    for position in range(max(positions) + 1):
        if not capture.grab():
            raise RuntimeError(f"no frame {position}")
        if position in positions:
            kept[position] = cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB)
    capture.release()
    return np.stack([kept[position] for position in positions])


READERS: dict[str, tuple[str, Reader]] = {
    OURS: ("av", read_ours),
    "PyAV all, 1 thread": ("av", read_pyav("NONE")),
    "PyAV all, auto": ("av", read_pyav("AUTO")),
    "decord": ("decord", read_decord),
    "torchcodec exact": ("torchcodec.decoders", read_torchcodec("exact")),
    "torchcodec approx.": ("torchcodec.decoders", read_torchcodec("approximate")),
    "OpenCV grab": ("cv2", read_opencv),
}


def find_absent() -> dict[str, str]:
    """Return why a reader cannot run, for those that cannot."""
    absent = {}
    for name, (module, _) in READERS.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError, RuntimeError) as error:
            reason = "not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
            absent[name] = f"absent: {reason}"
    return absent


def judge(frames: np.ndarray, truth: dict, positions: list[int]) -> str:
    """Say whether these are the frames at the positions, given them and their neighbours."""
    if frames.shape != np.stack([truth[p] for p in positions]).shape:
        return "wrong: another frame size"
    if all((frame == truth[p]).all() for frame, p in zip(frames, positions, strict=True)):
        return "equal"
    wrong = 0
    for frame, position in zip(frames, positions, strict=True):
        distances = {
            p: np.abs(frame.astype(np.int16) - truth[p]).mean()
            for p in (position, position - 1, position + 1)
            if p in truth
        }
        wrong += distances[position] > min(distances.values())
    return f"wrong: {wrong} other frames" if wrong else "other rounding"


def examine(path: str, absent: dict[str, str], repeats: int) -> dict:
    """Compare, then time every reader on one clip."""
    count = decode_everything(path, set(), "AUTO")[0]
    positions = segment_indices(count, NUM_FRAMES)
    near = {p + step for p in positions for step in (-1, 0, 1)}
    truth = decode_everything(path, near, "NONE")[1]
    height, width = truth[positions[0]].shape[:2]
    results: dict[str, dict] = {name: {"frames": reason} for name, reason in absent.items()}
    timed = {}
    for name, (_, read) in READERS.items():
        if name in absent:
            continue
        try:
            verdict = judge(read(path, count, positions), truth, positions)
        except Exception as error:  # a peer may fail in any way; that is its result
            verdict = f"error: {type(error).__name__}"
        results[name] = {"frames": verdict}
        if verdict in ("equal", "other rounding"):
            timed[name] = read
    if results[OURS]["frames"] != "equal":
        sys.exit(f"{path}: our frames differ from decoding everything: {results[OURS]['frames']}")
    rounds = measure.interleave(
        {name: partial(read, path, count, positions) for name, read in timed.items()}, repeats
    )
    for name, figures in measure.compare(rounds, OURS).items():
        results[name] |= figures
    return {
        "clip": Path(path).name,
        "size": f"{width}x{height}",
        "num_frames": count,
        "readers": {name: results[name] for name in READERS},
    }


def render_clips(folder: Path) -> list[str]:
    """Write 10 s of moving noise and gradients in H.264, in two sizes and two GOP lengths."""
    paths = []
    for width, height in ((340, 256), (1280, 720)):
        generator = np.random.default_rng(0)
        noise = generator.integers(0, 60, (height, width + 300, 3), dtype=np.uint8)
        ramp = np.linspace(0, 190, width, dtype=np.uint8)[None, :, None]
        for gop in (12, 250):
            paths.append(str(folder / f"rendered_{height}p_gop{gop}.mp4"))
            with av.open(paths[-1], "w") as output:
                stream = output.add_stream("libx264", rate=30, options={"preset": "medium"})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.gop_size = gop
                stream.codec_context.time_base = Fraction(1, 30)
                for i in range(300):
                    image = noise[:, i : i + width] // 2 + np.roll(ramp, 3 * i, axis=1)
                    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                    frame.pts = i
                    output.mux(stream.encode(frame))
                output.mux(stream.encode(None))
    return paths


def print_clip(clip: dict) -> None:
    timed = {name: row for name, row in clip["readers"].items() if "range" in row}
    title = f"{clip['clip']}  {clip['size']}, {clip['num_frames']} frames"
    measure.print_table(title, timed)
    for name, row in clip["readers"].items():
        if row["frames"] != "equal":
            print(f"  {name:28} {row['frames']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", nargs="*", help="video files; none: render four clips")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--rendered", action="store_true", help="the rendered clips as well")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    absent = find_absent()
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        paths = list(arguments.videos)
        if arguments.rendered or not paths:
            paths += render_clips(Path(folder))
        for path in paths:
            clips.append(examine(path, absent, arguments.repeats))
            print_clip(clips[-1])
    if arguments.json:
        measure.write_json(arguments.json, clips)


if __name__ == "__main__":
    main()

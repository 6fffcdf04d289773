"""How long does it take to get 8 frames of a video, and what do others need for the same?

    python benchmarks/bench_video.py [VIDEO...] [--rendered] [--repeats 5] [--json FILE]

Each reader opens the file and returns the frames at the evaluation positions as RGB. Without
videos, clips are rendered. Peers that are not installed are reported as absent. The frames
of each reader are compared with decoding everything first: one that returns other frames is
reported and not timed. "other rounding" means the right frames, converted to RGB by another
swscale. Ours runs with all cores, as a lone video gets them, and with one, as each of many
videos does: the ratio of processor time says what many files at once would cost.
"""

import argparse
import importlib
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import measure
import numpy as np
from av.codec import codecs_available
from clips import H264, write_moving_noise

from actionclip.sampling import segment_indices
from actionclip.video import decode

NUM_FRAMES = 8
CORES = os.cpu_count() or 1
OURS = "actionclip"
OURS_ALONE = "actionclip, 1 thread"
DECODE_ALL = "PyAV all, auto"
PEERS = ("decord", "torchcodec exact", "torchcodec approx.", "OpenCV grab")
RIGHT = ("equal", "other rounding")
# Of fewer frames than this, a file is opened rather than decoded.
FEWEST_FRAMES = 30

# A reader maps (path, frames in the file, positions) to (T, H, W, 3) uint8.
Reader = Callable[[str, int, list[int]], np.ndarray]


def read_ours(threads: int) -> Reader:
    def read(path: str, count: int, positions: list[int]) -> np.ndarray:
        frames = decode(path, lambda n: segment_indices(n, NUM_FRAMES), threads=threads).frames
        return frames.numpy().transpose(0, 2, 3, 1)

    return read


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
    OURS: ("av", read_ours(CORES)),
    OURS_ALONE: ("av", read_ours(1)),
    "PyAV all, 1 thread": ("av", read_pyav("NONE")),
    DECODE_ALL: ("av", read_pyav("AUTO")),
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


def examine(path: str, kind: str, absent: dict[str, str], repeats: int) -> dict:
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
        if verdict in RIGHT:
            timed[name] = read
    for name in (OURS, OURS_ALONE):
        if results[name]["frames"] != "equal":
            sys.exit(f"{path}: {name}: {results[name]['frames']} than by decoding everything")
    rounds = measure.interleave(
        {name: partial(read, path, count, positions) for name, read in timed.items()}, repeats
    )
    for name, figures in measure.compare(rounds, OURS).items():
        results[name] |= figures
    for name, figures in measure.compare(rounds, OURS_ALONE).items():
        results[name]["1_thread_is_faster_by"] = figures["ours_is_faster_by"]
    return {
        "clip": Path(path).name,
        "kind": kind if count >= FEWEST_FRAMES else "tiny",
        "size": f"{width}x{height}",
        "num_frames": count,
        "readers": {name: results[name] for name in READERS},
    }


# name -> (encoder, its options, width, height, key frame every so many)
HEVC = {"preset": "superfast", "x265-params": "log-level=none"}
VP9 = {"cpu-used": "8", "deadline": "realtime", "row-mt": "1"}
CLIPS: dict[str, tuple[str, dict[str, str], int, int, int]] = {
    "rendered_256p_gop12.mp4": ("libx264", H264, 340, 256, 12),
    "rendered_256p_gop250.mp4": ("libx264", H264, 340, 256, 250),
    "rendered_720p_gop12.mp4": ("libx264", H264, 1280, 720, 12),
    "rendered_720p_gop250.mp4": ("libx264", H264, 1280, 720, 250),
    "rendered_720p_hevc.mp4": ("libx265", HEVC, 1280, 720, 250),
    "rendered_256p_vp9.webm": ("libvpx-vp9", VP9, 340, 256, 128),
}


def render_clips(folder: Path) -> list[str]:
    """Write 10 s of moving noise and gradients in every way for which there is an encoder."""
    paths = []
    for name, (codec, options, width, height, gop) in CLIPS.items():
        if codec not in codecs_available:
            print(f"{name} is left out: this PyAV cannot write {codec}")
            continue
        path = folder / name
        paths.append(write_moving_noise(path, width, height, gop=gop, codec=codec, options=options))
    return paths


def ratio_to(clip: dict, names: Sequence[str], key: str) -> dict[str, float]:
    """Return how much faster ours is than each of these readers that was right."""
    rows = {name: clip["readers"][name] for name in names}
    return {name: row[key] for name, row in rows.items() if row["frames"] in RIGHT}


def summarise(clips: list[dict]) -> dict:
    """Return the ratio to the fastest peer that was right: median and least of each kind."""
    summary: dict = {}
    for key in ("ours_is_faster_by", "1_thread_is_faster_by"):
        for kind in ("real", "rendered", "tiny"):
            ratios = {
                clip["clip"]: min(ratio_to(clip, PEERS, key).values())
                for clip in clips
                if clip["kind"] == kind and ratio_to(clip, PEERS, key)
            }
            if ratios:
                worst = min(ratios, key=ratios.__getitem__)
                summary.setdefault(key, {})[kind] = {
                    "median": round(statistics.median(ratios.values()), 3),
                    "least": ratios[worst],
                    "least_clip": worst,
                }
    return summary


def rows(clips: list[dict]) -> list[dict]:
    """Return what enters the table of benchmarks/README.md."""
    fastest, everything = {}, {}
    for clip in clips:
        peers = ratio_to(clip, PEERS, "ours_is_faster_by")
        if peers:
            fastest[clip["clip"]] = min(peers.values())
        for ratio in ratio_to(clip, (DECODE_ALL,), "ours_is_faster_by").values():
            everything[clip["clip"]] = ratio
    real = {clip["clip"] for clip in clips if clip["kind"] == "real"}
    answers = []
    for title, peer, ratios in (
        ("decode 8 frames", "the fastest for each clip", fastest),
        ("decode 8 frames against all of them", DECODE_ALL, everything),
    ):
        of_real = [ratio for clip, ratio in ratios.items() if clip in real]
        if of_real:
            answers.append(measure.row(f"{title}, real clips", {peer: of_real}))
        if ratios:
            worst = min(ratios, key=ratios.__getitem__)
            against = {f"{peer}: {worst}": [ratios[worst]]}
            answers.append(measure.row(f"{title}, slowest clip", against))
    gop12 = [ratio for clip, ratio in everything.items() if "gop12" in clip]
    if gop12:
        answers.append(
            measure.row("decode 8 frames against all of them, GOP 12", {DECODE_ALL: gop12})
        )
    return answers


def print_clip(clip: dict) -> None:
    timed = {name: row for name, row in clip["readers"].items() if "range" in row}
    title = f"{clip['clip']}  {clip['size']}, {clip['num_frames']} frames"
    measure.print_table(title, timed)
    for name, row in clip["readers"].items():
        if row["frames"] != "equal":
            print(f"  {name:28} {row['frames']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", nargs="*", help="video files; none: only the rendered clips")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--rendered", action="store_true", help="the rendered clips as well")
    parser.add_argument("--json", help="write the results to this file")
    arguments = parser.parse_args()
    absent = find_absent()
    clips = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [(path, "real") for path in arguments.videos]
        if arguments.rendered or not paths:
            paths += [(path, "rendered") for path in render_clips(Path(folder))]
        for path, kind in paths:
            clips.append(examine(path, kind, absent, arguments.repeats))
            print_clip(clips[-1])
    summary = summarise(clips)
    for key, kinds in summary.items():
        for kind, figures in kinds.items():
            print(f"{key}: {kind} clips: {figures}")
    if arguments.json:
        results = {"clips": clips, "summary": summary, "rows": rows(clips)}
        measure.write_json(arguments.json, results)


if __name__ == "__main__":
    main()

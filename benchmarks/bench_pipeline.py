"""Does decoding keep up with the model when many videos are scored, and does the cost stay linear?

    GOMP_SPINCOUNT=10000 python benchmarks/bench_pipeline.py [--clips 16] [--json FILE]

Rendered 10-second clips of 340x256 go through `VideoClassifier.stream`: whole, and its stages
alone, the decoding in the same number of workers, and the model with all frames at hand. `one
after another` decodes in the thread of the model. Where both stages share the cores, the whole
cannot be as fast as the slower one: `share_of_the_cores` is what their processor times would take
on all cores, over what the whole took. Then, with `tiny`, how time and peak memory of a fresh
process grow from 10 to 1,000 clips, and with the first model the time from 8 to 32 frames.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import measure
import numpy as np
import torch
from clips import write_moving_noise
from torch import Tensor

import actionclip
from actionclip.ahead import map_ahead
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.published import MODELS
from actionclip.sampling import view_indices
from actionclip.synthetic import sentences, write_clip
from actionclip.transforms import resize_short_side, views
from actionclip.video import FrameTransform, decode

LABELS = sentences()[:10]
DISTINCT_CLIPS = 4
CLIP_COUNTS = (10, 100, 1000)
FRAME_COUNTS = (8, 16, 24, 32)
CORES = os.cpu_count() or 1
# Scores of the same frames in another order of additions.
TOLERANCE = 1e-5


def render_clips(folder: Path) -> list[str]:
    """Write clips of 10 s in H.264, 340x256, each with noise of its own."""
    return [
        write_moving_noise(folder / f"{number}.mp4", 340, 256, seed=number)
        for number in range(DISTINCT_CLIPS)
    ]


def build(name: str, num_frames: int) -> ActionCLIP:
    """Return a model of a published shape with random weights, always the same."""
    torch.manual_seed(0)
    return ActionCLIP(ActionCLIPConfig(MODELS[name].config.clip, num_frames=num_frames)).eval()


class Stages:
    """The pipeline over a list of clips, and its two stages alone."""

    def __init__(self, name: str, num_frames: int, paths: list[str]) -> None:
        self.model = build(name, num_frames)
        self.paths = paths
        self.classifier = actionclip.VideoClassifier(self.model, LABELS)
        self.in_turn = actionclip.VideoClassifier(self.model, LABELS, workers=0)
        # Resized but not cut, so that the classifier, which does both, has only to cut them.
        size = self.model.preprocessing.resize
        self.ready = [self.decode(path, partial(resize_short_side, size=size)) for path in paths]

    def decode(self, path: str, transform: FrameTransform) -> Tensor:
        rule, count = self.model.config.sampling, self.model.num_frames
        choose = partial(view_indices, num_segments=count, num_clips=1, rule=rule)
        return decode(path, lambda n: choose(n)[0], transform=transform).frames

    def decoding(self) -> None:
        cut = partial(views, preprocessing=self.model.preprocessing)
        work = partial(self.decode, transform=cut)
        for _ in map_ahead(work, self.paths, self.classifier.workers, "decode"):
            pass

    def encoding(self) -> Tensor:
        return self.in_turn(self.ready).scores

    def whole(self) -> Tensor:
        return scores(self.classifier, self.paths)

    def one_after_another(self) -> Tensor:
        return scores(self.in_turn, self.paths)

    def assert_agreement(self) -> None:
        right = self.encoding()
        for run in (self.whole, self.one_after_another):
            error = (run() - right).abs().max()
            assert error < TOLERANCE, f"{run.__name__} is off by {error}"


def scores(classifier: actionclip.VideoClassifier, paths: list[str]) -> Tensor:
    predictions = [result.prediction for result in classifier.stream(paths)]
    return torch.stack([p.scores for p in predictions if p is not None])


def measure_stages(name: str, paths: list[str], repeats: int) -> dict:
    """Time the whole and its stages in turn."""
    stages = Stages(name, 8, paths)
    stages.assert_agreement()
    contestants: dict[str, Callable[[], object]] = {
        "ours": stages.whole,
        "one after another": stages.one_after_another,
        "ours, decoding alone": stages.decoding,
        "ours, model alone": stages.encoding,
    }
    rounds = measure.interleave(contestants, repeats, retries=1)
    summary = measure.compare(rounds, "ours")
    measure.print_table(f"{len(paths)} clips, {name}, 8 frames", summary)
    of_slower, of_cores = [], []
    decoding, encoding = rounds["ours, decoding alone"], rounds["ours, model alone"]
    for i, seconds in enumerate(rounds["ours"].wall):
        of_slower.append(max(decoding.wall[i], encoding.wall[i]) / seconds)
        of_cores.append((decoding.cpu[i] + encoding.cpu[i]) / CORES / seconds)
    for title, shares in (("the slower stage", of_slower), ("the cores", of_cores)):
        print(
            f"  share of {title}: {statistics.median(shares):.0%} "
            f"[{min(shares):.0%}..{max(shares):.0%}]"
        )
    return {
        "summary": summary,
        "share_of_the_slower_stage": [round(share, 3) for share in of_slower],
        "share_of_the_cores": [round(share, 3) for share in of_cores],
        "rows": [
            measure.row("pipeline", measure.ratios(rounds, "ours")),
            measure.row(
                "pipeline, share of its slower stage", {"the slower stage": of_slower}, "limit"
            ),
        ],
    }


def fit_line(counts: tuple[int, ...], values: list[float]) -> dict[str, float]:
    """Return the constant and the slope of a straight line, and how far the values are off it.

    Each value counts by its own size: a percent off is the same at 10 clips as at 1,000.
    """
    slope, constant = np.polyfit(counts, values, 1, w=1 / np.array(values))
    line = constant + slope * np.array(counts)
    return {
        "constant": round(float(constant), 4),
        "slope": round(float(slope), 6),
        "worst_deviation": round(float(np.abs(np.array(values) / line - 1).max()), 3),
    }


def score_tiny(folder: str, count: int) -> None:
    """In a process of its own: score clips with `tiny`, print the seconds and the peak in MiB."""
    paths = sorted(str(path) for path in Path(folder).glob("*.mp4"))
    classifier = actionclip.VideoClassifier(actionclip.load("tiny"), LABELS)
    start = time.perf_counter()
    done = sum(1 for _ in classifier.stream(paths[i % len(paths)] for i in range(count)))
    assert done == count
    print(time.perf_counter() - start, peak_mebibytes())


def peak_mebibytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def measure_growth(folder: Path, repeats: int) -> dict:
    """Score more and more clips with `tiny`, each number in a fresh process."""
    for number, text in enumerate(LABELS):
        write_clip(folder / f"tiny{number}.mp4", text, number)
    seconds: dict[int, list[float]] = {count: [] for count in CLIP_COUNTS}
    peaks: dict[int, list[float]] = {count: [] for count in CLIP_COUNTS}
    for _ in range(repeats):
        for count in CLIP_COUNTS:
            command = [sys.executable, __file__, "--score", str(folder), str(count)]
            (wall, peak), _ = measure.undisturbed(partial(two_numbers, command), retries=1)
            seconds[count].append(wall)
            peaks[count].append(peak)
    line = fit_line(CLIP_COUNTS, [statistics.median(seconds[count]) for count in CLIP_COUNTS])
    memory = {count: round(statistics.median(peaks[count]), 1) for count in CLIP_COUNTS}
    print(f"tiny, {CLIP_COUNTS[0]} to {CLIP_COUNTS[-1]} clips: seconds {line}")
    print(f"  peak memory in MiB: {memory}")
    linear = [10 * few / many for few, many in zip(seconds[100], seconds[1000], strict=True)]
    return {
        "seconds": seconds,
        "seconds_of_clips": line,
        "peak_mebibytes": memory,
        "row": measure.row("pipeline, 1,000 clips against 100", {"in proportion": linear}, "limit"),
    }


def two_numbers(command: list[str]) -> tuple[float, float]:
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    first, second = output.split()
    return float(first), float(second)


def measure_frames(name: str, paths: list[str], repeats: int) -> dict:
    """Time the whole pipeline with 8 to 32 frames of each clip."""
    runs: dict[str, Callable[[], object]] = {
        str(count): Stages(name, count, paths).whole for count in FRAME_COUNTS
    }
    rounds = measure.interleave(runs, repeats, retries=1)
    seconds = {count: statistics.median(rounds[str(count)].wall) for count in FRAME_COUNTS}
    line = fit_line(FRAME_COUNTS, list(seconds.values()))
    print(f"{name}, 8 to 32 frames of {len(paths)} clips: seconds {line}")
    return {"seconds": seconds, "seconds_of_frames": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[m for m in MODELS if "ViT" in m])
    parser.add_argument("--clips", type=int, default=16, help="clips of a run (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds (default 3)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--score", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # the weights are random, and the labels do not matter
    if arguments.score:
        score_tiny(arguments.score[0], int(arguments.score[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = render_clips(Path(folder))
        many = [paths[i % len(paths)] for i in range(arguments.clips)]
        stages = measure_stages(arguments.model, many, arguments.repeats)
        frames = measure_frames(arguments.model, paths, arguments.repeats)
        (Path(folder) / "tiny").mkdir()
        growth = measure_growth(Path(folder) / "tiny", arguments.repeats)
    if arguments.json:
        rows = [*stages.pop("rows"), growth.pop("row")]
        measure.write_json(
            arguments.json, {"rows": rows, "stages": stages, "clips": growth, "frames": frames}
        )


if __name__ == "__main__":
    main()

"""What all benchmarks share: interleaved timing, ratios with their spread, JSON with the machine.

Absolute times mean little on a shared machine, so everything is timed in turn, round by
round, and each round gives one ratio; the median and the range of those ratios are reported.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import actionclip

PACKAGES = (
    "torch",
    "av",
    "numpy",
    "transformers",
    "open_clip_torch",
    "decord",
    "torchcodec",
    "opencv-python-headless",
)


@dataclass
class Rounds:
    """Seconds of every round, by the clock and of processor time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleave(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Rounds]:
    """Time every contestant once a round; one round before the first is not counted."""
    rounds = {name: Rounds() for name in contestants}
    for number in range(repeats + 1):
        for name, run in contestants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if number > 0:
                rounds[name].cpu.append(time.process_time() - cpu)
                rounds[name].wall.append(time.perf_counter() - wall)
    return rounds


def compare(rounds: Mapping[str, Rounds], ours: str) -> dict[str, dict[str, Any]]:
    """Summarise rounds: milliseconds, and how many times faster `ours` was in the same round.

    The ratio of processor times says what many files, or a busy machine, would cost.
    """
    summary = {}
    for name, theirs in rounds.items():
        ratios = _ratios(theirs.wall, rounds[ours].wall)
        summary[name] = {
            "milliseconds": round(1000 * statistics.median(theirs.wall), 2),
            "ours_is_faster_by": round(statistics.median(ratios), 3),
            "range": [round(min(ratios), 3), round(max(ratios), 3)],
            "by_processor_time": round(statistics.median(_ratios(theirs.cpu, rounds[ours].cpu)), 3),
        }
    return summary


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [mine / yours for mine, yours in zip(theirs, ours, strict=True)]


def print_table(title: str, summary: Mapping[str, Mapping[str, Any]]) -> None:
    print(title)
    for name, row in summary.items():
        low, high = row["range"]
        print(
            f"  {name:28} {row['milliseconds']:10.1f} ms   ours x{row['ours_is_faster_by']:.2f} "
            f"[{low:.2f}..{high:.2f}]  processor x{row['by_processor_time']:.2f}"
        )


def machine() -> dict[str, Any]:
    """Describe where and with what the numbers were made."""
    versions: dict[str, str | None] = {"actionclip": actionclip.__version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    # Files elsewhere are named without the folders of this machine.
    words = [
        Path(word).name if word.startswith((os.sep, os.pardir)) else word for word in sys.argv[1:]
    ]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": versions,
    }


def write_json(path: str, results: object) -> None:
    """Write the results beside the description of the machine."""
    document = {"machine": machine(), "results": results}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

"""What all benchmarks share: interleaved timing, ratios with their spread, JSON with the machine.

Absolute times mean little on a shared machine, so everything is timed in turn, round by
round, and each round gives one ratio; the median and the range of those ratios are reported.
A sample during which other programs used the processor is taken again, a few times.
`row` gives the form in which a script's answers enter the table of benchmarks/README.md.
"""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

import actionclip

PACKAGES = (
    "torch",
    "av",
    "numpy",
    "transformers",
    "open_clip_torch",
    "onnxruntime",
    "openvino",
    "decord",
    "torchcodec",
    "opencv-python-headless",
)

# A sample is disturbed if other programs used more than this share of one core meanwhile ...
FOREIGN_SHARE = 0.1
# ... beyond what the kernel's clock of 10 ms cannot tell from nothing on a few cores.
CLOCK_ERROR_SECONDS = 0.03
# How often a disturbed sample is taken again. On a machine that others use all the time each
# try costs as much as a round, so few.
RETRIES = 1

Result = TypeVar("Result")


@dataclass
class Rounds:
    """Seconds of every round, by the clock and of processor time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    disturbed: int = 0  # rounds in which every try was disturbed

    def add(self, wall: float, cpu: float, disturbed: bool = False) -> None:
        """Append one round."""
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.disturbed += disturbed


def interleave(
    contestants: Mapping[str, Callable[[], object]], repeats: int, retries: int = RETRIES
) -> dict[str, Rounds]:
    """Time every contestant once a round; one round before the first is not counted."""
    rounds = {name: Rounds() for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            (wall, cpu), disturbed = undisturbed(partial(_seconds, run), retries)
            rounds[name].add(wall, cpu, disturbed)
    return rounds


def undisturbed(run: Callable[[], Result], retries: int = RETRIES) -> tuple[Result, bool]:
    """Call `run`, again while other programs use the processor, up to `retries` times more.

    Processes that `run` starts count as ours. Where there is no /proc/stat, nothing is ever
    called again.

    Returns:
        What the least disturbed call returned, and whether that one was still disturbed.
    """
    least = float("inf")
    for _ in range(retries + 1):
        start, before = time.perf_counter(), _foreign_seconds()
        result = run()
        seconds = time.perf_counter() - start
        foreign = (_foreign_seconds() - before - CLOCK_ERROR_SECONDS) / seconds
        if foreign < least:
            least, best = foreign, result
        if least <= FOREIGN_SHARE:
            break
    return best, least > FOREIGN_SHARE


def _seconds(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return time.perf_counter() - wall, _cpu_seconds() - cpu


def _cpu_seconds() -> float:
    """Return the processor time of this process and of the children it waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def _foreign_seconds() -> float:
    """Return the processor time that all other programs have used since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - _cpu_seconds() - _living_seconds()


def _living_seconds() -> float:
    """Return the processor time of our living descendants and of those they waited for."""
    parents, ticks = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the command's name, which may hold anything: state, parent, ..., times.
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        number = int(path.parent.name)
        parents[number] = int(fields[1])
        ticks[number] = sum(map(int, fields[11:15]))
    ours, found = set(), {os.getpid()}
    while found:
        found = {number for number, parent in parents.items() if parent in found}
        ours |= found
    return sum(ticks[number] for number in ours) / os.sysconf("SC_CLK_TCK")


def ratios(
    rounds: Mapping[str, Rounds], ours: str, peers: Sequence[str] | None = None
) -> dict[str, list[float]]:
    """Return how many times longer each peer took than `ours`, round by round.

    `peers` are all others whose name does not begin with "ours", unless they are named.
    """
    if peers is None:
        peers = [name for name in rounds if name != ours and not name.startswith("ours")]
    return {name: _ratios(rounds[name].wall, rounds[ours].wall) for name in peers}


def row(
    name: str,
    ratios: Mapping[str, Sequence[float]],
    kind: Literal["time", "memory", "limit"] = "time",
) -> dict[str, Any]:
    """Return one row of the table in benchmarks/README.md; a script's `results["rows"]` holds them.

    Args:
        name: The question, one of those in benchmarks/table.py.
        ratios: For each peer, theirs / ours: one value per round, per clip, or just one. More
            is better for us. Empty if none of the peers could run.
        kind: What was divided. `limit`: not a peer but what no program can beat; the ratio
            is the share of it that ours reaches.

    Returns:
        The row: the best peer is the one with the lowest median.
    """
    medians = {peer: round(statistics.median(values), 3) for peer, values in ratios.items()}
    best = min(medians, key=medians.__getitem__, default=None)
    return {
        "row": name,
        "kind": kind,
        "against": best,
        "peers": {
            peer: {
                "ratio": medians[peer],
                "range": [round(min(values), 3), round(max(values), 3)],
            }
            for peer, values in ratios.items()
        },
    }


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
            "rounds": len(theirs.wall),
            "disturbed": theirs.disturbed,
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

"""Do odd and hostile videos give frames or one clear error, and is nothing else touched?

The catalogue and the odd names of tests/hostile_videos.py through `decode` and through the
command, a long run of mutants, and the files that cost most. Takes about two minutes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import tracing
from hostile_videos import (
    Everything,
    Outcome,
    compressed_index,
    decode_mutants,
    h264_bomb_in_matroska,
    in_command_order,
    measured_outcome,
    run_command,
    trace_decoding,
    write_everything,
)
from video_files import write_video

from actionclip.video import Limits
from benchmarks.reliability.figures import Figure

MUTANTS = 10_000
MOST_SECONDS = 5.0  # of CPU, so that no file fails because the machine is busy
MOST_BYTES = 2 << 30
LARGEST_SIDE = 6928  # a multiple of 16, just below the limit of 48 million pixels


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    """Yield the figures of hostile videos; `small` is some seconds instead of minutes."""
    with write_everything(folder) as everything:
        total = len(everything.rows) + len(everything.not_written)
        missing = [row.name for row in everything.not_written]
        yield share("files of the catalogue that could be written", missing, total)
        for threads in (1,) if small else (1, 2):
            yield from decoding(everything, threads)
        yield from command(everything, folder)
        yield from system_calls(everything, folder)
    yield from mutants(folder, MUTANTS // 100 if small else MUTANTS)
    yield from costly(folder, small)


def share(question: str, failures: Sequence[str], total: int) -> Figure:
    answer = f"{total - len(failures)} of {total}"
    return Figure("B3", question, answer, not failures, "; ".join(failures))


def none(question: str, findings: Sequence[str]) -> Figure:
    return Figure("B3", question, str(len(findings)), not findings, "; ".join(findings[:20]))


def decoding(everything: Everything, threads: int) -> Iterator[Figure]:
    """Decode 8 frames of each file in a process of its own."""
    wrong, costs = [], []
    for path, expected in everything.expected.items():
        outcome, seconds, peak = measured_outcome(path, everything.folder, threads=threads)
        costs.append((seconds, peak, Path(path).name))
        if difference := expected.difference(outcome):
            wrong.append(f"{path}: {difference}")
    how = "one thread" if threads == 1 else f"{threads} threads"
    yield share(f"files and odd names that come out as expected, {how}", wrong, len(costs))
    yield cost(f"8 frames of the slowest, {how}", *max(costs))
    largest = max(costs, key=lambda cost: cost[1])
    yield cost(f"8 frames of the largest in memory, {how}", *largest)


def cost(
    question: str,
    seconds: float,
    peak_bytes: int,
    note: str,
    most_seconds: float = MOST_SECONDS,
    most_bytes: int = MOST_BYTES,
) -> Figure:
    holds = seconds < most_seconds and peak_bytes < most_bytes
    answer = f"{seconds:.2f} s of CPU, {peak_bytes / 1e6:.0f} MB above idle"
    return Figure("B3", question, answer, holds, note)


def command(everything: Everything, folder: Path) -> Iterator[Figure]:
    """Give everything to one `actionclip-zeroshot`."""
    paths = in_command_order(everything.expected)
    run = run_command(paths, everything.folder, folder / "trace")
    wrong = [
        f"{path}: {difference}"
        for path, row in zip(paths, run.rows, strict=False)
        if (difference := everything.expected[path].difference(Outcome.of_row(row)))
    ]
    wrong += [f"{path}: no row" for path in paths[len(run.rows) :]]
    yield share("rows of actionclip-zeroshot as expected, in order", wrong, len(paths))
    yield Figure("B3", "its exit code", str(run.returncode), run.returncode == 3)
    yield none("tracebacks", ["on standard error"] if "Traceback" in run.stderr else [])
    if run.trace is None:
        yield Figure("B3", "its system calls", "not traced", False, "strace is not installed")
        return
    yield none("files that only scripts name, opened", everything.touched_canaries(run.trace))
    yield none("sockets to a network", run.trace.network)


def system_calls(everything: Everything, folder: Path) -> Iterator[Figure]:
    """Decode each file under strace."""
    if tracing.STRACE is None:
        yield Figure("B3", "system calls of decoding", "not traced", False, "no strace")
        return
    paths = list(everything.expected)
    strangers, calls, noise = trace_decoding(paths, everything.folder, folder / "trace")
    yield none("files opened by decoding besides the named one", strangers)
    yield none("sockets and programs of decoding", calls)
    yield none("lines on standard error of decoding", noise.splitlines())
    called = everything.was_called()
    yield none("connections to the port that scripts name", ["somebody called"] * called)


def mutants(folder: Path, number: int) -> Iterator[Figure]:
    """Decode healthy videos of eight kinds with bytes changed, cut out and put in."""
    found = [
        f"seed {seed}: {wrong}"
        for seed, wrong in decode_mutants(folder, range(number), MOST_SECONDS)
        if wrong
    ]
    question = f"of {number} mutants: signals, over 5 s, or errors but ours"
    yield none(question, found)


def costly(folder: Path, small: bool) -> Iterator[Figure]:
    """Decode what claims or needs the most."""
    path = write_video(
        folder / "long.mp4", 600, times=range(0, 600 * 1500, 1500), gop=60, bframes=2
    )
    outcome, seconds, peak = measured_outcome(path, folder)
    ten_hours = cost("8 frames of 600 in ten hours", seconds, peak, outcome.message, 2.0, 500 << 20)
    yield ten_hours if outcome.status == "ok" else none("ten hours", [str(outcome)])
    if small:
        return
    longest = Limits().max_seconds  # not a hang: the work is bounded, and its size by the limits
    path = folder / "largest.mkv"
    path.write_bytes(h264_bomb_in_matroska(LARGEST_SIDE))
    outcome, seconds, peak = measured_outcome(path, folder)
    question = f"30 frames of {LARGEST_SIDE} x {LARGEST_SIDE}, as large as allowed, 16 references"
    yield cost(question, seconds, peak, outcome.status, longest)
    path = folder / "index.mov"
    path.write_bytes(compressed_index(2_000_000_000))
    outcome, seconds, peak = measured_outcome(path, folder)
    packed = f"an index of 2 GB packed into {path.stat().st_size / 1e6:.0f} MB"
    yield cost(packed, seconds, peak, f"{outcome.reason}; libav unpacks no larger one", longest)

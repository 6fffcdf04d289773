"""Bulk scoring under fire: a thousand paths, a third of them bad, killed at random moments."""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from actionclip.classifier import VideoClassifier
from actionclip.synthetic import write_clip
from actionclip.weights import load
from benchmarks.reliability.figures import Figure

LABELS = ("a red circle moving left", "a red circle moving right", "a blue star growing")
BAD = ("missing", "empty", "text", "cut", "folder", "pipe")
SEED = 0


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    """Yield the figures."""
    count, kills, repeats = (100, 3, 1) if small else (1000, 20, 5)
    paths = write_all(folder / "videos", count)
    yield from compare_with_list(folder, paths)
    yield kill(folder, paths, kills)
    yield change_some(folder, paths)
    yield measure_throughput(paths, repeats)
    yield measure_memory(folder, paths)


def write_all(folder: Path, count: int) -> list[str]:
    """Write short videos, three of ten of them bad; returns their paths in a mixed order."""
    folder.mkdir()
    clips = []
    for i in range(20):
        clips.append(folder / f"clip{i}.mp4")
        write_clip(clips[-1], LABELS[i % len(LABELS)], (SEED, i))
    paths = []
    for i in range(count):
        is_bad = i % 10 < 3
        path = folder / f"{i:04d}{'-bad' if is_bad else ''}.mp4"
        if is_bad:
            write_bad(path, BAD[i // 10 % len(BAD)], clips[0])
        else:
            os.link(clips[i % len(clips)], path)
        paths.append(str(path))
    random.Random(SEED).shuffle(paths)
    return paths


def write_bad(path: Path, kind: str, clip: Path) -> None:
    """Write what cannot be scored."""
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("no video")
        case "cut":  # before its index, which an MP4 has at its end
            path.write_bytes(clip.read_bytes()[:1000])
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)


def command(output: Path) -> list[str]:
    return [
        sys.executable, "-m", "actionclip", "zeroshot", "-", "--model", "tiny", "--labels", *LABELS,
        "--format", "jsonl", "--output", str(output),
    ]  # fmt: skip


def run(output: Path, paths: list[str]) -> "subprocess.CompletedProcess[str]":
    """Score all paths, as a user does."""
    names = "".join(f"{path}\n" for path in paths)
    return subprocess.run(command(output), input=names, capture_output=True, text=True)


def rows(output: Path) -> list[dict]:
    """Return the rows of a file, without one that a kill has torn."""
    lines = output.read_bytes().split(b"\n")[:-1] if output.exists() else []
    return [json.loads(line) for line in lines]


def compare_with_list(folder: Path, paths: list[str]) -> Iterator[Figure]:
    """Ask for one row a path in order, and for none the second time."""
    output = folder / "rows.jsonl"
    first = run(output, paths)
    found = rows(output)
    right = [
        row["path"] == path and (row["status"] == "error") == ("-bad" in path)
        for row, path in zip(found, paths, strict=False)
    ]
    holds = first.returncode == 3 and len(found) == len(paths) and all(right)
    answer = f"{sum(right)} of {len(paths)}, exit code {first.returncode}"
    yield Figure("B4", f"{len(paths)} paths, 30 % bad: right rows in order", answer, holds)
    before = output.read_bytes()
    again = run(output, paths)
    expected = f"{len(paths)} of them known from before"
    holds = expected in again.stderr and output.read_bytes() == before
    answer = again.stderr.strip().splitlines()[-1].partition(": ")[2]
    yield Figure("B4", "the same again: nothing is scored, the file stays", answer, holds)


def kill(folder: Path, paths: list[str], kills: int) -> Figure:
    """Kill the command at random moments, and go on each time."""
    expected = (folder / "rows.jsonl").read_bytes()
    output = folder / "killed.jsonl"
    generator = random.Random(SEED)
    num_lost = num_doubled = done = 0
    while done < kills:
        output.unlink(missing_ok=True)
        before: list[dict] = []
        # Until one is through, so that they meet its beginning, its middle and its end.
        while done < kills and len(before) < len(paths):
            process = subprocess.Popen(
                command(output), stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            left = len(paths) - len(before)
            kill_at = len(before) + generator.randrange(-(-left // 3))
            assert process.stdin is not None
            process.stdin.write("".join(f"{path}\n" for path in paths))
            process.stdin.close()
            # At a moment that so many rows were there, and a little later.
            while len(rows(output)) < kill_at and process.poll() is None:
                time.sleep(0.002)
            time.sleep(generator.random() * 0.02)
            process.send_signal(signal.SIGKILL)
            done += process.wait() == -signal.SIGKILL
            now = rows(output)
            num_lost += sum(row not in now for row in before)
            num_doubled += len(now) - len({row["path"] for row in now})
            before = now
        run(output, paths)
        num_lost += output.read_bytes() != expected
    answer = f"{done} kills: {num_lost} lost, {num_doubled} doubled"
    question = "killed (SIGKILL) at random moments: rows lost or doubled"
    return Figure("B4", question, answer, num_lost == num_doubled == 0)


def change_some(folder: Path, paths: list[str]) -> Figure:
    """Change, add and take away videos; only these may be scored anew."""
    output = folder / "rows.jsonl"
    good = [path for path in paths if "-bad" not in path]
    changed, added, removed = good[0], f"{good[1]}.copy.mp4", good[2]
    content = Path(good[3]).read_bytes()
    os.unlink(changed)
    Path(changed).write_bytes(content)
    Path(added).write_bytes(content)
    now = [path for path in paths if path != removed] + [added]
    result = run(output, now)
    holds = (
        f"{len(now) - 2} of them known" in result.stderr
        and [r["path"] for r in rows(output)] == now
    )
    answer = result.stderr.strip().splitlines()[-1].partition(": ")[2]
    question = "one video changed, one added, one removed: only the new are scored"
    return Figure("B4", question, answer, holds)


def measure_throughput(paths: list[str], repeats: int) -> Figure:
    """Compare the time of the good videos alone with that of the whole list."""
    classifier = VideoClassifier(load("tiny"), LABELS, isolated=True)
    good = [path for path in paths if "-bad" not in path and os.path.exists(path)]

    def seconds(videos: list[str]) -> float:
        start = time.perf_counter()
        for _ in classifier.stream(videos):
            pass
        return time.perf_counter() - start

    seconds(good)
    shares = [seconds(good) / seconds(paths) for _ in range(repeats)]
    middle = statistics.median(shares)
    answer = f"{middle:.0%} ({min(shares):.0%} to {max(shares):.0%})"
    question = "speed on the good videos among 30 % bad ones, of that without them"
    return Figure("B4", question, answer, middle >= 0.95, f"{repeats} rounds, the bar is 95 %")


MEMORY = """
import os, sys
from pathlib import Path
from actionclip.classifier import VideoClassifier
from actionclip.weights import load

def family():
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found

def state():
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family()]
    threads = len(os.listdir("/proc/self/task"))
    return sum(pages) * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd")), threads

if __name__ == "__main__":
    paths = sys.stdin.read().splitlines()
    labels = sys.argv[1:]
    classifier = VideoClassifier(load("tiny"), labels, isolated=True)
    for i, _ in enumerate(classifier.stream(paths), start=1):
        if i in (len(paths) // 10, len(paths) - 20):
            print(*state(), flush=True)
"""


def measure_memory(folder: Path, paths: list[str]) -> Figure:
    """Compare memory, file descriptors and threads early and late, children included."""
    script = folder / "memory.py"
    script.write_text(MEMORY)
    result = subprocess.run(
        [sys.executable, script, *LABELS],
        input="\n".join(paths),
        capture_output=True,
        text=True,
        check=True,
    )
    early, late = (list(map(int, line.split())) for line in result.stdout.splitlines())
    growth = late[0] / early[0] - 1
    answer = (
        f"memory {early[0] / 2**20:.0f} to {late[0] / 2**20:.0f} MiB ({growth:+.1%}), open files "
        f"{early[1]} to {late[1]}, threads {early[2]} to {late[2]}"
    )
    holds = growth <= 0.05 and late[1] <= early[1] + 2 and late[2] <= early[2]
    question = f"video {len(paths) // 10} against video {len(paths) - 20}, with all processes"
    return Figure("B4", question, answer, holds)

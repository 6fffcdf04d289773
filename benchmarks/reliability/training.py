"""Does a training survive kills, signals, stalls, a full disk, bad videos and bad losses?

Bars B5, B6 and B7. A training of a tiny model on a few rendered clips, six steps with everything
random in them, is disturbed at every kind of moment and resumed; what it leaves behind has to be
that of an undisturbed one, bit for bit. All of it on a CPU.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import training_runs
from training_files import write_all
from training_runs import Orders, Training, result

import actionclip
from benchmarks.reliability.figures import Figure

KILLS = 20
SEED = 20261121
# A rank that stands still is noticed after so long.
STALL_SECONDS = 5
# As much as holds one state of the model, 15 MB, but not two.
DISK_MEGABYTES = 20

# What torchrun passes on by default, and SIGUSR1.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
RESTARTS = 3


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    """Disturb trainings in every way; `small` leaves out torchrun and most of the kills."""
    data = folder / "data"
    data.mkdir()
    write_all(data)
    whole = Training(data, folder / "whole", "--workers", "0")
    whole.wait()
    whole.clear()
    expected = result(whole.output)
    for ranks, workers in [(1, 0)] if small else [(1, 0), (1, 2), (2, 0), (2, 2)]:
        yield from _kills(data, folder, ranks, workers, 2 if small else KILLS)
    numbers = [signal.SIGUSR1] if small else [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT]
    for number in numbers:
        yield _signals(data, folder, number, expected)
    yield _no_number(data, folder)
    yield _stall(data, folder)
    yield _worker_killed(data, folder)
    yield from _broken(data, folder)
    yield _damaged(data, folder, expected)
    yield _full_disk(data, folder, expected)
    if not small:
        yield from _under_torchrun(data, folder)


def _kills(data: Path, folder: Path, ranks: int, workers: int, kills: int) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tally = training_runs.kill_at_random(
            data, Path(scratch), ranks=ranks, workers=workers, kills=kills, seed=SEED
        )
    where = f"{ranks} rank{'s' * (ranks > 1)}, {workers} workers"
    yield Figure(
        "B5",
        f"kill -9 at random moments, resumed, bit-identical: {where}",
        f"{tally.same} of {kills}",
        tally.same == kills,
        "; ".join(tally.notes),
    )
    yield Figure(
        "B5", f"unreadable states after them: {where}", str(tally.no_state), tally.no_state == 0
    )
    if ranks > 1:
        yield Figure(
            "B5",
            f"longest time until the other rank had ended: {where}",
            f"{tally.seconds:.1f} s",
            tally.seconds < 60,
        )


def _signals(data: Path, folder: Path, number: signal.Signals, expected: dict[str, Any]) -> Figure:
    output = folder / number.name
    code = 130 if number == signal.SIGINT else 143
    *stops, end = training_runs.stop_at_moments(data, output, number)
    steps = {"loading": 0, "first step": 1, "middle": 3, "evaluation": 4, "saving": 4, "average": 6}
    right = [
        stop
        for stop in stops
        if stop.code == code
        and stop.line.startswith(f"{number.name}: saved step ")
        and int(re.findall(r"\d+", stop.line.removeprefix(number.name))[0]) == steps[stop.moment]
    ]
    same = end.code == 0 and result(output) == expected
    wrong = [f"{stop.moment}: {stop.code}, {stop.line}" for stop in stops if stop not in right]
    return Figure(
        "B6",
        f"{number.name} while loading, in the first step, later, in an evaluation, while saving, "
        f"at the average: saved within a step, exit code {code}; bit-identical at the end",
        f"{len(right)} of {len(steps)}; {'identical' if same else 'different'}",
        len(right) == len(steps) and same,
        "; ".join(wrong),
    )


def _no_number(data: Path, folder: Path) -> Figure:
    scratch = folder / "no_number"
    scratch.mkdir()
    found = training_runs.poisoned(data, scratch)
    right = [
        case
        for case, ranks in found.items()
        if all(
            f"not finite in step 2 (rank 1: {ranks[1]['path']});" in rank["message"]
            and rank["unchanged"]
            for rank in ranks
        )
    ]
    return Figure(
        "B7",
        "NaN on one of two ranks: both stop before the optimiser step, with step, rank and file, "
        f"weights unchanged ({', '.join(found)})",
        f"{len(right)} of {len(found)}",
        len(right) == len(found),
        "; ".join(f"{case}: {found[case]}" for case in found if case not in right),
    )


def _stall(data: Path, folder: Path) -> Figure:
    training = Training(
        data,
        folder / "stall",
        *("--workers", "0", "--epochs", "500", "--stall-timeout", str(STALL_SECONDS)),
        ranks=2,
    )
    training_runs.wait_for_lines(training, 2)
    training.signal(signal.SIGSTOP, 1)
    start = time.monotonic()
    training.ranks[0].join(60)
    seconds, code = time.monotonic() - start, training.codes[0]
    training.clear()
    said = "stalled: nothing done" in training.lines[-1]
    with_stacks = "in _step" in training.log.read_text()
    return Figure(
        "B5",
        f"one of two ranks stands still: the other ends after {STALL_SECONDS} s with exit code 6, "
        "the step and all stacks",
        f"exit code {code} after {seconds:.1f} s",
        code == 6 and said and with_stacks,
    )


def _worker_killed(data: Path, folder: Path) -> Figure:
    arguments = ("--workers", "2", "--epochs", "500")
    training = Training(data, folder / "worker", *arguments, ranks=2)
    training_runs.wait_for_lines(training, 2)
    os.kill(training_runs.reading_process(training), signal.SIGKILL)
    start = time.monotonic()
    training.wait(60)
    seconds, codes = time.monotonic() - start, training.codes
    training.clear()
    named = any("a process that reads videos died" in line for line in training.lines)
    return Figure(
        "B5",
        "a process that reads videos is killed: both ranks end, with its number and likely cause",
        f"exit codes {codes} after {seconds:.1f} s",
        codes == [2, 2] and named,
    )


def _broken(data: Path, folder: Path) -> Iterator[Figure]:
    for broken, code in ((0, 0), (2, 0), (20, 4)):
        name = f"many{broken}"
        training_runs.write_many(data, name, broken)
        training = training_runs.train_on_many(data, folder / name, name)
        faults = len((training.output / "bad_samples.jsonl").read_text().splitlines())
        records = [
            json.loads(line)
            for line in (training.output / "metrics.jsonl").read_text().splitlines()
        ]
        counted = max([record.get("replaced", 0) for record in records], default=0)
        holds = training.codes == [code] and (code != 0 or faults == counted == broken)
        answer = f"exit code {training.codes[0]}, {faults} listed, {counted} in the metrics"
        if broken == 2:
            cut = training_runs.train_on_many(data, folder / f"{name}cut", name, stop=True)
            same = cut.codes == [0] and result(cut.output) == result(training.output)
            holds = holds and same
            answer += f"; resumed: {'the same' if same else 'others'}"
        yield Figure(
            "B5",
            f"{broken} of {training_runs.MANY} videos are broken ({broken / 4:g} %), 1 % allowed",
            answer,
            holds,
            "" if holds else training.lines[-1],
        )


def _damaged(data: Path, folder: Path, expected: dict[str, Any]) -> Figure:
    output, arguments = folder / "damaged", ("--workers", "0", "--resume", "latest")
    found = []
    for spoil in (training_runs.flip_a_bit, _cut_in_half, Path.unlink):
        stop = Training(data, output, *arguments, orders=Orders((signal.SIGTERM,), "middle"))
        stop.wait()
        if (output / "last.pt").exists() and (output / "previous.pt").exists():
            spoil(output / "last.pt")
        again = Training(data, output, *arguments)
        again.wait()
        told = any("going on from the state before it" in line for line in again.lines)
        found.append(again.codes == [0] and told and result(output) == expected)
        shutil.rmtree(output)
    return Figure(
        "B5",
        "last.pt has a flipped bit, is cut in half, is gone: noticed, resumed from the state "
        "before it, bit-identical",
        f"{sum(found)} of {len(found)}",
        all(found),
    )


def _cut_in_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _full_disk(data: Path, folder: Path, expected: dict[str, Any]) -> Figure:
    question = (
        f"a disk of {DISK_MEGABYTES} MB fills up: exit code 5, one line, the state before intact, "
        "nothing half written; with room, resumed and bit-identical"
    )
    disk = folder / "disk"
    disk.mkdir()
    size = f"size={DISK_MEGABYTES}m"
    if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", disk], check=False).returncode:
        return Figure("B5", question, "-", False, "mounting a disk is not permitted here")
    try:
        output, arguments = disk / "run", ("--workers", "0", "--resume", "latest")
        full = Training(data, output, *arguments)
        full.wait()
        errors = [line for line in full.lines if "No space left" in line]
        left = [path.name for path in disk.rglob("*.part")]
        faults = training_runs.unreadable(output)
        held = (output / "last.pt").exists() and not faults and not left
        subprocess.run(["mount", "-o", "remount,size=200m", disk], check=True)
        again = Training(data, output, *arguments)
        again.wait()
        resumed = any(line.startswith("going on at step ") for line in again.lines)
        same = again.codes == [0] and resumed and result(output) == expected
    finally:
        subprocess.run(["umount", disk], check=True)
    return Figure(
        "B5",
        question,
        f"exit code {full.codes[0]}, state {'intact' if held else 'lost'}, "
        f"{'identical' if same else 'different'}",
        full.codes == [5] and len(errors) == 1 and held and same,
        "; ".join([*faults, *left]),
    )


def _under_torchrun(data: Path, folder: Path) -> Iterator[Figure]:
    """Use the real launcher, which starts, watches and restarts the processes."""
    whole, _, _ = _torchrun(data, folder / "torchrun")
    if whole != 0:
        yield Figure("B5", "torchrun", f"exit code {whole}", False, "it does not start here")
        return
    expected = result(folder / "torchrun")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        output = folder / f"torchrun-{number.name}"
        code, seconds, err = _torchrun(data, output, to_launcher=number)
        saved = f"{number.name}: saved step " in err
        again, _, _ = _torchrun(data, output)
        same = again == 0 and result(output) == expected
        yield Figure(
            "B6",
            f"{number.name} to torchrun with two ranks: saved and ended; resumed, bit-identical",
            f"ended after {seconds:.1f} s, {'saved' if saved else 'not saved'}, "
            f"{'identical' if same else 'different'}",
            code != 0 and saved and same and seconds < 30,
            f"with its --signals-to-handle {SIGNALS}",
        )
    output = folder / "torchrun-killed"
    code, seconds, _ = _torchrun(data, output, to_rank=signal.SIGKILL)
    yield Figure(
        "B5",
        "kill -9 of one of two ranks: torchrun ends",
        f"exit code {code} after {seconds:.1f} s",
        code != 0 and seconds < 60,
    )
    again = []
    for i in range(RESTARTS):
        output = folder / f"torchrun-restarted{i}"
        code, _, err = _torchrun(data, output, "--max-restarts", "1", to_rank=signal.SIGKILL)
        same = code == 0 and "going on at step " in err and result(output) == expected
        again.append("identical" if same else f"exit code {code}")
    yield Figure(
        "B5",
        "kill -9 of one of two ranks, torchrun --max-restarts 1: goes on by itself, bit-identical",
        f"{again.count('identical')} of {RESTARTS}",
        again.count("identical") == RESTARTS,
        "; ".join(each for each in again if each != "identical"),
    )
    output = folder / "torchrun-stopped"
    options = ("--epochs", "500", "--stall-timeout", str(STALL_SECONDS))
    code, seconds, err = _torchrun(data, output, to_rank=signal.SIGSTOP, options=options)
    yield Figure(
        "B5",
        "one of two ranks stands still: the other says so, torchrun ends",
        f"exit code {code} after {seconds:.1f} s",
        code != 0 and "stalled: nothing done" in err and seconds < 60,
    )


def _torchrun(
    data: Path,
    output: Path,
    *launcher: str,
    to_launcher: signal.Signals | None = None,
    to_rank: signal.Signals | None = None,
    options: Sequence[str] = (),
) -> tuple[int, float, str]:
    """Run two ranks, and send a signal to the launcher or to the second rank on the way.

    Returns:
        The exit code, the seconds after the signal, and what was said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [
        "2",
        "--signals-to-handle",
        SIGNALS,
        *launcher,
        "-m",
        "actionclip",
        "train",
        *training_runs.OPTIONS,
    ]
    command += ["--output", str(output), "--workers", "0", "--resume", "latest", *options]
    root = str(Path(actionclip.__file__).parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": root,
    }
    process = subprocess.Popen(
        command,
        cwd=data,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    start = time.monotonic()
    if to_launcher or to_rank:
        _wait_for_state(process, output)
        start = time.monotonic()
        target = process.pid if to_launcher else training_runs.rank_process(process.pid, 1)
        os.kill(target, to_launcher or to_rank or 0)
    try:
        err = process.communicate(timeout=training_runs.HANG_SECONDS)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its processes, by force after 30 seconds
        err = process.communicate(timeout=training_runs.HANG_SECONDS)[1]
    return process.returncode, time.monotonic() - start, err


def _wait_for_state(process: "subprocess.Popen[str]", output: Path) -> None:
    deadline = time.monotonic() + training_runs.HANG_SECONDS
    while not (output / "previous.pt").exists() and process.poll() is None:
        if time.monotonic() > deadline:
            return
        time.sleep(0.01)

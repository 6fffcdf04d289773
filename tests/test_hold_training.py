"""Training under fire: signals, kills, stalls, full disks, broken videos, losses of no number."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import training_runs
from training_files import write_all
from training_runs import CASES, Orders, Training, result

from actionclip import distributed
from actionclip.errors import InputError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="for POSIX systems")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves behind that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "run"
    training = Training(data, output, "--workers", "0")
    assert training.wait()
    assert training.codes == [0], training.lines
    return result(output)


# Signals.


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_at_any_moment_saves(
    number: signal.Signals, data: Path, tmp_path: Path, whole: dict[str, Any]
) -> None:
    *stops, end = training_runs.stop_at_moments(data, tmp_path / "run", number)
    # The step in which the signal comes is the last one; an evaluation is done again.
    steps = {"loading": 0, "first step": 1, "middle": 3, "evaluation": 4, "average": 6}
    for stop in stops:
        assert stop.code == 143, stop
        saved = re.fullmatch(rf"{number.name}: saved step (\d); go on with .*latest", stop.line)
        assert saved, stop
        if stop.moment in steps:
            assert int(saved[1]) == steps[stop.moment], stop
    assert end.code == 0
    assert result(tmp_path / "run") == whole
    assert not list((tmp_path / "run").glob("*.part"))


def test_what_ends_a_run_at_once(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for second, last in (
        (signal.SIGTERM, "terminated"),
        (signal.SIGUSR1, "SIGUSR1: saved step 1; go on with --resume latest"),
    ):
        orders = Orders((signal.SIGUSR1, second), "first step")
        training = Training(data, output, "--workers", "0", orders=orders)
        assert training.wait()
        assert (training.codes, training.lines[-1]) == ([143], last)
        assert (output / "last.pt").exists() == (second == signal.SIGUSR1)


# Kills and stalls.


@pytest.mark.parametrize(
    ("ranks", "workers", "kills"),
    [
        (1, 0, 1),
        *(
            pytest.param(ranks, workers, 6, marks=pytest.mark.slow)
            for ranks, workers in ((1, 2), (2, 0), (2, 2))
        ),
    ],
)
def test_killed_at_random_moments(
    ranks: int, workers: int, kills: int, data: Path, tmp_path: Path
) -> None:
    tally = training_runs.kill_at_random(
        data, tmp_path, ranks=ranks, workers=workers, kills=kills, seed=7
    )
    assert (tally.same, tally.no_state, tally.notes) == (kills, 0, [])
    assert tally.seconds < 60


def test_while_processes_join_signals_end_them(data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path / "run", "--workers", "0", ranks=2)
    training.signal(signal.SIGKILL, 1)  # long before it could join
    time.sleep(2)
    training.signal(signal.SIGTERM)
    try:
        assert training.wait(20)
        assert training.codes[0] in (-signal.SIGTERM, 143)
    finally:
        training.clear()


def test_restarted_processes_find_nothing_of_former_ones() -> None:
    """What torchrun keeps when it restarts all is one store."""
    store = dist.HashStore()
    store.set("asks/1", "a process that was killed before it was answered")
    for seconds in (0.0, 0.5):  # which the second process takes longer to come
        with ThreadPoolExecutor(2) as executor:
            first = executor.submit(distributed._fresh_part, store, 0, 2, 20.0)
            time.sleep(seconds)
            second = executor.submit(distributed._fresh_part, store, 1, 2, 20.0)
        assert not second.result().check(["address"])
        first.result().set("address", str(seconds))
        assert second.result().get("address") == str(seconds).encode()
    with ThreadPoolExecutor(2) as executor:
        first = executor.submit(distributed._fresh_part, store, 0, 3, 0.5)
        executor.submit(distributed._fresh_part, store, 1, 3, 0.5)
    with pytest.raises(InputError, match=r"of 3 processes 2 did not come within 0.5 s; start all"):
        first.result()


def test_last_words_that_nobody_reads_hold_nothing_up(tmp_path: Path) -> None:
    code = (
        "import os, time\n"
        "from actionclip.cli.watchdog import Watchdog\n"
        "reader, writer = os.pipe()\n"
        "os.set_blocking(writer, False)\n"
        "try:\n"
        "    while True: os.write(writer, b'x' * 4096)\n"
        "except BlockingIOError: pass\n"
        "os.set_blocking(writer, True)\n"
        "os.dup2(writer, 2)\n"
        "with Watchdog('train', 0.2): time.sleep(100)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 1


def test_a_rank_that_stands_still(data: Path, tmp_path: Path) -> None:
    arguments = ("--workers", "0", "--epochs", "500", "--stall-timeout", "5")
    training = Training(data, tmp_path / "run", *arguments, ranks=2)
    try:
        training_runs.wait_for_lines(training, 2)
        training.signal(signal.SIGSTOP, 1)
        training.ranks[0].join(60)
        assert training.codes == [6, None]
    finally:
        training.clear()
    assert re.fullmatch(
        r"rank 0: stalled: nothing done for 5 s since (step \d+ of 1000|saving step \d+|a video of "
        r"the evaluation after step \d+|the start); the stacks above show where it waits: .*",
        training.lines[-1],
    )
    text = training.log.read_text()
    assert re.search(r'Thread 0x.*\n(  File ".*\n)*  File ".*train.py", line \d+ in _step', text)


@pytest.mark.slow
def test_time_in_which_all_stood_still_does_not_count(data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path / "run", "--workers", "0", "--stall-timeout", "5")
    training_runs.wait_for_lines(training, 2)
    training.signal(signal.SIGSTOP)
    time.sleep(8)
    training.signal(signal.SIGCONT)
    assert training.wait()
    assert training.codes == [0]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_reading_process_that_is_killed(ranks: int, data: Path, tmp_path: Path) -> None:
    training = Training(data, tmp_path / "run", "--workers", "2", "--epochs", "500", ranks=ranks)
    training_runs.wait_for_lines(training, 2)
    os.kill(training_runs.reading_process(training), signal.SIGKILL)
    assert training.wait(60)
    assert training.codes == [2] * ranks
    assert any(
        re.match(r"a process that reads videos died \(DataLoader worker .*fewer --wor", line)
        for line in training.lines
    )


# Disks.


def test_a_disk_that_takes_no_more(data: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    output = tmp_path / "run"
    arguments = ("--workers", "0", "--resume", "latest")
    first = Training(data, output, *arguments, orders=Orders((signal.SIGTERM,), "first step"))
    assert first.wait()
    before = (output / "last.pt").read_bytes()
    full = Training(data, output, *arguments, orders=Orders(file_bytes=len(before) // 2))
    assert full.wait()
    assert full.codes == [5]
    assert full.lines[-1] == (
        f"{output / 'last.pt'}: cannot be written: File too large; once it can, go on with "
        "--resume latest"
    )
    assert (output / "last.pt").read_bytes() == before
    assert not list(output.glob("*.part"))
    again = Training(data, output, *arguments)
    assert again.wait()
    assert again.codes == [0]
    assert result(output) == whole


def test_a_damaged_state_is_not_used(data: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    output = tmp_path / "run"
    arguments = ("--workers", "0", "--resume", "latest")
    first = Training(data, output, *arguments, orders=Orders((signal.SIGTERM,), "middle"))
    assert first.wait()
    last, previous = output / "last.pt", output / "previous.pt"
    training_runs.flip_a_bit(last)
    again = Training(data, output, *arguments)
    assert again.wait()
    assert again.codes == [0]
    told = [line for line in again.lines if "last.pt" in line]
    assert len(told) == 1
    assert re.fullmatch(rf"{last}: damaged \(in .*\); going on from the state before it", told[0])
    assert "going on at step 2 of 6" in again.lines
    assert result(output) == whole

    training_runs.flip_a_bit(last)
    os.truncate(previous, 1000)
    none = Training(data, output, *arguments)
    assert none.wait()
    assert none.codes == [2]
    assert re.fullmatch(
        rf"{last}: damaged .*; {previous}: damaged .*; start again in another folder",
        none.lines[-1],
    )


# Losses that are no number, and broken videos.


def test_no_number_on_one_rank_stops_all(data: Path, tmp_path: Path) -> None:
    found = training_runs.poisoned(data, tmp_path)
    assert list(found) == list(CASES)
    for case, ranks in found.items():
        message = f"the loss is not finite in step 2 (rank 1: {ranks[1]['path']}); the step has "
        for rank in ranks:
            assert rank["message"].startswith(message), (case, rank)
            assert rank["unchanged"], case


@pytest.fixture(scope="module")
def many(data: Path) -> Path:
    for broken in (0, 2, 20):
        training_runs.write_many(data, f"many{broken}", broken)
    return data


@pytest.mark.slow
def test_no_broken_videos(many: Path, tmp_path: Path) -> None:
    training = training_runs.train_on_many(many, tmp_path / "run", "many0")
    assert training.codes == [0]
    assert faults_of(training.output) == []


def faults_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "bad_samples.jsonl").read_text().splitlines()]


def test_few_broken_videos_are_counted(many: Path, tmp_path: Path) -> None:
    training = training_runs.train_on_many(many, tmp_path / "whole", "many2")
    assert training.codes == [0]
    found = result(training.output)
    assert len(faults_of(training.output)) == 2
    (end,) = [r for r in found["metrics"] if r["kind"] == "train" and r["step"] == 8]
    assert end["replaced"] == 2


@pytest.mark.slow
def test_broken_videos_are_counted_once_when_resumed(many: Path, tmp_path: Path) -> None:
    training = training_runs.train_on_many(many, tmp_path / "whole", "many2")
    cut = training_runs.train_on_many(many, tmp_path / "cut", "many2", stop=True)
    assert cut.codes == [0]
    assert any(line.startswith("going on at step 3 of ") for line in cut.lines)
    assert result(cut.output) == result(training.output)


def test_many_broken_videos_stop_the_run(many: Path, tmp_path: Path) -> None:
    training = training_runs.train_on_many(many, tmp_path / "run", "many20")
    assert training.codes == [4]
    assert re.match(
        r"\d+ of the 400 videos of epoch 1 cannot be used so far, more than --max-bad 0.01 allows; "
        r"one is many20/.*\.mp4 \(.*\), all are in .*bad_samples.jsonl",
        training.lines[-1],
    )
    assert 4 < len(faults_of(training.output)) <= 20

"""Whatever a file holds or is called: frames or one clear error, and nothing else is touched."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hostile_videos
import pytest
import tracing
from hostile_videos import (
    SIDE_OF_BOMB,
    Everything,
    Outcome,
    decode_mutants,
    in_command_order,
    measured_outcome,
    outcome_of,
    run_command,
    trace_decoding,
    write_everything,
)
from video_files import write_video

from actionclip.video import Limits

needs_strace = pytest.mark.skipif(tracing.STRACE is None, reason="strace is not installed")


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Everything]:
    with write_everything(tmp_path_factory.mktemp("hostile")) as written:
        yield written
        assert not written.was_called()


def test_every_file_comes_out_as_expected(everything: Everything, capfd) -> None:
    assert [row.name for row in everything.not_written] == []
    outcomes = {
        row.name: row.expected.difference(outcome_of(path)) for path, row in everything.rows.items()
    }
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}
    assert len(outcomes) >= 90
    assert capfd.readouterr() == ("", "")  # not even by libav


def test_every_odd_name_comes_out_as_expected(everything: Everything, monkeypatch) -> None:
    monkeypatch.chdir(everything.folder)
    outcomes = {name: x.difference(outcome_of(name)) for name, x in everything.oddities.items()}
    assert {name: wrong for name, wrong in outcomes.items() if wrong} == {}
    assert len(outcomes) >= 19


def test_threads_and_strictness_change_no_outcome(everything: Everything) -> None:
    wrong = []
    for path, row in everything.rows.items():
        if row.name.startswith(("broken/", "lies/", "times/")):
            strict = outcome_of(path, threads=2, strict=True)
            expected = row.expected
            if expected.status == "damaged":
                expected = hostile_videos.error("damaged")
            wrong += filter(None, [expected.difference(strict)])
    assert wrong == []


def test_the_command_gives_each_its_row(everything: Everything, tmp_path: Path) -> None:
    paths = in_command_order(everything.expected)
    run = run_command(paths, everything.folder, tmp_path / "trace")
    assert run.returncode == 3
    lines = run.stderr.splitlines()
    assert [line for line in lines if not line.startswith("actionclip-zeroshot: ")] == []
    assert len(run.rows) == len(paths)
    for path, row in zip(paths, run.rows, strict=True):
        outcome = Outcome.of_row(row)
        assert everything.expected[path].difference(outcome) == "", path
        assert "\n" not in outcome.message
    if run.trace is not None:
        assert everything.touched_canaries(run.trace) == []
        assert run.trace.network == []


@needs_strace
def test_nothing_but_the_named_file_is_opened(everything: Everything, tmp_path: Path) -> None:
    classes = ("scripts/", "bombs/", "lies/", "broken/")
    paths = [str(path) for path, row in everything.rows.items() if row.name.startswith(classes)]
    paths += everything.oddities
    strangers, calls, noise = trace_decoding(paths, everything.folder, tmp_path / "trace")
    assert strangers == []
    assert calls == []
    assert noise == ""


@needs_strace
def test_the_tracer_sees_what_scripts_make_libav_read(
    everything: Everything, tmp_path: Path
) -> None:
    """Without our list of containers libav does follow them."""
    code = (
        "import av, contextlib, sys\n"
        "for path in sys.argv[1:]:\n"
        "    with contextlib.suppress(av.FFmpegError):\n"
        "        av.open(path, container_options={'protocol_whitelist': 'file,http,tcp'})\n"
    )
    for name in ("hls-near.m3u8", "concat-near.mp4"):
        command = [sys.executable, "-c", code, str(everything.path(f"scripts/{name}"))]
        _, trace = tracing.run(command, tmp_path / "trace", timeout=60)
        assert everything.touched_canaries(trace)
    script = tmp_path / "far.m3u8"
    script.write_text(hostile_videos.HLS.format("http://127.0.0.1:1/a.ts"))
    command = [sys.executable, "-c", code, str(script)]
    _, trace = tracing.run(command, tmp_path / "trace", timeout=60)
    assert any("connect" in call for call in trace.network)


@pytest.mark.parametrize(
    "name",
    ["png.mkv", "png-hidden.mkv", "vp8.webm", "h264.mkv", "h264.h264", "jpeg.avi", "gif.gif"],
)
def test_a_bomb_is_refused_before_its_pixels_are_there(everything: Everything, name: str) -> None:
    path = everything.path(f"bombs/{name}")
    outcome, _, peak_bytes = measured_outcome(path, everything.folder)
    assert everything.rows[path].expected.difference(outcome) == ""
    assert peak_bytes < SIDE_OF_BOMB**2  # a byte a pixel


@pytest.mark.parametrize("max_pixels", [96 * 56, 10**12])
def test_the_limit_of_pixels_is_that_of_the_frames_shown(max_pixels: int, tmp_path: Path) -> None:
    """H.264 codes 64 rows of these 56, and libav knows no number above 2**31."""
    path = write_video(tmp_path / "a.mkv", 8, size=(96, 56))
    assert outcome_of(path, limits=Limits(max_pixels=max_pixels)).status == "ok"
    refused = outcome_of(path, limits=Limits(max_pixels=96 * 56 - 1))
    assert refused.reason == "too-large"


def test_mutants_never_escape_our_errors(tmp_path: Path) -> None:
    assert [found for found in decode_mutants(tmp_path, range(100), seconds=5) if found[1]] == []


def test_a_dead_or_silent_child_is_told_from_a_good_one() -> None:
    good = hostile_videos.in_child(lambda report: report("done"), 30)
    assert (good.reports, good.end) == (["done"], "")
    dead = hostile_videos.in_child(lambda _: os.kill(os.getpid(), signal.SIGKILL), 30)
    assert (dead.reports, dead.end) == ([], "ended by signal 9")
    silent = hostile_videos.in_child(lambda _: time.sleep(60), 0.1)
    assert (silent.reports, silent.end) == ([], "silent for 0.1 s")

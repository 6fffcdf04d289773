"""The command as its user meets it: which videos are bad, counts, exit codes."""

import csv
import json
import os
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from video_files import picture, write_video

from actionclip.ahead import map_ahead
from actionclip.cli import check
from actionclip.cli.check import main
from actionclip.video import Limits


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Two classes with a video each, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, num_frames in (("golf", 12), ("diving", 20)):
        Path("clips", name).mkdir(parents=True)
        write_video(Path("clips", name, f"{name}.mp4"), num_frames)
    return Path("clips")


def break_two(clips):
    """Add a file of text and an .avi that ends early."""
    (clips / "golf" / "text.mp4").write_text("not a video")
    whole = write_video(clips / "whole.avi", 60)
    (clips / "golf" / "cut.avi").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()


def test_whole_videos(clips, capsys):
    assert main(["clips"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "actionclip-check: clips: folder per class"
    assert lines[1] == "actionclip-check: 2 classes: diving, golf"
    assert lines[2] == "actionclip-check: 2 videos in clips"
    assert lines[-1] == "actionclip-check: 2 videos: 2 ok, 0 damaged, 0 error, 0 missing"


def test_the_table_holds_the_bad_ones(clips, capsys):
    break_two(clips)
    assert main(["clips"]) == 3
    out, err = capsys.readouterr()
    cut, reason, text, other = out.splitlines()
    assert cut == os.path.join("clips", "golf", "cut.avi")
    assert reason.startswith("  damaged: the file is cut short")
    assert text == os.path.join("clips", "golf", "text.mp4")
    assert other.startswith("  not-a-video: not a video in a known format")
    assert err.splitlines()[-1].endswith("4 videos: 2 ok, 1 damaged, 1 error, 0 missing")


@pytest.mark.parametrize("workers", ["1", "3"])
def test_rows_for_programs_hold_all_in_order(workers, clips, capsys):
    break_two(clips)
    Path("list.txt").write_text(
        "diving/diving.mp4 0\ngone.mp4 0\ngolf/text.mp4 1\ngolf/golf.mp4 1\ngolf/cut.avi 1\n"
    )
    Path("labels.txt").write_text("diving\ngolf\n")
    arguments = ["list.txt", "--videos", "clips", "--labels", "labels.txt", "--workers", workers]
    assert main([*arguments, "--format", "json"]) == 3
    rows = json.loads(capsys.readouterr().out)
    assert [(os.path.basename(row["path"]), row["status"], row["reason"]) for row in rows] == [
        ("diving.mp4", "ok", None),
        ("text.mp4", "error", "not-a-video"),
        ("golf.mp4", "ok", None),
        ("cut.avi", "damaged", "damaged"),
        ("gone.mp4", "error", "missing"),
    ]
    assert [row["frames"] for row in rows][:3] == [20, None, 12]
    assert set(rows[0]) == {"path", "status", "reason", "message", "frames"}
    assert rows[-1]["message"] == "not in clips; restore it or use --videos"
    assert main([*arguments, "--format", "jsonl", "--output", "rows.jsonl"]) == 3
    assert [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()] == rows
    assert main([*arguments, "--format", "csv", "--output", "rows.csv"]) == 3
    table = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    assert [row["reason"] for row in table] == ["", "not-a-video", "", "damaged", "missing"]
    assert list(table[0]) == ["path", "status", "reason", "message", "frames"]


def test_damage_anywhere_is_found(clips, capsys):
    path = clips / "golf" / "golf.mp4"
    write_video(path, 60, gop=5, bframes=0)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = (start + len(data)) // 2
    data[middle : middle + 600] = b"\xff" * 600
    path.write_bytes(data)
    assert main(["clips", "--format", "jsonl"]) == 3
    rows = {row["path"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows[str(path)]["status"] == "damaged"


def test_only_the_span_of_a_sample_is_decoded(clips, capsys):
    Path("spans.csv").write_text(
        "path,label,start,end\ngolf/golf.mp4,golf,0.2,0.4\ngolf/golf.mp4,golf,5,6\n"
    )
    assert main(["spans.csv", "--videos", "clips", "--format", "jsonl"]) == 3
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["status"], first["frames"]) == ("ok", 5)
    assert (second["status"], second["reason"]) == ("error", "no-frames")
    assert "no frame is shown from 5 to 6 seconds, the last one is at 0.44" in second["message"]


def test_folders_of_frames(tmp_path, capsys):
    for i in range(3):
        (tmp_path / "golf" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 48, 32)).save(tmp_path / "golf" / "a" / f"img_{i:05d}.png")
    assert main([str(tmp_path), "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["frames"] == 3
    (tmp_path / "golf" / "a" / "img_00001.png").write_bytes(b"\x89PNG broken")
    assert main([str(tmp_path), "--format", "jsonl"]) == 3
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "error"
    assert "img_00001.png" in row["message"]


def test_a_film_may_take_longer_than_while_training(clips, monkeypatch):
    monkeypatch.setattr(check, "LIMITS", Limits(max_seconds=0.0))
    assert main(["clips"]) == 3
    monkeypatch.undo()
    assert check.LIMITS.max_seconds >= 3600 > Limits().max_seconds


def test_few_videos_are_under_way_at_a_time(clips):
    class Endless:
        taken = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.taken += 1
            return check.Sample(str(clips / "golf" / "golf.mp4"), (0,))

    samples = Endless()
    results = map_ahead(partial(check.decode_one, limits=Limits()), samples, 2, "check")
    for _ in range(10):
        next(results)
    results.close()
    assert samples.taken <= 14


def test_no_bar_where_nobody_looks(clips, capsys, monkeypatch):
    assert main(["clips"]) == 0
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["clips"]) == 0
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: cannot be read (No such file or directory); check the path"),
        (["clips", "--workers", "0"], "--workers is 0, it must be at least 1"),
        (["clips", "--split", "train1"], "clips: has a folder per class and no split 'train1'"),
        (["list.txt", "--output", "list.txt"], "--output list.txt is also an input"),
        (["list.txt"], "list.txt: none of its 1 videos is in "),
        (["list.txt", "--videos", "nope"], "--videos nope: is not a folder"),
        (["clips", "--labels", "nope.txt"], "nope.txt: cannot be read"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, clips, capsys):
    Path("list.txt").write_text("gone.mp4 golf\n")
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"actionclip-check: {message}")
    assert err.count("\n") == 1


def test_an_output_that_cannot_be_written(clips, capsys):
    assert main(["clips", "--output", "no/such/folder"]) == 5
    assert "cannot write the results to no/such/folder" in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--videos", "--labels", "--split", "--workers", "--format", "--output"):
        assert option in out

"""The command as its user meets it: rows, one-line errors, exit codes."""

import base64
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import filled
import pytest
import torch
from golden_files import clip_config, state_shapes
from video_files import write_video

import actionclip
from actionclip.__main__ import main as package_main
from actionclip.classifier import VideoClassifier
from actionclip.cli import building, report, zeroshot
from actionclip.errors import OutputError
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig

LABELS = ["juggling balls", "archery", "bowling"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two videos, a text file called .mp4, an empty folder and a folder of videos."""
    folder = tmp_path_factory.mktemp("zeroshot")
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4))
    filled.fill_(model.clip)
    actionclip.save(model, folder / "model.safetensors")
    (folder / "clips").mkdir()
    for name, count in (("a.mp4", 20), ("clips/b.webm.mkv", 6), ("clips/c.mp4", 5)):
        write_video(folder / name, num_frames=count)
    (folder / "text.mp4").write_text("no video")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(folder)

    def run(*arguments: str, labels: list[str] = LABELS) -> tuple[int, str, str]:
        options = ["--model", "model.safetensors", "--device", "cpu", "--precision", "fp32"]
        code = zeroshot.main([*arguments, "--labels", *labels, *options])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


def rows(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


def test_table(run) -> None:
    code, out, err = run("a.mp4", "--top-k", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "a.mp4"
    assert len(lines) == 3
    score, label = lines[1].split("  ")[1:3]
    assert 0 <= float(score) <= 1
    assert label.strip() in LABELS


def test_every_bad_video_has_its_row_and_the_others_go_on(run) -> None:
    code, out, err = run("nowhere.mp4", "a.mp4", "text.mp4", "empty", "clips", "--format", "jsonl")
    assert code == 3
    table = [(row["path"], row["status"], row["reason"]) for row in rows(out)]
    assert table == [
        ("nowhere.mp4", "error", "missing"),
        ("a.mp4", "ok", None),
        ("text.mp4", "error", "not-a-video"),
        ("empty", "error", "no-frames"),
        (os.path.join("clips", "b.webm.mkv"), "ok", None),
        (os.path.join("clips", "c.mp4"), "ok", None),
    ]
    assert [row["frames"] for row in rows(out)] == [None, 20, None, None, 6, 5]
    lines = err.splitlines()
    assert lines[0].startswith("actionclip-zeroshot: nowhere.mp4: missing: ")
    assert lines[1].startswith("actionclip-zeroshot: text.mp4: not-a-video: ")
    assert lines[2].startswith("actionclip-zeroshot: empty: no-frames: ")
    assert lines[3] == "actionclip-zeroshot: 6 videos: 3 ok, 0 damaged, 3 error"
    assert len(lines) == 4


def test_rows_are_those_of_the_documentation(run) -> None:
    _, out, _ = run("a.mp4", "--format", "json")
    (row,) = json.loads(out)
    assert list(row) == ["path", "status", "reason", "message", "frames", "predictions"]
    assert {p["label"] for p in row["predictions"]} == set(LABELS)
    scores = [p["score"] for p in row["predictions"]]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)
    model = actionclip.load("model.safetensors", device="cpu")
    best = actionclip.VideoClassifier(model, LABELS)("a.mp4").top(1)[0]
    assert row["predictions"][0]["label"] == best[0]
    assert row["predictions"][0]["score"] == pytest.approx(best[1], abs=1e-5)


def test_formats_say_the_same(run) -> None:
    videos = ("a.mp4", "text.mp4", "clips/c.mp4")
    as_json = json.loads(run(*videos, "--format", "json")[1])
    assert rows(run(*videos, "--format", "jsonl")[1]) == as_json
    table = list(csv.DictReader(io.StringIO(run(*videos, "--format", "csv")[1])))
    flat = [
        (row["path"], p.get("label", ""), str(p.get("score", "")))
        for row in as_json
        for p in row["predictions"] or [{}]
    ]
    assert [(line["path"], line["label"], line["score"]) for line in table] == flat
    assert [line["rank"] for line in table] == ["1", "2", "3", "", "1", "2", "3"]


def test_damaged_videos_are_scored_and_said_so(run, folder: Path) -> None:
    whole = write_video(folder / "whole.mkv", num_frames=60).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    code, out, err = run("cut.mkv", "--format", "jsonl")
    (row,) = rows(out)
    assert (code, row["status"], row["reason"]) == (0, "damaged", "damaged")
    assert row["predictions"]
    assert err.startswith(f"actionclip-zeroshot: cut.mkv: damaged: {row['message']}")
    assert "  damaged\n  0." in run("cut.mkv")[1]
    code, out, _ = run("cut.mkv", "--format", "jsonl", "--strict")
    assert (code, rows(out)[0]["status"]) == (3, "error")


def test_paths_from_standard_input(run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        buffer = io.BytesIO(b"a.mp4\n\nnowhere \xff.mp4\r\nclips\n")

    monkeypatch.setattr(sys, "stdin", Input)
    code, out, err = run("-", "--format", "jsonl")
    assert code == 3
    found = [os.path.join("clips", name) for name in ("b.webm.mkv", "c.mp4")]
    assert [row["path"] for row in rows(out)] == ["a.mp4", "nowhere \ufffd.mp4", *found]
    assert base64.b64decode(rows(out)[1]["path_b64"]) == b"nowhere \xff.mp4"
    assert ["path_b64" in row for row in rows(out)] == [False, True, False, False]
    assert "nowhere \ufffd.mp4: missing" in err


def test_labels_and_templates_from_files(run, folder: Path) -> None:
    (folder / "labels.csv").write_text('id,name\n0,archery\n1,"run, jump"\n')
    (folder / "labels.txt").write_text("archery\nrun, jump\n")
    (folder / "templates.txt").write_text("a clip of {}\n{}\n")
    options = ("a.mp4", "--templates", "templates.txt", "--format", "jsonl")
    from_csv = run(*options, labels=["labels.csv"])
    assert from_csv == run(*options, labels=["labels.txt"])
    assert from_csv == run(*options, labels=["archery", "run, jump"])
    assert from_csv[0] == 0


def test_views_and_frames_change_the_scores(run) -> None:
    plain = run("a.mp4", "--format", "jsonl")[1]
    assert run("a.mp4", "--format", "jsonl", "--batch-size", "1", "--workers", "0")[1] == plain
    others = [("--frames", "7"), ("--clips", "3"), ("--crops", "3"), ("--templates", "none")]
    for extra in others:
        code, out, _ = run("a.mp4", "--format", "jsonl", *extra)
        assert code == 0
        assert out != plain


def test_output_file(run, folder: Path) -> None:
    code, out, _ = run("a.mp4", "--format", "jsonl", "--output", "scores.jsonl")
    assert (code, out) == (0, "")
    assert rows((folder / "scores.jsonl").read_text())[0]["path"] == "a.mp4"
    code, _, err = run("a.mp4", "--output", "no/folder/scores.txt")
    assert code == 5
    assert err == (
        "actionclip-zeroshot: cannot write the results to no/folder/scores.txt: "
        "there is no such folder\n"
    )
    if os.path.exists("/dev/full"):
        code, _, err = run("a.mp4", "--output", "/dev/full")
        assert code == 5
        assert err.endswith("No space left on device\n")


@pytest.mark.parametrize("format", ["table", "json", "jsonl", "csv"])
def test_a_killed_run_goes_on(run, folder: Path, format: str, monkeypatch) -> None:
    videos = ("a.mp4", "clips", "text.mp4", "nowhere.mp4", "a.mp4")
    output = folder / f"rows.{format}"
    _, expected, _ = run(*videos, "--format", format)
    classify = VideoClassifier.stream
    taken = []

    def stream(self: VideoClassifier, paths):
        for result in classify(self, paths):
            if len(taken) == 3:
                raise KeyboardInterrupt
            taken.append(result.path)
            yield result

    monkeypatch.setattr(VideoClassifier, "stream", stream)
    options = (*videos, "--format", format, "--output", str(output))
    assert run(*options)[0] == 130
    assert output.exists() == (format == "jsonl")
    taken.clear()
    monkeypatch.setattr(VideoClassifier, "stream", classify)
    code, out, err = run(*options)
    assert (code, out) == (3, "")
    end = "actionclip-zeroshot: 6 videos: 4 ok, 0 damaged, 2 error; 3 of them known from before\n"
    assert err.endswith(end)
    assert "a.mp4" not in err
    written = output.read_text()
    if format == "jsonl":
        records = rows(written)
        assert len({record.pop("key") for record in records}) == 5  # a.mp4 stands twice
        written = "".join(json.dumps(record) + "\n" for record in records)
    assert written == expected
    assert not Path(f"{output}.part").exists()


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_a_link_to_an_output_stays_one(run, folder: Path, format: str) -> None:
    for name in (f"real.{format}", f"link.{format}"):
        (folder / name).unlink(missing_ok=True)
    os.symlink(f"real.{format}", folder / f"link.{format}")
    assert run("a.mp4", "clips", "--format", format, "--output", f"link.{format}")[0] == 0
    assert (folder / f"link.{format}").is_symlink()
    assert "clips" in (folder / f"real.{format}").read_text()


def test_what_a_folder_leaves_out_is_counted(run, folder: Path) -> None:
    (folder / "mixed" / "below").mkdir(parents=True)
    (folder / "mixed" / "below" / "a.mp4").write_bytes((folder / "a.mp4").read_bytes())
    for name in ("upload", "notes.txt"):
        (folder / "mixed" / name).write_text("?")
    code, out, err = run("mixed", "--format", "jsonl")
    assert (code, len(rows(out))) == (0, 1)
    assert err == (
        "actionclip-zeroshot: mixed: 2 other files in it are left out, as they are not called "
        "like videos\n"
    )


def test_rows_that_go_are_counted(run) -> None:
    options = ("--format", "jsonl", "--output", "going.jsonl")
    assert run("clips", "a.mp4", *options)[0] == 0
    err = run("a.mp4", *options)[2]
    assert err == (
        "actionclip-zeroshot: going.jsonl: 2 rows of other videos, settings or earlier tries "
        "were there, and are not\n"
    )


def test_an_output_that_is_a_folder(run) -> None:
    code, _, err = run("a.mp4", "--output", "clips")
    assert (code, err.count("\n")) == (5, 1)
    assert "to clips: it is a folder; name a file" in err


def test_devices_take_rows_and_keep_none(folder: Path) -> None:
    assert zeroshot.is_stream("/dev/stdout")
    assert zeroshot.is_stream("/dev/null")
    os.mkfifo(folder / "pipe")
    assert zeroshot.is_stream(str(folder / "pipe"))
    assert not zeroshot.is_stream(str(folder / "new.jsonl"))
    assert not zeroshot.is_stream(str(folder / "a.mp4"))


def test_names_that_are_not_utf8_in_every_format(run, folder: Path) -> None:
    name = os.fsdecode(b"gone \xfe.mp4")
    for format in ("csv", "table"):
        assert "gone \\udcfe.mp4" in run(name, "--format", format)[1]
    os.makedirs(folder / "frames")
    (folder / "frames" / os.fsdecode(b"1\xff.jpg")).write_text("no image")
    _, out, _ = run("frames", "--format", "jsonl")
    assert "\\udc" not in out
    assert "1\ufffd.jpg" in rows(out)[0]["message"]


def test_csv_keeps_what_scripts_need(run) -> None:
    labels = ["\u0645\u06cc\u200c\u062f\u0648\u062f", "two\u00a0words", "evil\u202egnirts"]
    _, out, _ = run("a.mp4", "--format", "csv", labels=labels)
    assert labels[0] in out
    assert labels[1] in out
    assert "evil\\u202egnirts" in out


def test_other_settings_do_all_again(run, folder: Path) -> None:
    options = ("clips", "--format", "jsonl", "--output", "settings.jsonl")
    changes: list[tuple[tuple[str, ...], list[str]]] = [
        ((), LABELS),
        ((), LABELS[::-1]),
        (("--clips", "2"), LABELS),
        (("--crops", "3"), LABELS),
        (("--frames", "3"), LABELS),
        (("--templates", "none"), LABELS),
        (("--raw-labels",), LABELS),
        (("--top-k", "1"), LABELS),
        (("--strict",), LABELS),
        (("--precision", "bf16"), LABELS),
    ]
    for extra, labels in changes:
        _, _, err = run(*options, *extra, labels=labels)
        assert "known" not in err, extra
    for harmless in ("--batch-size", "1"), ("--workers", "1"):
        assert "2 of them known from before" in run(*options, *extra, *harmless)[2]


def test_a_cell_is_never_computed(run, folder: Path) -> None:
    for name in ("=cmd|' C calc'!A0.mp4", "@SUM(1).mp4", "plain.mp4"):
        (folder / name).write_text("no video")
    labels = ["+1", "-2 \x1b[2J", "archery"]
    videos = ("./a.mp4", "=cmd|' C calc'!A0.mp4", "@SUM(1).mp4", "plain.mp4")
    _, out, _ = run(*videos, "--format", "csv", labels=labels)
    cells = [cell for line in csv.reader(io.StringIO(out)) for cell in line]
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)
    assert "\x1b" not in out
    assert {"'=cmd|' C calc'!A0.mp4", "'@SUM(1).mp4", "'+1", "'-2 \\x1b[2J", "plain.mp4"} <= {
        *cells
    }


@pytest.mark.parametrize(
    ("arguments", "labels", "message"),
    [
        (["a.mp4", "--model", "ViT-B16"], LABELS, r"did you mean ViT-B/16"),
        (["a.mp4"], ["archery", "Archery"], "read the same"),
        (["a.mp4"], ["nolabels.txt"], r"nolabels\.txt: cannot be read"),
        (["a.mp4"], [" "], "blank"),
        (["a.mp4"], ["word " * 90], "has 9. tokens|has 1.. tokens"),
        (["a.mp4", "--templates", "no-such"], LABELS, "unknown templates 'no-such'"),
        (["a.mp4", "--temporal", "lsmt"], LABELS, "temporal is 'lsmt'; choose from"),
        (["a.mp4", "--temporal", "transf"], LABELS, "contradicts"),
        (["a.mp4", "--top-k", "0"], LABELS, "--top-k is 0"),
        (["a.mp4", "--frames", "0"], LABELS, "num_frames is 0"),
        (["a.mp4", "--frames", "four"], LABELS, "argument --frames: invalid int value: 'four'"),
        (["a.mp4", "--crops", "2"], LABELS, "argument --crops: invalid choice"),
        (["a.mp4", "--device", "gpu7"], LABELS, "--device gpu7 cannot be used here"),
        (["a.mp4", "--device", "meta"], LABELS, "--device meta cannot be used here"),
        (["a.mp4", "--output", "a.mp4"], LABELS, "--output a.mp4 is also an input"),
        (["a.mp4"], ["archery", "text.mp4"], r"label 'text\.mp4' is a file; name videos before"),
        (["a.mp4", "--model", "/dev/null"], LABELS, "/dev/null: not a regular file"),
        (["a.mp4", "--no-such-option"], LABELS, "unrecognized arguments: --no-such-option"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    folder: Path, monkeypatch, capsys, arguments: list[str], labels: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    options = [] if "--model" in arguments else ["--model", "model.safetensors"]
    assert zeroshot.main([*arguments, "--labels", *labels, *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("actionclip-zeroshot: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [
        (">&-", 5, "standard output is closed"),
        ("<&-", 2, "standard input is closed"),
        ("2>&-", 3, ""),
    ],
)
def test_closed_streams(folder: Path, redirect: str, code: int, message: str) -> None:
    shell = " ".join(command("-", "no.mp4", "--labels", "x", "--model", "model.safetensors"))
    if redirect != "<&-":
        redirect += " < /dev/null"
    result = subprocess.run(
        ["bash", "-c", f"{shell} {redirect}"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_warnings_are_one_line_each(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    torch.save(filled.state_dict(state_shapes("clip", "tiny")), "plain.pt")
    options = ("--model", "plain.pt", "--temporal", "transf", "--precision", "fp32")
    assert zeroshot.main(["a.mp4", "--labels", *LABELS, *options]) == 0
    told, untrained = capsys.readouterr().err.splitlines()
    start = "actionclip-zeroshot: warning: "
    assert told.startswith(start + "plain.pt does not tell its activation")
    assert untrained.startswith(start + "the model holds untrained weights")


def test_missing_labels(capsys) -> None:
    assert zeroshot.main(["a.mp4"]) == 2
    assert "--labels" in capsys.readouterr().err


def test_a_damaged_weight_file(run, folder: Path, capsys) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[:-10])
    code = zeroshot.main(["a.mp4", "--labels", *LABELS, "--model", "cut.safetensors"])
    err = capsys.readouterr().err
    assert code == 2
    assert err.count("\n") == 1
    assert "cut.safetensors" in err


def test_an_error_of_ours_is_exit_1_and_debug_shows_where(
    run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(building, "VideoClassifier", fail)
    code, _, err = run("a.mp4")
    assert code == 1
    assert err.startswith("actionclip-zeroshot: internal error, please report it: KeyError: 'oops'")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert zeroshot.main(["a.mp4", "--labels", "x", "--model", "nothing", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_control_characters_cannot_reach_the_terminal(run, folder: Path) -> None:
    name = "evil\x1b[31m\nname.mp4"
    write_video(folder / "plain.mp4", num_frames=3).rename(folder / name)
    code, out, err = run(name, "nowhere\x07.mp4", labels=["a", "b\x1b[2J"])
    assert code == 3
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert out.splitlines()[0] == "evil\\x1b[31m\\nname.mp4"


def test_bars_have_eighths() -> None:
    table = report.TableWriter(io.StringIO())
    assert table.bar(1.0) == "█" * 20
    assert table.bar(0.0) == ""
    assert table.bar(0.5 + 1 / 160) == "█" * 10 + "▏"
    assert table.bar(0.049) == "█"
    assert table.bar(0.04) == "▊"

    class Ascii(io.StringIO):
        encoding = "ascii"

    assert report.TableWriter(Ascii()).bar(0.5) == "#" * 10


def test_help_and_version(capsys) -> None:
    assert zeroshot.main(["--help"]) == 0
    assert "exit codes:" in capsys.readouterr().out
    assert zeroshot.main(["--version"]) == 0
    assert capsys.readouterr().out == f"actionclip {actionclip.__version__}\n"


def test_as_a_module(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    assert package_main(["zeroshot", "a.mp4", "--labels", "x", "--model", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("actionclip-zeroshot: model 'nothing'")
    assert package_main(["no-such-command"]) == 2
    assert "{zeroshot,train,eval,check,synthetic,env}" in capsys.readouterr().err
    assert package_main(["--help"]) == 0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "actionclip", "zeroshot", *arguments]


def test_signals_end_it_with_their_codes(folder: Path) -> None:
    """A list on standard input that never ends leaves the command waiting."""
    arguments = command("-", "--labels", "x", "--model", "model.safetensors", "--format", "jsonl")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [*arguments, "--workers", "0"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("nowhere.mp4\n" * 3000)
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["status"] == "error"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code, err
        assert "Traceback" not in err


def test_a_reader_that_leaves_is_no_traceback(folder: Path) -> None:
    shell = " ".join(command("-", "--labels", "x", "--model", "model.safetensors"))
    result = subprocess.run(
        [
            "bash",
            "-c",
            f"yes no.mp4 | head -3000 | {shell} | head -1; echo ${{PIPESTATUS[2]}}",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout.splitlines() == ["no.mp4", "5"]
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


def test_closed_standard_output_is_named_once(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with (
        pytest.raises(OutputError, match=r"^standard output is closed; use --output FILE$"),
        report.open_output(None),
    ):
        pass

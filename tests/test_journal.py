"""Rows that survive: what is known is not done again, nothing is lost, nothing stands twice."""

import errno
import json
import os
import resource
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from actionclip.cli import journal
from actionclip.cli.journal import Journal, replace_output
from actionclip.errors import InputError, OutputError

SETTINGS = {"labels": ["a", "b"]}


class Classifier:
    """Gives every video a row, and notes which it was asked for."""

    def __init__(self, ahead: int = 0, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.ahead = ahead
        self.stop_after = stop_after

    def __call__(self, paths: Iterable[str]) -> Iterator[dict]:
        paths = iter(paths)
        waiting: list[str] = []
        for _ in range(10**6):
            while len(waiting) <= self.ahead and (path := next(paths, None)) is not None:
                waiting.append(path)
            if not waiting:
                return
            if len(self.asked) == self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(waiting.pop(0))
            yield make_row(self.asked[-1])


def make_row(path: str) -> dict:
    reason = None if os.path.exists(path) else "missing"
    status = "error" if reason else "ok"
    return {"path": path, "status": status, "reason": reason, "message": f"about {path}"}


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    names = [f"{i}.mp4" for i in range(6)]
    for name in names:
        Path(name).write_text(name)
    return names


def complete(videos: Iterable[str], classifier: Classifier, settings: object = SETTINGS) -> list:
    """Run to the end; returns whether each row is new."""
    with Journal("rows.jsonl", settings) as rows:
        done = list(rows.complete(videos, classifier))
        assert [row for row, _ in done] == [make_row(path) for path in videos]
        rows.finish()
    return [is_new for _, is_new in done]


def lines() -> list[dict]:
    return [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ahead", [0, 1, 4])
@pytest.mark.parametrize("done", range(6))
def test_an_interrupted_run_goes_on(videos, ahead: int, done: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        complete(videos, Classifier(ahead, stop_after=done))
    assert [line["path"] for line in lines()] == videos[:done]
    classifier = Classifier(ahead)
    assert complete(videos, classifier) == [False] * done + [True] * (6 - done)
    assert classifier.asked == videos[done:]
    assert [line["path"] for line in lines()] == videos
    assert complete(videos, classifier) == [False] * 6


@pytest.mark.parametrize("torn", range(1, 60, 7))
def test_a_torn_line_is_done_again(videos, torn: int) -> None:
    complete(videos, Classifier())
    whole = Path("rows.jsonl").read_bytes()
    os.truncate("rows.jsonl", len(whole) - torn)
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == videos[-1:]
    assert Path("rows.jsonl").read_bytes() == whole


def test_what_a_power_cut_leaves(videos) -> None:
    complete(videos[:3], Classifier())
    with open("rows.jsonl", "ab") as file:
        file.write(bytes(5000))
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == videos[3:]


def test_another_list_leaves_its_own_rows_in_its_order(videos) -> None:
    complete(videos[:4], Classifier())
    others = ["new.mp4", *reversed(videos), "5.mp4"]
    Path("new.mp4").write_text("")
    classifier = Classifier(ahead=2)
    complete(others, classifier)
    assert classifier.asked == ["new.mp4", "5.mp4", "4.mp4", "5.mp4"]  # twice listed, two rows
    assert [line["path"] for line in lines()] == others
    classifier = Classifier()
    complete(others, classifier)
    assert classifier.asked == []


@pytest.mark.parametrize("change", ["size", "time", "settings"])
def test_what_has_changed_is_done_again(videos, change: str) -> None:
    complete(videos, Classifier())
    classifier = Classifier()
    match change:
        case "size":
            Path("2.mp4").write_text("longer than before")
        case "time":
            os.utime("2.mp4", ns=(1, 1))
        case "settings":
            complete(videos, classifier, {"labels": ["a"]})
            assert classifier.asked == videos
            return
    complete(videos, classifier)
    assert classifier.asked == ["2.mp4"]
    assert [line["path"] for line in lines()] == videos


def test_a_video_that_was_missing(videos) -> None:
    os.rename("2.mp4", "elsewhere")
    complete(videos, Classifier())
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == []
    os.rename("elsewhere", "2.mp4")
    complete(videos, classifier)
    assert classifier.asked == ["2.mp4"]
    assert [line["status"] for line in lines()] == ["ok"] * 6


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_video_that_could_not_be_read(videos) -> None:
    os.chmod("2.mp4", 0)
    complete(videos, Classifier())
    os.chmod("2.mp4", 0o600)
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == ["2.mp4"]


@pytest.mark.parametrize("reason", ["unreadable", "timeout", "crashed"])
def test_what_the_machine_may_have_caused_is_tried_again(videos, reason: str) -> None:
    complete(videos, Classifier())
    text = Path("rows.jsonl").read_text()
    before = '"reason": null, "message": "about 2'
    Path("rows.jsonl").write_text(text.replace(before, before.replace("null", f'"{reason}"')))
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == ["2.mp4"]
    assert [line["reason"] for line in lines()] == [None] * 6


def test_a_folder_of_frames_is_what_is_in_it(videos) -> None:
    os.mkdir("frames")
    Path("frames", "1.jpg").write_text("one")
    os.utime("frames", ns=(1, 1))
    complete(["frames"], Classifier())
    classifier = Classifier()
    complete(["frames"], classifier)
    assert classifier.asked == []
    Path("frames", "1.jpg").write_text("another")
    assert os.stat("frames").st_mtime_ns == 1
    complete(["frames"], classifier)
    assert classifier.asked == ["frames"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_file_that_is_taken_away_meanwhile(videos, is_replaced: bool) -> None:
    with Journal("rows.jsonl", SETTINGS) as rows:
        list(rows.complete(videos, Classifier()))
        os.unlink("rows.jsonl")
        if is_replaced:
            Path("rows.jsonl").write_text("another's")
        rows.finish()
    assert [line["path"] for line in lines()] == videos


def test_a_disk_without_locks(videos, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: object) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal, "try_lock", refuse)
    with pytest.raises(OutputError, match=r"results to rows\.jsonl: No locks available"):
        complete(videos, Classifier())


@pytest.mark.parametrize(
    "content",
    [
        b"hello",
        b"hello\n",
        b'{"path": "a.mp4", "status": "ok"}\n',  # of another version, or another command
        b'{"labels": ["a"]}',
        b'{"path": "/etc/precious", "a": 1}',
        b"[]\n",
        b"\xff\xfe\n",
        b"{" * 100_000 + b"\n",
    ],
)
def test_a_file_of_something_else_is_left_alone(videos, content: bytes) -> None:
    Path("rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.jsonl: its line at byte 0 is not a row that this"):
        complete(videos, Classifier())
    assert Path("rows.jsonl").read_bytes() == content


def test_one_process_writes_it(videos) -> None:
    with (
        Journal("rows.jsonl", SETTINGS),
        pytest.raises(InputError, match=r"rows\.jsonl: another process writes it"),
        Journal("rows.jsonl", SETTINGS),
    ):
        pass


def test_a_disk_that_refuses(videos) -> None:
    with (
        pytest.raises(OutputError, match=r"no/rows\.jsonl: No such file"),
        Journal("no/rows.jsonl", 1),
    ):
        pass
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"rows\.jsonl: File too large"):
            complete(videos, Classifier())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.path.getsize("rows.jsonl") == 300
    classifier = Classifier()
    complete(videos, classifier)
    assert classifier.asked == videos[2:]


def test_rows_reach_the_disk_now_and_then(videos, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    clock = iter(range(0, 100, 2))
    monkeypatch.setattr(journal.os, "fsync", lambda _: flushed.append(len(lines())))
    monkeypatch.setattr(journal.time, "monotonic", clock.__next__)
    complete(videos, Classifier())
    assert flushed == [3, 6, 6]  # after more than five seconds each, and at the end


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("older")

    def rows() -> Iterator[dict]:
        yield make_row("a.mp4")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_output(str(path), "json", rows())
    assert path.read_text() == "older"
    replace_output(str(path), "json", [make_row("a.mp4"), make_row("b \udcff.mp4")])
    assert json.loads(path.read_text()) == [make_row("a.mp4"), make_row("b \udcff.mp4")]
    assert os.listdir(tmp_path) == ["rows.json"]

"""The files of a run: nothing is lost, doubled or half written, whatever happens to the disk."""

import errno
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from actionclip import tensor_files
from actionclip.errors import InputError, OutputError, TrainingError, WeightsError
from actionclip.labels import read_labels
from actionclip.runs import RunFolder
from actionclip.tensor_files import write_atomically

STATE = {"step": 7, "weights": torch.arange(300_000.0)}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run with two lines in its metrics, one in its bad samples, and a saved state."""
    folder = RunFolder(tmp_path / "new" / "run")
    folder.check_free()
    folder.start({"name": "Ärger", "broken": "\udcff"}, ("left, right", "# Ärger"))
    folder.log("metrics", {"step": 1})
    folder.log("metrics", {"step": 2, "text": "first\u2028second"})
    folder.log("bad_samples", {"path": "a\udcff.mp4"})
    folder.save_state(STATE)
    return folder


def test_what_is_written_is_read(folder: RunFolder) -> None:
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "bad_samples.jsonl",
        "config.json",
        "labels.txt",
        "last.pt",
        "metrics.jsonl",
    ]
    assert (folder.path / "config.json").read_text(encoding="utf-8") == (
        '{\n  "name": "Ärger",\n  "broken": "?"\n}\n'
    )
    assert folder.records("metrics") == [{"step": 1}, {"step": 2, "text": "first\u2028second"}]
    assert folder.records("bad_samples") == [{"path": "a\udcff.mp4"}]
    state = folder.load_state(folder.last)
    assert state["step"] == 7
    assert torch.equal(state["weights"], STATE["weights"])
    sizes = {name: folder.log_file(name).stat().st_size for name in ("metrics", "bad_samples")}
    assert state["log_sizes"] == sizes


LABELS = {
    ("walk, then run", "# 1", "3 dogs;", '"quoted" \\t\\'): "labels.txt",
    ("first\u2028second", "a\x85b", "c\x0bd", "Ärger", "走る"): "labels.txt",
    ("two\nlines", "id", '"a", b', "two\r\nlines"): "labels.csv",
    ("return\rhere", "plain"): "labels.csv",
    ("\ufeffmarked", "plain"): "labels.csv",
}


@pytest.mark.parametrize("names", LABELS)
def test_labels_are_read_as_they_were(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start({}, ["older\nnames"])
    folder.start({}, names)
    (file,) = folder.path.glob("labels.*")
    assert file.name == LABELS[names]
    assert read_labels([str(file)]) == list(names)


@pytest.mark.parametrize("name", ["config.json", "labels.txt", "labels.csv"])
def test_what_is_not_of_a_run_is_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=rf"{name} is not that of a run; name another folder"):
        RunFolder(tmp_path).check_free()


def test_a_folder_holds_one_run(folder: RunFolder) -> None:
    with pytest.raises(InputError, match=r"run holds a run; go on with --resume latest, or name"):
        RunFolder(folder.path).check_free()
    assert len(folder.records("metrics")) == 2


def test_logs_are_cut_to_what_the_state_knows(folder: RunFolder) -> None:
    kept = folder.log_file("metrics").read_bytes()
    folder.log("metrics", {"step": 3})
    folder.log("bad_samples", {"path": "b.mp4"})
    with open(folder.log_file("metrics"), "a") as file:
        file.write('{"step": 4, "lo')
    for name in ("last.pt", "best.safetensors", "average.safetensors", "config.json", "labels.txt"):
        (folder.path / f"{name}.4711.part").write_text("half")
    (folder.path / "film.mp4.part").write_text("not ours")
    folder.go_on_from(folder.last, folder.load_state(folder.last))
    assert folder.log_file("metrics").read_bytes() == kept
    assert len(folder.records("bad_samples")) == 1
    assert [path.name for path in folder.path.glob("*.part")] == ["film.mp4.part"]


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.truncate(path, 5)])
def test_a_log_that_lost_lines_is_noticed(
    folder: RunFolder, change: Callable[[Path], object]
) -> None:
    change(folder.log_file("metrics"))
    with pytest.raises(TrainingError, match=r"metrics.jsonl is shorter than when .*last.pt was"):
        folder.go_on_from(folder.last, folder.load_state(folder.last))


def test_a_run_that_saved_nothing_starts_again(folder: RunFolder) -> None:
    folder.last.unlink()
    (folder.path / "last.pt.4711.part").write_text("half")
    folder.check_free()
    folder.start({}, ())
    assert folder.records("metrics") == folder.records("bad_samples") == []
    assert not list(folder.path.glob("*.part"))


def test_a_state_that_cannot_be_read(folder: RunFolder) -> None:
    os.truncate(folder.last, 1000)
    with pytest.raises(WeightsError, match=r"last.pt: damaged \(File is not a zip file\)$"):
        folder.load_state(folder.last)
    with pytest.raises(WeightsError, match=r"previous.pt: missing$"):
        folder.load_state(folder.previous)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES])
def test_a_disk_that_cannot_read_says_nothing_of_the_state(
    number: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(zipfile, "ZipFile", fail)
    message = f"last.pt: cannot be read: {os.strerror(number)}; once it can, go on with --resume"
    with pytest.raises(TrainingError, match=message):
        folder.load_state(folder.last)


def test_a_damaged_state_is_put_aside(folder: RunFolder) -> None:
    folder.save_state({**STATE, "step": 8})
    os.truncate(folder.last, 1000)
    folder.go_on_from(folder.previous, folder.load_state(folder.previous))
    assert folder.load_state(folder.last)["step"] == 7
    assert (folder.path / "last.damaged.pt").stat().st_size == 1000


def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    # Small, so that many of the changes are in what the archive says of itself.
    folder.save_state({"step": 7, "weights": torch.arange(40.0)})
    content, drawn = folder.last.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(500):
        changed = bytearray(content)
        changed[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        folder.last.write_bytes(changed)
        try:
            state = folder.load_state(folder.last)
        except WeightsError:
            noticed += 1
        else:
            assert state["step"] == 7
            assert torch.equal(state["weights"], torch.arange(40.0))
    assert 100 < noticed < 500


def test_the_state_before_is_kept(folder: RunFolder) -> None:
    folder.log("metrics", {"step": 3})
    folder.save_state({**STATE, "step": 8})
    assert [folder.load_state(path)["step"] for path in folder.states] == [8, 7]
    folder.log("metrics", {"step": 4})
    folder.go_on_from(folder.previous, folder.load_state(folder.previous))
    assert folder.load_state(folder.last)["step"] == 7
    assert not folder.previous.exists()
    assert [record["step"] for record in folder.records("metrics")] == [1, 2]
    folder.last.rename(folder.previous)
    assert folder.has_state
    with pytest.raises(InputError, match=r"run holds a run; go on with --resume latest"):
        folder.check_free()


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("saved_before", [1, 2])
def test_at_every_moment_of_saving_there_is_a_state(
    saved_before: int, links: bool, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saved_before == 2:
        folder.save_state(STATE)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    states = [state_of(folder)]

    def watch(owner: Any, name: str) -> None:
        act = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            states.append(state_of(folder))
            done = act(*arguments, **options)
            states.append(state_of(folder))
            return done

        monkeypatch.setattr(owner, name, watched)

    for name in ("link", "replace", "fsync", "unlink", "remove"):
        watch(os, name)
    watch(torch, "save")
    folder.save_state({**STATE, "step": 8})
    assert states == sorted(states)
    assert (states[0], states[-1]) == (7, 8)
    assert [folder.load_state(path)["step"] for path in folder.states] == [8, 7]


def refuse(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def state_of(folder: RunFolder) -> int:
    """Return the step of the newest state that a resumed run would find."""
    whole = [path for path in folder.states if path.exists()]
    return torch.load(whole[0])["step"]


class FullDisk:
    """A file on a disk with little room left."""

    def __init__(self, file: BinaryIO, room: int) -> None:
        self.file = file
        self.room = room

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


# In the header, in the weights (torch.save then hides the error), and in what follows them.
@pytest.mark.parametrize("room", [0, 1000, 1_200_700])
def test_a_full_disk_keeps_the_older_state(
    room: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder.last.read_bytes()
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, FullDisk(file, room)))
    with pytest.raises(OutputError, match=r"last.pt: cannot be written: No space left on device$"):
        folder.save_state(STATE)
    assert folder.last.read_bytes() == before
    assert not list(folder.path.glob("*.part"))


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_refuses_keeps_the_older_state(
    name: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder.last.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensor_files.os, name, refuse)
    with pytest.raises(OutputError, match=r"cannot be written: Input/output error$"):
        folder.save_state(STATE)
    monkeypatch.undo()
    assert folder.last.read_bytes() == before
    assert not list(folder.path.glob("*.part"))


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        write_atomically(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written(folder: RunFolder) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no disk that is always full")
    folder.log_file("metrics").unlink()
    folder.log_file("metrics").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"metrics.jsonl: cannot be written: No space left"):
        folder.log("metrics", {"step": 3})


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        folder = RunFolder(path)
        folder.check_free()
        with pytest.raises(OutputError, match=r"file.*: cannot be written: "):
            folder.start({}, ())

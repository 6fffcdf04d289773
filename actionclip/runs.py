"""The files of a training run: its settings, what it logged, its latest state.

    config.json          every setting, resolved, with versions and the data's counts and hash
    labels.txt           the class names in order, for `--labels`; labels.csv if one of them
                         holds what would end a line
    metrics.jsonl        a line for each logged step and each evaluation
    bad_samples.jsonl    a line for each video that could not be used as it should
    last.pt              all that the run needs to go on exactly
    previous.pt          likewise as it was saved before, should last.pt be damaged
    last.damaged.pt      a last.pt that was damaged when the run went on from previous.pt
    best.safetensors     weights and configuration of the best epoch, for `load`
    average.safetensors  likewise of the mean over several epochs, if that is wanted

Writes what the loop hands over, and reads it back. After a crash, lines that the latest state
does not know are cut off, so that each stands once. One process of a run has these files.
"""

import csv
import errno
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actionclip.errors import InputError, OutputError, TrainingError, WeightsError
from actionclip.models.base import VideoTextModel
from actionclip.tensor_files import read_file, write_atomically
from actionclip.weights import save

LOGS = ("metrics", "bad_samples")
LABELS = ("labels.txt", "labels.csv")

# What reading a zip archive with changed bytes ends in, besides places before its start (EINVAL);
# found by changing each kind of them.
_DAMAGES = (EOFError, RuntimeError, ValueError, zipfile.BadZipFile)


class RunFolder:
    """The folder of one run.

    Args:
        path: of the folder; it is made if it is not there.

    Raises:
        OutputError: from every method, if something cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def previous(self) -> Path:
        return self.path / "previous.pt"

    @property
    def states(self) -> tuple[Path, Path]:
        """Where states are saved, the newest first."""
        return self.last, self.previous

    @property
    def has_state(self) -> bool:
        return any(path.exists() for path in self.states)

    @property
    def best(self) -> Path:
        return self.path / "best.safetensors"

    @property
    def average(self) -> Path:
        return self.path / "average.safetensors"

    def log_file(self, name: str) -> Path:
        """Return the path of one of `LOGS`."""
        return self.path / f"{name}.jsonl"

    def check_free(self) -> None:
        """Refuse a folder that holds a run, or settings or labels of something else.

        Raises:
            InputError: if it does.
        """
        for name in ("config.json", *LABELS):
            path = self.path / name
            if path.exists() and not self.log_file("metrics").exists():
                raise InputError(f"{path} is not that of a run; name another folder")
        if self.has_state:
            raise InputError(
                f"{self.path} holds a run; go on with --resume latest, or name another folder"
            )

    def start(self, config: Mapping[str, Any], class_names: Sequence[str]) -> None:
        """Begin a new run, or again one that was stopped before it saved anything."""
        with _as_output_error(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_partial_files()
            for name in LOGS:
                self.log_file(name).write_bytes(b"")
            for name in LABELS:
                (self.path / name).unlink(missing_ok=True)
        self._write("config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        self._write(*_label_file(class_names))

    def log(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a line to a log."""
        path = self.log_file(name)
        with _as_output_error(path), open(path, "ab") as file:
            # In ASCII, which can also say what bytes of a name are not UTF-8.
            file.write(json.dumps(record).encode() + b"\n")

    def records(self, name: str) -> list[dict[str, Any]]:
        """Return what a log holds."""
        with open(self.log_file(name), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def save_state(self, state: Mapping[str, Any]) -> None:
        """Save a state from which the run can go on; the logs so far belong to it.

        The one so far stays as `previous`. Whenever this is broken off, one of the two is whole.
        """
        sizes = {}
        for name in LOGS:
            path = self.log_file(name)
            with _as_output_error(path), open(path, "ab") as file:
                os.fsync(file.fileno())
                sizes[name] = file.tell()
        self._keep_previous()
        write_atomically(self.last, partial(torch.save, {**state, "log_sizes": sizes}))

    def _keep_previous(self) -> None:
        """Name the state so far `previous`, and let it be `last` too until another one is."""
        if not self.last.exists():
            return
        with _as_output_error(self.previous):
            # First of all, so that the disk never has to hold three states.
            self.previous.unlink(missing_ok=True)
            try:
                os.link(self.last, self.previous)
            except OSError:  # some disks know no second names
                os.replace(self.last, self.previous)

    def load_state(self, path: Path) -> dict[str, Any]:
        """Return one of `states`, after a look at every byte of it.

        Raises:
            WeightsError: if it is missing or damaged.
            TrainingError: if it cannot be read now, which says nothing about the file.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                # No entry is compressed; to unpack one has more ways to fail.
                packed = (info.filename for info in archive.infolist() if info.compress_type)
                damaged = next(packed, None) or archive.testzip()
        except _DAMAGES as error:
            raise WeightsError(f"{path}: damaged ({error})") from error
        except FileNotFoundError as error:
            raise WeightsError(f"{path}: missing") from error
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise WeightsError(f"{path}: damaged ({error})") from error
            raise TrainingError(
                f"{path}: cannot be read: {error.strerror or error}; once it can, go on with "
                "--resume latest"
            ) from error
        if damaged is not None:
            raise WeightsError(f"{path}: damaged (in {damaged})")
        return read_file(path).content

    def go_on_from(self, path: Path, state: Mapping[str, Any]) -> None:
        """Make one of `states` the newest, and cut the logs to what they held when it was saved.

        Raises:
            TrainingError: if they are shorter than that.
        """
        self._remove_partial_files()
        for name, size in state["log_sizes"].items():
            log = self.log_file(name)
            if not log.exists() or log.stat().st_size < size:
                raise TrainingError(
                    f"{log} is shorter than when {path} was saved: the folder was changed; "
                    "start again in another one"
                )
            with _as_output_error(log):
                os.truncate(log, size)
        if path != self.last:
            with _as_output_error(self.last):
                if self.last.exists():
                    os.replace(self.last, self.path / "last.damaged.pt")
                os.replace(path, self.last)

    def save_best(self, model: VideoTextModel) -> None:
        """Replace the best weights."""
        save(model, self.best)

    def save_average(self, model: VideoTextModel) -> None:
        """Write the mean of the weights of several epochs."""
        save(model, self.average)

    def _write(self, name: str, text: str) -> None:
        content = text.encode("utf-8", "replace")
        write_atomically(self.path / name, lambda file: file.write(content))

    def _remove_partial_files(self) -> None:
        """Remove what a killed process was writing, see `write_atomically`."""
        names = ("config.json", *LABELS, self.last.name, self.best.name, self.average.name)
        for name in names:
            for path in self.path.glob(f"{name}.*.part"):
                path.unlink(missing_ok=True)


def _label_file(class_names: Sequence[str]) -> tuple[str, str]:
    """Return name and content of a file from which `labels.read_labels` reads these names.

    All but the spaces around them, which no label file keeps and no comparison of names sees.
    """
    # A byte order mark is one only at the start of a text, and not a part of it there.
    if not any("\n" in name or "\r" in name or "\ufeff" in name for name in class_names):
        return "labels.txt", "".join(f"{name}\n" for name in class_names)
    file = io.StringIO()
    writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerows([("id", "name"), *enumerate(class_names)])
    return "labels.csv", file.getvalue()


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error

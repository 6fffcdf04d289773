"""Rows of finished videos in a file, from which the same command goes on after a crash.

Between the results and the file that the user asked for. A line is a row in JSON with the key of
what it stands for: the video as a file and the settings of the run. It is handed to the system as
soon as it is there; of a killed run at most the last line is torn, and the next cuts it off.
"""

import hashlib
import io
import json
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from itertools import pairwise
from types import TracebackType
from typing import IO

from actionclip.cli.report import WRITERS, Row, as_output_error
from actionclip.download import try_lock
from actionclip.errors import InputError
from actionclip.tensor_files import write_atomically

# What a power cut may cost; to wait for the disk at every row would take longer than some videos.
FLUSH_SECONDS = 5.0
# Far above a row with thousands of predictions; a film named by mistake is not read whole.
MAX_ROW_BYTES = 16_000_000

# How every row begins, see `report.row`.
_START = b'{"path": "'
# What a busy or failing machine may have caused: the next time the same file may do.
_PASSING = frozenset({"crashed", "timeout", "unreadable"})


class Journal:
    """The rows of a run with given settings, and those that earlier runs left.

    Args:
        path: of the file; one that is there is gone on with.
        settings: whatever decides the rows besides the videos.

    Raises:
        InputError: when it is entered, if the file holds something else, or another process
            writes it.
        OutputError: from every method, if it cannot be written.
    """

    def __init__(self, path: str, settings: object) -> None:
        self.path = path
        self._settings = json.dumps(settings)
        self._known: dict[str, list[int]] = {}  # key -> where its rows are
        self._places = array("q")  # of the rows of this run, in the order of its videos
        self._num_rows = 0  # in the file
        self._flushed = time.monotonic()

    def __enter__(self) -> "Journal":
        with as_output_error(self.path):
            self._file: IO[bytes] = open(self.path, "a+b")
        try:
            with as_output_error(self.path):
                self._file.seek(0)  # Windows locks what follows
                if not try_lock(self._file):
                    raise InputError(
                        f"{self.path}: another process writes it; name another --output"
                    )
                self._end = self._read()
                self._file.truncate(self._end)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # What could not be written is tried once more, and an error has been raised for it.
        with suppress(OSError):
            self._file.close()

    def _read(self) -> int:
        """Note where the rows are; returns where the whole ones end."""
        self._file.seek(0)
        end = 0
        while line := self._file.readline(MAX_ROW_BYTES):
            if not line.endswith(b"\n") and len(line) < MAX_ROW_BYTES and _is_torn(line):
                return end
            row = _parse(line)
            if row is None:
                raise InputError(
                    f"{self.path}: its line at byte {end} is not a row that this command wrote "
                    "with --output; name another file, or remove it"
                )
            if row.get("reason") not in _PASSING:
                self._known.setdefault(row["key"], []).append(end)
            self._num_rows += 1
            end += len(line)
        return end

    def complete(
        self, videos: Iterable[str], classify: Callable[[Iterable[str]], Generator[Row, None, None]]
    ) -> Generator[tuple[Row, bool], None, None]:
        """Yield the rows of all videos in order, and whether each is new; new ones are kept.

        Args:
            videos: paths.
            classify: gives the rows of those that have none, in order; it takes a few ahead.
        """
        ahead: deque[str | int] = deque()  # taken, and not yielded yet: a key, or where its row is

        def without_row() -> Iterator[str]:
            for path in videos:
                key = self._key(path)
                if places := self._known.get(key):
                    ahead.append(places.pop(0))
                else:
                    ahead.append(key)
                    yield path

        with closing(classify(without_row())) as rows:
            for row in rows:
                yield from self._old_rows(ahead)
                self._append({**row, "key": ahead.popleft()})
                yield row, True
        yield from self._old_rows(ahead)

    def _old_rows(self, ahead: deque[str | int]) -> Iterator[tuple[Row, bool]]:
        while ahead and isinstance(place := ahead[0], int):
            ahead.popleft()
            self._places.append(place)
            yield self._row_at(place), False

    def _key(self, path: str) -> str:
        """Tell a video as it is now, under these settings, from all others."""
        try:
            files: list[object] = [_signature(os.stat(path)), os.access(path, os.R_OK)]
            if os.path.isdir(path):  # whose frames may change without it
                with os.scandir(path) as entries:
                    files += sorted([entry.name, *_signature(entry.stat())] for entry in entries)
        except (OSError, ValueError):  # ValueError: a null character in the name
            files = []
        text = json.dumps([path, files, self._settings])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _append(self, row: Row) -> None:
        line = json.dumps(row).encode() + b"\n"
        with as_output_error(self.path):
            self._file.write(line)
            self._file.flush()
            if time.monotonic() > self._flushed + FLUSH_SECONDS:
                os.fsync(self._file.fileno())
                self._flushed = time.monotonic()
        self._places.append(self._end)
        self._num_rows += 1
        self._end += len(line)

    def _row_at(self, place: int) -> Row:
        row: Row = json.loads(self._line_at(place))
        del row["key"]
        return row

    def rows(self) -> Iterator[Row]:
        """Yield the rows of this run, in the order of its videos."""
        return map(self._row_at, self._places)

    def finish(self) -> int:
        """Leave the rows of this run in the order of its videos; returns how many others go."""
        if self._is_in_order() and self._is_there():
            with as_output_error(self.path):
                os.fsync(self._file.fileno())
            return 0
        lines = map(self._line_at, self._places)
        write_atomically(self.path, lambda file: file.writelines(lines))
        return self._num_rows - len(self._places)

    def _is_in_order(self) -> bool:
        return len(self._places) == self._num_rows and all(a < b for a, b in pairwise(self._places))

    def _is_there(self) -> bool:
        """Tell whether nobody has moved or replaced the file meanwhile."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def _line_at(self, place: int) -> bytes:
        self._file.seek(place)
        return self._file.readline()


def replace_output(path: str, format: str, rows: Iterable[Row]) -> None:
    """Write a file of rows in one step.

    Raises:
        OutputError: if it cannot be written; an older one is kept then.
    """

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        writer = WRITERS[format](text)
        for row in rows:
            writer.write(row)
        writer.close()
        text.detach()

    write_atomically(path, write)


def _signature(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _parse(line: bytes) -> Row | None:
    """Return the row on a line, or None if it is not one of a journal."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    texts = (row.get("path"), row.get("status"), row.get("key"))
    return row if all(isinstance(text, str) for text in texts) else None


def _is_torn(line: bytes) -> bool:
    """Tell whether a last line is what a crash leaves of a row, or a power cut: zeros."""
    if not line.strip(b"\0"):
        return True
    try:
        json.loads(line)
    except ValueError:
        return _START.startswith(line[: len(_START)])
    return _parse(line) is not None

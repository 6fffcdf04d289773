"""Write results one by one, as a table for people or as rows for programs."""

import base64
import contextlib
import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from actionclip.errors import InputError, OutputError, one_line

if TYPE_CHECKING:
    from actionclip.classifier import VideoResult

Row = dict[str, Any]

# How Python holds bytes of a name that are not UTF-8. In JSON many readers refuse them.
_HALF = re.compile("[\ud800-\udfff]")
# Controls, and what turns or ends a line: not all that has no width, which some scripts need.
_STEERING = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What makes a spreadsheet compute a cell.
_FORMULA_STARTS = ("=", "+", "-", "@")

BAR_WIDTH = 20
# A full block and its left parts, an eighth at a time.
BLOCKS = "█▏▎▍▌▋▊▉"


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Open the file for the results, or take standard output.

    Raises:
        OutputError: if it cannot be opened, or written while it is open.
    """
    if path is None and sys.stdout is None:
        raise OutputError("standard output is closed; use --output FILE")
    with as_output_error(path or "standard output"):
        if path is None:
            # A name that is not UTF-8, or a terminal that is not, must not end the run.
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")
            yield sys.stdout
            sys.stdout.flush()
        else:
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file


@contextlib.contextmanager
def as_output_error(name: str) -> Iterator[None]:
    """Say of which output it is that the system cannot write it."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"cannot write the results to {name}: {error.strerror or error}"
        ) from error


def refuse_to_overwrite(output: str | None, inputs: Iterable[str | None]) -> None:
    """Refuse an output that is one of the inputs.

    Raises:
        InputError: if it is, under whichever name.
    """
    if output is None or not os.path.exists(output):
        return
    for name in filter(None, inputs):
        if os.path.exists(name) and os.path.samefile(name, output):
            raise InputError(f"--output {output} is also an input; name another file")


def row(result: "VideoResult", top_k: int) -> Row:
    """Return the result as the JSON object that the documentation describes.

    With `top_k` 0, of a command that predicts nothing, it has no predictions.
    """
    values: Row = {
        "path": result.path,
        "status": result.status,
        "reason": result.reason,
        "message": result.message and _HALF.sub("\ufffd", result.message),
        "frames": result.num_frames,
    }
    if _HALF.search(result.path):
        values["path"] = _HALF.sub("\ufffd", result.path)
        with contextlib.suppress(UnicodeEncodeError):  # a list may hold what no file is called
            values["path_b64"] = base64.b64encode(os.fsencode(result.path)).decode()
    if top_k:
        values["predictions"] = []
    if top_k and result.prediction is not None:
        best = cast(list[tuple[str, float]], result.prediction.top(top_k))
        values["predictions"] = [{"label": x, "score": round(score, 6)} for x, score in best]
    return values


class JsonLinesWriter:
    """One JSON object a line, complete as soon as it is written.

    Args:
        file: where to write.
        predicts: whether rows hold predictions.
    """

    def __init__(self, file: IO[str], *, predicts: bool = True) -> None:
        self.file = file
        self.predicts = predicts

    def write(self, row: Row) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing is left open."""


class JsonWriter(JsonLinesWriter):
    """One JSON array of the same objects."""

    def __init__(self, file: IO[str], *, predicts: bool = True) -> None:
        super().__init__(file, predicts=predicts)
        self.separator = "[\n"

    def write(self, row: Row) -> None:
        self.file.write(self.separator + json.dumps(row))
        self.separator = ",\n"

    def close(self) -> None:
        self.file.write("\n]\n" if self.separator == ",\n" else "[]\n")


class CsvWriter(JsonLinesWriter):
    """One line a prediction, best first, and one for each video without any."""

    COLUMNS = ("path", "status", "reason", "message", "frames")
    PREDICTION_COLUMNS = ("rank", "label", "score")

    def __init__(self, file: IO[str], *, predicts: bool = True) -> None:
        super().__init__(file, predicts=predicts)
        columns = (*self.COLUMNS, *(self.PREDICTION_COLUMNS if predicts else ()))
        self.csv = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        self.csv.writeheader()

    def write(self, row: Row) -> None:
        predictions = row.get("predictions", [])
        best = [{"rank": rank, **each} for rank, each in enumerate(predictions, start=1)]
        for prediction in best or [{}]:
            cells = {**row, **prediction, "path": full_name(row)}
            self.csv.writerow({name: csv_cell(value) for name, value in cells.items()})
        self.file.flush()


def csv_cell(value: Any) -> Any:
    """Make a cell what it looks like: nothing that steers a terminal, and nothing computed.

    Spreadsheets run a cell that begins like a formula; the apostrophe makes it text.
    Source: OWASP, CSV Injection.
    """
    if not isinstance(value, str):
        return value
    text = _STEERING.sub(lambda match: one_line(match[0]), value)
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def full_name(row: Row) -> str:
    """Return the path of a row with all that it holds, as Python names files."""
    return os.fsdecode(base64.b64decode(row["path_b64"])) if "path_b64" in row else row["path"]


class TableWriter(JsonLinesWriter):
    """The path, then a score, a label and a bar a line, or what is wrong."""

    def __init__(self, file: IO[str], *, predicts: bool = True) -> None:
        super().__init__(file, predicts=predicts)
        self.blocks = BLOCKS if _can_encode(file, BLOCKS) else "#"

    def write(self, row: Row) -> None:
        lines = [one_line(full_name(row))]
        predictions = row.get("predictions", [])
        if row["status"] != "ok" and not self.predicts:
            lines.append(f"  {row['reason']}: {one_line(row['message'] or '')}")
        elif row["status"] != "ok":
            lines.append(f"  {row['status']}" + ("" if predictions else f": {row['reason']}"))
        labels = [one_line(prediction["label"]) for prediction in predictions]
        width = max(map(len, labels), default=0)
        for label, prediction in zip(labels, predictions, strict=True):
            score = prediction["score"]
            lines.append(f"  {score:.2f}  {label:{width}}  {self.bar(score)}".rstrip())
        self.file.write("\n".join(lines) + "\n")
        self.file.flush()

    def bar(self, score: float) -> str:
        """Draw a score in [0, 1] in steps of an eighth of a character."""
        steps = len(self.blocks)
        full, part = divmod(round(score * BAR_WIDTH * steps), steps)
        return self.blocks[0] * full + (self.blocks[part] if part else "")


def _can_encode(file: IO[str], text: str) -> bool:
    try:
        text.encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


WRITERS = {
    "table": TableWriter,
    "json": JsonWriter,
    "jsonl": JsonLinesWriter,
    "csv": CsvWriter,
}

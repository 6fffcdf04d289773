"""Write results one by one, as a table for people or as rows for programs."""

import contextlib
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from actionclip.cli.command import one_line
from actionclip.errors import InputError, OutputError

if TYPE_CHECKING:
    from actionclip.classifier import VideoResult

BAR_WIDTH = 20
# A full block and its left parts, an eighth at a time.
BLOCKS = "█▏▎▍▌▋▊▉"


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[str]]:
    """Open the file for the results, or take standard output.

    Raises:
        OutputError: if it cannot be opened, or written while it is open.
    """
    try:
        if path is None and sys.stdout is None:
            raise OutputError("standard output is closed; use --output FILE")
        if path is None:
            # A name that is not UTF-8, or a terminal that is not, must not end the run.
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")
            yield sys.stdout
            sys.stdout.flush()
        else:
            with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                yield file
    except BrokenPipeError:
        raise
    except OSError as error:
        name = path or "standard output"
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


def row(result: "VideoResult", top_k: int) -> dict[str, Any]:
    """Return the result as the JSON object that the documentation describes.

    With `top_k` 0, of a command that predicts nothing, it has no predictions.
    """
    values: dict[str, Any] = {
        "path": result.path,
        "status": result.status,
        "reason": result.reason,
        "message": result.message,
        "frames": result.num_frames,
    }
    if top_k:
        values["predictions"] = []
    if top_k and result.prediction is not None:
        best = cast(list[tuple[str, float]], result.prediction.top(top_k))
        values["predictions"] = [{"label": x, "score": round(score, 6)} for x, score in best]
    return values


class JsonLinesWriter:
    """One JSON object a line, complete as soon as it is written."""

    def __init__(self, file: IO[str], top_k: int) -> None:
        self.file = file
        self.top_k = top_k

    def write(self, result: "VideoResult") -> None:
        self.file.write(json.dumps(row(result, self.top_k)) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Nothing is left open."""


class JsonWriter(JsonLinesWriter):
    """One JSON array of the same objects."""

    def __init__(self, file: IO[str], top_k: int) -> None:
        super().__init__(file, top_k)
        self.separator = "[\n"

    def write(self, result: "VideoResult") -> None:
        self.file.write(self.separator + json.dumps(row(result, self.top_k)))
        self.separator = ",\n"

    def close(self) -> None:
        self.file.write("\n]\n" if self.separator == ",\n" else "[]\n")


class CsvWriter(JsonLinesWriter):
    """One line a prediction, best first, and one for each video without any."""

    COLUMNS = ("path", "status", "reason", "message", "frames")
    PREDICTION_COLUMNS = ("rank", "label", "score")

    def __init__(self, file: IO[str], top_k: int) -> None:
        super().__init__(file, top_k)
        columns = (*self.COLUMNS, *(self.PREDICTION_COLUMNS if top_k else ()))
        self.csv = csv.DictWriter(file, columns, lineterminator="\n")
        self.csv.writeheader()

    def write(self, result: "VideoResult") -> None:
        values = row(result, self.top_k)
        predictions = values.pop("predictions", [])
        if not predictions:
            self.csv.writerow(values)
        for rank, prediction in enumerate(predictions, start=1):
            self.csv.writerow({**values, "rank": rank, **prediction})
        self.file.flush()


class TableWriter(JsonLinesWriter):
    """The path, then a score, a label and a bar a line, or what is wrong."""

    def __init__(self, file: IO[str], top_k: int) -> None:
        super().__init__(file, top_k)
        self.blocks = BLOCKS if _can_encode(file, BLOCKS) else "#"

    def write(self, result: "VideoResult") -> None:
        lines = [one_line(result.path)]
        if result.status != "ok" and self.top_k == 0:
            lines.append(f"  {result.reason}: {one_line(result.message or '')}")
        elif result.status != "ok":
            lines.append(
                f"  {result.status}" + (f": {result.reason}" if not result.prediction else "")
            )
        predictions = row(result, self.top_k).get("predictions", [])
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

"""Read what a user typed for labels and templates: words, or a file that lists them.

The step before `prompts`, and the only one of the text side that opens the
user's files. Does not judge the names; `prompts.check_class_names` does.
"""

import codecs
import csv
import difflib
import io
from collections.abc import Sequence
from pathlib import Path

from actionclip.errors import InputError, short
from actionclip.prompts import TEMPLATES

# Far above any label list, far below what would hurt: a video given by mistake is not read whole.
MAX_FILE_BYTES = 10_000_000
# Far above any prompt of 77 tokens: a file of another kind may be a single line.
MAX_LINE_LENGTH = 10_000


def read_labels(values: Sequence[str]) -> list[str]:
    """Return the class names that were typed, or those in the file that was named.

    Args:
        values: class names, or a single `.txt` (one name per line) or `.csv` (a header with a
            column `name` or `label` and, if wanted, `id`; the class index is the row's position).

    Raises:
        InputError: if the file cannot be read or used, or stands among other values.
    """
    files = [value for value in values if Path(value).suffix.lower() in (".txt", ".csv")]
    if not files:
        return list(values)
    if len(values) > 1:
        raise InputError(
            f"label {short(files[0])} looks like a file among {len(values)} labels; "
            "give either one file or the labels themselves"
        )
    path = Path(files[0])
    names = _csv_names(path) if path.suffix.lower() == ".csv" else _lines(path)
    if not names:
        raise InputError(f"{path}: holds no labels; write one per line")
    _check_lengths(path, names)
    return names


def read_templates(name_or_file: str) -> tuple[str, ...]:
    """Return the prompt templates of a name in `TEMPLATES`, or of a file with one per line.

    Raises:
        InputError: if it is neither, or the file cannot be read or is empty.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if path.suffix.lower() != ".txt" and not path.is_file():
        close = difflib.get_close_matches(name_or_file, TEMPLATES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"unknown templates {short(name_or_file)}: {hint}"
            f"use one of {', '.join(TEMPLATES)} or a text file with one template per line"
        )
    templates = tuple(_lines(path))
    if not templates:
        raise InputError(f"{path}: holds no templates; write one per line, with {{}} for the label")
    _check_lengths(path, templates)
    return templates


def _check_lengths(path: Path, lines: Sequence[str]) -> None:
    longest = max(lines, key=len)
    if len(longest) > MAX_LINE_LENGTH:
        raise InputError(
            f"{path}: {short(longest)} goes on for {len(longest)} characters, the limit is "
            f"{MAX_LINE_LENGTH}; write one short text per line"
        )


def _lines(path: Path) -> list[str]:
    # Not splitlines(), which also breaks at characters that editors do not show as a new line.
    lines = (line.strip() for line in io.StringIO(read_text(path, MAX_FILE_BYTES), newline=None))
    return [line for line in lines if line]


def _csv_names(path: Path) -> list[str]:
    # `strict`: without it an open quote silently swallows the rows up to the next quote.
    reader = csv.reader(io.StringIO(read_text(path, MAX_FILE_BYTES), newline=""), strict=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num} is not valid CSV ({error}); check its quotes"
        ) from error
    if not rows:
        return []
    header = [column.lower() for column in rows[0][1]]
    name_columns = [i for i, column in enumerate(header) if column in ("name", "label")]
    if len(name_columns) != 1:
        raise InputError(
            f"{path}: the header is {short(','.join(header))}; "
            "it needs one column 'name' or 'label'"
        )
    names = []
    for position, (line, row) in enumerate(rows[1:]):
        if len(row) != len(header):
            raise InputError(
                f"{path}: line {line} has {len(row)} fields, the header {len(header)}; "
                "put quotes around a name that contains a comma"
            )
        # The position is what numbers the classes; an id that disagrees means wrong accuracies.
        if "id" in header and row[header.index("id")] != str(position):
            raise InputError(
                f"{path}: line {line} has id {short(row[header.index('id')])}, its position is "
                f"{position}; number the rows 0, 1, 2, ... in the order of the classes"
            )
        names.append(row[name_columns[0]])
    return names


def read_text(path: Path, max_bytes: int) -> str:
    """Return the text of a user's file: UTF-8, or UTF-16 with a byte order mark.

    Raises:
        InputError: if it cannot be read, is larger than `max_bytes` or is not text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if len(data) > max_bytes:
        raise InputError(f"{path}: is over {max_bytes} bytes; that is not a list")
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(error.encoding, errors="ignore")
        raise InputError(
            f"{path}: line {before.count(chr(10)) + 1} is not valid {error.encoding}; "
            "save the file as UTF-8"
        ) from error
    if "\0" in text:
        raise InputError(f"{path}: is not a text file, it has zero bytes; save it as UTF-8")
    return text

"""Strings, label files and lists that nobody would write, and a slow tokenizer to compare with.

Shared by the tests and the long run. Everything is drawn from a seed, so that a failure can be
repeated by its number.
"""

import gzip
import html
import json
import os
import random
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex

from actionclip import annotations
from actionclip.annotations import VideoList, describe, read_video_list
from actionclip.errors import InputError
from actionclip.labels import read_labels
from actionclip.prompts import check_class_names

# The tokenizer, as CLIP defines it


@cache
def merge_ranks() -> dict[tuple[str, str], int]:
    """Return the merges of the packaged table as pairs of written symbols."""
    table = Path(annotations.__file__).parent / "bpe_merges.txt.gz"
    symbols = vocabulary_start()
    ranks = {}
    for line in gzip.decompress(table.read_bytes()).decode().splitlines():
        left, right = (symbols[int(number)] for number in line.split())
        ranks[left, right] = len(ranks)
        symbols.append(left + right)
    return ranks


def vocabulary_start() -> list[str]:
    """Return the first 512 tokens: a character for each byte, then the same ending a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(68)]
    return characters + [character + "</w>" for character in characters]


@cache
def ids() -> dict[str, int]:
    """Return the id of every token."""
    tokens = vocabulary_start() + [left + right for left, right in merge_ranks()]
    return {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


@cache
def character_of_byte() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict(zip(printable + others, vocabulary_start(), strict=False))


def reference_encode(text: str) -> list[int]:
    """Return the token ids of a text, one definition after the other, as slow as that is."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    text = " ".join(text.split()).lower()
    return [token for piece in reference_pieces(text) for token in reference_piece_ids(piece)]


def reference_pieces(text: str) -> Iterator[str]:
    """Yield special tokens, contractions, runs of letters, single numbers, runs of the rest."""
    # The long s is a case variant of s, and the pattern of CLIP ignores case.
    folded = text.replace("\u017f", "s")
    fixed = ["<|startoftext|>", "<|endoftext|>", "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"]
    start = 0
    while start < len(text):
        end = start + 1
        kind = kind_of(text[start])
        for beginning in fixed:
            if folded.startswith(beginning, start):
                end = start + len(beginning)
                break
        else:
            while kind in ("letter", "other") and end < len(text) and kind_of(text[end]) == kind:
                end += 1
        if kind != "space":
            yield text[start:end]
        start = end


def kind_of(character: str) -> str:
    # U+0345 is no letter, but a case variant of iota: ignoring case, CLIP's pattern passes it over.
    if character.isspace() or character == "\u0345":
        return "space"
    category = unicodedata.category(character)
    if category == "Cn":  # perhaps newer than Python's tables
        category = "".join(c for c in "LN" if regex.fullmatch(rf"\p{{{c}}}", character))
    return {"L": "letter", "N": "number"}.get(category[:1], "other")


def reference_piece_ids(piece: str) -> list[int]:
    if piece in ("<|startoftext|>", "<|endoftext|>"):
        return [ids()[piece]]
    symbols = [character_of_byte()[byte] for byte in piece.encode()]
    symbols[-1] += "</w>"
    ranks = merge_ranks()
    while True:
        known = [pair for pair in pairwise(symbols) if pair in ranks]
        if not known:
            return [ids()[symbol] for symbol in symbols]
        best = min(known, key=ranks.__getitem__)
        merged, i = [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                merged.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                merged.append(symbols[i])
                i += 1
        symbols = merged


# Strings


@cache
def characters() -> tuple[list[str], ...]:
    """Return kinds of characters; those of Unicode 3.2, on which all libraries agree."""
    old = [chr(c) for c in range(0x20000) if unicodedata.ucd_3_2_0.category(chr(c)) != "Cn"]
    by_category: dict[str, list[str]] = {}
    for character in filter(str.isprintable, old):  # other kinds of characters follow below
        by_category.setdefault(unicodedata.category(character)[0], []).append(character)
    return (
        [chr(c) for c in range(32, 127)],
        list("abcdefghijklmnopqrstuvwxyz "),
        list("ABCdefGHI jkl'_-.,!?0123456789"),
        *by_category.values(),
        [c for c in old if c.isspace()],
        [c for c in old if unicodedata.bidirectional(c) in ("R", "AL", "RLE", "RLO", "LRO", "PDF")],
        [c for c in old if unicodedata.combining(c)],
        [chr(c) for c in (*range(32), *range(127, 160))],
        [chr(c) for c in (0xD800, 0xDBFF, 0xDC00, 0xDFFF, 0xFFFE, 0xFFFF, 0x10FFFF, 0xFEFF)],
        list("\U0001f600\U0001f44d\U0001f3fd\u200d\ufe0f\U0001f1e9\U0001f1ea\u2764\U0001f3c0"),
        list("&#;<>xX0123456789ampltgquot"),
    )


SNIPPETS = (
    "'s", "'T", "'re", "'ve", "'m", "'LL", "'d", "'\u017f", "\u2019s", "n't", "<|startoftext|>",
    "<|endoftext|>", "<|EndOfText|>", "<|endoftext", "&amp;", "&amp;amp;", "&lt;b&gt;", "&#39;",
    "&#x1F600;", "&#0;", "&#xD800;", "&nbsp;", "&notit;", "&NotEqualTilde;", "&#128;", "\r\n",
    "\u2028", "\x85", "\x1b[1m", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "\ufb01", "\u0130", "\u1e9e",
    "\ud83d\ude00", "a" * 300, "ab" * 200, "1234567890" * 5, "\u0301" * 40, "_" * 60, "TVShow",
)  # fmt: skip


def random_text(seed: int) -> str:
    """Return a string of one to four kinds of characters, with snippets in between."""
    rng = random.Random(seed)
    kinds = [rng.choice(characters()) for _ in range(rng.randint(1, 4))]
    parts = []
    for _ in range(rng.randint(1, 12)):
        alphabet = rng.choice(kinds)
        parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(0, 12))))
        if rng.random() < 0.15:
            parts.append(rng.choice(SNIPPETS))
        if rng.random() < 0.3:
            parts.append(" ")
    return "".join(parts)


# Label files: their name, their bytes, and the names in them or a part of the one error

_NAMES = ["juggling balls", "cr\u00e8me br\u00fbl\u00e9e", "\u6253\u7bee\u7403"]
_TEXT = "\n".join(_NAMES)
_NOT_UTF8 = "is not valid utf-8; save the file as UTF-8"
_ZERO = "zero bytes; save it as UTF-8"

LabelFile = tuple[str, bytes, list[str] | str]


def label_files() -> Iterator[LabelFile]:
    """Yield label files in odd encodings and of odd shapes."""
    yield "plain.txt", _TEXT.encode(), _NAMES
    yield "mark.txt", _TEXT.encode("utf-8-sig"), _NAMES
    yield "utf16.txt", _TEXT.encode("utf-16"), _NAMES
    yield "utf16be.txt", ("\ufeff" + _TEXT).encode("utf-16-be"), _NAMES
    yield "utf16nomark.txt", _TEXT.encode("utf-16-le"), "is not valid utf-8|zero bytes"
    yield "utf32.txt", _TEXT.encode("utf-32"), _ZERO
    yield "utf32be.txt", ("\ufeff" + _TEXT).encode("utf-32-be"), "is not valid utf-8|zero bytes"
    yield "utf32nomark.txt", "archery\n".encode("utf-32-be"), _ZERO
    yield "latin1.txt", "archery\ncr\u00e8me".encode("latin-1"), f"line 2 {_NOT_UTF8}"
    yield "shiftjis.txt", "\u67d4\u9053\n\u5263\u9053".encode("shift-jis"), f"line 1 {_NOT_UTF8}"
    yield "gb18030.txt", "\u6253\u7bee\u7403".encode("gb18030"), f"line 1 {_NOT_UTF8}"
    yield "surrogate.txt", b"archery\n\xed\xa0\x80", f"line 2 {_NOT_UTF8}"
    yield "overlong.txt", b"archery\n\xc0\xaf", f"line 2 {_NOT_UTF8}"
    yield "nul.txt", b"archery\0\ndiving\n", _ZERO
    yield "cr.txt", _TEXT.replace("\n", "\r").encode(), _NAMES
    yield "crlf.txt", _TEXT.replace("\n", "\r\n").encode(), _NAMES
    yield "mixed.txt", b"a\r\nb\nc\rd\n\r\n\re", ["a", "b", "c", "d", "e"]
    yield "separators.txt", "a\u2028b\nc\x0bd\ne\x85f".encode(), ["a\u2028b", "c\x0bd", "e\x85f"]
    yield "spaces.txt", "\u00a0a\u3000\n \t\n\x0cb \n".encode(), ["a", "b"]
    yield "inner_mark.txt", "a\n\ufeffb".encode(), ["a", "\ufeffb"]
    yield "escape.txt", b"a\x1b[2Jb", ["a\x1b[2Jb"]
    yield "empty.txt", b"", "holds no labels"
    yield "only_mark.txt", b"\xef\xbb\xbf", "holds no labels"
    yield "half_mark.txt", b"\xff\xfe\x41", "is not valid utf-16"
    yield "binary.txt", bytes(range(256)) * 40, _NOT_UTF8
    yield "elf.txt", b"\x7fELF\x02\x01\x01" + bytes(64), _ZERO
    yield "ten_million.txt", b"archery\n" * 1_250_000, "read the same"
    yield "one_more.txt", b"x" * 10_000_001, "is over 10000000 bytes; that is not a list"
    yield "one_line.txt", b"x" * 10_000_000, "goes on for 10000000 characters, the limit is 10000"
    yield "quotes.csv", b'id,name\n0,"a, ""b"""\n1,"c\nd"\n', ['a, "b"', "c\nd"]
    yield "formula.csv", b"id,name\n0,=cmd|' /C calc'!A0\n", ["=cmd|' /C calc'!A0"]
    yield "formulas.csv", b"name\n+1\n-1\n@x\n\t=1\n", ["+1", "-1", "@x", "=1"]
    yield "cr.csv", b"id,name\r0,a\r1,b\r", ["a", "b"]
    yield "mark.csv", "id,name\n0,\u00e9\n".encode("utf-16"), ["\u00e9"]
    yield "open_quote.csv", b'id,name\n0,"a\n1,b\n', "is not valid CSV"
    yield "huge_field.csv", b'id,name\n0,"' + b"x" * 200_000 + b'"\n', "is not valid CSV .*limit"
    yield "long_field.csv", b"name\n" + b"x" * 100_000, "goes on for 100000 characters"
    yield "commas.csv", b"," * 1_000_000, "the header is"
    yield "nul.csv", b"id,name\n0,a\0b\n", _ZERO
    yield "headless.csv", b"0,archery\n", "it needs one column 'name' or 'label'"
    yield "id_twice.csv", b"id,name\n0,a\n0,b\n", "its position is 1"


def label_file_problem(folder: Path, file: LabelFile) -> str:
    """Read a label file as the commands do; return what is not as expected, or nothing."""
    name, data, expected = file
    path = folder / name
    path.write_bytes(data)
    try:
        names = check_class_names(read_labels([str(path)]))
    except InputError as error:
        if isinstance(expected, str) and re.search(expected, str(error)):
            return _not_one_short_line(str(error))
        return f"raises {error}"
    return "" if names == expected else f"holds {names!a}"[:300]


# Lists of videos


class Layout(NamedTuple):
    """A list that can be read: its files, what is read, and which file is changed."""

    files: dict[str, bytes]
    source: str
    changed: str
    split: str | None = None


def layouts() -> dict[str, Layout]:
    rows = [{"path": "run/a.avi", "label": "run"}, {"path": "run/b.avi", "labels": ["run", "sit"]}]
    texts = {
        "words.txt": "run/a.avi 0\nrun/b.avi 1,2\nwalk/c.avi 1\n",
        "frames.txt": "run/d 8 run\nrun/e 12 0\n",
        "header.csv": 'path,label,start,end,split\n"run/a.avi",run,0,1.5,x\nb,sit,,,x\n',
        "bare.csv": "run/a.avi,run\nrun/b.avi,sit,0.5,2\n",
        "header.tsv": "video\tlabels\nrun/a.avi\trun;sit\nrun/b.avi\trun|x\n",
        "rows.json": json.dumps(rows, indent=1),
        "rows.jsonl": "\n".join(map(json.dumps, rows)),
        "kinetics.csv": "label,youtube_id,time_start,time_end,split\nrun,a,10,20,val\n",
        "something_v1.csv": "1;Doing x\n2;Running, fast\n",
    }
    found = {name: Layout({name: text.encode()}, name, name) for name, text in texts.items()}
    found["header.csv"] = found["header.csv"]._replace(split="x")
    templates = [{"id": "1", "template": "Doing [x]"}, {"id": "2", "template": "Running"}]
    something = {
        "v2.json": json.dumps(templates).encode(),
        "labels.json": b'{"Doing x": "0", "Running": "1"}',
    }
    charades = {
        "Charades_v1_train.csv": b'id,actions\na,c000 1.0 2.5;c001 0 9\nb,""\n',
        "Charades_v1_classes.txt": b"c000 run\nc001 sit\n",
    }
    ucf = {"trainlist01.txt": b"Run/a.avi 1\nWalk/c.avi 2\n", "classInd.txt": b"1 Run\n2 Walk\n"}
    hmdb = {
        "hmdb/run_test_split1.txt": b"a.avi 1\nb.avi 2\n",
        "hmdb/walk_test_split1.txt": b"c.avi 1\n",
    }
    for files in (something, charades, ucf):
        source, classes = files
        found[source] = Layout(files, source, source)
        found[classes] = Layout(files, source, classes)
    found["hmdb"] = Layout(hmdb, "hmdb", "hmdb/run_test_split1.txt", "train1")
    return found


VIDEOS = (
    "run/a.avi", "run/b.avi", "walk/c.avi", "a.avi", "b.avi", "c.avi", "1.webm", "2.webm",
    "a.mp4", "run/a_000010_000020.mp4", "1/1.jpg", "2/1.jpg", "run/d/img_00008.jpg", "Run/a.avi",
    "Walk/c.avi",
)  # fmt: skip

_TOKENS = (
    b'"', b'""', b",", b";", b"|", b"\t", b"\n", b"\r", b"\r\n", b"\0", b" ", b"\xff",
    b"\xfe\xff", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b":", b"[" * 2000, b'{"a":' * 2000,
    b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 400, b"9" * 5000,
    b"x" * 400, b"x" * 200_000, b"../" * 50, b"/", b"//", b"~", b".", b"\\", b"\\ud800",
    b"\\u0000", b"\x1b[2J", b"=cmd|' /C'!A0", "\u0663".encode(), "\u00b2".encode(),
    "\u2028".encode(), b"path", b"label", b"id", b"split", b"youtube_id", b"actions",
    b"c999 1 2", b"c000 " + b"9" * 400 + b" " + b"9" * 500,
)  # fmt: skip


def mutant(data: bytes, seed: str) -> bytes:
    """Return the bytes after one to four changes."""
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        start = rng.randint(0, len(changed))
        end = min(len(changed), start + rng.randint(0, 12))
        change = rng.randrange(6)
        if change == 0 and start < len(changed):
            changed[start] ^= 1 << rng.randrange(8)
        elif change == 1:
            del changed[start:end]
        elif change == 2:
            changed[start:start] = changed[start:end]
        elif change == 3:
            del changed[start:]
        else:
            changed[start : end if change == 4 else start] = rng.choice(_TOKENS)
    return bytes(changed)


def fuzz_lists(folder: Path, count: int, report: Callable[[str], None]) -> dict[str, int]:
    """Read mutants of each layout; returns how many each accepts, reports what is wrong.

    Args:
        folder: an empty folder to work in.
        count: mutants of each layout.
        report: called with a sentence for each mutant that is neither a list nor one clear error.
    """
    accepted = {}
    for layout, (files, source, changed, split) in layouts().items():
        place = folder / layout
        for name in (*VIDEOS, *files):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(files.get(name, b""))
        accepted[layout] = 0
        for number in range(count):
            seed = f"{layout} {number}"
            (place / changed).unlink()  # some disks wait whenever a file is written over
            (place / changed).write_bytes(mutant(files[changed], seed))
            try:
                videos = read_video_list(place / source, split=split)
                check_list(videos)
                accepted[layout] += 1
            except InputError as error:
                problem = _not_one_short_line(str(error))
                if problem:
                    report(f"{seed}: {problem}")
            except Exception as error:
                report(f"{seed}: {type(error).__name__}: {error}"[:300])
    return accepted


def check_list(videos: VideoList) -> None:
    """Assert what everything after the reader relies on."""
    assert videos.samples
    assert len(set(videos.class_names)) == len(videos.class_names)
    for sample in videos.samples:
        assert os.path.exists(sample.path)
        assert all(0 <= label < len(videos.class_names) for label in sample.labels)
        assert list(sample.labels) == sorted(set(sample.labels))
        for action in sample.actions:
            sample.during(action)
    json.dumps([describe(videos), videos.class_names]).encode()
    "".join(videos.class_names).encode()


def _not_one_short_line(message: str) -> str:
    if not message.isprintable():
        return f"an error of several lines, {message!r}"[:300]
    if len(message) > 1000:
        return f"an error of {len(message)} characters, {message!r}"[:300]
    return ""

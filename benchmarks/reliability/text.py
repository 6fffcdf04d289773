"""Whether text that nobody would write is read right, or refused in one line."""

import contextlib
import random
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ftfy
import text_fuzz

from actionclip.errors import InputError
from actionclip.tokenizer import encode
from benchmarks.reliability.figures import Figure


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    yield same_tokens(500 if small else 100_000)
    yield same_tokens_as_transformers(200 if small else 10_000)
    yield longest_encoding(20_000 if small else 1_000_000)
    yield label_files(folder)
    yield from lists(folder / "lists", 20 if small else 6000)


def same_tokens(count: int) -> Figure:
    wrong = []
    for seed in range(count):
        text = text_fuzz.random_text(seed)
        if _outcome(encode, text) != text_fuzz.reference_encode(text):
            wrong.append(seed)
    return Figure(
        "text",
        "random strings with the token ids of a plainly written tokenizer",
        f"{count - len(wrong):,} of {count:,}",
        not wrong,
        f"not those of the seeds {wrong[:10]}" if wrong else "",
    )


def same_tokens_as_transformers(count: int) -> Figure:
    """Compare with a peer where both mean the same."""
    question = "strings of letters, digits and punctuation with the ids of transformers"
    try:
        import transformers
    except ImportError:
        return Figure("text", question, "not compared", False, "transformers is not installed")
    vocabulary = list(text_fuzz.ids())
    peer = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=list(text_fuzz.merge_ranks()),
    )
    rng = random.Random(0)
    alphabet = string.ascii_letters + string.digits + " " * 12 + ".,!?;:()-/#@*+='"
    alphabet += "\u00e9\u00f1\u00fc\u00df\u0436\u0449\u03bb\u03c0\u4e2d\u6587\u3042\ud55c\U0001f600"
    wrong = []
    for _ in range(count):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
        if encode(text) != peer(ftfy.fix_text(text))["input_ids"][1:-1]:
            wrong.append(text)
    return Figure(
        "text",
        question,
        f"{count - len(wrong):,} of {count:,}",
        not wrong,
        f"such as not {wrong[0]!a}"
        if wrong
        else "it neither repairs text nor resolves HTML entities, so those are left out",
    )


def longest_encoding(length: int) -> Figure:
    """Time what takes longest of a single label that fills its file."""
    rng = random.Random(0)
    texts = {
        "one word": "".join(rng.choices(string.ascii_lowercase, k=length)),
        "one letter": "a" * length,
        "words": "".join(rng.choices(string.ascii_lowercase + "  ", k=length)),
        "accents": "\u0301" * length,
        "mistaken encoding": "\u00c3\u00a9" * (length // 2),
        "entities": "&amp;" * (length // 5),
        "ampersands": "&" * length,
        "digits": "&#" + "9" * length,
        "lines": "\n" * length,
        "surrogates": "\ud800" * length,
        "escapes": "\x1b[" * (length // 2),
    }
    seconds = {name: _seconds(encode, text) for name, text in texts.items()}
    slowest = max(seconds, key=seconds.__getitem__)
    return Figure(
        "text",
        f"longest time for a text of {length:,} characters, under 60 s",
        f"{seconds[slowest]:.1f} s ({slowest})",
        seconds[slowest] < 60,
        "a label or template file with a line of over 10,000 is refused before that",
    )


def label_files(folder: Path) -> Figure:
    files = list(text_fuzz.label_files())
    problems = {file[0]: text_fuzz.label_file_problem(folder, file) for file in files}
    wrong = [f"{name}: {problem}" for name, problem in problems.items() if problem]
    return Figure(
        "text",
        "label files in odd encodings and shapes: right, or one line",
        f"{len(files) - len(wrong)} of {len(files)}",
        not wrong,
        "; ".join(wrong)[:300],
    )


def lists(folder: Path, count: int) -> Iterator[Figure]:
    problems: list[str] = []
    accepted = text_fuzz.fuzz_lists(folder, count, problems.append)
    total = count * len(accepted)
    yield Figure(
        "text",
        f"mutated lists of videos, {len(accepted)} layouts: read, or one error of ours in one line",
        f"{total - len(problems):,} of {total:,}",
        not problems,
        problems[0] if problems else f"{sum(accepted.values()):,} of them could still be read",
    )


def _outcome(function: Callable[[str], list[int]], text: str) -> object:
    try:
        return function(text)
    except Exception as error:  # which one is what is asked
        return error


def _seconds(function: Callable[[str], list[int]], text: str) -> float:
    start = time.perf_counter()
    with contextlib.suppress(InputError):
        function(text)
    return time.perf_counter() - start

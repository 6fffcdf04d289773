"""Turn sentences into CLIP's token ids, and back.

The start of the text side: prompts -> token ids (P, 77) -> text encoder. The
byte-pair merges are data of the package (`bpe_merges.txt.gz`, see NOTICE) and
are read on the first call. Knows nothing of templates or classes.

Source: CLIP (arXiv:2103.00020), section 2.4, and the vocabulary of OpenAI's release.
"""

import functools
import gzip
import heapq
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actionclip.errors import InputError, short

# The vocabulary is the 256 byte symbols, the same 256 ending a word, one token per merge and
# two special tokens; the number of merges is as OpenAI's code counts them.
NUM_MERGES = 49152 - 256 - 2
SOT_ID = 2 * 256 + NUM_MERGES
EOT_ID = SOT_ID + 1
VOCAB_SIZE = EOT_ID + 1

_SPECIAL_IDS = {"<|startoftext|>": SOT_ID, "<|endoftext|>": EOT_ID}

# The byte that each of the first 256 ids stands for: printable Latin-1 first, then the rest.
_PRINTABLE = bytes([*range(33, 127), *range(161, 173), *range(174, 256)])
_BYTES = _PRINTABLE + bytes(byte for byte in range(256) if byte not in _PRINTABLE)

# Whitespace matches nothing, so it separates pieces and needs no clean-up beforehand.
# `L` stands for letters and `N` for digits.
_PIECE = r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[{L}]+|[{N}]|[^\s{L}{N}]+"
_PLAIN_PIECE = re.compile(_PIECE.format(L="a-z", N="0-9"))


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> Tensor:
    """Turn texts into rows of token ids, padded with zeros.

    Args:
        texts: one text or P texts.
        context_length: length of a row; the published models take 77.
        truncate: shorten a text that does not fit instead of raising; its last id stays EOT.

    Returns:
        (P, context_length) int64; a row is SOT, the text, EOT, zeros. P is 1 for one text.

    Raises:
        InputError: if a text is not a string, or does not fit and `truncate` is off.
    """
    if isinstance(texts, str):
        texts = [texts]
    rows = np.zeros((len(texts), context_length), dtype=np.int64)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is of type {type(text).__name__}; pass strings only")
        ids = [SOT_ID, *encode(text), EOT_ID]
        if len(ids) > context_length:
            if not truncate:
                raise InputError(
                    f"text {short(text)} has {len(ids)} tokens, the limit is {context_length}; "
                    "shorten it or pass truncate=True"
                )
            ids = [*ids[: context_length - 1], EOT_ID]
        rows[i, : len(ids)] = ids
    return torch.from_numpy(rows)


def encode(text: str) -> list[int]:
    """Return the token ids of a text, without SOT, EOT and padding.

    Raises:
        InputError: if the text holds a character reference of thousands of digits.
    """
    return [token for piece in words(text) for token in _encode_piece(piece)]


def words(text: str) -> list[str]:
    """Return what the tokens of a text stand for: words in lower case, digits, punctuation."""
    text = _clean(text)
    pattern = _PLAIN_PIECE if _is_plain(text) else _any_piece()
    return list(pattern.findall(text))


def token_ids(vocabulary: Iterable[str]) -> list[int]:
    """Return the ids, ascending, of all tokens in which texts of these words can be written."""
    return sorted({SOT_ID, EOT_ID, *(token for word in vocabulary for token in encode(word))})


def decode(ids: Iterable[int] | Tensor) -> str:
    """Return the cleaned text of token ids; a space follows every word.

    Nothing is left out: SOT and EOT become their names and padding (id 0) becomes "!", so cut a
    row of `tokenize` to what is wanted. Bytes that are not UTF-8 become U+FFFD.

    Raises:
        InputError: if an id is outside the vocabulary.
    """
    tokens = [int(token) for token in ids]
    for token in tokens:
        if not 0 <= token < VOCAB_SIZE:
            raise InputError(f"token id {token} is outside the vocabulary 0..{VOCAB_SIZE - 1}")
    vocabulary = _vocabulary()
    return b"".join(vocabulary[token] for token in tokens).decode("utf-8", errors="replace")


def _clean(text: str) -> str:
    # Plain text without "&" passes these steps unchanged.
    if not _is_plain(text) or "&" in text:
        import html

        import ftfy

        try:
            # Twice, as in CLIP: entities are sometimes escaped themselves.
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        except ValueError as error:  # "&#999...": Python reads no number of over 4300 digits
            raise InputError(f"text {short(text)} cannot be read ({error})") from error
    return text.lower()


def _is_plain(text: str) -> bool:
    """Tell printable ASCII, as almost all prompts are.

    It needs neither ftfy nor regex, whose imports would add 0.1 s to the start of a program.
    """
    return text.isascii() and text.isprintable()


@functools.cache
def _any_piece() -> Any:
    import regex

    return regex.compile(_PIECE.format(L=r"\p{L}", N=r"\p{N}"), regex.IGNORECASE)


@functools.lru_cache(maxsize=65536)
def _encode_piece(piece: str) -> tuple[int, ...]:
    if piece in _SPECIAL_IDS:
        return (_SPECIAL_IDS[piece],)
    tokens = [_BYTES.index(byte) for byte in piece.encode()]
    tokens[-1] += 256  # the same byte, ending a word
    return tuple(_merge(tokens))


def _merge(tokens: list[int]) -> list[int]:
    """Replace pairs by the token they make, the earliest merge first, each from left to right.

    A heap, because one word of 30,000 letters took 14 s with a search of all pairs for each merge.
    """
    merges = _merges()
    # Ids follow the order of the merges, so the smallest is the one to apply first.
    pairs = [
        (merges[key], left)
        for left, key in enumerate(map(_key, tokens, tokens[1:]))
        if key in merges
    ]
    heapq.heapify(pairs)
    end = len(tokens)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    gone = -1
    while pairs:
        merged, left = heapq.heappop(pairs)
        right = after[left]
        # Another merge may have taken one of the two since.
        if right == end or merges.get(_key(tokens[left], tokens[right])) != merged:
            continue
        tokens[left], tokens[right] = merged, gone
        after[left] = after[right]
        if after[left] < end:
            before[after[left]] = left
        for first in (before[left], left):
            if first >= 0 and after[first] < end:
                key = _key(tokens[first], tokens[after[first]])
                if key in merges:
                    heapq.heappush(pairs, (merges[key], first))
    return [token for token in tokens if token != gone]


def _key(left: int, right: int) -> int:
    # Not a tuple: 48894 of them cost the garbage collector 0.1 s at start-up.
    return left << 16 | right


@functools.cache
def _merges() -> dict[int, int]:
    """Read the merge table: `_key` of two ids -> the id of the token they make."""
    table = importlib.resources.files("actionclip").joinpath("bpe_merges.txt.gz").read_bytes()
    pairs = np.fromstring(gzip.decompress(table).decode(), dtype=np.int64, sep=" ").reshape(-1, 2)
    assert len(pairs) == NUM_MERGES, f"bpe_merges.txt.gz holds {len(pairs)} merges"
    keys = (pairs[:, 0] << 16 | pairs[:, 1]).tolist()
    return dict(zip(keys, range(2 * 256, SOT_ID), strict=True))


@functools.cache
def _vocabulary() -> list[bytes]:
    """Return the bytes of every token, with a space where a word ends."""
    tokens = [bytes([byte]) for byte in _BYTES]
    tokens += [token + b" " for token in tokens]
    for key in _merges():
        tokens.append(tokens[key >> 16] + tokens[key & 0xFFFF])
    return tokens + [name.encode() for name in _SPECIAL_IDS]

import hashlib
import html
import json
import random
import subprocess
import sys
from pathlib import Path

import ftfy
import pytest
import torch

from actionclip import tokenizer
from actionclip.errors import InputError
from actionclip.tokenizer import (
    EOT_ID,
    SOT_ID,
    VOCAB_SIZE,
    decode,
    encode,
    token_ids,
    tokenize,
    words,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer.json").read_text("utf-8"))


def byte_symbols() -> list[str]:
    """The characters that stand for bytes in OpenAI's file, in the order of their ids."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(68)]
    return symbols + [symbol + "</w>" for symbol in symbols]


def original_merges() -> list[tuple[str, str]]:
    """The merges as OpenAI's file spells them."""
    symbols = byte_symbols()
    merges = []
    for key in tokenizer._merges():
        merges.append((symbols[key >> 16], symbols[key & 0xFFFF]))
        symbols.append("".join(merges[-1]))
    return merges


def random_text(rng: random.Random, alphabet: list[str]) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 30)))


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: ascii(item["text"])[:40])
def test_golden(item):
    row = tokenize(item["text"])
    assert row.tolist() == [item["ids"] + [0] * (77 - len(item["ids"]))]
    assert decode(item["ids"][1:-1]) == item["decoded"]


@pytest.mark.parametrize("item", GOLDEN["long_items"], ids=lambda item: item["text"][:20])
def test_golden_long(item):
    assert len(encode(item["text"])) + 2 == item["n_tokens_with_sot_eot"]
    assert tokenize(item["text"], truncate=True).tolist() == [item["truncated_ids"]]
    if item["raises_without_truncate"]:
        with pytest.raises(InputError, match=f"{item['n_tokens_with_sot_eot']} tokens"):
            tokenize(item["text"])
    else:
        assert tokenize(item["text"]).tolist() == [item["truncated_ids"]]


def test_constants_are_those_of_the_published_vocabulary():
    assert (GOLDEN["sot"], GOLDEN["eot"], GOLDEN["vocab_size"]) == (SOT_ID, EOT_ID, VOCAB_SIZE)


def test_merge_table_is_openais_without_loss():
    text = "".join(f"{left} {right}\n" for left, right in original_merges())
    # Of lines 2 to 48895 of OpenAI's bpe_simple_vocab_16e6.txt; also in NOTICE.
    expected = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"
    assert hashlib.sha256(text.encode()).hexdigest() == expected


def test_notice_has_the_hash_of_the_stored_table():
    table = Path(tokenizer.__file__).parent / "bpe_merges.txt.gz"
    notice = (Path(__file__).parent.parent / "NOTICE").read_text("utf-8")
    assert hashlib.sha256(table.read_bytes()).hexdigest() in notice


def test_agrees_with_transformers():
    transformers = pytest.importorskip("transformers")
    merges = original_merges()
    vocabulary = byte_symbols() + [left + right for left, right in merges]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    peer = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges
    )
    rng = random.Random(0)
    alphabet = list("aaabcdeeefghiiijklmnooopqrsttuuvwxyzABCXYZ0123456789      .,!?;:()-/#@*+='")
    alphabet += list("éñüßøжщяλπσ中文動画あいうエオ한국어😀🏀→€")
    for _ in range(2000):
        text = random_text(rng, alphabet)
        # The peer does not call ftfy.
        assert encode(text) == peer(ftfy.fix_text(text))["input_ids"][1:-1], ascii(text)


@pytest.mark.parametrize("first", [0, 32])
def test_plain_text_needs_no_ftfy(first):
    rng = random.Random(first)
    alphabet = [chr(code) for code in range(first, 128)] + list("&&&<;;#0123") + ["&amp;", "&LT;"]
    plain = 0
    for _ in range(3000):
        text = random_text(rng, alphabet)
        fixed = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
        assert tokenizer._clean(text) == fixed, ascii(text)
        plain += "&" not in text and text.isprintable()
    assert plain > 50  # the short way was taken, too


def test_plain_text_falls_into_the_same_pieces():
    rng = random.Random(2)
    alphabet = [*map(chr, range(32, 127)), "'", "'", "'s", "'ll", "<|endoftext|>", "<|", "Ab", " "]
    for _ in range(3000):
        text = random_text(rng, alphabet).replace("&", "").lower()
        assert words(text) == tokenizer._any_piece().findall(text), text


def test_start_up_imports_neither_ftfy_nor_regex():
    code = (
        "import sys; from actionclip.tokenizer import _merges, tokenize;"
        "from actionclip.prompts import readable;"
        "assert not _merges.cache_info().currsize;"
        "tokenize(['archery, an action', readable('TVShow')]);"
        "assert not {'ftfy', 'regex'} & set(sys.modules);"
        "tokenize('caf\\u00e9'); assert {'ftfy', 'regex'} <= set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_random_unicode():
    rng = random.Random(0)
    planes = [(0, 0x250), (0x250, 0x3000), (0x3000, 0xD800), (0xD800, 0xE000), (0xE000, 0x110000)]
    texts = []
    for _ in range(400):
        start, stop = rng.choice(planes)
        texts.append("".join(chr(rng.randrange(start, stop)) for _ in range(rng.randrange(25))))
    rows = tokenize(texts, truncate=True)
    assert rows.shape == (400, 77)
    assert rows.dtype == torch.int64
    assert rows.min() >= 0
    assert rows.max() == EOT_ID
    for text, row in zip(texts, rows, strict=True):
        ids = encode(text)
        assert encode(decode(ids)) == ids, ascii(text)
        assert decode(encode(decode(ids))) == decode(ids)
        assert row.tolist()[: len(ids) + 1] == [SOT_ID, *ids][:76] + [EOT_ID] * (len(ids) > 75)


def test_entities_beside_a_tag_are_unescaped_twice():
    # ftfy leaves entities alone when it sees "<", so only CLIP's own unescaping is at work.
    assert encode("<b> tom &amp;amp; jerry") == encode("<b> tom & jerry")
    assert encode("<b> &amp;amp;amp;") == encode("<b> &") + encode("amp;")


def test_contractions_ignore_case_beyond_ascii():
    # lower() leaves the long s, a case variant of s.
    assert decode(encode("it'\u017f")) == "it '\u017f "


def test_rows_do_not_depend_on_their_neighbours():
    texts = ["archery", "playing basketball", "tai chi"]
    assert torch.equal(tokenize(texts), torch.cat([tokenize(text) for text in texts]))
    assert tokenize([]).shape == (0, 77)
    assert tokenize(texts, context_length=5)[:, :5].equal(tokenize(texts)[:, :5])


def test_too_long_text_is_named_in_one_line():
    with pytest.raises(InputError) as error:
        tokenize(["archery", "line\nbreak " * 50])
    message = str(error.value)
    assert message.startswith("text 'line\\nbreak line")
    assert "...' has 102 tokens, the limit is 77; shorten it or pass truncate=True" in message
    assert len(message) < 200
    assert "\n" not in message


def test_too_long_for_a_short_context():
    with pytest.raises(InputError, match="text 'a b c d' has 6 tokens, the limit is 5"):
        tokenize("a b c d", context_length=5)
    assert tokenize("a b c d", 5, truncate=True).tolist() == [[SOT_ID, 320, 321, 322, EOT_ID]]


@pytest.mark.parametrize("value", [None, 3, b"bytes", ["nested"]])
def test_only_strings(value):
    with pytest.raises(InputError, match=f"text 1 is of type {type(value).__name__}"):
        tokenize(["archery", value])


@pytest.mark.parametrize("token", [-1, 49408])
def test_decode_outside_the_vocabulary(token):
    with pytest.raises(InputError, match=f"token id {token} is outside"):
        decode([320, token])


def test_decode_takes_a_tensor_and_broken_utf8():
    assert decode(tokenize("Tai Chi")[0, 1:3]) == "tai chi "
    assert decode([127]) == "\N{REPLACEMENT CHARACTER}"
    assert decode([SOT_ID, 0]) == "<|startoftext|>!"


def test_words_are_cleaned_and_in_lower_case():
    assert words("A big  Red\tcircle") == ["a", "big", "red", "circle"]
    assert words("tom &amp;amp; jerry_12") == ["tom", "&", "jerry", "_", "1", "2"]
    assert words("Can't you?") == ["can", "'t", "you", "?"]
    assert words("Caf\u00e9 \u52d5\u753b") == ["caf\u00e9", "\u52d5\u753b"]
    assert words(" ") == []


def test_token_ids_are_those_of_every_text_of_these_words():
    vocabulary = ["abseiling", "a", "circle", "7", "a"]
    ids = token_ids(vocabulary)
    assert ids == sorted(set(ids))
    text = "Circle a 7 7 abseiling A"
    assert set(words(text)) == set(vocabulary)
    assert set(tokenize(text)[0].tolist()) - {0} == set(ids)
    assert token_ids([]) == [SOT_ID, EOT_ID]

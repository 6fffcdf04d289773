"""Text that nobody would write: the tokenizer, label files and lists of videos.

The same with more of everything is `python -m benchmarks.reliability text`.
"""

import io
import random
import re
import string
import types

import pytest
import text_fuzz

from actionclip import tokenizer
from actionclip.annotations import Action, read_video_list
from actionclip.cli.eval import write_per_class
from actionclip.cli.zeroshot import main as zeroshot
from actionclip.errors import InputError
from actionclip.evaluate import ClassResult
from actionclip.labels import read_templates
from actionclip.prompts import class_prompts
from actionclip.tokenizer import EOT_ID, decode, encode, tokenize


def test_tokenizer_equals_the_slow_one():
    for seed in range(2000):
        text = text_fuzz.random_text(seed)
        assert encode(text) == text_fuzz.reference_encode(text), f"seed {seed}: {text!a}"


def test_the_slow_tokenizer_has_the_published_vocabulary():
    ids = text_fuzz.ids()
    assert len(ids) == tokenizer.VOCAB_SIZE
    assert ids["<|endoftext|>"] == EOT_ID
    # Known from the original code.
    assert text_fuzz.reference_encode("a diagram") == [320, 22697]


@pytest.mark.parametrize("alphabet", [string.ascii_lowercase, "a", "\u00e9\u6253"])
def test_one_very_long_word(alphabet):
    rng = random.Random(0)
    word = "".join(rng.choice(alphabet) for _ in range(1000))
    assert encode(word) == text_fuzz.reference_encode(word)
    # Searching all pairs for each merge, this took a minute.
    word = "".join(rng.choice(alphabet) for _ in range(100_000))
    assert decode(encode(word)) == f"{word} "


def test_a_character_reference_of_thousands_of_digits():
    with pytest.raises(InputError, match=r"text '&#999.*\.\.\.' cannot be read \(Exceeds") as error:
        tokenize("&#" + "9" * 5000 + ";")
    assert len(str(error.value)) < 300
    assert encode("&#x" + "0" * 5000 + "61;") == encode("a")


def test_label_files(tmp_path):
    files = list(text_fuzz.label_files())
    assert len(files) > 40
    for file in files:
        assert text_fuzz.label_file_problem(tmp_path, file) == "", file[0]


def test_a_label_file_that_is_none_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "labels.txt"
    path.write_bytes(b"archery\n\xff\n")
    assert zeroshot(["a.mp4", "--model", "tiny", "--labels", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r".*labels\.txt: line 2 is not valid utf-8; save .*\n", captured.err)


def test_a_template_file_of_one_endless_line(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("{}" + "x" * 10_000)
    with pytest.raises(InputError, match=r"goes on for 10002 characters, the limit is 10000"):
        read_templates(str(path))


def test_names_that_look_like_code_stay_text():
    names = ["=cmd|' /C calc'!A0", "{0.__class__}", "%s", "$(id)", "\x1b[2J", "a{}b"]
    assert class_prompts(["see {}!"], names, raw_labels=True) == [f"see {n}!" for n in names]
    assert tokenize(names).shape == (6, 77)


def test_the_table_of_classes_can_neither_steer_a_terminal_nor_a_spreadsheet():
    names = ["=cmd|' /C calc'!A0", "a\x1b[2Jb", "new\nline", "\x9b31m", "\u202egpj", 'a, "b"']
    rows = tuple(ClassResult(name, 1, {"top1": 1.0}) for name in names)
    file = io.StringIO(newline="")
    write_per_class(file, types.SimpleNamespace(per_class=rows))
    assert file.getvalue().splitlines() == [
        "id,name,videos,top1",
        "0,'=cmd|' /C calc'!A0,1,1.000000",
        r"1,a\x1b[2Jb,1,1.000000",
        r"2,new\nline,1,1.000000",
        r"3,\x9b31m,1,1.000000",
        r"4,\u202egpj,1,1.000000",
        '5,"a, ""b""",1,1.000000',
    ]


def test_an_endless_action_is_taken_as_the_whole_video(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "Charades_v1_classes.txt").write_text("c000 run\n")
    (tmp_path / "list.csv").write_text(f"id,actions\na,c000 1 {'9' * 400}\n")
    assert read_video_list(tmp_path / "list.csv").samples[0].actions == (Action(0),)


def test_lists_of_videos(tmp_path):
    problems: list[str] = []
    accepted = text_fuzz.fuzz_lists(tmp_path, 100, problems.append)
    assert problems == []
    assert sum(accepted.values()) > 100  # mutants are near enough to what is read

import pytest

from actionclip import labels
from actionclip.errors import InputError
from actionclip.labels import read_labels, read_templates
from actionclip.prompts import TEMPLATES


@pytest.fixture
def write(tmp_path):
    def write(name: str, data: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return str(path)

    return write


def test_words_as_given():
    assert read_labels(["juggling balls", " Archery", "a.b"]) == [
        "juggling balls",
        " Archery",
        "a.b",
    ]
    assert read_labels([]) == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_text_file(write, encoding, newline):
    text = newline.join(["juggling balls", "", "  crème brûlée ", "\t", "打篮球", "a\u2028b"])
    if encoding in ("utf-16-le", "utf-16-be"):
        text = "\ufeff" + text
    path = write("labels.TXT", text.encode(encoding))
    assert read_labels([path]) == ["juggling balls", "crème brûlée", "打篮球", "a\u2028b"]


@pytest.mark.parametrize(
    "text",
    [
        'id,name\n0,archery\n1,"riding, or walking"\n2,"so-called ""planking"""\n',
        'name\narchery\n"riding, or walking"\n"so-called ""planking"""',
        'ID, Label,extra\r\n0,archery,x\r\n\r\n1,"riding, or walking",\r\n'
        '2,"so-called ""planking""",y\r\n',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_file(write, text, encoding):
    path = write("labels.csv", text.encode(encoding))
    assert read_labels([path]) == ["archery", "riding, or walking", 'so-called "planking"']


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,name\n0,archery\n2,diving\n",
            r"line 3 has id '2', its position is 1; number the rows",
        ),
        ("id,name\n1,archery\n", "line 2 has id '1', its position is 0"),
        ("id,name\n0,archery\n,diving\n", "line 3 has id ''"),
        ("id,name\n0,riding, or walking\n", "line 2 has 3 fields, the header 2; put quotes"),
        ("id,name\n\n0\n", "line 3 has 1 fields"),
        ("0,archery\n1,diving\n", "the header is '0,archery'; it needs one column"),
        ("name,label\na,b\n", "it needs one column 'name' or 'label'"),
        ('id,name\n0,"archery\n1,diving\n', "is not valid CSV .*check its quotes"),
        ("id,name\n", "holds no labels"),
        ("", "holds no labels"),
    ],
)
def test_csv_errors(write, text, message):
    path = write("labels.csv", text)
    with pytest.raises(InputError, match=message) as error:
        read_labels([path])
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "holds no labels; write one per line"),
        (b"\n  \n", "holds no labels"),
        (b"archery\nta\xef chi\n", "line 2 is not valid utf-8; save the file as UTF-8"),
        (b"\xef\xbb\xbfarchery\n\n\xff", "line 3 is not valid utf-8"),
        ("archery\ndiving\n".encode("utf-16") + b"\x00", "line 3 is not valid utf-16"),
        ("archery\n".encode("utf-16-le"), "zero bytes; save it as UTF-8"),
    ],
)
def test_text_errors(write, data, message):
    path = write("labels.txt", data)
    with pytest.raises(InputError, match=message) as error:
        read_labels([path])
    assert str(error.value).startswith(f"{path}: ")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"labels\.csv: cannot be read \(No such file"):
        read_labels([str(tmp_path / "labels.csv")])
    folder = tmp_path / "labels.txt"
    folder.mkdir()
    with pytest.raises(InputError, match=r"labels\.txt: cannot be read \("):
        read_labels([str(folder)])


def test_large_file(write, monkeypatch):
    monkeypatch.setattr(labels, "MAX_FILE_BYTES", 20)
    assert read_labels([write("fits.txt", "a" * 20)]) == ["a" * 20]
    with pytest.raises(InputError, match=r"large\.txt: is over 20 bytes"):
        read_labels([write("large.txt", "a" * 21)])


@pytest.mark.parametrize("values", [["archery", "b.txt"], ["b.CSV", "archery"], ["b.txt", "c.txt"]])
def test_file_among_labels(values):
    with pytest.raises(InputError, match=r"label 'b\..*' looks like a file among 2 labels"):
        read_labels(values)


def test_templates(write):
    assert read_templates("actionclip") == TEMPLATES["actionclip"]
    assert read_templates("none") == ("{}",)
    text = "a video of {}\n\n {} in action \n"
    for name in ("mine.txt", "mine"):
        assert read_templates(write(name, text)) == ("a video of {}", "{} in action")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("actoinclip", "unknown templates 'actoinclip': did you mean 'actionclip'"),
        ("a photo of {}", "unknown templates 'a photo of {}': use one of actionclip, none or a"),
        ("missing.txt", r"missing\.txt: cannot be read \(No such file"),
    ],
)
def test_template_errors(name, message):
    with pytest.raises(InputError, match=message):
        read_templates(name)


def test_empty_template_file(write):
    with pytest.raises(InputError, match=r"holds no templates; write one per line, with \{\} for"):
        read_templates(write("empty.txt", "\n"))

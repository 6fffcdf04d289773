"""Every layout of data: what it is taken for, which files it finds, what it refuses."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from actionclip import annotations
from actionclip.annotations import (
    Action,
    Sample,
    VideoList,
    base_classes,
    describe,
    few_shot,
    keep_classes,
    read_video_list,
    whole_videos,
)
from actionclip.errors import InputError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder of every test, with nothing in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names):
    """Make empty files: a list of videos is read without opening one."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def write(name, text, encoding="utf-8"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode(encoding))
    return name


def found(video_list):
    """Return (path, labels) of each sample."""
    return [(os.path.normpath(s.path), s.labels) for s in video_list.samples]


# Folder per class


def test_a_folder_per_class():
    touch("d/class 10/b.mp4", "d/class 2/deep/er/a.MKV", "d/class 2/x10.avi", "d/class 2/x9.avi")
    touch("d/class 2/notes.txt", "d/class 2/._x9.avi", "d/.git/a.mp4", "d/empty/readme")
    touch("d/stray.mp4")
    videos = read_video_list("d")
    assert videos.layout == "folder per class"
    assert videos.class_names == ("class 2", "class 10", "empty")
    assert found(videos) == [
        ("d/class 2/deep/er/a.MKV", (0,)),
        ("d/class 2/x9.avi", (0,)),
        ("d/class 2/x10.avi", (0,)),
        ("d/class 10/b.mp4", (1,)),
    ]
    assert videos.samples[0].name == "class 2/deep/er/a.MKV"
    assert not videos.multi_label
    assert videos.missing == ()
    assert videos.notes == (
        "1 video outside of the class folders, not used",
        "class empty has no videos",
    )


def test_class_folders_of_frame_folders_and_links():
    touch("d/run/v1/img_00001.jpg", "d/run/v1/img_00002.jpg", "store/v2/1.png", "store/walk/w.mp4")
    os.symlink(os.path.abspath("store/v2"), "d/run/v2")
    os.symlink(os.path.abspath("store/walk"), "d/walk")
    os.symlink(os.path.abspath("d"), "d/run/loop")
    assert found(read_video_list("d"))[:3] == [
        ("d/run/loop/walk/w.mp4", (0,)),
        ("d/run/v1", (0,)),
        ("d/run/v2", (0,)),
    ]
    os.unlink("d/run/loop")
    assert found(read_video_list("d")) == [
        ("d/run/v1", (0,)),
        ("d/run/v2", (0,)),
        ("d/walk/w.mp4", (1,)),
    ]


def test_class_folders_take_the_order_of_given_names():
    touch("d/brush_hair/a.mp4", "d/ApplyEyeMakeup/b.mp4")
    videos = read_video_list("d", class_names=["Brush hair", "golf", "apply eye makeup"])
    assert videos.class_names == ("Brush hair", "golf", "apply eye makeup")
    assert found(videos) == [("d/ApplyEyeMakeup/b.mp4", (2,)), ("d/brush_hair/a.mp4", (0,))]
    with pytest.raises(InputError, match=r"has label 'ApplyEyeMakeup'; it is not one of the 1"):
        read_video_list("d", class_names=["golf"])


def test_folders_called_like_numbers_are_names():
    touch("d/7/a.mp4", "d/3/b.mp4")
    assert read_video_list("d").class_names == ("3", "7")


def test_numbered_class_folders_keep_their_numbers_in_every_part():
    touch("train/1 walking/a.mp4", "train/2 running/b.mp4", "val/2 running/c.mp4")
    names = read_video_list("train").class_names
    assert names == ("1 walking", "2 running")
    assert found(read_video_list("val", class_names=names)) == [("val/2 running/c.mp4", (1,))]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["d/a.mp4"], "d: holds 1 video and no folders; give a folder with a folder per class"),
        (["d/train/golf/a.mp4", "d/val/golf/b.mp4"], "its folders are parts, not classes; give d/"),
        (["d/golf/1.jpg", "d/golf/2.jpg"], "d/golf: holds images; put the frames of each video"),
        (["d/golf/a.txt"], r"d: holds no videos \(folder per class\)"),
        (["d/golf/a.mp4", "d/Golf/b.mp4"], "class names 'Golf' and 'golf' read the same"),
    ],
)
def test_folders_that_are_no_data(files, message):
    touch(*files)
    with pytest.raises(InputError, match=message):
        read_video_list("d")


# Lists


def test_path_and_index():
    touch("clips/a b.mp4", "clips/c.mp4")
    write("l/list.txt", "clips/a b.mp4 1\r\n\r\n  clips/c.mp4 0\r\n")
    videos = read_video_list("l/list.txt", class_names=["x", "y"])
    assert videos.layout == "list of 'path label'"
    assert found(videos) == [("clips/a b.mp4", (1,)), ("clips/c.mp4", (0,))]
    with pytest.raises(
        InputError, match=r"its labels are numbers .* name the classes with --labels"
    ):
        read_video_list("l/list.txt")
    with pytest.raises(InputError, match=r"list.txt: line 1 has label '1'; use 0 to 0"):
        read_video_list("l/list.txt", class_names=["x"])


def test_path_and_name():
    touch("a.mp4", "b.mp4", "c.mp4")
    write("list.txt", "a.mp4 walk10\nb.mp4 walk9\nc.mp4 walk10")
    videos = read_video_list("list.txt")
    assert videos.class_names == ("walk9", "walk10")
    assert found(videos) == [("a.mp4", (1,)), ("b.mp4", (0,)), ("c.mp4", (1,))]
    with pytest.raises(
        InputError, match=r"list.txt: line 2 has label 'walk9'; it is not one of th"
    ):
        read_video_list("list.txt", class_names=["Walk10"])


def test_several_labels_in_a_list():
    touch("a.mp4", "b.mp4")
    write("list.txt", "a.mp4 2,0,2\nb.mp4 1")
    videos = read_video_list("list.txt", class_names=["x", "y", "z"])
    assert found(videos) == [("a.mp4", (0, 2)), ("b.mp4", (1,))]
    assert videos.multi_label


def test_a_csv_may_be_a_list_with_spaces():
    touch("a.mp4", "b.mp4")
    write("list.csv", "a.mp4 1\nb.mp4 0,1")
    videos = read_video_list("list.csv", class_names=["x", "y"])
    assert videos.layout == "list of 'path label'"
    assert found(videos) == [("a.mp4", (1,)), ("b.mp4", (0, 1))]


@pytest.mark.parametrize("line", ["b.mp4", "1"])
def test_a_line_of_another_kind_is_named(line):
    write("list.txt", f"a.mp4 0\n\n{line}\n")
    with pytest.raises(InputError, match=rf"list.txt: line 3 is '{line}'; write 'path label'"):
        read_video_list("list.txt", class_names=["x"])


def test_frame_folders():
    for name, count in (("a b", 3), ("c", 2), ("e", 0)):
        Path("frames", name).mkdir(parents=True)
        touch(*(f"frames/{name}/img_{i + 1:05d}.jpg" for i in range(count)))
    touch("frames/d/1.png", "frames/d/2.png", "frames/d/list.txt", "frames/f")
    write("list.txt", "a b 3 1\nc 5 0\nd 2 0\ne 4 1\ngone 7 1\nf 1 0\n")
    videos = read_video_list("list.txt", videos="frames", class_names=["x", "y"])
    assert videos.layout == "list of 'folder num_frames label'"
    assert found(videos) == [("frames/a b", (1,)), ("frames/c", (0,)), ("frames/d", (0,))]
    assert videos.missing == ("e", "gone", "f")
    assert videos.notes == (
        "1 folder with another number of frames than listed, all in the folder are used "
        "(c has 2, not 5)",
    )
    write("list.txt", "a 3 1\nc x 0\n")
    with pytest.raises(InputError, match="line 2 is 'c x 0'; write 'folder num_frames label'"):
        read_video_list("list.txt", class_names=["x", "y"])


# Tables


def test_csv_with_a_header_in_any_order():
    touch("v/a, b.mp4", "v/c.mp4")
    rows = 'golf,3.5,"a, b.mp4",1,9,,\nlong jump,,c.mp4,,,,\n'
    write("list.csv", "Label,end,path,start,extra,,\n" + rows)
    videos = read_video_list("list.csv", videos="v")
    assert videos.layout == "csv"
    assert videos.class_names == ("golf", "long jump")
    assert videos.samples == (
        Sample("v/a, b.mp4", (0,), 1.0, 3.5, "a, b.mp4"),
        Sample("v/c.mp4", (1,), None, None, "c.mp4"),
    )


@pytest.mark.parametrize(
    ("name", "text", "layout"),
    [
        ("list.csv", "a.mp4,golf,0,2\nb.mp4,long jump,1.5,2\n", "csv without a header"),
        ("list.tsv", "a.mp4\tgolf\t0\t2\nb.mp4\tlong jump\t1.5\t2\n", "tsv without a header"),
        ("list.txt", "a.mp4\tgolf\t0\t2\nb.mp4\tlong jump\t1.5\t2\n", "tsv without a header"),
        (
            "list.jsonl",
            '{"path": "a.mp4", "label": "golf", "start": 0, "end": 2}\n\n'
            '{"path": "b.mp4", "label": "long jump", "start": "1.5", "end": 2}\n',
            "JSON list",
        ),
        (
            "list.json",
            '[\n {"file": "a.mp4", "class": "golf", "start": 0, "end": 2},\n'
            ' {"file": "b.mp4", "class": "long jump", "start": 1.5, "end": 2}]',
            "JSON list",
        ),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_every_kind(name, text, layout, encoding):
    touch("a.mp4", "b.mp4")
    videos = read_video_list(write(name, text, encoding))
    assert videos.layout == layout
    assert videos.class_names == ("golf", "long jump")
    spans = [(s.name, s.labels, s.start_seconds, s.end_seconds) for s in videos.samples]
    assert spans == [("a.mp4", (0,), 0.0, 2.0), ("b.mp4", (1,), 1.5, 2.0)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,labels\na.mp4,run; jump\nb.mp4,\nc.mp4,jump|golf\n"),
        ("list.tsv", "path\tlabels\na.mp4\trun;jump\nb.mp4\t\nc.mp4\tjump|golf\n"),
        (
            "list.jsonl",
            '{"path": "a.mp4", "labels": ["run", "jump"]}\n{"path": "b.mp4", "labels": []}\n'
            '{"path": "c.mp4", "labels": ["jump", "golf"]}\n',
        ),
        (
            "list.jsonl",
            '{"path": "a.mp4", "labels": [2, 1]}\n{"path": "b.mp4", "labels": []}\n'
            '{"path": "c.mp4", "labels": ["1", 0]}\n',
        ),
    ],
)
def test_several_labels_in_a_table(name, text):
    touch("a.mp4", "b.mp4", "c.mp4")
    videos = read_video_list(write(name, text), class_names=["golf", "jump", "run"])
    assert found(videos) == [("a.mp4", (1, 2)), ("b.mp4", ()), ("c.mp4", (0, 1))]
    assert videos.multi_label


def test_a_column_split():
    touch("a.mp4", "b.mp4")
    write("list.csv", "path,label,split\na.mp4,golf,train\nb.mp4,golf,val\nb.mp4,golf,x\n")
    assert found(read_video_list("list.csv", split="val")) == [("b.mp4", (0,))]
    with pytest.raises(
        InputError, match=r"line 3 starts another split; choose one .* train, val, x"
    ):
        read_video_list("list.csv")
    with pytest.raises(
        InputError, match="has no split 'test'; its column 'split' has train, val, x"
    ):
        read_video_list("list.csv", split="test")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "path,label\na.mp4,x\nb.mp4,x,3\n", "line 3 has 3 fields, the header 2; put quo"),
        ("a.csv", 'path,label\na.mp4,"x\n', r"line 2 is not valid CSV \(.*\); check its quotes"),
        ("a.csv", "path,path,label\na.mp4,b,x\n", "the header is 'path,path,label'; name each"),
        ("a.csv", "path,kind\na.mp4,x\n", "line 2 has no field 'label'; it has path, kind"),
        ("a.csv", "id,label\na.mp4,x\n", "line 2 has no field 'path'; it has id, label"),
        ("a.csv", "a.mp4,x,3\n", "line 1 has 3 fields; use path,label or path,label,start,end"),
        ("a.csv", "a.mp4,x,3,y\n", "line 1 has 'y' where a time in seconds belongs"),
        ("a.csv", "a.mp4,x,3,2\n", r"line 1 is wrong: end_seconds is 2.0 for a.mp4; it must be"),
        ("a.csv", "a.mp4,x,-1,2\n", "line 1 is wrong: start_seconds is -1.0 for a.mp4; use 0"),
        ("a.csv", "a.mp4,x,nan,2\n", "line 1 is wrong: start_seconds is nan"),
        ("a.csv", "a.mp4,x,0,inf\n", "line 1 is wrong: end_seconds is inf"),
        ("a.csv", "a.mp4,\n", "line 1 has label ''; write a name"),
        ("a.csv", ",x\n", "line 1 has '' where a path or a label belongs"),
        ("a.csv", f"a.mp4,{'x' * 301}\n", "line 1 has label 'xxx.*xx...'; write a name"),
        ("a.csv", ",,\n", r"a.csv: holds no videos \(csv without a header\)"),
        ("a.csv", "path,label\n", r"a.csv: holds no videos \(csv\)"),
        ("a.txt", " \n\n", r"a.txt: holds no videos \(list of 'path label'\); check"),
        ("a.jsonl", '{"path": "a.mp4", "label": "x"}\nb\n', "line 2 is not valid JSON"),
        ("a.jsonl", '{"path": "a.mp4", "label": "x"}\n[1]\n', r"line 2 is \[1\]; it must be an ob"),
        ("a.jsonl", '{"path": "a.mp4", "label": 1.5}\n', "line 1 has 1.5 where a path or a label"),
        ("a.jsonl", '{"path": "a.mp4", "label": true}\n', "line 1 has True where a path or"),
        ("a.jsonl", '{"path": "a.mp4", "labels": 3}\n', "line 1 has labels 3; write a list"),
        ("a.jsonl", '{"path": ["a"], "label": "x"}\n', r"line 1 has \['a'\] where a path or a"),
        ("a.jsonl", '{"path": "a\\u0000.mp4", "label": "x"}\n', r"line 1 has 'a\\x00.mp4' where"),
        ("a.jsonl", '{"path": "a\\ud800.mp4", "label": "x"}\n', r"line 1 has 'a\\ud800.mp4' wher"),
        ("a.jsonl", '{"path": "a", "label": "x", "start": []}\n', r"line 1 has \[\] where a time"),
        ("a.json", '[{"path": "a.mp4", "label": "x"}, 3]', "item 2 is 3; it must be an object"),
        ("a.json", '[{"path": "a.mp4", "label": "x"}', "a.json: it is not valid JSON"),
        ("a.json", '[{"a":' * 100_000, "a.json: it is not valid JSON"),
        ("a.mp4", "x", "a.mp4: is a video; give a folder per class or a list of videos"),
        ("a.txt", "a.mp4 x\0y", "a.txt: is not a text file, it has zero bytes"),
    ],
)
def test_lists_that_cannot_be_used(name, text, message):
    write(name, text)
    with pytest.raises(InputError, match=message) as caught:
        read_video_list(name)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text():
    Path("a.txt").write_bytes(b"a.mp4 x\nb\xff.mp4 x\n")
    with pytest.raises(InputError, match=r"a.txt: line 2 is not valid utf-8; save the file as"):
        read_video_list("a.txt")
    Path("a.bin").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(InputError, match=r"a.bin: "):
        read_video_list("a.bin")
    with pytest.raises(InputError, match=r"nope.csv: cannot be read \(No such file or directory\)"):
        read_video_list("nope.csv")
    with pytest.raises(InputError, match="has a null character"):
        read_video_list("a\0b")


def test_a_huge_file_is_not_read(monkeypatch):
    monkeypatch.setattr(annotations, "MAX_LIST_BYTES", 1000)
    write("a.txt", "a.mp4 golf\n" * 100)
    with pytest.raises(InputError, match=r"a.txt: is over 1000 bytes; that is not a list"):
        read_video_list("a.txt")


@pytest.mark.parametrize("data", ["d", "list.txt", "ucf/trainlist01.txt", "sth.json"])
def test_a_split_where_there_is_none(data):
    touch("d/golf/a.mp4", "a.mp4", "ucf/Golf/a.avi", "1.webm")
    write("list.txt", "a.mp4 golf")
    write("ucf/trainlist01.txt", "Golf/a.avi 1")
    write("sth.json", '[{"id": "1", "template": "x"}]')
    assert len(read_video_list(data).samples) == 1
    with pytest.raises(InputError, match="'train9'"):
        read_video_list(data, split="train9")


# Official data sets


@pytest.fixture
def ucf():
    touch("UCF-101/BoxingSpeedBag/v_BoxingSpeedBag_g01_c01.avi", "UCF-101/Archery/v_A_g01_c02.mp4")
    touch("UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi")
    write("splits/classInd.txt", "1 HandstandPushups\n2 Archery\n3 BoxingSpeedBag\n")
    write(
        "splits/trainlist01.txt",
        "HandstandPushups/v_HandStandPushups_g01_c01.avi 1\r\n"
        "BoxingSpeedBag/v_BoxingSpeedBag_g01_c01.avi 3\r\n",
    )
    write("splits/testlist01.txt", "Archery/v_A_g01_c02.avi\nArchery/v_A_g01_c03.avi\n")
    write("splits/trainlist02.txt", "Archery/v_A_g01_c02.avi 2\n")
    write("splits/testlist02.txt", "")


def test_ucf101(ucf):
    train = read_video_list("splits", split="train1")
    assert train.layout == "UCF101 trainlist01.txt"
    assert train.class_names == ("HandstandPushups", "Archery", "BoxingSpeedBag")
    assert found(train) == [
        ("UCF-101/HandstandPushups/v_HandStandPushups_g01_c01.avi", (0,)),
        ("UCF-101/BoxingSpeedBag/v_BoxingSpeedBag_g01_c01.avi", (2,)),
    ]
    assert train == replace(read_video_list("splits/trainlist01.txt"), source="splits")
    test = read_video_list("splits", split="test1", videos="UCF-101")
    assert found(test) == [("UCF-101/Archery/v_A_g01_c02.mp4", (1,))]
    assert test.missing == ("Archery/v_A_g01_c03.avi",)
    choices = "train1, test1, train2, test2"
    with pytest.raises(InputError, match=f"UCF101 and no split was named; .* {choices}"):
        read_video_list("splits")
    with pytest.raises(InputError, match=f"UCF101 and there is no split 'train3'; .* {choices}"):
        read_video_list("splits", split="train3")
    with pytest.raises(InputError, match="holds no videos"):
        read_video_list("splits", split="test2")


def test_ucf101_labels_must_fit_the_classes(ucf):
    write("splits/trainlist01.txt", "Archery/v_A_g01_c02.avi 1\n")
    with pytest.raises(InputError, match=r"line 1 has label '1', but Archery is number 2"):
        read_video_list("splits", split="train1")
    write("splits/classInd.txt", "1 Archery\n3 BoxingSpeedBag\n")
    with pytest.raises(InputError, match=r"classInd.txt: its lines are not numbered in order"):
        read_video_list("splits", split="train1")
    os.unlink("splits/classInd.txt")
    assert read_video_list("splits", split="train1").class_names == ("Archery",)
    given = ["1 Diving", "2 Archery"]
    assert read_video_list("splits", split="train1", class_names=given).class_names == (
        "Diving",
        "Archery",
    )


def test_hmdb51():
    touch("hmdb51_org/brush_hair/#a_b;(x) y.avi", "hmdb51_org/brush_hair/c.avi")
    touch("hmdb51_org/wave/d.avi", "hmdb51_org/wave/e.mp4")
    write("s/brush_hair_test_split1.txt", "#a_b;(x) y.avi 1 \nc.avi 2 \nz.avi 0 \n")
    write("s/wave_test_split1.txt", "d.avi 0 \ne.avi 2 \nf.avi 2 \n")
    write("s/brush_hair_test_split2.txt", "c.avi 1 \n")
    write("s/wave_test_split2.txt", "d.avi 1 \n")
    train = read_video_list("s", split="train1")
    assert train.layout == "HMDB51 split 1, train"
    assert train.class_names == ("brush_hair", "wave")
    assert found(train) == [("hmdb51_org/brush_hair/#a_b;(x) y.avi", (0,))]
    test = read_video_list("s", split="test1")
    assert found(test) == [("hmdb51_org/brush_hair/c.avi", (0,)), ("hmdb51_org/wave/e.mp4", (1,))]
    assert test.missing == ("wave/f.avi",)
    assert len(read_video_list("s", split="train2").samples) == 2
    with pytest.raises(InputError, match=r"HMDB51 and no split .* train1, test1, train2, test2"):
        read_video_list("s")
    write("s/wave_test_split1.txt", "d.avi 3\n")
    with pytest.raises(InputError, match=r"wave_test_split1.txt: line 1 is 'd.avi 3'; HMDB51 has"):
        read_video_list("s", split="train1")


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"massaging person's head",-_abc,7,17,val,0
riding a bike,--xyz,123,133,val,1
riding a bike,gone,0,10,val,0
"""
KINETICS_FILES = ("-_abc_000007_000017.mp4", "--xyz_000123_000133.mkv")


@pytest.mark.parametrize(
    "places",
    [
        ("", ""),
        ("massaging person's head/", "riding a bike/"),
        ("massaging_person's_head/", "riding_a_bike/"),
    ],
)
@pytest.mark.parametrize("root", ["val", "k400", "elsewhere"])
def test_kinetics(root, places):
    first, second = (
        f"{root}/{place}{name}" for place, name in zip(places, KINETICS_FILES, strict=True)
    )
    touch(first, second)
    write("k400/val.csv", KINETICS)
    videos = read_video_list("k400/val.csv", videos=None if root != "elsewhere" else root)
    assert videos.layout == "Kinetics csv"
    assert videos.class_names == ("massaging person's head", "riding a bike")
    assert found(videos) == [(first, (0,)), (second, (1,))]
    assert videos.missing == ("gone_000000_000010.mp4",)
    assert videos.samples[0].start_seconds is None  # the file is the clip already
    assert read_video_list("k400/val.csv", videos=root).digest == videos.digest


def test_kinetics_without_labels_or_times():
    write("test.csv", "youtube_id,time_start,time_end,split\na,1,11,test\n")
    with pytest.raises(InputError, match=r"test.csv: line 2 has no label: this part of Kinetics"):
        read_video_list("test.csv")
    write("val.csv", "label,youtube_id,time_start,time_end\ngolf,a,1,\n")
    with pytest.raises(InputError, match=r"val.csv: line 2 has no times"):
        read_video_list("val.csv")


def test_something_something_v2():
    touch("20bn-something-something-v2/78687.webm", "20bn-something-something-v2/9/00001.jpg")
    labels = {"Holding something next to something": "1", "Bending something": "0"}
    write("s/labels.json", json.dumps(labels))
    rows = [
        {"id": "78687", "label": "holding potato", "template": "Holding [something] next to "
         "[something]", "placeholders": ["potato", "x"]},
        {"id": 9, "label": "bending a fork", "template": "Bending [something]"},
        {"id": "3", "label": "bending a spoon", "template": "Bending [something]"},
    ]  # fmt: skip
    write("s/train.json", json.dumps(rows))
    videos = read_video_list("s/train.json")
    assert videos.layout == "Something-Something V2 json"
    assert videos.class_names == ("Bending something", "Holding something next to something")
    root = "20bn-something-something-v2"
    assert found(videos) == [(f"{root}/78687.webm", (1,)), (f"{root}/9", (0,))]
    assert videos.missing == ("3.webm",)
    write("s/test.json", '[{"id": "78687"}]')
    with pytest.raises(InputError, match=r"test.json: item 1 has no template: this part"):
        read_video_list("s/test.json")
    write("s/labels.json", '{"Bending something": "0", "Holding something": "2"}')
    with pytest.raises(InputError, match=r"labels.json: must number its classes from 0"):
        read_video_list("s/train.json")
    write("s/labels.json", '{"Bending something": "0"}')
    with pytest.raises(InputError, match=r"item 1 has label 'Holding something next to something'"):
        read_video_list("s/train.json")


def test_something_something_v1():
    touch("20bn-something-something-v1/100218/00001.jpg", "20bn-something-something-v1/7/00001.jpg")
    write("something-something-v1-labels.csv", "Holding something\nFolding, then unfolding\n")
    write(
        "something-something-v1-train.csv", "100218;Folding, then unfolding\n7;Holding something\n"
    )
    videos = read_video_list("something-something-v1-train.csv")
    assert videos.layout == "Something-Something V1 csv"
    assert videos.class_names == ("Holding something", "Folding, then unfolding")
    root = "20bn-something-something-v1"
    assert found(videos) == [(f"{root}/100218", (1,)), (f"{root}/7", (0,))]
    write("something-something-v1-test.csv", "100218;\n7;\n")
    with pytest.raises(InputError, match=r"test.csv: line 1 has label ''"):
        read_video_list("something-something-v1-test.csv")


def test_charades():
    touch("Charades_v1_480/YSKX3.mp4", "Charades_v1_480/AAAAA.mp4")
    write("Charades_v1_classes.txt", "c000 Holding some clothes\nc001 Putting clothes\nc002 Run\n")
    write(
        "Charades_v1_test.csv",
        "id,subject,script,actions,length\n"
        'YSKX3,HR43,"He said ""no"",\nand left.",c002 11.90 21.20;c000 0.00 12.60;c002 1 2,31.0\n'
        "AAAAA,HR43,nothing,,30\n"
        "GONE0,HR43,nothing,c001 1 2,30\n",
    )
    videos = read_video_list("Charades_v1_test.csv")
    assert videos.layout == "Charades csv"
    assert videos.class_names == ("Holding some clothes", "Putting clothes", "Run")
    assert found(videos) == [
        ("Charades_v1_480/YSKX3.mp4", (0, 2)),
        ("Charades_v1_480/AAAAA.mp4", ()),
    ]
    assert videos.missing == ("GONE0.mp4",)
    assert videos.multi_label
    write("one.csv", "id,actions\nYSKX3,c001 1 2\n")
    assert read_video_list("one.csv").multi_label  # though this part has one label a video
    os.unlink("Charades_v1_classes.txt")
    given = ["c000 Holding some clothes", "c001 Putting clothes", "c002 Run"]
    assert read_video_list("Charades_v1_test.csv", class_names=given) == videos
    with pytest.raises(InputError, match=r"line 3 has label '2'; use 0 to 1"):
        read_video_list("Charades_v1_test.csv", class_names=given[:2])
    write("Charades_v1_test.csv", "id,actions\nYSKX3,c2 1 2\n")
    message = r"line 2 has action 'c2 1 2'; Charades has 'c092 11.9 21.2'"
    with pytest.raises(InputError, match=message):
        read_video_list("Charades_v1_test.csv", class_names=given)


# Files


def write_charades(actions: str = "c002 11.90 21.20;c000 0.00 12.60;c001 4 4;c001 9 2"):
    write("Charades_v1_classes.txt", "c000 Hold\nc001 Put\nc002 Run\n")
    write("train.csv", f"id,actions,length\nYSKX3,{actions},31.0\nAAAAA,,30\n")


def test_the_folder_of_charades_is_no_folder_per_class():
    touch("all/Charades_v1_480/YSKX3.mp4", "all/Charades_v1_train.csv")
    with pytest.raises(InputError, match=r"name a list in it, all.Charades_v1_train\.csv"):
        read_video_list("all")


def test_charades_says_when_its_actions_are_shown():
    touch("Charades_v1_480/YSKX3.mp4", "Charades_v1_480/AAAAA.mp4")
    write_charades()
    videos = read_video_list("train.csv")
    first, second = videos.samples
    # Times that make no span leave the whole video.
    whole = Action(1, None, None)
    assert first.actions == (Action(2, 11.9, 21.2), Action(0, 0.0, 12.6), whole, whole)
    assert (first.start_seconds, first.end_seconds, first.labels) == (None, None, (0, 1, 2))
    assert second.actions == ()
    assert describe(videos)[3:5] == [
        "2 actions with times, which training uses",
        "2 actions with times that are no span, taken as the whole",
    ]
    assert describe(few_shot(videos, 1, 0))[3:5] == describe(videos)[3:5]
    digests = {videos.digest}
    for actions in (
        "c002 11.90 21.30;c000 0.00 12.60;c001 4 4;c001 9 2",
        "c002 11.90 21.20;c000 0.10 12.60;c001 4 4;c001 9 2",
        "c000 11.90 21.20;c002 0.00 12.60;c001 4 4;c001 9 2",
    ):
        write_charades(actions)
        other = read_video_list("train.csv")
        assert [sample.labels for sample in other.samples] == [(0, 1, 2), ()]
        digests.add(other.digest)
    assert len(digests) == 4
    for wrong in (
        "c002 11.90",
        "c002 a b",
        "c002 1.2.3 5",
        "c002 nan 5",
        "c0021 1 2",
        "c002 1 2 3",
    ):
        write_charades(wrong)
        with pytest.raises(InputError, match=rf"line 2 has action '{wrong}'; Charades has 'c092"):
            read_video_list("train.csv")
    write_charades("c002 -1 2")
    assert read_video_list("train.csv").samples[0].actions == (Action(2),)


def test_whole_videos_have_all_their_labels_at_any_time():
    touch("Charades_v1_480/YSKX3.mp4", "Charades_v1_480/AAAAA.mp4")
    write_charades()
    videos = read_video_list("train.csv")
    whole = whole_videos(videos)
    assert [sample.actions for sample in whole.samples] == [(), ()]
    assert [s.labels for s in whole.samples] == [s.labels for s in videos.samples]
    write("plain.csv", "path,labels\nCharades_v1_480/YSKX3.mp4,Hold;Put;Run\n")
    assert whole.digest != videos.digest
    assert not any("times" in line for line in describe(whole))
    with pytest.raises(InputError, match=r"plain\.csv: does not say when .* --whole-videos"):
        whole_videos(read_video_list("plain.csv"))


def test_folders_of_frames_have_no_times():
    touch("Charades_v1_rgb/YSKX3/YSKX3-000001.jpg", "Charades_v1_rgb/AAAAA/AAAAA-000001.jpg")
    write_charades()
    videos = read_video_list("train.csv")
    assert [(sample.labels, sample.actions) for sample in videos.samples] == [
        ((0, 1, 2), ()),
        ((), ()),
    ]
    assert videos.notes == ("1 folder of frames, which have no times, used in training as a whole",)
    assert not any("actions" in line for line in describe(videos))


def test_kept_classes_keep_their_actions():
    touch("Charades_v1_480/YSKX3.mp4", "Charades_v1_480/AAAAA.mp4")
    write_charades()
    (sample,) = keep_classes(read_video_list("train.csv"), ["Run", "Put"]).samples
    assert sample.labels == (0, 1)
    assert sample.actions == (Action(1, 11.9, 21.2), Action(0), Action(0))


def test_what_a_part_of_a_video_shows():
    sample = Sample(
        "a.mp4",
        (0, 1, 2, 3, 4, 5),
        name="a",
        actions=(
            Action(0, 10.0, 20.0),
            Action(1, 15.0, 30.0),  # shares half of the shorter, the first
            Action(2, 15.1, 30.0),  # a little less
            Action(3, 8.0, 12.0),  # half of its own 4 seconds
            Action(4, 0.0, 10.0),  # ends where the first begins
            Action(5, None, None),
        ),
    )
    first, *_, last = sample.actions
    assert sample.during(first) == Sample("a.mp4", (0, 1, 3, 5), 10.0, 20.0, "a")
    assert sample.during(last) == Sample("a.mp4", (0, 1, 2, 3, 4, 5), None, None, "a")
    assert sample.during(sample.actions[4]).labels == (3, 4, 5)
    for one in sample.actions:
        for other in sample.actions:
            assert one.overlaps(other) == other.overlaps(one)


def test_missing_files_are_listed_in_order():
    touch("v/b.mp4")
    write("list.txt", "z.mp4 golf\nb.mp4 golf\nsub/a.mp4 golf\n")
    videos = read_video_list("list.txt", videos="v")
    assert found(videos) == [("v/b.mp4", (0,))]
    assert videos.missing == ("z.mp4", "sub/a.mp4")
    message = r"list.txt: none of its 3 videos is in \. \(the first is 'z.mp4'; .* with --videos"
    with pytest.raises(InputError, match=message):
        read_video_list("list.txt")
    with pytest.raises(InputError, match="--videos nope: is not a folder"):
        read_video_list("list.txt", videos="nope")


@pytest.mark.parametrize("root", ["lists", "lists/videos", "", "videos"])
def test_the_folder_with_most_of_the_videos_is_taken(root):
    touch("lists/a.mp4", os.path.join(root, "b.mp4"), os.path.join(root, "c.mp4"))
    write("lists/list.txt", "a.mp4 golf\nb.mp4 golf\nc.mp4 golf\n")
    assert read_video_list("lists/list.txt").root == (root or ".")


def test_paths_may_start_from_the_current_folder():
    touch("data/golf/a.mp4")
    write("data/deep/lists/list.txt", "data/golf/a.mp4 golf\n")
    assert read_video_list("data/deep/lists/list.txt").root == "."


def test_absolute_and_climbing_paths_and_paths_without_extension(tmp_path):
    touch("x/a.mp4", "v/b.webm", "v/c")
    write("list.txt", f"{tmp_path}/x/a.mp4 golf\n../x/a.mp4 golf\nb golf\nc golf\nb.mp4 golf")
    videos = read_video_list("list.txt", videos="v")
    assert [s.path for s in videos.samples] == [
        f"{tmp_path}/x/a.mp4",
        "v/../x/a.mp4",
        "v/b.webm",
        "v/c",
    ]
    assert videos.missing == ("b.mp4",)


def test_repeated_lines_count_once_and_are_noted():
    touch("a.mp4", "b.mp4")
    write("list.csv", "a.mp4,x\na.mp4,x\nb.mp4,x\na.mp4,y\n")
    videos = read_video_list("list.csv")
    assert found(videos) == [("a.mp4", (0,)), ("b.mp4", (0,)), ("a.mp4", (1,))]
    assert videos.notes == (
        "1 repeated line, each video and label is used once",
        "1 video listed again with other labels",
    )
    write("list.csv", "a.mp4,x,0,1\na.mp4,x,1,2\n")
    assert len(read_video_list("list.csv").samples) == 2
    assert read_video_list("list.csv").notes == ()


# The hash


def digest(text, *, names=("x", "y", "z"), videos="v"):
    return read_video_list(write("list.csv", text), class_names=names, videos=videos).digest


def test_the_digest_tells_lists_apart():
    touch("v/a.mp4", "v/b.mp4", "w/a.mp4", "w/b.mp4")
    base = digest("a.mp4,0,1,2\nb.mp4,1,,\n")
    same = [
        digest("path,start,end,label\na.mp4,1.0,2e0,x\n\nb.mp4,,,1\n".replace(",1\n", ",y\n")),
        digest("a.mp4,0,1,2\nb.mp4,1,,\n", videos="w"),
        digest("a.mp4,0,1,2\ngone.mp4,2,,\nb.mp4,1,,\n"),  # what is missing is not in it
    ]
    other = [
        digest("b.mp4,1,,\na.mp4,0,1,2\n"),
        digest("a.mp4,0,1,3\nb.mp4,1,,\n"),
        digest("a.mp4,0,0,2\nb.mp4,1,,\n"),
        digest("a.mp4,1,1,2\nb.mp4,1,,\n"),
        digest("a.mp4,0,1,2\n"),
        digest("a.mp4,0,1,2\nb.mp4,1,,\n", names=("x", "y", "w")),
    ]
    assert set(same) == {base}
    assert len({base, *other}) == 1 + len(other)
    # Runs record it, so it must not change.
    assert base == "c8fdc07c730f0e2e0ef8f3c96d1533d5cbd6f1daa5f878ac52024cdefced8aa9"


# Few shots


def class_list(counts, root="r"):
    """Return a list of so many videos of each class, mixed."""
    rows = [(f"{name}/{i}.mp4", c) for c, (name, n) in enumerate(counts.items()) for i in range(n)]
    samples = tuple(Sample(f"{root}/{path}", (c,), name=path) for path, c in sorted(rows)[::-1])
    return VideoList("data", "a test", tuple(counts), samples, (), "0" * 64, False)


def names_of(video_list, class_index):
    return {s.name for s in video_list.samples if class_index in s.labels}


def test_few_shots_of_each_class():
    full = class_list({"a": 20, "b": 30, "c": 3})
    few = few_shot(full, 5, seed=0)
    assert [len(names_of(few, c)) for c in range(3)] == [5, 5, 3]
    assert [s for s in full.samples if s in few.samples] == list(few.samples)
    assert few.digest != full.digest
    assert few.notes == (
        "5 shots a class, drawn with seed 0",
        "1 class with fewer videos, such as c",
    )
    assert few_shot(full, 5, seed=0) == few
    others = [names_of(few_shot(full, 5, seed), 1) for seed in range(1, 6)]
    assert names_of(few, 1) not in others


def test_few_shots_depend_on_nothing_else():
    few = few_shot(class_list({"a": 20, "b": 30}), 4, seed=3)
    elsewhere = few_shot(class_list({"z": 9, "b": 30, "a": 20}, root="/other"), 4, seed=3)
    assert names_of(few, 0) == names_of(elsewhere, 2)
    assert names_of(few, 1) == names_of(elsewhere, 1)
    more = few_shot(class_list({"a": 20, "b": 30}), 8, seed=3)
    assert names_of(few, 0) < names_of(more, 0)
    full = class_list({"a": 20})
    renamed = replace(full, class_names=("b",))
    assert names_of(few_shot(full, 4, seed=3), 0) != names_of(few_shot(renamed, 4, seed=3), 0)


def test_few_shots_are_drawn_evenly():
    full = class_list({"a": 10})
    drawn = [name for seed in range(2000) for name in names_of(few_shot(full, 3, seed), 0)]
    for name in names_of(full, 0):
        assert abs(drawn.count(name) - 600) < 100  # five standard deviations


def test_few_shots_of_several_labels():
    samples = tuple(
        Sample(f"{i}.mp4", labels, name=f"{i}.mp4")
        for i, labels in enumerate([(0, 1), (0, 1), (0,), (1,), ()])
    )
    full = VideoList("data", "a test", ("a", "b"), samples, (), "", True)
    few = few_shot(full, 1, seed=0)
    assert 1 <= len(few.samples) <= 2
    assert names_of(few, 0)
    assert names_of(few, 1)


def test_few_shots_that_cannot_be_drawn():
    with pytest.raises(InputError, match="shots is 0, it must be at least 1"):
        few_shot(class_list({"a": 3}), 0, seed=0)
    with pytest.raises(InputError, match=r"data: class 'b' has no videos to draw 2 shots from"):
        few_shot(class_list({"a": 3, "b": 0}), 2, seed=0)


# Some classes


def test_some_classes_are_kept_in_their_order():
    full = class_list({"BrushHair": 2, "b": 3, "c d": 1, "e": 1})
    some = keep_classes(full, ["C_D", "brush hair", "brush_hair"])
    assert some.class_names == ("BrushHair", "c d")
    assert [(s.name, s.labels) for s in some.samples] == [
        ("c d/0.mp4", (1,)),
        ("BrushHair/1.mp4", (0,)),
        ("BrushHair/0.mp4", (0,)),
    ]
    assert some.notes == ("2 of 4 classes kept, 4 videos without any of them left out",)
    alone = class_list({"BrushHair": 2, "c d": 1})
    assert some.digest == keep_classes(alone, alone.class_names).digest != full.digest
    assert keep_classes(full, full.class_names).samples == full.samples
    assert full == class_list({"BrushHair": 2, "b": 3, "c d": 1, "e": 1})
    assert len(few_shot(some, 1, seed=0).samples) == 2


def test_some_of_several_labels_are_kept():
    samples = tuple(
        Sample(f"{i}.mp4", labels, name=f"{i}.mp4")
        for i, labels in enumerate([(0, 1, 3), (2,), (), (1,), (0, 2)])
    )
    actions = (Action(3, 1, 2), Action(0, 0, 9), Action(1))
    samples = (replace(samples[0], actions=actions), *samples[1:])
    full = VideoList("data", "a test", ("a", "b", "c", "d"), samples, (), "", True)
    some = keep_classes(full, ("b", "d"))
    assert [(s.name, s.labels) for s in some.samples] == [("0.mp4", (0, 1)), ("3.mp4", (0,))]
    assert some.samples[0].actions == (Action(1, 1, 2), Action(0))
    assert some.multi_label
    assert base_classes(full) == ("a", "b")  # two videos each, as c has


def test_classes_that_cannot_be_kept():
    full = class_list({"a": 3, "b": 0})
    message = r"^data: has no class 'c', 'd', 'e' and 2 more; its 2 classes are 'a', \.\.\.$"
    with pytest.raises(InputError, match=message):
        keep_classes(full, ["a", "c", "d", "e", "f", "g"])
    with pytest.raises(InputError, match=r"^data: has no videos of the 1 class to keep; check"):
        keep_classes(full, ["b"])


@pytest.mark.parametrize(
    ("counts", "base"),
    [
        ({"a": 1, "b": 3, "c": 2, "d": 3}, "bd"),
        ({"a": 1, "b": 3, "c": 1, "d": 0}, "ab"),
        ({"a": 1, "b": 3, "c": 2, "d": 5, "e": 0}, "bcd"),
        ({"a": 4}, "a"),
    ],
)
def test_base_classes(counts, base):
    assert base_classes(class_list(counts)) == tuple(base)


def test_the_description():
    touch("v/a.mp4", "v/b.mp4")
    write("list.txt", "a.mp4 3\nb.mp4 0\nc.mp4 1\nd.mp4 1\n")
    videos = read_video_list("list.txt", videos="v", class_names=["p", "q", "r", "s"])
    assert describe(videos) == [
        "list.txt: list of 'path label'",
        "4 classes: p, q, r, ...",
        "2 videos in v, 2 missing (the first is c.mp4)",
        f"hash {videos.digest[:16]}",
    ]


def test_no_look_at_every_file(monkeypatch):
    """A list as long as that of Kinetics takes seconds, also on a slow disk."""
    touch(*(f"val/id{i:05d}_000000_000010.mp4" for i in range(300)))
    rows = "".join(f"label {i % 9},id{i:05d},0,10,val\n" for i in range(20_000))
    write("val.csv", "label,youtube_id,time_start,time_end,split\n" + rows)
    looks = []
    for name in ("stat", "listdir", "scandir"):
        original = getattr(os, name)

        def counted(*arguments, original=original, **options):
            looks.append(arguments)
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, counted)
    start = time.process_time()
    videos = read_video_list("val.csv")
    assert time.process_time() - start < 5
    assert len(looks) < 200
    assert len(videos.samples) == 300
    assert len(videos.missing) == 19_700

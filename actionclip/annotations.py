"""Read a data set's list of videos and labels, in whatever layout it comes.

The start of training and evaluation: a folder or a list that a user names -> samples, each a
video file with its class indices. Recognises the layout by content, looks for the files and
says what it found; opens no video.

Every layout is read into rows, then all rows go one way: labels become class indices, names
become paths, repeated rows are dropped, and what was found is hashed.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from actionclip.errors import InputError, short
from actionclip.labels import read_text
from actionclip.prompts import check_class_names, comparison_key
from actionclip.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, Span, by_number

# The largest public lists (Kinetics-700, Something-Something) are below 50 MB.
MAX_LIST_BYTES = 300_000_000
# Longer "class names" come from a missing quote or a file of another kind.
MAX_LABEL_LENGTH = 300


@dataclass(frozen=True)
class Action:
    """One of the actions of a video that shows several, and when.

    Attributes:
        label: class index.
        start_seconds: when it starts; None is the start of the video.
        end_seconds: when it ends; None is the end of the video.
    """

    label: int
    start_seconds: float | None = None
    end_seconds: float | None = None

    def overlaps(self, other: "Action") -> bool:
        """Tell whether the two share at least half of the shorter one."""
        start, end = self._bounds
        other_start, other_end = other._bounds
        shared = min(end, other_end) - max(start, other_start)
        return shared >= min(end - start, other_end - other_start) / 2

    @property
    def _bounds(self) -> tuple[float, float]:
        start, end = self.start_seconds, self.end_seconds
        return -math.inf if start is None else start, math.inf if end is None else end


@dataclass(frozen=True)
class Sample:
    """One labelled video, or a span of one.

    Attributes:
        path: the video file, or the folder of its frames.
        labels: class indices, ascending; one unless the list is multi-label.
        start_seconds: where its span starts; None is the start of the video.
        end_seconds: where its span ends; None is the end of the video.
        name: the video as the list names it, the same wherever the files lie.
        actions: when each label is shown, where the list says so (Charades). Training reads one
            of them at a time, evaluation the video.
    """

    path: str
    labels: tuple[int, ...]
    start_seconds: float | None = None
    end_seconds: float | None = None
    name: str = ""
    actions: tuple[Action, ...] = ()

    def during(self, action: Action) -> "Sample":
        """Return the span of one of the actions, with the labels of all that it overlaps."""
        labels = {other.label for other in self.actions if action.overlaps(other)}
        span = (action.start_seconds, action.end_seconds)
        return Sample(self.path, tuple(sorted(labels)), *span, self.name)


@dataclass(frozen=True)
class VideoList:
    """The labelled videos of one data set, or of one part of it.

    Attributes:
        source: the folder or file that the list was read from.
        layout: what it was taken for, in words.
        class_names: K class names; a label is a position in it.
        samples: the videos that exist, in the order of the list.
        missing: the names of the others, as the list has them.
        digest: sha256 of the class names and of every sample's name, labels, span and actions,
            in the order of the list, in hex. The folder of the videos is not part of it.
        multi_label: whether a video can have several labels or none.
        root: the folder that relative paths start from.
        notes: a sentence on each thing that a user should know about the list.
    """

    source: str
    layout: str
    class_names: tuple[str, ...]
    samples: tuple[Sample, ...]
    missing: tuple[str, ...]
    digest: str
    multi_label: bool
    root: str = ""
    notes: tuple[str, ...] = ()


def read_video_list(
    data: str | os.PathLike[str],
    *,
    videos: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
    split: str | None = None,
) -> VideoList:
    """Read the samples of a data set, whatever its layout.

    A label is a class name or the index of one. Names are compared without regard to case,
    underscores and spacing, as "ApplyEyeMakeup" and "apply eye makeup".

    Args:
        data: one of

            * a folder with a folder per class, of video files or of folders of frames;
            * a text file of `path label` lines, split at the last space; several labels are
              separated by commas;
            * a text file of `folder num_frames label` lines, the list of ActionCLIP;
            * a .csv or .tsv file with a header that names the columns `path`, `label` (one) or
              `labels` (separated by ; or |), and perhaps `start`, `end` (seconds) and `split`;
              or without a header, in the order `path,label[,start,end]`;
            * a file with a JSON object of these keys a line, where `labels` is a list;
            * UCF101: its folder of splits with `split` "train1" or "test1", or a list in it;
            * HMDB51: its folder of splits with `split` "train1" or "test1";
            * Kinetics csv, Something-Something json (V2) or csv (V1), Charades csv.
        videos: the folder that the list's paths start from. By default the likely ones are
            tried, next to the list and above it, and the one with most of the videos is taken.
        class_names: the classes in order. By default those that come with the data set, or
            the names in the list, sorted. Lists of one data set need the same ones.
        split: which part, where `data` holds several: a number as above, or a value of the
            column `split`.

    Raises:
        InputError: if the list cannot be read or understood, with file and line, or if none of
            its videos exists.
    """
    source = os.fspath(data)
    if "\0" in source:
        raise InputError(f"{source!r} has a null character; give the path of a folder or list")
    read = _read_folder if os.path.isdir(source) else _read_file
    listing = read(source, split)
    if not listing.rows:
        raise InputError(f"{source}: holds no videos ({listing.layout}); check that it is the list")
    names = _class_names(listing, class_names)
    labels = _class_indices(listing, names)
    root, paths = _locate(listing, None if videos is None else os.fspath(videos))
    notes = list(listing.notes)
    paths = _check_frames(listing, paths, notes)
    samples = _samples(listing, labels, paths, notes)
    missing = tuple(row.name for row, path in zip(listing.rows, paths, strict=True) if path is None)
    if not samples:
        raise InputError(
            f"{source}: none of its {len(listing.rows)} videos is in {root} (the first is "
            f"{short(missing[0])}; taken for a {listing.layout}); name their folder with --videos"
        )
    return VideoList(
        source,
        listing.layout,
        tuple(names),
        samples,
        missing,
        _digest(names, samples),
        listing.is_multi_label or any(len(sample.labels) != 1 for sample in samples),
        root,
        tuple(notes),
    )


def few_shot(video_list: VideoList, shots: int, seed: int) -> VideoList:
    """Keep a few videos of each class.

    The draw for a class depends on the seed, its name and its videos' names alone, so it is the
    same on every machine and whatever the other classes; more shots add to fewer. A class with
    fewer videos keeps all, and a note says so. In a multi-label list a video drawn for one
    class keeps its other labels, so a class can end up with more than `shots`.

    Args:
        video_list: where to draw from.
        shots: videos drawn for each class, at least 1.
        seed: any integer; another one draws other videos.

    Returns:
        The list of the videos drawn, in their order, with a digest of its own.

    Raises:
        InputError: if `shots` is below 1 or a class has no video.
    """
    if shots < 1:
        raise InputError(f"shots is {shots}, it must be at least 1")
    of_class: list[list[int]] = [[] for _ in video_list.class_names]
    for position, sample in enumerate(video_list.samples):
        for label in sample.labels:
            of_class[label].append(position)
    drawn: set[int] = set()
    few = []
    for name, positions in zip(video_list.class_names, of_class, strict=True):
        if not positions:
            raise InputError(
                f"{video_list.source}: class {name!r} has no videos to draw {shots} shots from; "
                "add some or leave the class out of the labels"
            )
        ranks = {
            position: _rank(video_list.samples[position], name, seed) for position in positions
        }
        drawn.update(sorted(positions, key=ranks.__getitem__)[:shots])
        if len(positions) < shots:
            few.append(name)
    samples = tuple(video_list.samples[position] for position in sorted(drawn))
    notes = [f"{shots} shots a class, drawn with seed {seed}"]
    if few:
        notes.append(f"{_count(len(few), 'class', 'classes')} with fewer videos, such as {few[0]}")
    return replace(
        video_list,
        samples=samples,
        digest=_digest(video_list.class_names, samples),
        notes=(*video_list.notes, *notes),
    )


def _rank(sample: Sample, class_name: str, seed: int) -> str:
    """Return what orders the videos of a class at random, but always the same."""
    video = (sample.name or sample.path, sample.start_seconds, sample.end_seconds)
    return _sha256([seed, class_name, video])


def keep_classes(video_list: VideoList, class_names: Iterable[str]) -> VideoList:
    """Leave out all classes but some, and the videos of the others.

    Args:
        video_list: any list.
        class_names: the classes to keep, in any order; compared as in `read_video_list`.

    Returns:
        The list with these classes in its own order and spelling, its labels numbered anew,
        with a digest of its own. Of several labels a video keeps those of these classes.

    Raises:
        InputError: if the list has no such class, or none of its videos has one.
    """
    position_of = {comparison_key(name): i for i, name in enumerate(video_list.class_names)}
    wanted = {comparison_key(name): name for name in class_names}
    if unknown := [repr(name) for key, name in wanted.items() if key not in position_of]:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise InputError(
            f"{video_list.source}: has no class {', '.join(unknown[:3])}{more}; its "
            f"{len(position_of)} classes are {video_list.class_names[0]!r}, ..."
        )
    kept = sorted(position_of[key] for key in wanted)
    new_label = {old: new for new, old in enumerate(kept)}
    samples = tuple(
        _relabel(sample, new_label)
        for sample in video_list.samples
        if not new_label.keys().isdisjoint(sample.labels)
    )
    if not samples:
        raise InputError(
            f"{video_list.source}: has no videos of the {_count(len(kept), 'class', 'classes')} "
            "to keep; check that these are the right ones"
        )
    names = tuple(video_list.class_names[position] for position in kept)
    left_out = len(video_list.samples) - len(samples)
    note = (
        f"{len(kept)} of {_count(len(position_of), 'class', 'classes')} kept, "
        f"{_count(left_out, 'video')} without any of them left out"
    )
    return replace(
        video_list,
        class_names=names,
        samples=samples,
        digest=_digest(names, samples),
        notes=(*video_list.notes, note),
    )


def _relabel(sample: Sample, new_label: dict[int, int]) -> Sample:
    """Number the labels of a sample anew, without those that have no new number."""
    actions = tuple(
        replace(action, label=new_label[action.label])
        for action in sample.actions
        if action.label in new_label
    )
    labels = tuple(new_label[label] for label in sample.labels if label in new_label)
    return replace(sample, labels=labels, actions=actions)


def base_classes(video_list: VideoList) -> tuple[str, ...]:
    """Return the half of the classes that has most videos, in their order.

    Of two classes with as many videos the first is taken, of an odd number of classes the
    larger half. The others are the novel classes.

    Source: ViFi-CLIP (arXiv:2212.03640), base-to-novel setting.
    """
    counts = Counter(label for sample in video_list.samples for label in sample.labels)
    positions = range(len(video_list.class_names))
    most = sorted(positions, key=lambda label: -counts[label])[: (len(positions) + 1) // 2]
    return tuple(video_list.class_names[position] for position in sorted(most))


def whole_videos(video_list: VideoList) -> VideoList:
    """Forget when actions happen, so that training sees whole videos with all their labels.

    Raises:
        InputError: if the list does not say when.
    """
    if not any(sample.actions for sample in video_list.samples):
        raise InputError(
            f"{video_list.source}: does not say when actions happen ({video_list.layout}), so "
            "whole videos are used anyway; leave out --whole-videos"
        )
    samples = tuple(replace(sample, actions=()) for sample in video_list.samples)
    digest = _digest(video_list.class_names, samples)
    return replace(video_list, samples=samples, digest=digest)


def describe(video_list: VideoList) -> list[str]:
    """Return the lines with which a command says what it takes the data for."""
    names = video_list.class_names
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    found = f"{_count(len(video_list.samples), 'video')} in {video_list.root}"
    if video_list.missing:
        found += f", {len(video_list.missing)} missing (the first is {video_list.missing[0]})"
    return [
        f"{video_list.source}: {video_list.layout}",
        f"{_count(len(names), 'class', 'classes')}: {shown}",
        found,
        *_describe_actions(video_list),
        *video_list.notes,
        f"hash {video_list.digest[:16]}",
    ]


def _describe_actions(video_list: VideoList) -> list[str]:
    actions = [action for sample in video_list.samples for action in sample.actions]
    timed = sum(action.start_seconds is not None for action in actions)
    lines = [f"{_count(timed, 'action')} with times, which training uses"] if timed else []
    if rest := len(actions) - timed:
        lines.append(f"{_count(rest, 'action')} with times that are no span, taken as the whole")
    return lines


# What every layout is read into


class _Row(NamedTuple):
    """One line of a list, as it stands there.

    Attributes:
        where: where it stands, for messages.
        name: the video, as listed.
        labels: class names or indices, as listed.
        folders: where the video may lie, the likeliest first.
        key: what it is called there, with or without its extension.
        start_seconds: see `Sample`.
        end_seconds: see `Sample`.
        num_frames: images that its folder should hold.
        actions: see `Sample`; their labels are indices.
    """

    where: str
    name: str
    labels: tuple[str, ...]
    folders: tuple[str, ...]
    key: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    num_frames: int | None = None
    actions: tuple[Action, ...] = ()


@dataclass
class _Listing:
    """A list in whatever layout, read but not yet interpreted.

    Attributes:
        source: see `VideoList`.
        layout: see `VideoList`.
        rows: its lines.
        roots: folders in which the videos may lie, the likeliest first.
        class_names: those that come with the data set.
        has_names: whether labels are names even where they look like numbers.
        is_multi_label: whether the layout is one of a multi-label data set.
        notes: see `VideoList`.
    """

    source: str
    layout: str
    rows: list[_Row]
    roots: Iterable[str]
    class_names: Sequence[str] | None = None
    has_names: bool = False
    is_multi_label: bool = False
    notes: list[str] = field(default_factory=list)


def _place(name: str) -> tuple[tuple[str, ...], str]:
    """Return the folders and the key of a video that is listed by its path."""
    folder, key = os.path.split(name.rstrip("/"))
    return (folder,), key


def _at(source: str, where: str, problem: str) -> InputError:
    return InputError(f"{source}: {where} {problem}")


def _near(source: str, *folders: str) -> list[str]:
    """Return likely folders of the videos of a list: beside it, one above, the current one."""
    beside = os.path.dirname(source)
    bases = (beside, os.path.join(beside, os.pardir))
    names = ("", *folders, "videos")
    return [os.path.normpath(os.path.join(b, name)) for b in bases for name in names] + [os.curdir]


# Folders


_UCF_LIST = r"(?:train|test)list(\d+)\.txt"
_HMDB_LIST = r"(.+)_test_split(\d+)\.txt"
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test"})


def _read_folder(source: str, split: str | None) -> _Listing:
    names = sorted(entry.name for entry in _scan(source))
    if ucf := [match[1] for name in names if (match := re.fullmatch(_UCF_LIST, name))]:
        part, number = _official_split(source, "UCF101", ucf, split)
        return _read_file(os.path.join(source, f"{part}list{number:02d}.txt"), None)
    if hmdb := [match[2] for name in names if (match := re.fullmatch(_HMDB_LIST, name))]:
        return _read_hmdb(source, names, *_official_split(source, "HMDB51", hmdb, split))
    if charades := [name for name in names if re.fullmatch(r"Charades_v1_\w+\.csv", name)]:
        lists = " or ".join(os.path.join(source, name) for name in charades)
        raise InputError(f"{source}: is the folder of Charades; name a list in it, {lists}")
    if split is not None:
        raise InputError(
            f"{source}: has a folder per class and no split {split!r}; name the folder of the "
            "part instead"
        )
    return _read_class_folders(source)


def _official_split(
    source: str, data_set: str, numbers: Iterable[str], split: str | None
) -> tuple[str, int]:
    """Return what "train1" stands for, where a folder holds the numbered splits of a data set."""
    known = [f"{part}{n}" for n in sorted(set(map(int, numbers))) for part in ("train", "test")]
    if split not in known:
        given = "no split was named" if split is None else f"there is no split {split!r}"
        raise InputError(
            f"{source}: holds the splits of {data_set} and {given}; choose with --split from "
            f"{', '.join(known)}"
        )
    match = re.fullmatch(r"(train|test)(\d+)", split)
    assert match is not None
    return match[1], int(match[2])


def _scan(folder: str) -> list[os.DirEntry[str]]:
    """Return what a folder holds, without what is hidden."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be listed ({error.strerror}); check the path"
        ) from error


def _read_class_folders(source: str) -> _Listing:
    """Read a folder per class; a video is a video file or a folder of images, at any depth."""
    entries = _scan(source)
    classes = sorted((entry.name for entry in entries if entry.is_dir()), key=by_number)
    strays = sum(_has_extension(entry.name, VIDEO_EXTENSIONS) for entry in entries)
    if not classes:
        raise InputError(
            f"{source}: holds {_count(strays, 'video')} and no folders; give a folder with a "
            "folder per class, or a list of paths and labels"
        )
    if _PARTS.issuperset(map(str.lower, classes)):
        parts = " or ".join(os.path.join(source, name) for name in classes)
        raise InputError(f"{source}: its folders are parts, not classes; give {parts}")
    listing = _Listing(source, "folder per class", [], [source], classes, has_names=True)
    if strays:
        listing.notes.append(f"{_count(strays, 'video')} outside of the class folders, not used")
    for name in classes:
        folder = os.path.join(source, name)
        videos = sorted(_videos_below(folder), key=by_number)
        if not videos:
            listing.notes.append(f"class {name} has no videos")
        if folder in videos:
            raise InputError(
                f"{folder}: holds images; put the frames of each video into a folder of their own"
            )
        names = (os.path.relpath(video, source) for video in videos)
        listing.rows += [_Row(video, video, (name,), *_place(video)) for video in names]
    return listing


def _videos_below(folder: str) -> Iterator[str]:
    """Yield the video files and the folders of images below a folder, links included."""
    seen = set()
    folders = [folder]
    while folders:
        folder = folders.pop()
        identity = os.path.realpath(folder)
        if identity in seen:  # a link to a folder above
            continue
        seen.add(identity)
        entries = _scan(folder)
        if any(_has_extension(entry.name, IMAGE_EXTENSIONS) for entry in entries):
            yield folder
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.path)
            elif _has_extension(entry.name, VIDEO_EXTENSIONS):
                yield entry.path


def _read_hmdb(source: str, names: Sequence[str], part: str, number: int) -> _Listing:
    """Read HMDB51: a file per class and split, of `name.avi 1` lines (1 train, 2 test, 0 none)."""
    layout = f"HMDB51 split {number}, {part}"
    listing = _Listing(source, layout, [], _near(source + os.sep, "hmdb51_org", "hmdb51"))
    listing.class_names = []
    wanted = {"train": "1", "test": "2"}[part]
    for name in names:
        match = re.fullmatch(_HMDB_LIST, name)
        if match is None or int(match[2]) != number:
            continue
        class_name = match[1]
        listing.class_names.append(class_name)
        path = os.path.join(source, name)
        for where, line in _lines(_contents(path)):
            video, _, mark = line.rpartition(" ")
            if mark not in ("0", "1", "2") or not video:
                raise _at(path, where, f"is {short(line)}; HMDB51 has 'name.avi 0', 1 or 2 there")
            if mark == wanted:
                file = f"{class_name}/{video}"
                place = (class_name, ""), os.path.splitext(video)[0]
                listing.rows.append(_Row(f"{name}: {where}", file, (class_name,), *place))
    return listing


# Files


def _read_file(source: str, split: str | None) -> _Listing:
    if _has_extension(source, VIDEO_EXTENSIONS):
        raise InputError(f"{source}: is a video; give a folder per class or a list of videos")
    text = _contents(source)
    first = next((line for _, line in _lines(text)), "")
    if re.match(r'\s*(\[\s*)?\{\s*"|\[\s*($|\{)', first):
        return _read_json(source, text, split)
    if _is_table(source, first):
        return _read_table(source, text, split)
    if split is not None:
        raise InputError(f"{source}: is a list without splits; leave out the split {split!r}")
    if re.fullmatch(_UCF_LIST, os.path.basename(source)):
        return _read_ucf(source, text)
    return _read_words(source, text)


def _contents(path: str) -> str:
    return read_text(Path(path), MAX_LIST_BYTES)


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield where each line that is not blank stands, and the line without outer spaces."""
    # Not splitlines(), which also breaks at characters that editors do not show as a new line.
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if stripped := line.strip():
            yield f"line {number}", stripped


def _is_table(source: str, first: str) -> bool:
    """Tell whether a file has columns, by its first line and, where that is open, its name."""
    if "\t" in first:
        return True
    if "," not in first and ";" not in first:
        return False
    if _has_extension(source, frozenset({".csv", ".tsv"})):
        # Some projects give this extension to `path label` lists, perhaps with several labels.
        return re.fullmatch(r"[^,;]+ \d+(,\d+)*", first) is None
    return " " not in first


def _read_words(source: str, text: str) -> _Listing:
    """Read `path label` or `folder num_frames label`, whichever the first line is."""
    first = next(_lines(text), ("", ""))[1].rsplit(None, 2)
    has_frames = len(first) == 3 and first[1].isdecimal() and first[2].isdecimal()
    form = "folder num_frames label" if has_frames else "path label"
    rows = []
    for where, line in _lines(text):
        fields = line.rsplit(None, form.count(" "))
        if len(fields) <= form.count(" ") or (
            has_frames and not re.fullmatch(r"\d{1,9}", fields[1])
        ):
            raise _at(source, where, f"is {short(line)}; write '{form}' there")
        num_frames = int(fields[1]) if has_frames else None
        labels = tuple(fields[-1].split(","))
        rows.append(_Row(where, fields[0], labels, *_place(fields[0]), num_frames=num_frames))
    return _Listing(source, f"list of '{form}'", rows, _near(source))


def _read_ucf(source: str, text: str) -> _Listing:
    """Read trainlist01.txt or testlist01.txt of UCF101; the class is the folder of a video."""
    names = _numbered_names(os.path.join(os.path.dirname(source), "classInd.txt"))
    rows = []
    for where, line in _lines(text):
        video, _, label = line.partition(" ")
        class_name, _, file = video.partition("/")
        if not file:
            raise _at(source, where, f"is {short(line)}; UCF101 has 'Class/video.avi' there")
        # The label repeats the class, counted from 1; a list of someone's own may differ.
        if label and names and class_name in names and label != str(names.index(class_name) + 1):
            number = f"number {names.index(class_name) + 1} in classInd.txt"
            problem = f"has label {short(label)}, but {class_name} is {number}"
            raise _at(source, where, f"{problem}; rename the file if it is not the official list")
        key = os.path.splitext(file)[0]
        rows.append(_Row(where, video, (class_name,), (class_name, ""), key))
    layout = f"UCF101 {os.path.basename(source)}"
    roots = _near(source, "UCF-101", "UCF101")
    return _Listing(source, layout, rows, roots, names, has_names=True)


def _numbered_names(index_file: str) -> list[str] | None:
    """Return the names in a file such as classInd.txt, if it exists."""
    if not os.path.exists(index_file):
        return None
    lines = [line for _, line in _lines(_contents(index_file))]
    names = _without_numbers(lines)
    if names == lines:
        raise InputError(f"{index_file}: its lines are not numbered in order; restore the file")
    return names


def _without_numbers(names: Sequence[str]) -> list[str]:
    """Remove "1 " or "c000 " from names that are all numbered so, in order from 0 or 1."""
    matches = [re.fullmatch(r"c?(\d{1,6}) (.+)", name) for name in names]
    numbered = [(int(match[1]), match[2]) for match in matches if match]
    numbers = [number for number, _ in numbered]
    if len(numbers) < len(names) or numbers not in (
        list(range(len(names))),
        list(range(1, len(names) + 1)),
    ):
        return list(names)
    return [name for _, name in numbered]


# Tables and JSON: records of named fields

_PATH_FIELDS = ("path", "video", "file", "filename", "video_path")
_LABEL_FIELDS = ("label", "class", "class_name", "action")
_Record = tuple[str, dict[str, Any]]


def _read_table(source: str, text: str, split: str | None) -> _Listing:
    first = next(_lines(text))[1]
    # The names in lists of Something-Something V1 may hold commas.
    delimiter = ";" if re.match(r"\d+;", first) else next(m for m in "\t,;" if m in first)
    kind = "tsv" if delimiter == "\t" else "csv"
    rows = _table_rows(source, text, delimiter)
    first_row = next(rows, ("", []))
    header = [cell.lower() for cell in first_row[1]]
    if {*_PATH_FIELDS, "youtube_id", "id"}.isdisjoint(header):
        if split is not None:
            raise InputError(f"{source}: has no header with a column 'split'; leave out {split!r}")
        rows = chain([first_row] if header else [], rows)
        if delimiter == ";" and header and header[0].isdecimal():
            return _read_something_v1(source, rows)
        bare = [_bare_row(source, where, cells) for where, cells in rows]
        return _Listing(source, f"{kind} without a header", bare, _near(source))
    columns = [column for column in header if column]  # spreadsheets add empty ones
    if len(set(columns)) < len(columns):
        given = short(",".join(header))
        raise InputError(f"{source}: the header is {given}; name each column once")
    named = ((where, _named(source, where, header, cells)) for where, cells in rows)
    records = _of_split(source, named, split)
    if {"youtube_id", "time_start", "time_end"} <= {*header}:
        return _read_kinetics(source, records)
    if {"id", "actions"} <= {*header}:
        return _read_charades(source, records)
    return _read_records(source, kind, records)


def _table_rows(source: str, text: str, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    # `strict`: without it an open quote silently swallows the rows up to the next quote.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for cells in reader:
            if any(cells):
                yield f"line {reader.line_num}", [cell.strip() for cell in cells]
    except csv.Error as error:
        problem = f"is not valid CSV ({error}); check its quotes"
        raise _at(source, f"line {reader.line_num}", problem) from error


def _named(source: str, where: str, header: Sequence[str], cells: Sequence[str]) -> dict[str, str]:
    if len(cells) != len(header):
        problem = f"has {len(cells)} fields, the header {len(header)}"
        raise _at(source, where, f"{problem}; put quotes around a field that holds a separator")
    return dict(zip(header, cells, strict=True))


def _bare_row(source: str, where: str, cells: list[str]) -> _Row:
    if len(cells) not in (2, 4):
        problem = f"has {len(cells)} fields; use path,label or path,label,start,end or a header"
        raise _at(source, where, problem)
    name = _text(source, where, cells[0])
    return _Row(where, name, (cells[1],), *_place(name), *_span(source, where, name, *cells[2:]))


def _read_json(source: str, text: str, split: str | None) -> _Listing:
    records = list(_json_records(source, text))
    if records and "id" in records[0][1] and records[0][1].keys().isdisjoint(_PATH_FIELDS):
        if split is not None:
            raise InputError(
                f"{source}: holds one split; leave out {split!r} and name another file"
            )
        return _read_something(source, records)
    return _read_records(source, "JSON list", _of_split(source, records, split))


def _json_records(source: str, text: str) -> Iterator[_Record]:
    """Yield the objects of a JSON array, or of one a line."""
    if text.lstrip().startswith("["):
        values = ((f"item {i}", value) for i, value in enumerate(_parse(source, "it", text), 1))
    else:
        values = ((where, _parse(source, where, line)) for where, line in _lines(text))
    for where, value in values:
        if not isinstance(value, dict):
            raise _at(source, where, f"is {short(value)}; it must be an object, {{...}}")
        yield where, value


def _parse(source: str, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _at(source, where, f"is not valid JSON ({error}); correct it") from error


def _read_records(source: str, kind: str, records: Iterable[_Record]) -> _Listing:
    """Read records with a path, labels and perhaps a span."""
    rows = []
    for where, record in records:
        name = _text(source, where, _one_of(source, where, record, _PATH_FIELDS))
        if "labels" not in record:
            labels = [_one_of(source, where, record, _LABEL_FIELDS)]
        elif isinstance(record["labels"], str):
            labels = [x.strip() for x in re.split("[;|]", record["labels"]) if x.strip()]
        else:
            labels = record["labels"]
        if not isinstance(labels, list):
            raise _at(source, where, f"has labels {short(labels)}; write a list")
        texts = tuple(_text(source, where, label) for label in labels)
        span = _span(source, where, name, record.get("start"), record.get("end"))
        rows.append(_Row(where, name, texts, *_place(name), *span))
    return _Listing(source, kind, rows, _near(source))


def _one_of(source: str, where: str, record: dict[str, Any], fields: Sequence[str]) -> Any:
    for field_ in fields:
        if field_ in record:
            return record[field_]
    raise _at(source, where, f"has no field {fields[0]!r}; it has {_some(record) or 'none'}")


def _text(source: str, where: str, value: Any) -> str:
    """Return a path or a label as text that can be one."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _at(source, where, f"has {short(value)} where a path or a label belongs")
    text = str(value)
    try:
        is_text = bool(text.encode()) and "\0" not in text
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        is_text = False
    if not is_text:
        raise _at(source, where, f"has {short(text)} where a path or a label belongs")
    return text


def _of_split(source: str, records: Iterable[_Record], split: str | None) -> Iterator[_Record]:
    """Yield the records of one split; without a name there must be only one."""
    found: dict[str, str] = {}  # with where each starts
    for where, record in records:
        own = str(record.get("split", ""))
        found.setdefault(own, where)
        if own == split or (split is None and len(found) == 1):
            yield where, record
    known = _some(filter(None, found)) or "none"
    if split is None and len(found) > 1:
        where = list(found.values())[1]
        raise _at(source, where, f"starts another split; choose one with --split from {known}")
    if split is not None and split not in found:
        raise InputError(f"{source}: has no split {split!r}; its column 'split' has {known}")


def _span(
    source: str, where: str, name: str, start: Any = None, end: Any = None
) -> tuple[float | None, float | None]:
    times = []
    for value in (start, end):
        try:
            times.append(None if value is None or value == "" else float(value))
        except (TypeError, ValueError, OverflowError):
            problem = f"has {short(value)} where a time in seconds belongs"
            raise _at(source, where, problem) from None
    try:
        Span(name, *times)
    except InputError as error:
        raise _at(source, where, f"is wrong: {error}") from None
    return times[0], times[1]


def _read_kinetics(source: str, records: Iterable[_Record]) -> _Listing:
    """Read a list of Kinetics; its videos are called id_000010_000020."""
    rows, parts = [], set()
    folders: dict[str, tuple[str, ...]] = {}  # one tuple a class, not one a row
    for where, record in records:
        if "label" not in record:
            raise _at(source, where, "has no label: this part of Kinetics cannot be used")
        try:
            start, end = (int(float(record[column])) for column in ("time_start", "time_end"))
        except (ValueError, OverflowError):
            raise _at(source, where, "has no times, which are part of the file's name") from None
        key = f"{record['youtube_id']}_{start:06d}_{end:06d}"
        label = record["label"]
        own = folders.setdefault(label, (label, label.replace(" ", "_"), ""))
        rows.append(_Row(where, f"{key}.mp4", (label,), own, key))
        parts.add(record.get("split", ""))
    # Some distributions call this part "val".
    likely = sorted(parts | ({"val"} if parts & {"validate", "validation"} else set()))
    return _Listing(source, "Kinetics csv", rows, _near(source, *likely))


def _read_charades(source: str, records: Iterable[_Record]) -> _Listing:
    """Read a list of Charades: videos with all their actions."""
    rows = []
    for where, record in records:
        texts = filter(None, record["actions"].split(";"))
        actions = tuple(_charades_action(source, where, text) for text in texts)
        labels = tuple(str(action.label) for action in actions)
        name = record["id"]
        rows.append(_Row(where, f"{name}.mp4", labels, *_place(name), actions=actions))
    names = _numbered_names(os.path.join(os.path.dirname(source), "Charades_v1_classes.txt"))
    roots = _near(source, "Charades_v1_480", "Charades_v1", "Charades_v1_rgb")
    return _Listing(source, "Charades csv", rows, roots, names, is_multi_label=True)


def _charades_action(source: str, where: str, text: str) -> Action:
    number = r"(-?\d+(?:\.\d*)?)"
    match = re.fullmatch(rf"c(\d{{3}}) {number} {number}", text)
    if match is None:
        raise _at(source, where, f"has action {short(text)}; Charades has 'c092 11.9 21.2'")
    label, start, end = int(match[1]), float(match[2]), float(match[3])
    # Where times make no span, that the video shows the action is all they say.
    return Action(label, start, end) if 0 <= start < end < math.inf else Action(label)


def _read_something(source: str, records: Iterable[_Record]) -> _Listing:
    """Read a list of Something-Something V2; the label is the template without brackets."""
    rows = []
    for where, record in records:
        if "template" not in record:
            raise _at(source, where, "has no template: this part of the data has no labels")
        name = _text(source, where, _one_of(source, where, record, ("id",)))
        template = re.sub(r"[\[\]]", "", _text(source, where, record["template"]))
        rows.append(_Row(where, f"{name}.webm", (template,), *_place(name)))
    names = None
    for file in ("labels.json", "something-something-v2-labels.json"):
        index_file = os.path.join(os.path.dirname(source), file)
        if names is None and os.path.exists(index_file):
            names = _in_order(index_file, _parse(index_file, "it", _contents(index_file)))
    roots = _near(source, "20bn-something-something-v2")
    return _Listing(source, "Something-Something V2 json", rows, roots, names, has_names=True)


def _in_order(index_file: str, indices: Any) -> list[str]:
    """Return the names of an object such as {"Bending something": "0"} in their order."""
    names = {str(index): name for name, index in indices.items()} if type(indices) is dict else {}
    if not names or set(names) != set(map(str, range(len(indices)))):
        raise InputError(f'{index_file}: must number its classes from 0, as {{"a name": "0", ...}}')
    return [names[str(index)] for index in range(len(names))]


def _read_something_v1(source: str, records: Iterable[tuple[str, list[str]]]) -> _Listing:
    """Read a list of Something-Something V1: `id;template`; videos are folders of frames."""
    rows = []
    for where, cells in records:
        if len(cells) != 2:
            raise _at(
                source, where, f"has {len(cells)} fields; Something-Something V1 has id;label"
            )
        rows.append(_Row(where, cells[0], (cells[1],), *_place(cells[0])))
    index_file = os.path.join(os.path.dirname(source), "something-something-v1-labels.csv")
    names = None
    if os.path.exists(index_file):
        names = [line for _, line in _lines(_contents(index_file))]
    roots = _near(source, "20bn-something-something-v1")
    return _Listing(source, "Something-Something V1 csv", rows, roots, names, has_names=True)


# Labels


def _class_names(listing: _Listing, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        names = check_class_names(given)
        keys = {comparison_key(name) for name in names}
        if listing.has_names and any(
            comparison_key(x) in keys for row in listing.rows for x in row.labels
        ):
            return names  # numbers, if there are any, are a part of the names
        return check_class_names(_without_numbers(names))
    if listing.class_names is not None:
        return check_class_names(listing.class_names)
    if not listing.has_names and _are_indices(listing):
        raise InputError(
            f"{listing.source}: its labels are numbers ({listing.layout}); name the classes "
            "with --labels FILE"
        )
    for row in listing.rows:
        for label in row.labels:
            if not label.strip() or len(label) > MAX_LABEL_LENGTH:
                raise _at(listing.source, row.where, f"has label {short(label)}; write a name")
    return check_class_names(sorted({x for row in listing.rows for x in row.labels}, key=by_number))


def _are_indices(listing: _Listing) -> bool:
    return all(re.fullmatch(r"-?[0-9]{1,9}", label) for row in listing.rows for label in row.labels)


def _class_indices(listing: _Listing, names: Sequence[str]) -> list[tuple[int, ...]]:
    """Return the class indices of every row, ascending."""
    if not listing.has_names and _are_indices(listing):
        index_of = {str(index): index for index in range(len(names))}
        remedy = f"use 0 to {len(names) - 1}"
    else:
        index_of = {comparison_key(name): index for index, name in enumerate(names)}
        remedy = f"it is not one of the {len(names)} classes ({names[0][:80]}, ...)"
    known: dict[tuple[str, ...], tuple[int, ...]] = {}
    indices = []
    for row in listing.rows:
        if row.labels not in known:
            keys = [label if label in index_of else comparison_key(label) for label in row.labels]
            if wrong := [x for x, key in zip(row.labels, keys, strict=True) if key not in index_of]:
                raise _at(listing.source, row.where, f"has label {short(wrong[0])}; {remedy}")
            known[row.labels] = tuple(sorted({index_of[key] for key in keys}))
        indices.append(known[row.labels])
    return indices


# Files


class _Files:
    """The files below a folder, each of its folders listed once.

    A look at every single file of a large list would be slow.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.listed: dict[str, dict[str, str]] = {}
        # By the folders of a row, which most rows of a class have in common.
        self.places: dict[tuple[str, ...], list[dict[str, str]]] = {}

    def find(self, row: _Row) -> str | None:
        """Return the path of a row's video, if it exists."""
        if row.folders not in self.places:
            listed = [self._paths(folder) for folder in row.folders]
            self.places[row.folders] = [paths for paths in listed if paths]
        for paths in self.places[row.folders]:
            if row.key in paths:
                return paths[row.key]
        return None

    def _paths(self, folder: str) -> dict[str, str]:
        """Return what a folder holds by name and, for videos, also by the name's stem."""
        if folder not in self.listed:
            path = os.path.join(self.root, folder)
            try:
                names = sorted(os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                names = []
            except OSError as error:
                problem = f"cannot be listed ({error.strerror}); check the path"
                raise InputError(f"{short(path)} {problem}") from error
            prefix = os.path.join(path, "")
            paths = {name: prefix + name for name in names}
            for name in names:
                stem, extension = os.path.splitext(name)
                if extension.lower() in VIDEO_EXTENSIONS:
                    paths.setdefault(stem, paths[name])
            self.listed[folder] = paths
        return self.listed[folder]


def _locate(listing: _Listing, videos: str | None) -> tuple[str, list[str | None]]:
    """Return the folder that holds most of the videos, and the path of each that exists."""
    if videos is not None and not os.path.isdir(videos):
        raise InputError(f"--videos {videos}: is not a folder; name the one that holds the videos")
    best: tuple[int, str, list[str | None]] | None = None
    for root in dict.fromkeys(listing.roots if videos is None else [videos]):
        if not os.path.isdir(root):
            continue
        files = _Files(root)
        paths = [files.find(row) for row in listing.rows]
        found = len(paths) - paths.count(None)
        if best is None or found > best[0]:
            best = found, root, paths
        if found == len(paths):
            break
    assert best is not None  # the folder of the list, or the current one, exists
    return best[1:]


def _check_frames(
    listing: _Listing, paths: Sequence[str | None], notes: list[str]
) -> list[str | None]:
    """Compare the folders of frames with the counts in the list; an empty one is missing."""
    checked = list(paths)
    odd = []
    for position, (row, path) in enumerate(zip(listing.rows, paths, strict=True)):
        if row.num_frames is None or path is None:
            continue
        count = _count_frames(path, row.num_frames)
        if count == 0:
            checked[position] = None
        elif count != row.num_frames:
            odd.append(f"{row.name} has {count}, not {row.num_frames}")
    if odd:
        notes.append(
            f"{_count(len(odd), 'folder')} with another number of frames than listed, all in "
            f"the folder are used ({odd[0]})"
        )
    return checked


def _count_frames(folder: str, expected: int) -> int:
    # Two looks instead of hundreds of names, where frames are called as ActionCLIP calls them.
    if os.path.exists(os.path.join(folder, f"img_{expected:05d}.jpg")) and not os.path.exists(
        os.path.join(folder, f"img_{expected + 1:05d}.jpg")
    ):
        return expected
    if not os.path.isdir(folder):
        return 0
    return sum(_has_extension(entry.name, IMAGE_EXTENSIONS) for entry in _scan(folder))


# What comes out


def _samples(
    listing: _Listing,
    labels: Sequence[tuple[int, ...]],
    paths: Sequence[str | None],
    notes: list[str],
) -> tuple[Sample, ...]:
    """Return the samples that exist, each once."""
    samples: dict[Sample, None] = {}
    repeated = num_folders = 0
    for row, own, path in zip(listing.rows, labels, paths, strict=True):
        if path is not None:
            span = (row.start_seconds, row.end_seconds)
            actions = row.actions
            if actions and os.path.isdir(path):
                actions, num_folders = (), num_folders + 1
            sample = Sample(path, own, *span, row.name, actions)
            repeated += sample in samples
            samples[sample] = None
    if repeated:
        notes.append(f"{_count(repeated, 'repeated line')}, each video and label is used once")
    if num_folders:
        frames = _count(num_folders, "folder")
        notes.append(f"{frames} of frames, which have no times, used in training as a whole")
    spans = {(sample.name, sample.start_seconds, sample.end_seconds) for sample in samples}
    if len(spans) < len(samples):
        notes.append(f"{_count(len(samples) - len(spans), 'video')} listed again with other labels")
    return tuple(samples)


def _digest(class_names: Sequence[str], samples: Sequence[Sample]) -> str:
    rows: list[tuple[object, ...]] = []
    for s in samples:
        row = (s.name or s.path, s.labels, s.start_seconds, s.end_seconds)
        rows.append((*row, [astuple(action) for action in s.actions]) if s.actions else row)
    return _sha256([class_names, rows])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _some(names: Iterable[str]) -> str:
    """Return names for a message; a file of another kind may have thousands, or long ones."""
    shown = islice(names, 10)
    return ", ".join(name if re.fullmatch(r"\w{1,40}", name) else short(name) for name in shown)


def _has_extension(name: str, extensions: Container[str]) -> bool:
    return os.path.splitext(name)[1].lower() in extensions

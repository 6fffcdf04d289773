"""Training batches: what a sample holds, which samples a step has, what broken videos do."""

import math
from dataclasses import replace
from itertools import chain
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from video_files import write_video

from actionclip.annotations import Sample, VideoList, read_video_list
from actionclip.augment import Augmentation
from actionclip.dataset import (
    MOST_TRIES,
    Batch,
    RunSampler,
    TrainingClips,
    build_loader,
    join,
)
from actionclip.errors import InputError
from actionclip.recipe import Recipe
from actionclip.tokenizer import tokenize
from actionclip.transforms import Preprocessing, views
from actionclip.video import read_frames

CLASSES = ("archery", "BrushHair", "tai_chi")
SENTENCES = ("archery", "Brush Hair", "tai chi")
SIDE = 32
CENTRE = Preprocessing(SIDE, resize=36)
PLAIN = Recipe(templates=("{}",), batch_size=2, epochs=2)
VARIED = replace(
    PLAIN, augmentation=Augmentation(SIDE), templates=("see {}", "{}!", "a video of {}")
)
FRAMES = (24, 9, 3, 30, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i, num_frames in enumerate(FRAMES):
        write_video(folder / f"{i}.mp4", num_frames, size=(48, 40))
    whole = write_video(folder / "whole.mkv", 60, size=(48, 40)).read_bytes()
    (folder / "damaged.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("not a video")
    return folder


def video_list(
    folder: Path,
    names: list[str] | None = None,
    labels: list[tuple[int, ...]] | None = None,
) -> VideoList:
    names = names or [f"{i}.mp4" for i in range(len(FRAMES))]
    labels = labels or [(i % len(CLASSES),) for i in range(len(names))]
    samples = tuple(
        Sample(str(folder / name), label) for name, label in zip(names, labels, strict=True)
    )
    several = any(len(label) != 1 for label in labels)
    return VideoList("list.txt", "a list", CLASSES, samples, (), "", several)


def build(videos: VideoList, recipe: Recipe = PLAIN, num_frames: int = 4) -> TrainingClips:
    return TrainingClips(videos, recipe, num_frames, CENTRE, context_length=16)


def assert_same(actual: Batch, expected: Batch) -> None:
    for name in ("frames", "tokens", "labels"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert (actual.paths, actual.faults) == (expected.paths, expected.faults)
    assert actual.exhausted == expected.exhausted


def sentence(tokens: Tensor, templates: tuple[str, ...] = ("{}",)) -> str:
    """Find out which sentence a row of tokens is."""
    every = [template.replace("{}", name) for template in templates for name in SENTENCES]
    (match,) = [text for text in every if torch.equal(tokenize(text, 16)[0], tokens)]
    return match


def test_a_sample_has_frames_a_sentence_and_a_label(folder: Path) -> None:
    clips = build(video_list(folder), VARIED)
    assert len(clips) == 5
    for index in range(5):
        batch = clips[0, index]
        assert batch.frames.shape == (1, 4, 3, SIDE, SIDE)
        assert batch.frames.dtype == torch.uint8
        assert batch.tokens.shape == (1, 16)
        assert batch.labels.tolist() == [index % 3]
        assert batch.labels.dtype == torch.int64
        assert batch.paths == [str(folder / f"{index}.mp4")]
        assert SENTENCES[index % 3] in sentence(batch.tokens[0], VARIED.templates)
        assert (batch.faults, batch.exhausted, len(batch)) == ([], False, 1)


def test_without_augmentation_frames_are_cut_as_in_evaluation(folder: Path) -> None:
    clips = build(video_list(folder))
    for index, num_frames in enumerate(FRAMES):
        path = folder / f"{index}.mp4"
        every = views(read_frames(path, range(num_frames)), CENTRE)[0]
        drawn = []
        for frame in clips[3, index].frames[0]:
            (position,) = [i for i in range(num_frames) if torch.equal(every[i], frame)]
            drawn.append(position)
        if num_frames >= 4:
            for segment, position in enumerate(drawn):
                start = segment * num_frames // 4
                assert start <= position < (segment + 1) * num_frames // 4
        else:
            assert set(drawn) == set(range(num_frames))


def test_a_span_is_all_there_is(folder: Path) -> None:
    # 25 frames a second: the span holds the frames 5 to 9.
    sample = Sample(str(folder / "0.mp4"), (0,), start_seconds=0.2, end_seconds=0.4)
    clips = build(replace(video_list(folder), samples=(sample,)))
    every = views(read_frames(folder / "0.mp4", range(24)), CENTRE)[0]
    for epoch in range(4):
        for frame in clips[epoch, 0].frames[0]:
            (position,) = [i for i in range(24) if torch.equal(every[i], frame)]
            assert 5 <= position < 10


COLOURS = np.eye(3, dtype=np.uint8) * 255


def charades(folder: Path, actions: str) -> VideoList:
    """Write a list in the form of Charades of one video: 1 second red, 1 green, 1 blue."""
    path = folder / "Charades_v1_480" / "YSKX3.mp4"
    if not path.exists():
        path.parent.mkdir()
        with av.open(str(path), "w") as output:
            stream = output.add_stream("libx264", rate=24)
            stream.width = stream.height = 32
            for i in range(72):
                pixels = np.full((32, 32, 3), COLOURS[i // 24], np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
            output.mux(stream.encode(None))
    (folder / "train.csv").write_text(f"id,actions\nYSKX3,{actions}\n")
    return read_video_list(folder / "train.csv", class_names=CLASSES)


def seen(batch: Batch) -> tuple[set[int], str, list[int]]:
    """Return the colours of the frames, the sentence and the labels of a sample."""
    colours = set(batch.frames[0].amax((2, 3)).argmax(1).tolist())
    return colours, sentence(batch.tokens[0]), batch.labels[0].nonzero()[:, 0].tolist()


def test_an_action_is_read_when_it_is_shown(tmp_path: Path) -> None:
    clips = build(charades(tmp_path, "c000 0.0 1.0;c001 1.0 2.0;c002 1.5 2.9"))
    drawn = [seen(clips[epoch, 0]) for epoch in range(60)]
    every = {said: (colours, labels) for colours, said, labels in drawn}
    assert every == {
        "archery": ({0}, [0]),
        "Brush Hair": ({1}, [1, 2]),
        "tai chi": ({1, 2}, [1, 2]),
    }
    # Each of them a third of the times, within 4 standard deviations.
    for said in every:
        assert 5 < [said for _, said, _ in drawn].count(said) < 35
    assert not any(clips[epoch, 0].faults for epoch in range(10))
    for epoch in range(5):
        assert_same(clips[epoch, 0], clips[epoch, 0])


@pytest.mark.parametrize("span", ["5.0 9.0", "1.01 1.02"])
def test_an_action_without_frames_leaves_the_whole_video(tmp_path: Path, span: str) -> None:
    clips = build(charades(tmp_path, f"c000 0.0 1.0;c001 {span}"), num_frames=6)
    batches = [clips[epoch, 0] for epoch in range(20)]
    late = [batch for batch in batches if seen(batch)[1] == "Brush Hair"]
    assert 0 < len(late) < 20
    for batch in late:
        assert seen(batch) == ({0, 1, 2}, "Brush Hair", [0, 1])
        (fault,) = batch.faults
        assert (fault.reason, fault.replaced) == ("damaged", False)
        assert fault.message.startswith("no frame is shown from ")
        assert fault.message.endswith("; the whole video was used")
    assert not any(batch.faults for batch in batches if seen(batch)[1] == "archery")


def test_an_action_without_a_span_is_the_whole_video(tmp_path: Path) -> None:
    clips = build(charades(tmp_path, "c000 0.0 1.0;c001 2.0 1.0"), num_frames=6)
    every = {
        said: (colours, labels)
        for colours, said, labels in map(seen, (clips[i, 0] for i in range(20)))
    }
    assert every == {"archery": ({0}, [0, 1]), "Brush Hair": ({0, 1, 2}, [0, 1])}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("text.mp4", "not-a-video"), ("damaged.mkv", "damaged")],  # cut short before the action
)
def test_a_broken_video_with_actions_is_replaced(
    tmp_path: Path, folder: Path, name: str, reason: str
) -> None:
    videos = charades(tmp_path, "c000 2.0 2.4")
    broken = replace(videos.samples[0], path=str(folder / name))
    clips = build(replace(videos, samples=(broken, *videos.samples)))
    batch = clips[0, 0]
    assert batch.paths == [videos.samples[0].path]
    (fault,) = batch.faults
    assert (fault.path, fault.reason, fault.replaced) == (broken.path, reason, True)


def test_a_sample_is_the_same_whatever_was_read_before(folder: Path) -> None:
    videos = video_list(folder)
    first = build(videos, VARIED)
    keys = [(epoch, index) for epoch in range(2) for index in range(5)]
    expected = {key: first[key] for key in keys}
    torch.manual_seed(5)
    second = build(videos, VARIED)
    for key in reversed(keys):
        assert_same(second[key], expected[key])


def test_epochs_positions_and_seeds_differ(folder: Path) -> None:
    videos = video_list(folder, ["3.mp4", "3.mp4"], [(0,), (0,)])
    clips = build(videos)
    reference = clips[0, 0].frames
    assert not torch.equal(clips[1, 0].frames, reference)
    assert not torch.equal(clips[0, 1].frames, reference)
    other = build(videos, replace(PLAIN, seed=1))
    assert not torch.equal(other[0, 0].frames, reference)


def test_each_epoch_draws_a_template(folder: Path) -> None:
    clips = build(video_list(folder, ["2.mp4"], [(1,)]), VARIED)
    drawn = [sentence(clips[epoch, 0].tokens[0], VARIED.templates) for epoch in range(30)]
    assert set(drawn) == {"see Brush Hair", "Brush Hair!", "a video of Brush Hair"}


def test_raw_labels_are_not_split(folder: Path) -> None:
    clips = build(video_list(folder, ["2.mp4"], [(1,)]), replace(PLAIN, raw_labels=True))
    assert torch.equal(clips[0, 0].tokens, tokenize("BrushHair", 16))


def test_of_several_labels_one_is_said_and_all_are_kept(folder: Path) -> None:
    videos = video_list(folder, ["0.mp4", "1.mp4", "2.mp4"], [(0,), (), (0, 2)])
    clips = build(videos)
    assert len(clips) == 2  # what has no label teaches nothing
    assert clips[0, 0].labels.tolist() == [[True, False, False]]
    batches = [clips[epoch, 1] for epoch in range(20)]
    assert {tuple(batch.labels[0].tolist()) for batch in batches} == {(True, False, True)}
    assert {sentence(batch.tokens[0]) for batch in batches} == {"archery", "tai chi"}
    joined = join(batches[:3])
    assert joined.labels.shape == (3, 3)
    assert joined.labels.dtype == torch.bool


def test_a_broken_video_is_replaced_by_the_next_in_the_list(folder: Path) -> None:
    names = ["0.mp4", "text.mp4", "nowhere.mp4", "1.mp4", "text.mp4"]
    clips = build(video_list(folder, names), VARIED)
    batch = clips[2, 1]
    assert batch.paths == [str(folder / "1.mp4")]
    assert batch.labels.tolist() == [3 % 3]
    assert "archery" in sentence(batch.tokens[0], VARIED.templates)
    told = [(f.path, f.reason, f.replaced, f.epoch, f.index) for f in batch.faults]
    assert told == [
        (str(folder / "text.mp4"), "not-a-video", True, 2, 1),
        (str(folder / "nowhere.mp4"), "missing", True, 2, 2),
    ]
    assert all(fault.message and "\n" not in fault.message for fault in batch.faults)
    assert not batch.exhausted
    assert_same(build(video_list(folder, names), VARIED)[2, 1], batch)
    # After the last one comes the first.
    assert clips[0, 4].paths == [str(folder / "0.mp4")]


def test_a_damaged_video_is_used_and_listed(folder: Path) -> None:
    batch = build(video_list(folder, ["damaged.mkv"]))[0, 0]
    assert batch.paths == [str(folder / "damaged.mkv")]
    assert batch.frames.any()
    (fault,) = batch.faults
    assert (fault.reason, fault.replaced, fault.index) == ("damaged", False, 0)
    assert fault.message


def test_too_many_broken_videos_in_a_row_exhaust_the_tries(folder: Path) -> None:
    names = ["0.mp4", *["text.mp4"] * MOST_TRIES, "1.mp4"]
    clips = build(video_list(folder, names))
    batch = clips[0, 1]
    assert batch.exhausted
    assert [fault.index for fault in batch.faults] == list(range(1, 11))
    # It fits beside the others, so that all processes reach the same exchange.
    whole = join([clips[0, 0], batch])
    assert whole.exhausted
    assert whole.frames.shape == (2, 4, 3, SIDE, SIDE)
    almost = clips[0, 2]
    assert not almost.exhausted
    assert almost.paths == [str(folder / "1.mp4")]
    assert len(almost.faults) == MOST_TRIES - 1


def test_lists_without_labels_and_prompts_without_room_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"list\.txt holds no labelled video"):
        build(video_list(folder, ["0.mp4"], [()]))
    with pytest.raises(InputError, match=r"tokens, the limit is 16"):
        build(video_list(folder), replace(PLAIN, templates=("word " * 20 + "{}",)))


def test_batches_are_split_and_joined(folder: Path) -> None:
    names = ["0.mp4", "text.mp4", "1.mp4", "2.mp4", "3.mp4"]
    clips = build(video_list(folder, names))
    whole = join([clips[0, index] for index in range(5)])
    assert whole.paths == [str(folder / f"{i}.mp4") for i in (0, 1, 1, 2, 3)]
    assert [fault.index for fault in whole.faults] == [1]
    parts = whole.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert [part.frames.shape[0] for part in parts] == [2, 2, 1]
    assert not any(part.faults for part in parts)
    assert_same(join(parts), replace(whole, faults=[]))
    for size in (None, 5, 9):
        (only,) = whole.split(size)
        assert_same(only, replace(whole, faults=[]))


def keys(
    num_samples: int = 11, first_step: int = 0, rank: int = 0, world_size: int = 1, **options: int
) -> list[list[tuple[int, int]]]:
    recipe = replace(Recipe(batch_size=5, epochs=3), **options)
    sampler = RunSampler(num_samples, recipe, first_step, rank, world_size)
    steps = list(sampler)
    assert len(sampler) == len(steps)
    return steps


def test_each_epoch_is_a_permutation() -> None:
    steps = keys(num_samples=15)
    assert [len(step) for step in steps] == [5] * 9
    orders = []
    for epoch in range(3):
        drawn = list(chain(*steps[3 * epoch : 3 * epoch + 3]))
        assert {number for number, _ in drawn} == {epoch}
        orders.append([index for _, index in drawn])
        assert sorted(orders[-1]) == list(range(15))
        assert orders[-1] != list(range(15))
    assert orders[0] != orders[1] != orders[2]
    assert keys(num_samples=15, seed=1) != steps
    assert keys(num_samples=15) == steps


def test_what_does_not_fill_a_batch_is_left_out_once() -> None:
    steps = keys(num_samples=11, epochs=40)
    assert len(steps) == 80
    left_out = [
        set(range(11)) - {index for _, index in chain(*steps[i : i + 2])} for i in range(0, 80, 2)
    ]
    assert {len(indices) for indices in left_out} == {1}
    assert set().union(*left_out) == set(range(11))  # another one each time


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 5, 7])
def test_processes_share_each_batch(world_size: int, batch_size: int) -> None:
    whole = keys(batch_size=batch_size)
    shares = [
        keys(batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for step, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sorted(chain(*parts)) == sorted(step)
        sizes = [len(part) for part in parts]
        assert min(sizes) >= 1
        assert max(sizes) == math.ceil(batch_size / world_size)
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("first_step", range(7))
def test_a_run_goes_on_at_any_step(first_step: int) -> None:
    assert keys(first_step=first_step) == keys()[first_step:]
    assert (
        keys(first_step=first_step, rank=1, world_size=2) == keys(rank=1, world_size=2)[first_step:]
    )


def test_batches_that_cannot_be_filled() -> None:
    with pytest.raises(InputError, match=r"12 and there are 11 videos; use --batch-size 11"):
        RunSampler(11, Recipe(batch_size=12), 0, 0, 1)
    with pytest.raises(InputError, match=r"2 for 3 processes; use at least --batch-size 3"):
        RunSampler(11, Recipe(batch_size=2), 0, 0, 3)
    assert len(RunSampler(3, Recipe(batch_size=3, epochs=4), 0, 0, 3)) == 4


def test_frames_for_a_gpu_are_pinned(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = build(video_list(folder, ["0.mp4"] * 5), VARIED)
    sampler = RunSampler(5, VARIED, 0, 0, 1)
    assert not build_loader(clips, sampler, 0).pin_memory
    assert build_loader(clips, sampler, 0, pinned=True).pin_memory
    batch = clips[0, 0]
    monkeypatch.setattr(Tensor, "pin_memory", lambda x: x // 2)  # needs a GPU
    pinned = batch.pin_memory()
    assert torch.equal(pinned.frames, batch.frames // 2)
    assert pinned.paths == batch.paths
    assert torch.equal(pinned.tokens, batch.tokens)


def test_worker_processes_change_nothing(folder: Path) -> None:
    names = ["0.mp4", "text.mp4", "2.mp4", "damaged.mkv", "4.mp4"]
    clips = build(video_list(folder, names), VARIED)
    state = torch.get_rng_state()
    batches = {
        workers: list(build_loader(clips, RunSampler(5, VARIED, 1, 0, 1), workers))
        for workers in (0, 2)
    }
    assert torch.equal(torch.get_rng_state(), state)
    steps = list(RunSampler(5, VARIED, 1, 0, 1))
    assert len(batches[0]) == len(batches[2]) == len(steps) == 3
    for alone, together, step in zip(batches[0], batches[2], steps, strict=True):
        assert_same(together, alone)
        assert_same(alone, join([clips[key] for key in step]))

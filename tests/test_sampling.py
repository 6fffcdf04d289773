import json
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest

from actionclip.errors import InputError
from actionclip.sampling import random_segment_indices, segment_indices, view_indices

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sampling.json").read_text())


def sizes(row):
    return f"{row['num_frames']}-{row['num_segments']}"


@pytest.mark.parametrize("row", GOLDEN["val"], ids=sizes)
def test_segments_equal_the_reference(row):
    expected = [index - 1 for index in row["indices_1based"]]
    assert segment_indices(row["num_frames"], row["num_segments"]) == expected


@pytest.mark.parametrize("row", GOLDEN["train_ranges"], ids=sizes)
def test_random_segments_fill_exactly_the_reference_ranges(row):
    generator = np.random.default_rng(0)
    ranges = row["inclusive_ranges_1based"]
    widest = max(last - first + 1 for first, last in ranges)
    draws = np.array(
        [
            random_segment_indices(row["num_frames"], row["num_segments"], generator)
            for _ in range(min(30 * widest, 3000))
        ]
    )
    lowest, highest = (draws + 1).min(axis=0), (draws + 1).max(axis=0)
    for low, high, (first, last) in zip(lowest, highest, ranges, strict=True):
        assert first <= low
        assert high <= last
        if last - first < 50:  # enough draws to meet both ends
            assert (low, high) == (first, last)


def test_a_short_video_gives_every_frame_and_random_repeats():
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        indices = random_segment_indices(3, 5, generator)
        assert indices == sorted(indices)
        assert set(indices) == {0, 1, 2}
        assert len(indices) == 5
        seen.add(tuple(indices))
    assert len(seen) == 6  # multisets of 2 out of 3


def test_as_many_frames_as_segments_is_every_frame_once():
    assert random_segment_indices(8, 8, np.random.default_rng(0)) == list(range(8))
    assert segment_indices(8, 8) == list(range(8))


def test_random_segments_depend_on_the_generator_only():
    first = random_segment_indices(300, 8, np.random.default_rng(7))
    assert first == random_segment_indices(300, 8, np.random.default_rng(7))
    assert first != random_segment_indices(300, 8, np.random.default_rng(8))
    assert all(type(index) is int for index in first)


@pytest.mark.parametrize("num_segments", [1, 2, 3, 8, 16, 32])
def test_one_view_is_the_evaluation_sampling_in_floats(num_segments):
    for n in range(num_segments + 1, 400):
        if num_segments == 1:
            expected = [n // 2]
        else:
            tick = n / num_segments
            expected = [int(tick * i + (tick - 1) / 2) for i in range(num_segments)]
        assert view_indices(n, num_segments, 1) == [expected]
        assert segment_indices(n, num_segments) == expected


@pytest.mark.parametrize("num_clips", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("num_segments", [1, 2, 8, 32])
def test_views_are_sorted_in_range_and_ordered(num_segments, num_clips):
    for n in range(1, 200):
        views = view_indices(n, num_segments, num_clips)
        assert len(views) == num_clips
        for view in views:
            assert len(view) == num_segments
            assert view == sorted(view)
            assert view[0] >= 0
            assert view[-1] < n
        assert views == sorted(views)
        if n <= num_segments:
            assert all(view == views[0] for view in views)


def test_views_by_hand():
    # n = 80, S = 2, V = 4: segments of 40 frames; fractions 1/8, 3/8, 5/8, 7/8 minus half.
    assert view_indices(80, 2, 4) == [[4, 44], [14, 54], [24, 64], [34, 74]]
    assert view_indices(3, 2, 5)[0] == [0, 1]  # 0.15 - 0.5 truncates to 0, not to -1


def test_the_rule_of_xclip_by_hand():
    # Segments of 37.5 frames: 18.75, 56.25, 93.75, ...
    assert view_indices(300, 8, 1, rule="xclip") == [[18, 56, 93, 131, 168, 206, 243, 281]]
    # One frame later than ActionCLIP's, which is 3.5 before it is rounded down.
    assert view_indices(16, 2, 1, rule="xclip") == [[4, 12]]
    assert view_indices(16, 2, 1) == [[3, 11]]
    assert view_indices(3, 8, 1, rule="xclip") == [[0, 0, 0, 1, 1, 2, 2, 2]]
    assert view_indices(1, 4, 2, rule="xclip") == [[0] * 4] * 2
    # n = 80, S = 2, V = 4: segments of 40 frames; fractions 1/8, 3/8, 5/8, 7/8.
    assert view_indices(80, 2, 4, rule="xclip") == [[5, 45], [15, 55], [25, 65], [35, 75]]


@pytest.mark.parametrize("num_clips", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("num_segments", [1, 2, 3, 7, 8, 32])
def test_the_rule_of_xclip_is_exact(num_segments, num_clips):
    for n in range(1, 100):
        views = view_indices(n, num_segments, num_clips, rule="xclip")
        assert views == [
            [
                floor((i + Fraction(2 * v + 1, 2 * num_clips)) * n / num_segments)
                for i in range(num_segments)
            ]
            for v in range(num_clips)
        ]
        assert max(map(max, views)) < n


def test_a_rule_that_does_not_exist():
    with pytest.raises(InputError, match='rule is \'tsn\': pass "actionclip" or "xclip"'):
        view_indices(10, 8, 1, rule="tsn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 1), "num_frames is 0; it must be at least 1"),
        ((10, 0, 1), "num_segments is 0"),
        ((10, 8, -1), "num_clips is -1"),
    ],
)
def test_wrong_numbers_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        view_indices(*arguments)


def test_random_segments_check_their_arguments():
    with pytest.raises(InputError, match="num_frames is 0"):
        random_segment_indices(0, 8, np.random.default_rng(0))

"""What a training video goes through: the whole, its parts, and its random choices."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden_files import load_golden
from PIL import Image
from video_files import picture

from actionclip import augment as module
from actionclip.augment import Augmentation, augment, crop_offsets, crop_sizes, has_direction
from actionclip.errors import InputError

CASES = load_golden("crops.json")["cases"]
SCALES = (1, 0.875, 0.75, 0.66)
FULL = Augmentation(resolution=32)
PLAIN = Augmentation(resolution=32, flip=0, jitter=0, grayscale=0, randaugment_ops=0)
# Nothing is cut and nothing resized.
IDENTITY = replace(PLAIN, scales=(1,))


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def clip(num_frames: int = 4, width: int = 96, height: int = 64) -> torch.Tensor:
    """(T, 3, H, W) uint8 with the channels innermost in memory, as the decoder leaves them."""
    frames = np.stack([picture(i, width, height) for i in range(num_frames)])
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def still(num_frames: int = 4) -> torch.Tensor:
    return clip(1).expand(num_frames, -1, -1, -1)


def all_equal(frames: torch.Tensor) -> bool:
    return bool((frames == frames[:1]).all())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['image_w']}x{case['image_h']}")
def test_golden_crops(case):
    width, height = case["image_w"], case["image_h"]
    sizes = crop_sizes(width, height, SCALES, case["input_size"])
    assert [list(size) for size in sizes] == case["crop_pairs_wh_in_order"]
    for crop in sizes:
        offsets = crop_offsets(width, height, *crop)
        assert [list(offset) for offset in offsets] == case["offsets_xy"]["{}x{}".format(*crop)]


def test_five_crops_are_the_corners_and_the_centre():
    offsets = crop_offsets(340, 256, 224, 192, positions=5)
    # Steps of 116 / 4 = 29 and 64 / 4 = 16.
    assert set(offsets) == {(0, 0), (116, 0), (0, 64), (116, 64), (58, 32)}
    assert offsets == crop_offsets(340, 256, 224, 192)[:5]


@pytest.mark.parametrize(
    ("short", "sides"),
    [  # by hand: within two pixels of 224, but never larger than the frame
        (227, {227, 198, 170, 149}),
        (226, {224, 197, 169, 149}),
        (222, {222, 194, 166, 146}),
        (257, {257, 224, 192, 169}),
        (2, {2, 1}),
        (1, {1}),
    ],
)
def test_crop_sides(short, sides):
    sizes = crop_sizes(short + 50, short, SCALES, 224)
    assert {side for size in sizes for side in size} == sides


@pytest.mark.parametrize("positions", [5, 13])
def test_every_crop_is_reached_equally_often(positions):
    width, height = 340, 256
    augmentation = Augmentation(224, crop_positions=positions)
    boxes = Counter()
    rng = generator()
    for _ in range(1000 * positions):
        rows, columns = module._draw_crop(width, height, augmentation, rng)
        boxes[rows.start, rows.stop, columns.start, columns.stop] += 1
    expected = Counter()
    for crop_width, crop_height in crop_sizes(width, height, SCALES, 224):
        for left, top in crop_offsets(width, height, crop_width, crop_height)[:positions]:
            expected[top, top + crop_height, left, left + crop_width] += 100
    assert set(boxes) == set(expected)
    for box, count in expected.items():
        assert abs(boxes[box] - count) < 5 * count**0.5


def test_the_crop_is_inside_every_frame():
    for width, height in ((1, 1), (2, 7), (223, 600), (97, 61)):
        for crop_width, crop_height in crop_sizes(width, height, SCALES, 224):
            for left, top in crop_offsets(width, height, crop_width, crop_height):
                assert 0 <= left <= left + crop_width <= width
                assert 0 <= top <= top + crop_height <= height


@pytest.mark.parametrize(
    ("width", "height", "resolution"),
    [(96, 64, 32), (64, 96, 32), (30, 20, 32), (33, 32, 32), (340, 256, 224)],
)
def test_crop_and_resize_as_pillow(width, height, resolution):
    frames = clip(2, width, height)
    augmentation = replace(PLAIN, resolution=resolution)
    for seed in range(10):
        rows, columns = module._draw_crop(width, height, augmentation, generator(seed))
        result = augment(frames, augmentation, generator(seed))
        for frame, actual in zip(frames, result, strict=True):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            image = image.crop((columns.start, rows.start, columns.stop, rows.stop))
            image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
            expected = np.asarray(image).astype(int)
            difference = np.abs(actual.permute(1, 2, 0).numpy() - expected)
            assert difference.max() <= 1
            assert difference.mean() < 0.05


def test_a_crop_of_the_right_size_is_not_resized():
    frames = clip(width=32, height=32)
    assert torch.equal(augment(frames, IDENTITY, generator()), frames)


def test_randaugment_comes_before_the_crop_and_jitter_after(monkeypatch):
    seen = []

    def look(frame: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(frame.shape[1:]))
        return frame

    monkeypatch.setattr(module, "draw_operations", lambda *_: [look])
    monkeypatch.setattr(module, "_draw_jitter", lambda _: [look])
    augment(clip(1), replace(PLAIN, jitter=1), generator())
    assert seen == [(64, 96), (32, 32)]


def test_flip_only_mirrors():
    frames = clip()
    plain = augment(frames, replace(PLAIN, flip=0), generator())
    assert torch.equal(augment(frames, replace(PLAIN, flip=1), generator()), plain.flip(-1))


def test_grayscale_has_three_equal_channels():
    result = augment(clip(), replace(PLAIN, grayscale=1), generator())
    assert (result == result[:, :1]).all()
    plain = augment(clip(), PLAIN, generator())
    expected = [np.asarray(Image.fromarray(f.permute(1, 2, 0).numpy()).convert("L")) for f in plain]
    np.testing.assert_array_equal(result[:, 0], np.stack(expected))


@pytest.mark.parametrize("name", ["flip", "jitter", "grayscale"])
def test_probabilities(name):
    frames = clip(1, 32, 32)
    augmentation = replace(IDENTITY, **{name: 0.3})
    rng = generator()
    changed = sum(not torch.equal(augment(frames, augmentation, rng), frames) for _ in range(300))
    # 90 with a standard deviation of 8.
    assert 55 < changed < 125


def test_jitter_is_drawn_from_its_ranges_in_any_order():
    values: dict[str, list[float]] = {}
    orders = set()
    rng = generator()
    for _ in range(2000):
        operations = module._draw_jitter(rng)
        orders.add(tuple(operation.func.__name__ for operation in operations))
        for operation in operations:
            (value,) = operation.keywords.values()
            values.setdefault(operation.func.__name__, []).append(value)
    assert len(orders) == 24
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("color", 0.8, 1.2),
        ("hue", -25, 25),  # a tenth of 255
    ):
        tolerance = (high - low) / 50
        assert low <= min(values[name]) < low + tolerance
        assert high - tolerance < max(values[name]) <= high


def test_frames_that_are_equal_stay_equal():
    for seed in range(12):
        assert all_equal(augment(still(), FULL, generator(seed)))


@pytest.mark.parametrize("only", [{"jitter": 1}, {"randaugment_ops": 2}])
def test_per_frame_draws_for_every_frame(only):
    augmentation = replace(PLAIN, per_frame=True, **only)
    assert any(not all_equal(augment(still(), augmentation, generator(s))) for s in range(3))


def test_per_frame_has_one_crop_one_flip_and_one_grayscale():
    augmentation = replace(PLAIN, per_frame=True, flip=0.5, grayscale=0.5)
    for seed in range(10):
        assert all_equal(augment(still(), augmentation, generator(seed)))


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_generator_alone_decides(per_frame):
    augmentation = replace(FULL, per_frame=per_frame)
    first = [augment(clip(), augmentation, generator(seed)) for seed in range(8)]
    torch.manual_seed(1)
    np.random.seed(1)
    again = [augment(clip(), augmentation, generator(seed)) for seed in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({frames.numpy().tobytes() for frames in first}) == 8


def test_threads_change_nothing():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([augment(clip(), FULL, generator(seed)) for seed in range(6)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_layout_changes_nothing():
    for seed in range(10):
        inner, outer = clip(), clip().contiguous()
        results = [augment(frames, FULL, generator(seed)) for frames in (inner, outer)]
        assert torch.equal(*results)
        assert all(result.is_contiguous() for result in results)


def test_the_input_is_not_changed():
    for frames in (clip(), clip(width=32, height=32)):
        before = frames.clone()
        for seed in range(12):
            for augmentation in (FULL, IDENTITY):
                augment(frames, augmentation, generator(seed)).fill_(7)
        assert torch.equal(frames, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 4), (31, 33), (300, 40)])
def test_frames_of_any_size(size):
    for seed in range(10):
        result = augment(clip(2, *size), FULL, generator(seed))
        assert result.shape == (2, 3, 32, 32)
        assert result.dtype == torch.uint8


@pytest.mark.parametrize(
    "names",
    [
        ["eating", "Pushing something from left to right"],
        ["SwipeLeft"],
        ["turn_right"],
        ["a red circle moving RIGHT"],
        ["rotating clockwise"],
        ["spinning counterclockwise"],
        ["spinning counter-clockwise"],
        ["anticlockwise"],
        ["left-handed throw"],
        ["drifting leftwards"],
    ],
)
def test_names_with_a_direction(names):
    assert has_direction(names)


def test_names_without_a_direction():
    names = [
        "bright light",
        "upright bass",
        "eating leftovers",
        "copyright",
        "moving up",
        "BrightX",
    ]
    assert not has_direction(names)
    assert not has_direction([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution is 0; use at least 1 pixel"),
        ({"scales": ()}, r"scales are \(\); use one or more in \(0, 1\]"),
        ({"scales": (1, 1.2)}, r"scales are \(1, 1.2\); use"),
        ({"scales": (1, 0)}, r"scales are \(1, 0\); use"),
        ({"crop_positions": 9}, "crop_positions is 9; use 5 or 13"),
        ({"flip": 1.5}, "flip is 1.5; use a probability, 0 to 1"),
        ({"jitter": -0.1}, "jitter is -0.1; use"),
        ({"grayscale": float("nan")}, "grayscale is nan; use"),
        ({"randaugment_ops": -1}, "randaugment_ops is -1; use 0 or more"),
        ({"randaugment_magnitude": 31}, "randaugment_magnitude is 31; use 0 to 30"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(InputError, match=f"^{message}"):
        Augmentation(**{"resolution": 32} | options)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 3, 8, 8), r"frames are \(2, 3, 8, 8\) torch.float32; use \(T, 3, H, W\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"frames are \(3, 8, 8\) torch.uint8; use"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), r"frames are \(2, 1, 8, 8\) torch.uint8; use"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"frames are \(0, 3, 8, 8\); give at least"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), r"frames are \(2, 3, 0, 8\); give at least"),
    ],
)
def test_wrong_frames(frames, message):
    with pytest.raises(InputError, match=f"^{message}"):
        augment(frames, FULL, generator())

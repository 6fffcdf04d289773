"""Every operation against Pillow, which the official training code used."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from video_files import picture

from actionclip import randaugment
from actionclip.randaugment import draw_operations, rotation, source_pixels, warp

SIZES = [(97, 61), (61, 97), (340, 256), (20, 17), (8, 6), (3, 3), (2, 5), (1, 1)]


def images() -> list[np.ndarray]:
    """(H, W, 3) uint8 of many sizes and kinds."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in SIZES]
    dark = rng.integers(40, 90, (50, 70, 3), dtype=np.uint8)
    dark[..., 1] //= 3
    # Few levels, so that many pixels lie on the borders between the sectors of hue.
    pure = rng.choice(np.array([0, 1, 85, 128, 254, 255], np.uint8), (60, 80, 3))
    flat = np.full((20, 30, 3), (7, 130, 255), np.uint8)
    lone = flat.copy()
    lone[3, 4] = (8, 131, 0)
    return [*noise, dark, pure, flat, lone, picture(5, 96, 64)]


IMAGES = images()


def frame(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_equal_to_pillow(operation, pillow) -> None:
    for image in IMAGES:
        expected = np.asarray(pillow(Image.fromarray(image)))
        before = image.copy()
        for planes in (frame(image), frame(image).contiguous()):
            actual = operation(planes)
            assert actual.dtype == torch.uint8
            np.testing.assert_array_equal(actual.permute(1, 2, 0).numpy(), expected)
        np.testing.assert_array_equal(image, before)


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


@pytest.mark.parametrize("name", ["auto_contrast", "equalize", "invert"])
def test_operations_without_strength(name):
    pillow = {"auto_contrast": "autocontrast"}.get(name, name)
    assert_equal_to_pillow(getattr(randaugment, name), getattr(ImageOps, pillow))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_posterize(bits):
    assert_equal_to_pillow(
        lambda f: randaugment.posterize(f, bits), lambda i: ImageOps.posterize(i, bits)
    )


@pytest.mark.parametrize("threshold", [0, 76.8, 128, 256])
def test_solarize(threshold):
    assert_equal_to_pillow(
        lambda f: randaugment.solarize(f, threshold), lambda i: ImageOps.solarize(i, threshold)
    )


@pytest.mark.parametrize("addition", [0, 33, 110])
def test_solarize_add(addition):
    assert_equal_to_pillow(
        lambda f: randaugment.solarize_add(f, addition),
        lambda i: ImageOps.solarize(i.point(lambda level: min(255, level + addition)), 128),
    )


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
@pytest.mark.parametrize("factor", [0.1, 0.64, 1.0, 1.37, 1.9])
def test_enhancers(name, factor):
    enhancer = getattr(ImageEnhance, name.title())
    assert_equal_to_pillow(
        lambda f: getattr(randaugment, name)(f, factor), lambda i: enhancer(i).enhance(factor)
    )


def test_grayscale():
    assert_equal_to_pillow(randaugment.grayscale, lambda i: i.convert("L").convert("RGB"))


@pytest.mark.parametrize("shift", [-25, -1, 0, 7, 25])
def test_hue(shift):
    differences = []
    for image in IMAGES:
        hsv = np.array(Image.fromarray(image).convert("HSV"))
        hsv[..., 0] += np.int64(shift).astype(np.uint8)
        expected = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB")).astype(int)
        actual = randaugment.hue(frame(image), shift).permute(1, 2, 0).numpy()
        differences.append(np.abs(actual - expected).flatten())
    difference = np.concatenate(differences)
    # Few pixels are on the border between two of 255 hues, which are 6 levels apart.
    assert difference.max() <= 6
    assert (difference > 0).mean() < 3e-4


@pytest.mark.parametrize("degrees", [-30, -9, 0.5, 9, 17.3])
def test_rotation(degrees):
    def rotate(f: torch.Tensor) -> torch.Tensor:
        height, width = f.shape[1:]
        return warp(f, source_pixels(width, height, rotation(width, height, degrees)))

    assert_equal_to_pillow(rotate, lambda i: i.rotate(degrees))


@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0.09, 0, 0, 1, 0),
        (1, -0.3, 0, 0, 1, 0),
        (1, 0, 0, 0.09, 1, 0),
        (1, 0, 0, -0.3, 1, 0),
        (1, 0, 30, 0, 1, 0),
        (1, 0, -3.5, 0, 1, 0),
        (1, 0, 0, 0, 1, 16.7),
        (1, 0, 0, 0, 1, -100),
    ],
)
def test_shears_and_translations(matrix):
    assert_equal_to_pillow(
        lambda f: warp(f, source_pixels(f.shape[2], f.shape[1], matrix)),
        lambda i: affine(i, *matrix),
    )


def test_cutout():
    white = torch.full((3, 20, 30), 255, dtype=torch.uint8)
    painted = randaugment.cutout(white, center=(10.6, 9.2), size=6)
    # By hand: from 10.6 - 3 = 7.6 and 9.2 - 3 = 6.2, rounded down, six pixels.
    expected = white.clone()
    for channel, level in enumerate((125, 123, 114)):
        expected[channel, 6:12, 7:13] = level
    assert torch.equal(painted, expected)
    assert white.min() == 255


@pytest.mark.parametrize(("center", "pixels"), [((0.5, 0.5), 36), ((29.9, 19.9), 16)])
def test_cutout_at_the_border(center, pixels):
    white = torch.full((3, 20, 30), 255, dtype=torch.uint8)
    painted = randaugment.cutout(white, center=center, size=6)
    assert (painted[0] == 125).sum() == pixels


def drawn(name: str, magnitude: float, monkeypatch, seed: int = 0):
    """The operation of this name, as RandAugment draws it."""
    monkeypatch.setattr(randaugment, "OPERATIONS", (name,))
    (operation,) = draw_operations(1, magnitude, 97, 61, np.random.default_rng(seed))
    return operation


@pytest.mark.parametrize(
    ("name", "strength"),
    [  # at M = 9 of 30, from the specification
        ("posterize", {"bits": 1}),
        ("solarize", {"threshold": 76.8}),
        ("solarize_add", {"addition": 33}),
        ("color", {"factor": 0.64}),
        ("contrast", {"factor": 0.64}),
        ("brightness", {"factor": 0.64}),
        ("sharpness", {"factor": 0.64}),
    ],
)
def test_strength_at_the_default_magnitude(name, strength, monkeypatch):
    operation = drawn(name, 9, monkeypatch)
    assert operation.func is getattr(randaugment, name)
    assert operation.keywords == pytest.approx(strength)


@pytest.mark.parametrize(
    ("name", "pillow"),
    [
        ("rotate", lambda i, sign: i.rotate(9 * sign)),
        ("shear_x", lambda i, sign: affine(i, 1, 0.09 * sign, 0, 0, 1, 0)),
        ("shear_y", lambda i, sign: affine(i, 1, 0, 0, 0.09 * sign, 1, 0)),
        ("translate_x", lambda i, sign: affine(i, 1, 0, 30 * sign, 0, 1, 0)),
        ("translate_y", lambda i, sign: affine(i, 1, 0, 0, 0, 1, 30 * sign)),
    ],
)
def test_geometry_goes_both_ways(name, pillow, monkeypatch):
    image = IMAGES[0]
    results = {
        drawn(name, 9, monkeypatch, seed)(frame(image)).permute(1, 2, 0).numpy().tobytes()
        for seed in range(10)
    }
    assert results == {pillow(Image.fromarray(image), sign).tobytes() for sign in (-1, 1)}


def test_cutout_goes_everywhere(monkeypatch):
    assert drawn("cutout", 30, monkeypatch).keywords["size"] == 40
    operations = [drawn("cutout", 9, monkeypatch, seed) for seed in range(400)]
    assert {operation.keywords["size"] for operation in operations} == {12}
    x, y = np.array([operation.keywords["center"] for operation in operations]).T
    assert 0 <= x.min() < 5
    assert 92 < x.max() < 97
    assert 0 <= y.min() < 3
    assert 58 < y.max() < 61


def test_posterize_keeps_one_bit_at_the_weakest(monkeypatch):
    assert drawn("posterize", 0, monkeypatch).keywords == {"bits": 1}


@pytest.mark.parametrize("magnitude", [0, 9, 30])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_every_operation_takes_every_frame(name, magnitude, monkeypatch):
    for image in IMAGES:
        monkeypatch.setattr(randaugment, "OPERATIONS", (name,))
        height, width = image.shape[:2]
        (operation,) = draw_operations(1, magnitude, width, height, np.random.default_rng(0))
        result = operation(frame(image))
        assert result.shape == (3, height, width)
        assert result.dtype == torch.uint8


def test_all_operations_are_equally_likely(monkeypatch):
    names = []
    monkeypatch.setattr(randaugment, "_operation", lambda name, *_: names.append(name))
    draw_operations(16_000, 9, 97, 61, np.random.default_rng(0))
    counts = Counter(names)
    assert set(counts) == set(randaugment.OPERATIONS)
    assert len(randaugment.OPERATIONS) == 16
    # 1000 each, with a standard deviation of 31.
    assert all(850 < count < 1150 for count in counts.values())

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from actionclip.errors import InputError
from actionclip.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocessing,
    center_crop,
    normalize,
    resize_short_side,
    three_crops,
    views,
)

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads(str(np.load(GOLDEN / "preprocess.npz")["info_json"]))
CROPS = [
    case
    for case in json.loads((GOLDEN / "crops.json").read_text())["cases"]
    if case["three_crop_offsets_xy"]  # the original helper does not know upright frames
]
ACTIONCLIP = Preprocessing(resolution=224, resize=256)
CLIP = Preprocessing(resolution=224, resize=224)


def image(width: int, height: int) -> np.ndarray:
    """The golden (H, W, 3) noise image of this size."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"image:{width}x{height}".encode())))
    return rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def frame(width: int, height: int) -> torch.Tensor:
    return torch.from_numpy(image(width, height)).permute(2, 0, 1)


def difference(actual: torch.Tensor, expected: np.ndarray) -> tuple[int, float]:
    """The largest and the mean difference in grey levels of (3, H, W) and (H, W, 3) pixels."""
    levels = np.abs(actual.permute(1, 2, 0).numpy().astype(int) - expected.astype(int))
    return levels.max(), levels.mean()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['width']}x{case['height']}")
@pytest.mark.parametrize(
    ("name", "preprocessing"), [("actionclip_eval", ACTIONCLIP), ("clip_preprocess", CLIP)]
)
def test_golden(case, name, preprocessing):
    golden = np.load(GOLDEN / "preprocess.npz")
    source = frame(case["width"], case["height"])
    assert source[:, 0, 0].tolist() == case["source_first_pixel"]
    view = views(source, preprocessing)
    assert view.shape == (1, 3, 224, 224)
    key = f"224/{case['width']}x{case['height']}/{name}"
    # Measured on a CPU with AVX2: at most 1, on average at most 0.0085.
    largest, mean = difference(view[0, :, ::8, ::8], golden[f"{key}_uint8_stride8"])
    assert largest <= 1
    assert mean <= 0.01
    if f"{key}_norm_stride16" in golden:
        pixels = normalize(view[0, :, ::16, ::16], CLIP_MEAN, CLIP_STD)
        one_level = 1 / 255 / min(CLIP_STD)
        assert np.abs(pixels.numpy() - golden[f"{key}_norm_stride16"]).max() < one_level + 1e-5


@pytest.mark.parametrize(
    "size", [(240, 427), (101, 203), (641, 359), (8, 8), (3, 2), (1, 1), (1000, 10), (10, 1000)]
)
@pytest.mark.parametrize(
    ("interpolation", "pil"),
    [("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)],
)
def test_resize_is_pillows(size, interpolation, pil):
    width, height = size
    short, long = sorted(size)
    new_long = 224 * long // short
    new_size = (224, new_long) if width <= height else (new_long, 224)
    expected = np.asarray(Image.fromarray(image(*size)).resize(new_size, pil))
    largest, mean = difference(resize_short_side(frame(*size), 224, interpolation), expected)
    # Measured: at most 2, on average at most 0.0175 (8x8, bilinear).
    assert largest <= 2
    assert mean <= 0.02


@pytest.mark.parametrize(
    "size", [(320, 240), (241, 427), (256, 340), (301, 300), (90, 61), (33, 500), (64, 64), (7, 9)]
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("resolution", "resize"), [(64, 64), (56, 64), (33, 50)])
def test_one_view_is_the_centre_of_the_whole_resized_frame(size, interpolation, resolution, resize):
    width, height = size
    scale = resize / min(size)
    new_size = [resize if side == min(size) else int(side * scale + 1e-9) for side in size]
    whole = F.interpolate(
        frame(*size)[None], (new_size[1], new_size[0]), mode=interpolation, antialias=True
    )
    left, top = (round((side - resolution) / 2) for side in new_size)
    expected = whole[..., top : top + resolution, left : left + resolution]
    preprocessing = Preprocessing(resolution, resize, interpolation=interpolation)
    assert torch.equal(views(frame(width, height), preprocessing), expected)


def test_resizing_leaves_the_channels_innermost():
    # Else each frame is laid out anew, which takes as long as resizing it.
    for source in (frame(40, 30), torch.stack([frame(40, 30)] * 2)):
        assert resize_short_side(source, 24).movedim(-3, -1).is_contiguous()
        assert views(source, ACTIONCLIP)[0].movedim(-3, -1).is_contiguous()


def test_resize_leaves_the_right_size_alone():
    source = frame(300, 224)
    assert resize_short_side(source, 224) is source


def test_long_side_is_rounded_down():
    assert resize_short_side(frame(341, 256), 224).shape == (3, 224, 298)  # 298.375
    assert resize_short_side(frame(171, 128), 256).shape == (3, 256, 342)
    assert resize_short_side(frame(128, 171), 224).shape == (3, 299, 224)  # 299.25


@pytest.mark.parametrize("num_crops", [1, 3])
@pytest.mark.parametrize("channels_last", [False, True])
def test_stack_equals_frame_by_frame(num_crops, channels_last):
    rng = np.random.default_rng(0)
    stack = torch.from_numpy(rng.integers(0, 256, (2, 3, 3, 120, 90), dtype=np.uint8))
    if channels_last:
        stack = stack.transpose(2, 4).contiguous().transpose(2, 4)
    together = views(stack, ACTIONCLIP, num_crops)
    assert together.shape == (num_crops, 2, 3, 3, 224, 224)
    assert together.dtype == torch.uint8
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[:, i, j], views(stack[i, j], ACTIONCLIP, num_crops))


@pytest.mark.parametrize(
    ("size", "num_crops"), [((480, 320), 1), ((320, 480), 1), ((320, 240), 3), ((8, 8), 1)]
)
def test_mirrored(size, num_crops):
    # Even margins only: with odd ones the crop of the mirrored frame is one pixel off.
    mirrored = views(frame(*size).flip(-1), ACTIONCLIP, num_crops).flip(-1)
    expected = views(frame(*size), ACTIONCLIP, num_crops)
    if num_crops == 3:
        expected = expected.flip(0)  # left and right change places
    change = (mirrored.int() - expected.int()).abs()
    assert change.max() <= 1
    assert change.float().mean() < 0.01


def test_center_crop_rounds_halves_to_even():
    columns = torch.arange(11).expand(3, 9, 11)
    assert center_crop(columns, 4)[0, 0].tolist() == [4, 5, 6, 7]  # (11 - 4) / 2 = 3.5 -> 4
    assert center_crop(columns, 6)[0, 0].tolist() == [2, 3, 4, 5, 6, 7]  # 2.5 -> 2
    rows = torch.arange(9)[:, None].expand(3, 9, 11)
    assert center_crop(rows, 4)[0, :, 0].tolist() == [2, 3, 4, 5]  # 2.5 -> 2
    assert center_crop(rows, 2)[0, :, 0].tolist() == [4, 5]  # 3.5 -> 4


def test_center_crop_of_small_frames():
    with pytest.raises(InputError, match="frames of 30x20 pixels are too small for a crop of 21"):
        center_crop(torch.zeros(3, 20, 30, dtype=torch.uint8), 21)


@pytest.mark.parametrize("case", CROPS, ids=lambda case: f"{case['image_w']}x{case['image_h']}")
def test_three_crops_golden(case):
    width, height = case["image_w"], case["image_h"]
    at = torch.arange(height * width).reshape(1, height, width)
    crops = three_crops(at)
    assert crops.shape == (3, 1, height, height)
    offsets = [[corner % width, corner // width] for corner in crops[:, 0, 0, 0].tolist()]
    assert offsets == case["three_crop_offsets_xy"]


def test_three_crops_of_upright_frames_go_down():
    upright = torch.randint(0, 256, (2, 3, 40, 31), dtype=torch.uint8)
    expected = three_crops(upright.transpose(-1, -2)).transpose(-1, -2)
    assert torch.equal(three_crops(upright), expected)
    assert torch.equal(three_crops(upright)[2], upright[..., 8:39, :])


def test_three_views_span_the_short_side():
    source = frame(500, 224)
    assert torch.equal(views(source, ACTIONCLIP, 3)[1], source[:, :, 138:362])
    assert torch.equal(views(source, ACTIONCLIP, 3), views(source, CLIP, 3))


def test_views_keep_no_larger_frame_alive():
    assert views(frame(1000, 50), ACTIONCLIP).untyped_storage().nbytes() == 3 * 224 * 224
    source = frame(224, 224)
    assert views(source, CLIP).data_ptr() != source.data_ptr()


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(3, 8, 8), r"frames are \(3, 8, 8\) torch.float32; use"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"frames are \(8, 8, 3\) torch.uint8"),
        (torch.zeros(8, 8, dtype=torch.uint8), r"frames are \(8, 8\)"),
    ],
)
def test_views_of_wrong_frames(frames, message):
    with pytest.raises(InputError, match=message):
        views(frames, ACTIONCLIP)


def test_num_crops():
    with pytest.raises(InputError, match="num_crops is 2; use 1 or 3"):
        views(frame(8, 8), ACTIONCLIP, 2)


def test_preprocessing_that_cannot_be_cut():
    with pytest.raises(InputError, match="resize 200 is smaller than the crop of 224"):
        Preprocessing(resolution=224, resize=200)


@pytest.mark.parametrize("source", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-11),
    ],
)
def test_normalize_against_float64(source, dtype, tolerance):
    levels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).to(source)
    pixels = normalize(levels, CLIP_MEAN, CLIP_STD, dtype)
    assert pixels.dtype == dtype
    mean = np.array(CLIP_MEAN).reshape(3, 1, 1)
    std = np.array(CLIP_STD).reshape(3, 1, 1)
    expected = (np.arange(256).reshape(16, 16) / 255 - mean) / std
    error = np.abs(pixels.double().numpy() - expected)
    assert (error <= tolerance * np.maximum(np.abs(expected), 1)).all()
    assert torch.equal(levels, torch.arange(256).view(16, 16).expand(2, 3, 16, 16).to(source))

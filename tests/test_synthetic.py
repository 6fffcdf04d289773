from pathlib import Path

import av
import numpy as np
import pytest

from actionclip.cli.synthetic import main
from actionclip.errors import InputError
from actionclip.synthetic import (
    COLOURS,
    COLUMNS,
    MARGIN,
    MOTIONS,
    ROWS,
    SHAPES,
    SIDE,
    SIZES,
    held_out,
    place,
    render,
    sentence,
    sentences,
    still_sentences,
    track,
    write_clip,
    write_dataset,
)

OPPOSITES = [
    ("moving left", "moving right"),
    ("moving up", "moving down"),
    ("shrinking", "growing"),
]
CLEAN = "a red circle moving left"


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def decode(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return np.stack(frames).transpose(0, 3, 1, 2)


def find_red(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels that a frame has of a red shape, and their mean x in [0, 1], frame wise."""
    frames = frames.astype(int)
    red = (frames[:, 0] - frames[:, 1:].max(axis=1)) > 80
    count = red.sum(axis=(1, 2))
    x = (red.sum(axis=1) * (np.arange(SIDE) + 0.5)).sum(axis=1) / np.maximum(count, 1) / SIDE
    return count, x


def test_every_combination_has_its_sentence() -> None:
    assert len(set(sentences())) == len(COLOURS) * len(SHAPES) * len(MOTIONS) == 240
    assert sentences()[0] == CLEAN
    assert len(set(still_sentences())) == 2 * len(COLOURS) * len(SHAPES) * 9
    assert not set(still_sentences()) & set(sentences())


@pytest.mark.parametrize(
    "text", ["", "a red circle", "red circle moving left", "a red circle  moving left", "a cat"]
)
def test_other_sentences_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"cannot render '.*'; say 'a red circle moving left' or"):
        render(text, 1)


def test_a_fifth_is_held_out_evenly() -> None:
    rest = held_out(0)
    assert len(rest) == 48
    assert rest < set(sentences())
    assert rest != held_out(1)
    assert rest == held_out(0)
    for colour in COLOURS:
        for motion in MOTIONS:
            assert sum(sentence(colour, shape, motion) in rest for shape in SHAPES) == 1
    for shape in SHAPES:
        for motion in MOTIONS:
            assert sum(sentence(colour, shape, motion) in rest for colour in COLOURS) <= 2
        for colour in COLOURS:
            assert sum(sentence(colour, shape, motion) in rest for motion in MOTIONS) <= 2


@pytest.mark.parametrize(("backward", "forward"), OPPOSITES)
def test_opposites_differ_in_the_order_of_frames_only(backward: str, forward: str) -> None:
    for seed in range(8):
        there, back = (track(motion, 20, generator(seed)) for motion in (forward, backward))
        for field in ("x", "y", "radius", "angle"):
            np.testing.assert_array_equal(getattr(there, field), getattr(back, field)[::-1])


def test_motions_are_what_they_are_called() -> None:
    for seed in range(8):
        tracks = {motion: track(motion, 20, generator(seed)) for motion in MOTIONS}
        assert np.ptp(tracks["moving right"].x) > 0.3
        assert (np.diff(tracks["moving right"].x) >= 0).all()
        assert (np.diff(tracks["moving down"].y) >= 0).all()
        assert tracks["growing"].radius[-1] > 1.9 * tracks["growing"].radius[0]
        assert np.ptp(tracks["spinning"].angle) > 1.4 * np.pi
        turning_points = np.diff(np.sign(np.diff(tracks["bouncing"].y))) != 0
        assert turning_points.sum() >= 2
        for motion, where in tracks.items():
            moved = {f for f in ("x", "y", "radius", "angle") if np.ptp(getattr(where, f)) > 0}
            words = {"left": "x", "right": "x", "up": "y", "down": "y", "bouncing": "y"}
            words |= {"growing": "radius", "shrinking": "radius", "spinning": "angle"}
            assert moved == {words[motion.split()[-1]]}
            for centre in (where.x, where.y):
                assert (centre - where.radius >= MARGIN - 1e-6).all()
                assert (centre + where.radius <= 1 - MARGIN + 1e-6).all()


def test_shapes_at_rest_are_where_the_sentence_says() -> None:
    for seed in range(8):
        for size in SIZES:
            for row in ROWS:
                for column in COLUMNS:
                    where = place(size, row, column, 4, generator(seed))
                    assert all(np.ptp(f) == 0 for f in (where.x, where.y, where.radius))
                    assert (where.radius[0] > 0.17) == (size == "big")
                    for centre, third in (
                        (where.x, COLUMNS.index(column)),
                        (where.y, ROWS.index(row)),
                    ):
                        assert np.digitize(centre[0], [0.43, 0.57]) == third
                        assert abs(centre[0] - 0.5) + where.radius[0] <= 0.5 - MARGIN + 1e-6
    frames = render("a big red star at the middle right", 0)
    assert frames.shape == (4, 3, SIDE, SIDE)
    count, x = find_red(frames)
    assert (count > 40).all()
    assert (x > 0.55).all()


def test_clips_are_a_function_of_sentence_and_seed() -> None:
    one = render(CLEAN, 5)
    assert one.dtype == np.uint8
    assert 16 <= len(one) <= 24
    assert one.shape[1:] == (3, SIDE, SIDE)
    np.testing.assert_array_equal(one, render(CLEAN, 5))
    np.testing.assert_array_equal(one, render(CLEAN, (5,)))
    lengths = {len(render(CLEAN, (5, n))) for n in range(8)}
    assert len(lengths) > 3
    assert not np.array_equal(one[:16], render(CLEAN, 6)[:16])


def test_shapes_cover_what_geometry_says() -> None:
    # Areas of radius 1: disc, square, triangle, pentagram (5 kites around a pentagon), cross.
    angle = np.pi / 5
    areas = {
        "circle": np.pi * 0.9**2,
        "square": 1.5**2,
        "triangle": 3 * 3**0.5 * 0.5**2,
        "star": 5 * 0.36**2 * np.tan(angle) * (1 + np.tan(angle) * np.tan(2 * angle)),
        "cross": 4 * 0.3 * (2 * 0.95) - 4 * 0.3**2,
    }
    grid = (np.arange(800, dtype=np.float32) + 0.5) / 800 * 4 - 2
    x, y = np.meshgrid(grid, grid)
    for shape, distance in SHAPES.items():
        inside = distance(x, y) < 0
        assert inside.sum() * (4 / 800) ** 2 == pytest.approx(areas[shape], rel=0.02), shape
        np.testing.assert_array_equal(inside, inside[:, ::-1])  # left and right alike
        assert inside[y < 0].any()
    assert (
        SHAPES["triangle"](np.float32(0), np.float32(-0.95))
        < 0
        < SHAPES["triangle"](np.float32(0), np.float32(0.95))
    )


@pytest.mark.parametrize("motion", ["moving left", "moving right"])
def test_written_clips_show_the_motion(tmp_path: Path, motion: str) -> None:
    for seed in range(2):
        text = f"a red circle {motion}"
        write_clip(tmp_path / "a.mp4", text, seed)
        frames = decode(tmp_path / "a.mp4")
        drawn = render(text, seed)
        assert frames.shape == drawn.shape
        assert abs(frames.astype(int) - drawn).mean() < 12
        count, x = find_red(frames)
        assert (count > 40).all()
        assert (x[-1] - x[0] > 0.25) == (motion == "moving right")
        assert (x[0] - x[-1] > 0.25) == (motion == "moving left")


def test_parts_share_nothing(tmp_path: Path) -> None:
    clips = {}
    for part in ("train", "seen", "unseen"):
        folder = tmp_path / part
        listed = write_dataset(folder, part, 1, seed=3)
        clips[part] = [next(listed) for _ in range(2)]
        assert (folder / "labels.txt").read_text().splitlines() == sentences()
        names = {path.name for path in folder.iterdir() if path.is_dir()}
        assert names == (held_out(3) if part == "unseen" else set(sentences()) - held_out(3))
        assert {Path(path).parent.name for path in clips[part]} < names
    train, seen = (Path(clips[part][0]) for part in ("train", "seen"))
    assert train.parent.name == seen.parent.name
    assert train.read_bytes() != seen.read_bytes()


@pytest.mark.slow
def test_processes_change_nothing(tmp_path: Path) -> None:
    one = list(write_dataset(tmp_path / "one", "unseen", 1, seed=0))
    two = list(write_dataset(tmp_path / "two", "unseen", 1, seed=0, processes=2))
    assert len(one) == len(two) == 48
    for a, b in zip(one, two, strict=True):
        assert Path(a).read_bytes() == Path(b).read_bytes()


@pytest.mark.parametrize("name", ["clip", "clip.txt", "clip.gif"])
def test_names_that_are_no_video(tmp_path: Path, name: str, capsys) -> None:
    assert main([str(tmp_path / name), "--sentence", "a red circle growing"]) == 2
    assert f"{name}': end the name in .mp4" in capsys.readouterr().err


def test_command_writes_one_clip(tmp_path: Path) -> None:
    assert main([str(tmp_path / "a.mp4"), "--sentence", CLEAN, "--seed", "4"]) == 0
    write_clip(tmp_path / "b.mp4", CLEAN, 4)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sentence", "a pink circle moving left"], "cannot render 'a pink circle moving left'"),
        (["--clips-per-sentence", "0"], "--clips-per-sentence is 0; give at least 1"),
        (["--processes", "0"], "--processes is 0; give at least 1"),
        (["--seed", "-1"], "--seed is -1; give 0 or more"),
    ],
)
def test_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(tmp_path / "a.mp4"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_command_says_when_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "no" / "a.mp4"), "--sentence", CLEAN]) == 5
    assert "a.mp4: cannot be written" in capsys.readouterr().err

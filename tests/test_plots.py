"""Pictures hold what they were given, at any size, and say what is missing."""

import ast
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from actionclip.cli import plots
from actionclip.errors import InputError, MissingExtraError, OutputError

pytest.importorskip("matplotlib")


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch):
    """Catch the figure that would be saved; the test calls `figure()` for it."""
    caught = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: caught.append(figure))
    return lambda: caught.pop()


def texts(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_a_small_matrix_shows_names_counts_and_fractions(figure) -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 0, 0], [0, 2, 2]])
    plots.draw_confusion(matrix, ["archery", "playing $x$ drums", "a" * 40], "x.png")
    axes, bar = figure().axes
    assert texts(axes.get_yticklabels()) == ["archery", "playing $x$ drums", "a" * 27 + "…"]
    assert texts(axes.get_xticklabels()) == texts(axes.get_yticklabels())
    assert not axes.get_yticklabels()[1].get_parse_math()
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    # Columns are x, rows are y.
    assert cells == {(0, 0): "3", (1, 0): "1", (1, 2): "2", (2, 2): "2"}
    shades = axes.images[0].get_array().filled(-1)
    assert (shades[1] == -1).all()  # a class without videos
    assert shades[0, 2] == 0
    assert 0 < shades[0, 1] < shades[2, 1] < shades[0, 0] < 1
    assert shades[2, 1] == shades[2, 2]
    # The bar beside it translates shades back.
    half = bar.get_yticks()[texts(bar.get_yticklabels()).index("0.5")]
    assert half == pytest.approx(shades[2, 1])


def test_many_classes_are_numbered(figure) -> None:
    names = [f"class {i}" for i in range(400)]
    plots.draw_confusion(torch.eye(400, dtype=torch.int64), names, "x.png")
    axes, _ = figure().axes
    assert not axes.texts
    assert "class 0" not in texts(axes.get_xticklabels())
    assert axes.get_xlabel() == "predicted (id of the class)"


def test_a_matrix_is_drawn_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "confusion.png"
    plots.draw_confusion(
        10 * torch.eye(20, dtype=torch.int64), [str(i) for i in range(20)], str(path)
    )
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] > 500
    is_dark_blue = (pixels[..., 2] > 80) & (pixels[..., 0] < 30)
    rows, columns = np.nonzero(is_dark_blue[:, : pixels.shape[1] * 8 // 10])
    assert np.corrcoef(rows, columns)[0, 1] > 0.99  # the diagonal falls from left to right


def train(step: int, loss: float, text: float = 1e-6, head: float = 1e-5) -> dict:
    lr = {"text": text, "image": text, "head": head}
    return {"kind": "train", "step": step, "epoch": step / 10, "loss": loss, "lr": lr,
            "clips_per_second": 3.0}  # fmt: skip


def test_curves_hold_the_records(figure) -> None:
    records = [
        train(0, 3.0, 0.0, 0.0),
        train(10, 9.0),
        {"kind": "eval", "step": 10, "epoch": 1, "top1": 0.5, "top5": 0.75},
        train(10, 2.0),  # after a resume
        train(20, math.nan),
        {"kind": "eval", "step": 20, "epoch": 2, "top1": 0.625, "top5": 1.0},
        {"kind": "average", "step": 20, "epoch": 2, "top1": 0.75},
    ]
    plots.draw_curves(iter(records), "x.png")
    loss, rate, accuracy = figure().axes
    (line,) = loss.lines
    assert line.get_xdata().tolist() == [0, 10, 20]
    assert line.get_ydata().tolist()[:2] == [3.0, 2.0]
    assert {line.get_label(): line.get_ydata().tolist() for line in rate.lines} == {
        "text, image": [0, 1e-6, 1e-6],
        "head": [0, 1e-5, 1e-5],
    }
    assert {line.get_label(): line.get_ydata().tolist() for line in accuracy.lines} == {
        "top-1": [50, 62.5],
        "top-1, average of epochs": [75],
        "top-5": [75, 100],
    }
    assert texts(accuracy.get_legend().get_texts()) == [
        "top-1",
        "top-1, average of epochs",
        "top-5",
    ]


@pytest.mark.parametrize(
    "records",
    [
        [train(0, 1.0)],
        [{"kind": "eval", "step": 5, "epoch": 1, "mean_average_precision": 0.25}],
    ],
)
def test_curves_of_one_record(tmp_path: Path, records: list[dict], recwarn) -> None:
    path = tmp_path / "curves.png"
    plots.draw_curves(records, str(path))
    assert not recwarn.list
    with Image.open(path) as picture:
        assert picture.size == (960, 960)


def ratio(ratio: float, base: float, novel: float) -> dict:
    metrics = {"base_top1": base, "novel_top1": novel, "harmonic_mean": 0.5}
    return {"ratio": ratio, "metrics": metrics}


def test_ratios_of_base_and_novel_labels(figure) -> None:
    rows = [ratio(0, 0.5, 0.75), ratio(0.25, 0.625, 0.75), ratio(0.5, 0.75, 0.5)]
    rows += [ratio(0.75, 0.75, 0.49), ratio(1, 0.75, 0.25)]
    plots.draw_ratios(rows, "x.png")
    over_ratio, trade_off = figure().axes
    lines = {bars.get_label(): bars.lines[0] for bars in over_ratio.containers}
    assert list(lines) == ["base top-1", "novel top-1", "harmonic mean"]
    assert lines["novel top-1"].get_xdata().tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert lines["novel top-1"].get_ydata().tolist() == [75, 75, 50, 49, 25]
    assert texts(over_ratio.get_legend().get_texts()) == list(lines)
    (line,) = trade_off.lines
    assert line.get_xdata().tolist() == [50, 62.5, 75, 75, 75]
    assert line.get_ydata().tolist() == [75, 75, 50, 49, 25]
    # Two points that lie together share a label.
    assert {text.get_text(): text.xy for text in trade_off.texts} == {
        "0": (50, 75),
        "0.25": (62.5, 75),
        "0.5, 0.75": (75, 49),
        "1": (75, 25),
    }


def test_ratios_with_deviations(figure) -> None:
    rows = [
        {"ratio": 0.0, "metrics": {"top1": 0.5, "top5": 0.75}, "std": {"top1": 0.25, "top5": 0}},
        {"ratio": 1.0, "metrics": {"top1": 0.75, "top5": 1.0}, "std": {"top1": 0.125, "top5": 0}},
    ]
    plots.draw_ratios(rows, "x.png")
    (axes,) = figure().axes
    top1, top5 = axes.containers
    assert (top1.get_label(), top5.get_label()) == ("top-1", "top-5")
    (bars,) = top1.lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[25, 75], [62.5, 87.5]]


def test_one_ratio_is_drawn_to_a_file(tmp_path: Path, recwarn) -> None:
    plots.draw_ratios([ratio(0.5, 0.5, 0.5)], str(tmp_path / "ratios.png"))
    assert not recwarn.list
    with Image.open(tmp_path / "ratios.png") as picture:
        assert picture.size == (1320, 540)


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match=r"nothing to draw in x\.png"):
        plots.draw_curves([], "x.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        MissingExtraError, match=r"needs matplotlib: pip install 'actionclip\[viz\]'"
    ):
        plots.draw_confusion(torch.eye(2, dtype=torch.int64), ["a", "b"], "x.png")


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "no" / "x.png"
    with pytest.raises(OutputError, match=r"cannot draw .*x\.png: No such file"):
        plots.draw_curves([train(0, 1.0)], str(path))


def test_matplotlib_is_imported_only_to_draw() -> None:
    statements = ast.parse(Path(plots.__file__).read_text()).body
    imports = [ast.unparse(s) for s in statements if isinstance(s, ast.Import | ast.ImportFrom)]
    assert not any("matplotlib" in text for text in imports)

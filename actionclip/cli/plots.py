"""Draw what an evaluation or a training run has found, with matplotlib, into a .png file.

Nothing else of the package needs matplotlib: it is imported when something is drawn. No
window is opened and no global state of matplotlib is touched.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from actionclip.errors import InputError, MissingExtraError, OutputError, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Above, names would be smaller than a person can read; classes are numbered instead.
MOST_NAMES = 60
MOST_COUNTS = 15
LONGEST_NAME = 28

METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_class_accuracy": "mean class accuracy",
    "mean_average_precision": "mAP",
    "base_top1": "base top-1",
    "novel_top1": "novel top-1",
    "harmonic_mean": "harmonic mean",
}


def draw_confusion(matrix: Tensor, class_names: Sequence[str], path: str) -> None:
    """Draw a confusion matrix, each row as fractions of its class.

    Args:
        matrix: (K, K) int64, rows the right classes, columns the predicted ones.
        class_names: K names; shown where they fit.
        path: the .png file.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    num_classes = len(class_names)
    side = min(4 + 0.22 * num_classes, 16)
    figure = _new_figure(side + 0.6, side, "compressed")
    axes = figure.add_subplot()
    counts = matrix.numpy()
    totals = counts.sum(1, keepdims=True)
    fractions = np.divide(counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    axes.set_facecolor("0.92")  # rows of classes without videos
    picture = axes.imshow(_shade(fractions), cmap="Blues", vmin=0, vmax=1, interpolation="none")
    bar = figure.colorbar(picture, ax=axes, label="fraction of the class")
    levels = np.array([0, 0.01, 0.1, 0.25, 0.5, 1])
    bar.set_ticks(list(_shade(levels)), labels=[f"{level:g}" for level in levels])
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    if num_classes <= MOST_NAMES:
        names = [_shortened(name) for name in class_names]
        size = 9 if num_classes <= 30 else 6.5
        axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(num_classes), names, fontsize=size, parse_math=False)
    else:
        axes.set_xlabel("predicted (id of the class)")
        axes.set_ylabel("right (id of the class)")
    if num_classes <= MOST_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if fractions[row, column] > 0.4 else "black"
            if count:
                axes.text(column, row, str(count), ha="center", va="center", color=color)
    _save(figure, path)


def draw_curves(records: Iterable[Mapping[str, Any]], path: str) -> None:
    """Draw loss, learning rates and accuracies over the steps of a training run.

    Args:
        records: the lines of a `metrics.jsonl`. Of two with the same kind and step the later
            one counts.
        path: the .png file.

    Raises:
        InputError: if there is nothing to draw.
        MissingExtraError: if matplotlib is not installed.
        OutputError: if the file cannot be written.
    """
    steps: dict[str, dict[int, Mapping[str, Any]]] = {"train": {}, "eval": {}, "average": {}}
    for record in records:
        steps[record["kind"]][record["step"]] = record
    train, evaluations, averages = ([by[s] for s in sorted(by)] for by in steps.values())
    if not train and not evaluations:
        raise InputError(f"nothing to draw in {path}: the run has no metrics yet")
    figure = _new_figure(8, 8, "constrained")
    loss, rate, accuracy = figure.subplots(3, 1, sharex=True)
    _draw_line(loss, train, [record["loss"] for record in train], "loss")
    groups: dict[tuple[float, ...], list[str]] = {}  # those with equal rates share a line
    for group in train[0]["lr"] if train else ():
        groups.setdefault(tuple(record["lr"][group] for record in train), []).append(group)
    for rates, names in groups.items():
        _draw_line(rate, train, rates, ", ".join(names))
    for key, name in METRICS.items():
        having = [record for record in evaluations if key in record]
        _draw_line(accuracy, having, [100 * record[key] for record in having], name, marker="o")
        having = [record for record in averages if key in record]
        values = [100 * record[key] for record in having]
        _draw_line(accuracy, having, values, f"{name}, average of epochs", marker="*")
    loss.set_ylabel("loss")
    rate.set_ylabel("learning rate")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_xlabel("step")
    for axes in (loss, rate, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not loss and axes.lines:
            axes.legend(frameon=False)
    _save(figure, path)


def draw_ratios(rows: Sequence[Mapping[str, Any]], path: str) -> None:
    """Draw the accuracies of models between two others, over the ratio of their weights.

    With base and novel classes a second picture has the accuracy among the one over that among
    the other, a point for each ratio: the better, the further to the upper right.

    Args:
        rows: for each ratio, ascending, `ratio`, `metrics` and perhaps `std`, as in the results
            of an evaluation.
        path: the .png file.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        OutputError: if the file cannot be written.

    Source: WiSE-FT (arXiv:2109.01903), Figure 1.
    """
    has_novel = "novel_top1" in rows[0]["metrics"]
    figure = _new_figure(11 if has_novel else 6, 4.5, "constrained")
    over_ratio, *trade_off = figure.subplots(1, 1 + has_novel, squeeze=False)[0]
    look = {"marker": "o", "markersize": 4, "linewidth": 1.2}
    ratios = [row["ratio"] for row in rows]
    for key, name in METRICS.items():
        if key in rows[0]["metrics"]:
            values = [100 * row["metrics"][key] for row in rows]
            errors = [100 * row["std"][key] for row in rows] if "std" in rows[0] else None
            over_ratio.errorbar(ratios, values, errors, label=name, capsize=3, **look)
    over_ratio.set_xlabel("ratio (0: pretrained, 1: fine-tuned)")
    over_ratio.set_ylabel("accuracy (%)")
    over_ratio.legend(frameon=False)
    for axes in trade_off:
        points = np.array(
            [[100 * row["metrics"][key] for key in ("base_top1", "novel_top1")] for row in rows]
        )
        axes.plot(*points.T, **look)
        for text, point in _labels_apart([f"{ratio:g}" for ratio in ratios], points):
            axes.annotate(text, point, xytext=(5, 5), textcoords="offset points")
        axes.margins(0.12)
        axes.set_xlabel("top-1 among tuned (base) labels (%)")
        axes.set_ylabel("top-1 among unseen (novel) labels (%)")
    for axes in (over_ratio, *trade_off):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _labels_apart(
    texts: Sequence[str], points: np.ndarray
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield labels and points (N, 2), one label for neighbours that are too close for two."""
    span = np.maximum(np.ptp(points, axis=0), 1e-9)
    start = 0
    for end in range(1, len(points) + 1):
        is_last = end == len(points)
        if is_last or (np.abs(points[end] - points[start]) > 0.06 * span).any():
            yield ", ".join(texts[start:end]), (points[end - 1][0], points[end - 1][1])
            start = end


def _shade(fractions: np.ndarray) -> np.ndarray:
    """Map fractions to depths of colour in which a single mistake can be seen."""
    return np.where(fractions == 0, 0, 0.15 + 0.85 * np.sqrt(fractions))


def _draw_line(
    axes: "Axes",
    records: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    name: str,
    marker: str | None = None,
) -> None:
    """Draw values over the steps of their records."""
    if records:
        steps = [record["step"] for record in records]
        axes.plot(steps, values, label=name, linewidth=1.2, marker=marker, markersize=4)


def _shortened(name: str) -> str:
    """Return a class name that leaves room for the picture."""
    name = one_line(name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _new_figure(
    width: float, height: float, layout: Literal["compressed", "constrained"]
) -> "Figure":
    """Return an empty figure, its size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "viz") from error
    return Figure((width, height), layout=layout)


def _save(figure: "Figure", path: str) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"cannot draw {path}: {error.strerror or error}") from error

"""Draw what an evaluation or a training run has found, with matplotlib, into a .png file.

Nothing else of the package needs matplotlib: it is imported when something is drawn. No
window is opened and no global state of matplotlib is touched.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from actionclip.cli.command import one_line
from actionclip.errors import InputError, MissingExtraError, OutputError

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
    steps: dict[str, dict[int, Mapping[str, Any]]] = {"train": {}, "eval": {}}
    for record in records:
        steps[record["kind"]][record["step"]] = record
    train, evaluations = ([by[s] for s in sorted(by)] for by in steps.values())
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

"""Evaluate a classifier on labelled videos, each exactly once on any number of ranks.

Takes predictions on from where `classifier` leaves them: scores of videos and what the
list says about them -> numbers. Holds the scores of all videos but the frames of only a
few. Opens no list and prints nothing; every rank gets the same result.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actionclip.annotations import Sample
from actionclip.classifier import VideoClassifier, VideoResult
from actionclip.distributed import gather_objects, rank, world_size
from actionclip.errors import InputError
from actionclip.metrics import (
    average_precisions,
    class_accuracies,
    confusion_matrix,
    mean_average_precision,
    mean_class_accuracy,
    top_k_accuracy,
)
from actionclip.video import Span


class StoppedError(Exception):
    """An evaluation was asked to stop before its end."""


@dataclass(frozen=True)
class Failure:
    """A video that has no scores.

    Attributes:
        path: the video as the list names it.
        reason: that of `VideoError`, or `not-finite` for scores that are no numbers.
        message: one sentence for people.
    """

    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class ClassResult:
    """How well one class is recognised.

    Attributes:
        name: the class name.
        num_videos: videos of the class.
        metrics: `top1` and, from five classes on, `top5`, or `average_precision`, in
            [0, 1]; empty for a class without videos.
    """

    name: str
    num_videos: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """How well a classifier does on a list of videos.

    Attributes:
        num_videos: videos of the list that have a label.
        num_damaged: those scored by the part of them that could be decoded.
        num_unlabelled: other videos, which a multi-label list may hold. They are left out,
            as in the evaluation code of Charades.
        failures: videos without scores, in the order of the list; each counts as wrong.
        metrics: in [0, 1]. With one label a video: `top1`, `top5` (from five classes on) and
            `mean_class_accuracy`; else `mean_average_precision`. Means over classes leave
            out those without videos.
        per_class: K results in the order of the classes.
        confusion: (K, K) int64 with one label a video: rows are the right classes, columns
            the predicted ones, failures in no cell.
    """

    num_videos: int
    num_damaged: int
    num_unlabelled: int
    failures: tuple[Failure, ...]
    metrics: dict[str, float]
    per_class: tuple[ClassResult, ...]
    confusion: Tensor | None

    @property
    def num_scored(self) -> int:
        return self.num_videos - len(self.failures)

    @property
    def num_classes_without_videos(self) -> int:
        return sum(result.num_videos == 0 for result in self.per_class)


def evaluate(
    classifier: VideoClassifier,
    samples: Sequence[Sample],
    *,
    multi_label: bool,
    on_result: Callable[[VideoResult], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Evaluation:
    """Score labelled videos and sum up how often the classifier is right.

    In several processes each scores every `world_size`-th video; all must call this with
    the same list.

    Args:
        classifier: its labels are the classes.
        samples: labelled videos; a label is a position among the classes.
        multi_label: whether a video can have several labels or none.
        on_result: called with each result of this rank, such as to show progress.
        should_stop: asked after each video of this rank.

    Returns:
        The same on every rank.

    Raises:
        InputError: if no video has a label, or labels do not fit the classes.
        StoppedError: on every rank, if `should_stop` was true on any.
    """
    labelled = [sample for sample in samples if sample.labels]
    _check(labelled, len(classifier.labels), multi_label)
    part = _score(classifier, labelled[rank() :: world_size()], on_result, should_stop)
    parts: list[_Part] = gather_objects(part)
    if any(part.stopped for part in parts):
        raise StoppedError

    scores = torch.empty(len(labelled), len(classifier.labels))
    failures: dict[int, Failure] = {}
    for first, part in enumerate(parts):
        scores[first :: len(parts)] = part.scores
        failures |= {first + i * len(parts): failure for i, failure in part.failures.items()}
    metrics, per_class, confusion = (_multi_label if multi_label else _single_label)(
        scores, [sample.labels for sample in labelled], classifier.labels
    )
    return Evaluation(
        num_videos=len(labelled),
        num_damaged=sum(part.num_damaged for part in parts),
        num_unlabelled=len(samples) - len(labelled),
        failures=tuple(failures[i] for i in sorted(failures)),
        metrics=metrics,
        per_class=per_class,
        confusion=confusion,
    )


@dataclass
class _Part:
    """What one rank found.

    Attributes:
        scores: (n, K) of its n videos; NaN for failures.
        failures: by position among its videos.
        num_damaged: videos scored in part.
        stopped: whether it gave up before its last video.
    """

    scores: Tensor
    failures: dict[int, Failure] = field(default_factory=dict)
    num_damaged: int = 0
    stopped: bool = False


def _check(samples: Sequence[Sample], num_classes: int, multi_label: bool) -> None:
    """Refuse now what would only be noticed after the last video."""
    if not samples:
        raise InputError("the list holds no labelled video; there is nothing to evaluate")
    for sample in samples:
        if len(sample.labels) > 1 and not multi_label:
            raise InputError(
                f"{sample.path} has {len(sample.labels)} labels; evaluate with multi_label=True"
            )
        if not 0 <= min(sample.labels) <= max(sample.labels) < num_classes:
            raise InputError(
                f"{sample.path} has labels {sample.labels}, the classifier {num_classes} classes; "
                "build it with the class names of the list"
            )


def _score(
    classifier: VideoClassifier,
    samples: Sequence[Sample],
    on_result: Callable[[VideoResult], None] | None,
    should_stop: Callable[[], bool] | None,
) -> _Part:
    """Score the videos of this rank."""
    part = _Part(torch.full((len(samples), len(classifier.labels)), torch.nan))
    spans = (Span(s.path, s.start_seconds, s.end_seconds) for s in samples)
    # Closing ends the decoding threads, which would otherwise run ahead after a stop.
    with closing(classifier.stream(spans)) as results:
        for i, result in enumerate(results):
            if result.prediction is None:
                assert result.reason is not None
                assert result.message is not None
                part.failures[i] = Failure(result.path, result.reason, result.message)
            elif not result.prediction.scores.isfinite().all():
                message = "the model's scores are not finite; check its weights and precision"
                part.failures[i] = Failure(result.path, "not-finite", message)
            else:
                part.scores[i] = result.prediction.scores
                part.num_damaged += result.status == "damaged"
            if on_result is not None:
                on_result(result)
            if should_stop is not None and should_stop():
                part.stopped = True
                break
    return part


_Summary = tuple[dict[str, float], tuple[ClassResult, ...], Tensor | None]


def _single_label(
    scores: Tensor, labels: Sequence[tuple[int, ...]], class_names: Sequence[str]
) -> _Summary:
    """Sum up scores (N, K) where every video has one label."""
    right = torch.tensor([label for (label,) in labels])
    ranks = {"top1": 1, "top5": 5} if len(class_names) >= 5 else {"top1": 1}
    metrics = {name: top_k_accuracy(scores, right, k) for name, k in ranks.items()}
    metrics["mean_class_accuracy"] = mean_class_accuracy(scores, right)
    per_class = {name: class_accuracies(scores, right, k) for name, k in ranks.items()}
    counts = right.bincount(minlength=len(class_names))
    rows = _class_results(class_names, counts, per_class)
    return metrics, rows, confusion_matrix(scores, right)


def _multi_label(
    scores: Tensor, labels: Sequence[tuple[int, ...]], class_names: Sequence[str]
) -> _Summary:
    """Sum up scores (N, K) where a video may have several labels."""
    multi_hot = torch.zeros(scores.shape, dtype=torch.bool)
    for row, positions in zip(multi_hot, labels, strict=True):
        row[list(positions)] = True
    metrics = {"mean_average_precision": mean_average_precision(scores, multi_hot)}
    per_class = {"average_precision": average_precisions(scores, multi_hot)}
    return metrics, _class_results(class_names, multi_hot.sum(0), per_class), None


def _class_results(
    class_names: Sequence[str], counts: Tensor, metrics: dict[str, Tensor]
) -> tuple[ClassResult, ...]:
    """Turn metrics (K,) into one row for each class."""
    return tuple(
        ClassResult(
            name,
            int(counts[i]),
            {metric: float(values[i]) for metric, values in metrics.items() if counts[i] > 0},
        )
        for i, name in enumerate(class_names)
    )

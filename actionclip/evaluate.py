"""Evaluate a classifier on labelled videos, each exactly once on any number of ranks.

Takes predictions on from where `classifier` leaves them: logits of videos and what the
list says about them -> numbers, among all classes or among several subsets of them. Holds
the scores of all videos but the frames of only a few. Opens no list and prints nothing;
every rank gets the same result.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from actionclip.annotations import Sample
from actionclip.classifier import VideoClassifier, VideoResult
from actionclip.distributed import gather_objects, rank, reduce_max, world_size
from actionclip.errors import InputError
from actionclip.metrics import (
    average_precisions,
    class_accuracies,
    confusion_matrix,
    mean_average_precision,
    mean_class_accuracy,
    top_k_accuracy,
)
from actionclip.prompts import comparison_key
from actionclip.similarity import fuse_logits, mean_logits
from actionclip.video import Span

# Videos that a rank scores before it asks the others whether to stop. So it waits for the slowest
# no longer than for these, and hears soon; an exchange takes 1 ms (gloo, two busy cores).
EXCHANGE_VIDEOS = 8


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
    """How well a classifier does on a list of videos, among all classes or a subset of K.

    Attributes:
        num_videos: videos of the list that have a label among the classes.
        num_damaged: those scored by the part of them that could be decoded.
        num_unlabelled: videos without any label, which a multi-label list may hold. They are
            left out, as in the evaluation code of Charades.
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
        should_stop: asked after each video of this rank; every few videos all hear of it.

    Returns:
        The same on every rank.

    Raises:
        InputError: if no video has a label, or labels do not fit the classes.
        StoppedError: on every rank, if `should_stop` was true on any.
    """
    every_class = range(len(classifier.labels))
    (evaluation,) = evaluate_subsets(
        classifier,
        samples,
        [every_class],
        multi_label=multi_label,
        on_result=on_result,
        should_stop=should_stop,
    )
    return evaluation


def evaluate_subsets(
    classifier: VideoClassifier,
    samples: Sequence[Sample],
    subsets: Sequence[Sequence[int]],
    *,
    multi_label: bool,
    on_result: Callable[[VideoResult], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> list[Evaluation]:
    """Evaluate among several subsets of the classes, and encode each video only once.

    A video counts in the subsets that hold a label of it, and has to be told from the classes
    of that subset alone, as if the classifier knew no others. Videos of no subset are not
    decoded. The classes of multi-label videos are ranked by mean similarity, without a softmax.

    Args:
        classifier: its labels are the classes.
        samples: labelled videos; a label is a position among the classes.
        subsets: for each the positions of its classes; they may overlap.
        multi_label: whether a video can have several labels or none.
        on_result: called with each result of this rank, such as to show progress.
        should_stop: asked after each video of this rank; every few videos all hear of it.

    Returns:
        For each subset what `evaluate` returns, the same on every rank; its K classes are
        those of the subset, in that order.

    Raises:
        InputError: as `evaluate`, or if a subset is not made of distinct classes, or no video
            has a label in it.
        StoppedError: on every rank, if `should_stop` was true on any.
    """
    _check_samples(samples, len(classifier.labels), multi_label)
    _check_subsets(subsets, samples, classifier.labels)
    covered = set().union(*subsets)
    used = [sample for sample in samples if covered.intersection(sample.labels)]
    share = used[rank() :: world_size()]
    fuse = mean_logits if multi_label else fuse_logits
    # Shares differ by one video at most, and all ranks must take part in every exchange.
    common = len(used) // world_size()
    part = _score(classifier, share, common, subsets, fuse, on_result, should_stop)
    parts: list[_Part] = gather_objects(part)
    if any(part.stopped for part in parts):
        raise StoppedError
    merged = _merge(parts, len(used))
    num_unlabelled = sum(not sample.labels for sample in samples)

    evaluations = []
    for subset, scores in zip(subsets, merged.scores, strict=True):
        labels = _labels_within(used, subset)
        rows = [row for row, own in enumerate(labels) if own]
        metrics, per_class, confusion = (_multi_label if multi_label else _single_label)(
            scores[rows],
            [labels[row] for row in rows],
            [classifier.labels[position] for position in subset],
        )
        evaluation = Evaluation(
            num_videos=len(rows),
            num_damaged=len(merged.damaged.intersection(rows)),
            num_unlabelled=num_unlabelled,
            failures=tuple(merged.failures[row] for row in rows if row in merged.failures),
            metrics=metrics,
            per_class=per_class,
            confusion=confusion,
        )
        evaluations.append(evaluation)
    return evaluations


def draw_subsets(
    class_names: Sequence[str], num_subsets: int, size: int, seed: int
) -> list[tuple[int, ...]]:
    """Draw random subsets of the classes, the same on every machine.

    The draw depends on the seed and on the names alone, not on their order or spelling. Each
    subset is drawn from all classes, so subsets overlap.

    Args:
        class_names: K distinct names.
        num_subsets: how many to draw, at least 1.
        size: classes in each, 1 to K.
        seed: any integer; another one draws other subsets.

    Returns:
        For each subset the positions of its classes, ascending.

    Raises:
        InputError: if a number is out of range.

    Source: the zero-shot protocol on Kinetics-600, three times 160 of 220 classes.
    """
    if num_subsets < 1:
        raise InputError(f"{num_subsets} subsets to draw, it must be at least 1")
    if not 1 <= size <= len(class_names):
        raise InputError(f"subsets of {size} classes; take 1 to all {len(class_names)}")

    keys = [comparison_key(name) for name in class_names]
    subsets = []
    for number in range(num_subsets):
        ranks = [hashlib.sha256(f"{seed} {number} {key}".encode()).digest() for key in keys]
        drawn = sorted(range(len(class_names)), key=ranks.__getitem__)[:size]
        subsets.append(tuple(sorted(drawn)))
    return subsets


@dataclass
class _Part:
    """What one rank found, or all of them together, of n videos.

    Attributes:
        scores: for each subset (n, K) among its classes; NaN for failures.
        failures: by position among the videos.
        damaged: positions of the videos scored in part.
        stopped: whether it gave up before its last video.
    """

    scores: list[Tensor]
    failures: dict[int, Failure] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    stopped: bool = False


def _check_samples(samples: Sequence[Sample], num_classes: int, multi_label: bool) -> None:
    """Refuse now what would only be noticed after the last video."""
    if not any(sample.labels for sample in samples):
        raise InputError("the list holds no labelled video; there is nothing to evaluate")
    for sample in samples:
        if len(sample.labels) > 1 and not multi_label:
            raise InputError(
                f"{sample.path} has {len(sample.labels)} labels; evaluate with multi_label=True"
            )
        if not all(0 <= label < num_classes for label in sample.labels):
            raise InputError(
                f"{sample.path} has labels {sample.labels}, the classifier {num_classes} classes; "
                "build it with the class names of the list"
            )


def _check_subsets(
    subsets: Sequence[Sequence[int]], samples: Sequence[Sample], class_names: Sequence[str]
) -> None:
    with_videos = {label for sample in samples for label in sample.labels}
    positions = range(len(class_names))
    for number, subset in enumerate(subsets, start=1):
        if not subset or len({*subset}) < len(subset) or not {*positions}.issuperset(subset):
            raise InputError(
                f"subset {number} of the classes is {list(subset)}; it must hold positions from 0 "
                f"to {positions[-1]}, each once"
            )
        if with_videos.isdisjoint(subset):
            raise InputError(
                f"no video has a label in subset {number} of the classes "
                f"({len(subset)}, such as {class_names[subset[0]]!r})"
            )


def _labels_within(samples: Sequence[Sample], subset: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the labels of each sample as positions in a subset, without those outside of it."""
    positions = {label: position for position, label in enumerate(subset)}
    return [
        tuple(positions[label] for label in sample.labels if label in positions)
        for sample in samples
    ]


def _merge(parts: Sequence[_Part], num_videos: int) -> _Part:
    """Put what the ranks found of every `len(parts)`-th video back into the order of all."""
    merged = _Part([scores.new_empty(num_videos, scores.shape[1]) for scores in parts[0].scores])
    for first, part in enumerate(parts):
        for scores, own in zip(merged.scores, part.scores, strict=True):
            scores[first :: len(parts)] = own
        merged.failures |= {first + i * len(parts): part.failures[i] for i in part.failures}
        merged.damaged |= {first + i * len(parts) for i in part.damaged}
    return merged


def _score(
    classifier: VideoClassifier,
    samples: Sequence[Sample],
    common: int,
    subsets: Sequence[Sequence[int]],
    fuse: Callable[[Tensor], Tensor],
    on_result: Callable[[VideoResult], None] | None,
    should_stop: Callable[[], bool] | None,
) -> _Part:
    """Score the videos of this rank, each among the classes of every subset.

    Every rank has `common` videos or one more.
    """
    period = EXCHANGE_VIDEOS if world_size() > 1 else 1
    part = _Part([torch.full((len(samples), len(subset)), torch.nan) for subset in subsets])
    spans = (Span(s.path, s.start_seconds, s.end_seconds) for s in samples)
    # Closing ends the decoding threads, which would otherwise run ahead after a stop.
    with closing(classifier.stream(spans)) as results:
        for i, result in enumerate(results):
            if result.logits is None:
                assert result.reason is not None
                assert result.message is not None
                part.failures[i] = Failure(result.path, result.reason, result.message)
            elif not result.logits.isfinite().all():
                message = "the model's scores are not finite; check its weights and precision"
                part.failures[i] = Failure(result.path, "not-finite", message)
            else:
                for scores, subset in zip(part.scores, subsets, strict=True):
                    scores[i] = fuse(result.logits[..., list(subset)])
                if result.status == "damaged":
                    part.damaged.add(i)
            if on_result is not None:
                on_result(result)
            part.stopped = part.stopped or (should_stop is not None and should_stop())
            if i < common and (i + 1) % period == 0 and any(reduce_max([part.stopped])):
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

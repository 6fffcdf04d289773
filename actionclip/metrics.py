"""Score predictions against labels: accuracies, confusion, average precision.

The end of the flow: the scores (N, K) of N videos for K classes and what was right go
in, numbers come out. Pure tensors; knows no videos, names or files.

A row with a score that is not finite is a video without a prediction. It is never
right, and it counts among the videos like any other. Classes with equal scores are
ranked in the order of the classes, so that every prediction is one definite class.
"""

import torch
from torch import Tensor

from actionclip.errors import InputError


def label_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Count the classes that are ranked before the right one.

    Args:
        scores: (N, K) float.
        labels: (N,) int64 in [0, K).

    Returns:
        (N,) int64: 0 where the right class comes first, K where there is no prediction.

    Raises:
        InputError: if the shapes do not fit, there are no videos, or a label is no class.
    """
    num_classes = _check(scores, labels, (len(scores),))
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = labels[(labels < 0) | (labels >= num_classes)][0]
        raise InputError(f"label {int(wrong)} is not in [0, {num_classes}), the classes scored")
    of_label = scores.gather(1, labels[:, None])
    is_earlier = torch.arange(num_classes) < labels[:, None]
    is_ahead = (scores > of_label) | ((scores == of_label) & is_earlier)
    return is_ahead.sum(1).where(_has_prediction(scores), num_classes)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Return the fraction of videos whose class is among the `k` with the highest scores.

    Args:
        scores: (N, K) float.
        labels: (N,) int64 in [0, K).
        k: 1 to K. More than K is an error rather than a meaningless 1.0.

    Raises:
        InputError: as `label_ranks`, or if `k` is out of range.
    """
    if not 1 <= k <= scores.shape[-1]:
        raise InputError(f"k is {k}, it must be from 1 to the {scores.shape[-1]} classes")
    return float((label_ranks(scores, labels) < k).double().mean())


def class_accuracies(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """Return the top-k accuracy among the videos of each class.

    Args:
        scores: (N, K) float.
        labels: (N,) int64 in [0, K).
        k: at least 1.

    Returns:
        (K,) float64; NaN for a class without videos.

    Raises:
        InputError: as `label_ranks`.
    """
    is_right = (label_ranks(scores, labels) < k).double()
    num_classes = scores.shape[1]
    return labels.bincount(is_right, num_classes) / labels.bincount(minlength=num_classes)


def mean_class_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the mean of the classes' top-1 accuracies, without the classes that have no videos.

    Args:
        scores: (N, K) float.
        labels: (N,) int64 in [0, K).

    Raises:
        InputError: as `label_ranks`.
    """
    return float(class_accuracies(scores, labels).nanmean())


def confusion_matrix(scores: Tensor, labels: Tensor) -> Tensor:
    """Count how often each class was taken for each.

    Args:
        scores: (N, K) float.
        labels: (N,) int64 in [0, K).

    Returns:
        (K, K) int64: rows are the right classes, columns the predicted ones. Videos
        without a prediction are in no cell.

    Raises:
        InputError: as `label_ranks`.
    """
    ranks = label_ranks(scores, labels)
    num_classes = scores.shape[1]
    has_prediction = ranks < num_classes
    cells = (labels * num_classes + scores.argmax(1))[has_prediction]
    return cells.bincount(minlength=num_classes**2).unflatten(0, (num_classes, num_classes))


def average_precisions(scores: Tensor, multi_hot: Tensor) -> Tensor:
    """Return the average precision of each class when the videos are ranked by its scores.

    Not interpolated: the mean, over the class's videos, of the precision among the videos
    that score at least as high. Videos without a prediction come after all others, and
    one that belongs to the class adds nothing.

    Args:
        scores: (N, K) float.
        multi_hot: (N, K) bool, whether the video shows the class.

    Returns:
        (K,) float64; NaN for a class without videos.

    Raises:
        InputError: if the shapes do not fit, or there are no videos.

    Source: the evaluation code of Charades, up to equal scores: there the order of the
        videos decides, here they share a rank as in scikit-learn.
    """
    _check(scores, multi_hot, tuple(scores.shape))
    totals = multi_hot.sum(0)
    has_prediction = _has_prediction(scores)
    ranked, order = scores[has_prediction].sort(0, descending=True)
    hits = multi_hot[has_prediction].gather(0, order)
    sums = []
    for scores_of_class, hits_of_class in zip(ranked.T, hits.T, strict=True):
        found = hits_of_class.double().cumsum(0)
        # Equal scores are retrieved together: all have the precision after the last of them.
        last = torch.searchsorted(-scores_of_class, -scores_of_class, right=True)
        precisions = found[last - 1] / last
        sums.append(precisions[hits_of_class].sum())
    return torch.stack(sums) / totals


def mean_average_precision(scores: Tensor, multi_hot: Tensor) -> float:
    """Return the mean of the average precisions, without the classes that have no videos.

    Args:
        scores: (N, K) float.
        multi_hot: (N, K) bool, whether the video shows the class.

    Raises:
        InputError: as `average_precisions`, or if no video shows any class.
    """
    if not multi_hot.any():
        raise InputError("no video has a label, so there is no precision; check the data's labels")
    return float(average_precisions(scores, multi_hot).nanmean())


def _check(scores: Tensor, right: Tensor, shape: tuple[int, ...]) -> int:
    """Refuse what is not (N, K) beside labels of that shape; return K."""
    if scores.ndim != 2 or right.shape != shape or 0 in scores.shape:
        raise InputError(
            f"scores are {tuple(scores.shape)} and labels {tuple(right.shape)}; use (N, K) for at "
            "least one video with (N,) classes or an (N, K) multi-hot"
        )
    return scores.shape[1]


def _has_prediction(scores: Tensor) -> Tensor:
    """Tell (N,) which videos have finite scores."""
    return scores.isfinite().all(1)

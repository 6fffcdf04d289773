"""Metrics against hand-computed cases, a slow reference in plain Python, and invariances."""

import math
import random

import pytest
import torch

from actionclip.errors import InputError
from actionclip.metrics import (
    average_precisions,
    class_accuracies,
    confusion_matrix,
    label_ranks,
    mean_average_precision,
    mean_class_accuracy,
    top_k_accuracy,
)

NAN, INF = math.nan, math.inf

# Four classes; the last two videos are ranked wrong and have no scores.
SCORES = torch.tensor(
    [
        [0.7, 0.1, 0.1, 0.1],
        [0.2, 0.3, 0.4, 0.1],
        [0.1, 0.2, 0.3, 0.4],
        [0.4, 0.3, 0.2, 0.1],
        [NAN, NAN, NAN, NAN],
    ]
)
LABELS = torch.tensor([0, 1, 1, 3, 3])


def test_a_case_by_hand() -> None:
    assert label_ranks(SCORES, LABELS).tolist() == [0, 1, 2, 3, 4]
    expected = {1: 1 / 5, 2: 2 / 5, 3: 3 / 5, 4: 4 / 5}
    for k, accuracy in expected.items():
        assert top_k_accuracy(SCORES, LABELS, k) == pytest.approx(accuracy)
    per_class = class_accuracies(SCORES, LABELS, k=2).tolist()
    assert per_class[:2] == [1.0, 0.5]
    assert math.isnan(per_class[2])
    assert per_class[3] == 0
    assert mean_class_accuracy(SCORES, LABELS) == pytest.approx((1 + 0 + 0) / 3)
    assert confusion_matrix(SCORES, LABELS).tolist() == [
        [1, 0, 0, 0],
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [1, 0, 0, 0],
    ]


def ranked(row: list[float]) -> list[int]:
    """Classes from best to worst; `sorted` keeps the order of equal ones."""
    return sorted(range(len(row)), key=lambda c: -row[c])


@pytest.mark.parametrize("seed", range(5))
def test_random_cases_against_plain_python(seed: int) -> None:
    random.seed(seed)
    num_classes = random.randint(2, 7)
    # Few distinct values, so that ties are common; some videos without scores.
    rows = [[random.randint(0, 4) / 4 for _ in range(num_classes)] for _ in range(60)]
    for row in random.sample(rows, 5):
        row[random.randrange(num_classes)] = random.choice([NAN, INF, -INF])
    labels = [random.randrange(num_classes) for _ in rows]
    scores, right = torch.tensor(rows), torch.tensor(labels)
    orders = [ranked(row) if all(map(math.isfinite, row)) else [] for row in rows]
    for k in range(1, num_classes + 1):
        hits = [label in order[:k] for label, order in zip(labels, orders, strict=True)]
        assert top_k_accuracy(scores, right, k) == pytest.approx(sum(hits) / 60)
        for c, accuracy in enumerate(class_accuracies(scores, right, k).tolist()):
            own = [hit for hit, label in zip(hits, labels, strict=True) if label == c]
            expected = sum(own) / len(own) if own else NAN
            assert accuracy == pytest.approx(expected, nan_ok=True)
    matrix = [[0] * num_classes for _ in range(num_classes)]
    for label, order in zip(labels, orders, strict=True):
        if order:
            matrix[label][order[0]] += 1
    assert confusion_matrix(scores, right).tolist() == matrix
    assert confusion_matrix(scores, right).dtype == torch.int64


def test_the_first_metric_and_the_matrix_agree() -> None:
    scores = torch.randint(0, 3, (50, 4)).float()
    labels = torch.randint(0, 4, (50,))
    trace = confusion_matrix(scores, labels).diagonal().sum()
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(int(trace) / 50)


def test_equal_scores_are_ranked_in_the_order_of_the_classes() -> None:
    scores = torch.full((4, 4), 0.25)
    assert label_ranks(scores, torch.arange(4)).tolist() == [0, 1, 2, 3]
    assert mean_class_accuracy(scores, torch.arange(4)) == 0.25


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_scores_that_are_not_finite_are_never_right(bad: float) -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1])
    assert top_k_accuracy(scores, labels, 1) == 1
    for place in (0, 1):
        broken = scores.clone()
        broken[0, place] = bad
        assert top_k_accuracy(broken, labels, 1) == 0.5
        assert top_k_accuracy(broken, labels, 2) == 0.5
        assert confusion_matrix(broken, labels).tolist() == [[0, 0], [0, 1]]
        assert average_precisions(broken, scores.bool()).tolist() == [0.0, 1.0]


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5]])
    # Hits at ranks 1, 3 and 5: (1/1 + 2/3 + 3/5) / 3.
    multi_hot = torch.tensor([[1], [0], [1], [0], [1]]).bool()
    expected = (1 + 2 / 3 + 3 / 5) / 3
    assert float(average_precisions(scores, multi_hot)) == pytest.approx(expected)
    # The first and the third share a rank with the second: 2/3 each, then 3/5.
    tied = torch.tensor([[0.9], [0.9], [0.9], [0.6], [0.5]])
    expected = (2 / 3 + 2 / 3 + 3 / 5) / 3
    assert float(average_precisions(tied, multi_hot)) == pytest.approx(expected)
    # The first has no scores: hits at ranks 2 and 4 of the four others, of three videos.
    lost = torch.tensor([[NAN], [0.8], [0.7], [0.6], [0.5]])
    expected = (1 / 2 + 2 / 4) / 3
    assert float(average_precisions(lost, multi_hot)) == pytest.approx(expected)


def slow_average_precision(scores: list[float], hits: list[bool]) -> float:
    """The definition: for every hit, the precision among videos that score at least as high."""
    finite = [(s, h) for s, h in zip(scores, hits, strict=True) if math.isfinite(s)]
    total = 0.0
    for score, hit in finite:
        if hit:
            retrieved = [h for s, h in finite if s >= score]
            total += sum(retrieved) / len(retrieved)
    return total / sum(hits) if any(hits) else NAN


@pytest.mark.parametrize("values", [3, 1000])
def test_average_precision_against_plain_python(values: int) -> None:
    torch.manual_seed(0)
    scores = torch.randint(0, values, (80, 6)) / values
    scores[torch.randperm(80)[:5]] = NAN
    multi_hot = torch.rand(80, 6) < torch.tensor([0.5, 0.2, 0.1, 0.02, 0.9, 0.0])
    result = average_precisions(scores, multi_hot)
    expected = [
        slow_average_precision(scores[:, c].tolist(), multi_hot[:, c].tolist()) for c in range(6)
    ]
    assert result.tolist() == pytest.approx(expected, nan_ok=True)
    assert result.dtype == torch.float64
    assert math.isnan(expected[-1])
    assert mean_average_precision(scores, multi_hot) == pytest.approx(sum(expected[:-1]) / 5)


def test_the_order_of_videos_does_not_matter() -> None:
    torch.manual_seed(0)
    scores = torch.randint(0, 5, (40, 3)).float()
    multi_hot = torch.rand(40, 3) < 0.3
    order = torch.randperm(40)
    torch.testing.assert_close(
        average_precisions(scores[order], multi_hot[order]),
        average_precisions(scores, multi_hot),
    )


def test_nothing_scored_is_zero() -> None:
    scores = torch.full((3, 2), NAN)
    multi_hot = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    assert mean_average_precision(scores, multi_hot) == 0
    assert top_k_accuracy(scores, torch.tensor([0, 0, 1]), 2) == 0
    assert confusion_matrix(scores, torch.tensor([0, 0, 1])).sum() == 0


def test_wrong_arguments() -> None:
    scores = torch.rand(3, 4)
    labels = torch.tensor([0, 1, 2])
    for k in (0, 5):
        with pytest.raises(InputError, match=f"k is {k}, it must be from 1 to the 4 classes"):
            top_k_accuracy(scores, labels, k)
    for label in (-1, 4):
        with pytest.raises(InputError, match=rf"label {label} is not in \[0, 4\)"):
            label_ranks(scores, torch.tensor([0, label, 1]))
    with pytest.raises(InputError, match=r"scores are \(3, 4\) and labels \(2,\)"):
        confusion_matrix(scores, labels[:2])
    with pytest.raises(InputError, match=r"scores are \(0, 4\)"):
        top_k_accuracy(scores[:0], labels[:0], 1)
    with pytest.raises(InputError, match=r"labels \(3,\)"):
        average_precisions(scores, labels)
    with pytest.raises(InputError, match="no video has a label"):
        mean_average_precision(scores, torch.zeros(3, 4, dtype=torch.bool))

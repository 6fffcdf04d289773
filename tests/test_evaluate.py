"""Evaluation: every video once, failures counted as wrong, the same on any number of ranks."""

import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import filled
import pytest
import torch
from golden_files import clip_config
from processes import free_port
from video_files import write_video

from actionclip import evaluate as module
from actionclip.annotations import Sample
from actionclip.classifier import Prediction, VideoClassifier, VideoResult
from actionclip.errors import InputError
from actionclip.evaluate import (
    Evaluation,
    Failure,
    StoppedError,
    draw_subsets,
    evaluate,
    evaluate_subsets,
)
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.similarity import fuse_logits
from actionclip.weights import save

LABELS = ["archery", "bowling", "juggling balls", "diving", "fencing"]


class Oracle:
    """Stands in for a classifier: logits by path, an error for those it does not know."""

    def __init__(self, scores: dict[str, list[Any]], damaged: Iterable[str] = ()) -> None:
        self.labels = tuple(LABELS[: torch.tensor(next(iter(scores.values()))).shape[-1]])
        self.scores = scores
        self.damaged = damaged
        self.asked: list[str] = []

    def stream(self, videos):
        for video in videos:
            path = video.path
            self.asked.append(path)
            if path not in self.scores:
                yield VideoResult(path, "error", "missing", "no such file")
                continue
            logits = torch.tensor(self.scores[path]).view(1, -1, len(self.labels))
            prediction = Prediction(self.labels, fuse_logits(logits))
            status = "damaged" if path in self.damaged else "ok"
            yield VideoResult(path, status, None, None, 9, prediction, logits)


def one_hot(position: int, num_classes: int = 5) -> list[float]:
    return [float(i == position) for i in range(num_classes)]


def test_a_case_by_hand() -> None:
    oracle = Oracle(
        {"a": one_hot(0), "b": one_hot(1), "c": one_hot(0), "e": [0.1, 0.5, 0.2, 0.1, 0.1]},
        damaged="c",
    )
    samples = [Sample(p, (label,)) for p, label in zip("abcde", (0, 1, 1, 1, 2), strict=True)]
    result = evaluate(oracle, samples, multi_label=False)
    assert (result.num_videos, result.num_scored, result.num_damaged) == (5, 4, 1)
    assert result.num_unlabelled == 0
    assert result.failures == (Failure("d", "missing", "no such file"),)
    assert result.metrics["top1"] == pytest.approx(2 / 5)
    # "d" has no scores, so it is not even among the best five of five.
    assert result.metrics["top5"] == pytest.approx(4 / 5)
    assert result.metrics["mean_class_accuracy"] == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert list(result.metrics) == ["top1", "top5", "mean_class_accuracy"]
    assert result.num_classes_without_videos == 2
    rows = [(row.name, row.num_videos, row.metrics) for row in result.per_class]
    assert rows == [
        ("archery", 1, {"top1": 1.0, "top5": 1.0}),
        ("bowling", 3, {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)}),
        ("juggling balls", 1, {"top1": 0.0, "top5": 1.0}),
        ("diving", 0, {}),
        ("fencing", 0, {}),
    ]
    matrix = torch.zeros(5, 5, dtype=torch.int64)
    matrix[0, 0] = matrix[1, 1] = matrix[1, 0] = matrix[2, 1] = 1
    assert torch.equal(result.confusion, matrix)


def test_multi_label_by_hand() -> None:
    oracle = Oracle({"a": [0.9, 0.1, 0.0], "b": [0.8, 0.2, 0.0], "c": [0.7, 0.3, 0.0]})
    samples = [
        Sample("a", (0, 1)),
        Sample("b", ()),
        Sample("lost", (0,)),
        Sample("c", (0,)),
    ]
    result = evaluate(oracle, samples, multi_label=True)
    # Without "b": class 0 has hits at ranks 1 and 2 and one lost, class 1 at the last of two.
    first, second = (1 + 1) / 3, 1 / 2
    assert result.metrics == {"mean_average_precision": pytest.approx((first + second) / 2)}
    assert [row.num_videos for row in result.per_class] == [3, 1, 0]
    assert result.per_class[0].metrics == {"average_precision": pytest.approx(first)}
    assert result.per_class[2].metrics == {}
    assert (result.num_videos, result.num_unlabelled, result.num_scored) == (3, 1, 2)
    assert oracle.asked == ["a", "lost", "c"]
    assert result.confusion is None


def test_several_classes_do_not_compete() -> None:
    # After a softmax class 0 would be likelier in "b", which is not of it, than in "a".
    oracle = Oracle({"a": [2.0, 2.0, 0.0], "b": [1.0, -9.0, 0.0]})
    samples = [Sample("a", (0, 1)), Sample("b", (2,))]
    result = evaluate(oracle, samples, multi_label=True)
    assert result.per_class[0].metrics == {"average_precision": 1.0}


def test_below_five_classes_there_is_no_top5() -> None:
    oracle = Oracle({"a": one_hot(0, 4)})
    result = evaluate(oracle, [Sample("a", (0,))], multi_label=False)
    assert result.metrics == {"top1": 1.0, "mean_class_accuracy": 1.0}


def test_scores_that_are_no_numbers_are_failures() -> None:
    oracle = Oracle({"a": one_hot(0), "b": [math.nan] * 5}, damaged="b")
    result = evaluate(oracle, [Sample("a", (0,)), Sample("b", (0,))], multi_label=False)
    (failure,) = result.failures
    assert (failure.path, failure.reason) == ("b", "not-finite")
    assert result.metrics["top1"] == 0.5
    assert result.num_damaged == 0


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "no labelled video"),
        ([Sample("a", ())], "no labelled video"),
        ([Sample("a", (0, 1))], r"a has 2 labels; evaluate with multi_label=True"),
        ([Sample("a", (5,))], r"a has labels \(5,\), the classifier 5 classes"),
        ([Sample("a", (-1,))], r"a has labels \(-1,\)"),
    ],
)
def test_wrong_lists_are_refused_before_the_first_video(samples, message: str) -> None:
    oracle = Oracle({"a": one_hot(0)})
    with pytest.raises(InputError, match=message):
        evaluate(oracle, samples, multi_label=False)
    assert oracle.asked == []


def test_subsets_by_hand() -> None:
    """Five videos of four classes, one damaged and one lost, among three subsets."""
    oracle = Oracle(
        {
            "a": [5.0, 4.0, 0.0, 0.0, 0.0],
            "b": [5.0, 4.0, 0.0, 0.0, 0.0],
            "c": [0.0, 3.0, 2.0, 1.0, 0.0],
            "d": [9.0, 9.0, 9.0, 1.0, 0.0],
        },
        damaged="c",
    )
    samples = [Sample(p, (label,)) for p, label in zip("axbcd", (0, 1, 1, 2, 3), strict=True)]
    first, second, third = evaluate_subsets(
        oracle, samples, [(0, 1), (2, 1), (4, 2)], multi_label=False
    )
    assert oracle.asked == ["a", "x", "b", "c"]  # no subset has the class of "d"
    # Among archery and bowling "b" is wrong, among juggling and bowling right.
    assert (first.num_videos, first.num_scored, first.num_damaged) == (3, 2, 0)
    assert first.metrics == {"top1": pytest.approx(1 / 3), "mean_class_accuracy": 0.5}
    assert [(row.name, row.num_videos) for row in first.per_class] == [
        ("archery", 1),
        ("bowling", 2),
    ]
    assert second.metrics["top1"] == pytest.approx(1 / 3)
    assert [row.name for row in second.per_class] == ["juggling balls", "bowling"]
    assert second.confusion.tolist() == [[0, 1], [0, 1]]
    assert second.num_damaged == 1
    assert [len(result.failures) for result in (first, second, third)] == [1, 1, 0]
    # "c" is juggling, which nothing but diving, not asked for, would have beaten.
    assert (third.num_videos, third.metrics["top1"]) == (1, 1.0)


def test_classes_outside_of_a_subset_have_no_say() -> None:
    """The first template is sure of diving, so that it counts only where diving is no choice."""
    oracle = Oracle({"a": [[0.0, 2.0, 0.0, 10.0], [1.0, 0.0, 0.0, -10.0]]})
    samples = [Sample("a", (1,))]
    among_all, among_two = evaluate_subsets(
        oracle, samples, [(0, 1, 2, 3), (0, 1)], multi_label=False
    )
    # Bowling has (exp(2) / (1 + exp(2)) + 1 / (1 + exp(1))) / 2 = 0.57 of archery and bowling.
    assert among_two.metrics["top1"] == 1
    assert among_all.confusion[1].tolist() == [0, 0, 0, 1]


def test_subsets_of_several_labels() -> None:
    oracle = Oracle({"a": [0.9, 0.1, 0.0], "b": [0.8, 0.2, 0.0], "c": [0.7, 0.3, 0.6]})
    samples = [Sample("a", (0, 1)), Sample("b", ()), Sample("c", (0,)), Sample("d", (2,))]
    (result,) = evaluate_subsets(oracle, samples, [(1, 0)], multi_label=True)
    assert oracle.asked == ["a", "c"]
    assert (result.num_videos, result.num_unlabelled, result.failures) == (2, 1, ())
    assert [(row.name, row.num_videos) for row in result.per_class] == [
        ("bowling", 1),
        ("archery", 2),
    ]
    # Bowling is the second of the two videos, archery both.
    assert result.metrics["mean_average_precision"] == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ((), r"subset 2 of the classes is \[\]; it must hold positions from 0 to 4, each once"),
        ((0, 0), r"subset 2 of the classes is \[0, 0\]"),
        ((0, 5), r"subset 2 of the classes is \[0, 5\]"),
        ((-1,), r"subset 2 of the classes is \[-1\]"),
        ((1, 3), r"no video has a label in subset 2 of the classes \(2, such as 'bowling'\)"),
    ],
)
def test_wrong_subsets_are_refused_before_the_first_video(subset, message: str) -> None:
    oracle = Oracle({"a": one_hot(0)})
    with pytest.raises(InputError, match=message):
        evaluate_subsets(oracle, [Sample("a", (0,))], [(0,), subset], multi_label=False)
    assert oracle.asked == []


def test_draws_depend_on_seed_and_names_alone() -> None:
    names = [f"action {i}" for i in range(220)]
    subsets = draw_subsets(names, 3, 160, 0)
    assert [len(subset) for subset in subsets] == [160] * 3
    assert all(list(subset) == sorted({*subset}) for subset in subsets)
    assert len({*subsets}) == 3
    # What it drew when it was written: a result can be repeated years later.
    assert draw_subsets(LABELS, 3, 2, 0) == [(0, 2), (0, 2), (1, 2)]
    drawn = [{names[i] for i in subset} for subset in subsets]
    backwards = [name.replace(" ", "_").upper() for name in reversed(names)]
    again = draw_subsets(backwards, 3, 160, 0)
    assert [{backwards[i].lower().replace("_", " ") for i in s} for s in again] == drawn
    assert draw_subsets(names, 2, 160, 0) == subsets[:2]
    assert not {*draw_subsets(names, 3, 160, 1)} & {*subsets}
    # Every class is as likely: each is in 0.25 of many draws, give or take six deviations.
    counts = torch.zeros(40)
    for subset in draw_subsets(names[:40], 400, 10, 5):
        counts[list(subset)] += 1
    assert (counts / 400 - 0.25).abs().max() < 6 * (0.25 * 0.75 / 400) ** 0.5


@pytest.mark.parametrize(
    ("num_subsets", "size", "message"),
    [
        (0, 2, "0 subsets to draw, it must be at least 1"),
        (3, 0, "subsets of 0 classes; take 1 to all 5"),
        (3, 6, "subsets of 6 classes; take 1 to all 5"),
    ],
)
def test_wrong_draws(num_subsets: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        draw_subsets(LABELS, num_subsets, size, 0)


@pytest.fixture(scope="module")
def model() -> ActionCLIP:
    model = ActionCLIP(ActionCLIPConfig(clip_config("tiny"), num_frames=4))
    filled.fill_(model.clip)
    return model.eval()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Seven: four videos, one file that is none, and two spans of the first video."""
    folder = tmp_path_factory.mktemp("videos")
    samples = []
    for i, (count, size) in enumerate(
        [(30, (96, 64)), (9, (64, 80)), (3, (70, 50)), (12, (48, 48))]
    ):
        path = write_video(folder / f"{i}.mp4", num_frames=count, size=size)
        samples.append(Sample(str(path), (i,)))
    (folder / "text.mp4").write_text("not a video")
    samples.insert(2, Sample(str(folder / "text.mp4"), (4,)))
    samples.append(Sample(samples[0].path, (1,), 0.2, 0.5))
    samples.append(Sample(samples[0].path, (2,), 0.8, None))
    return samples


def test_real_videos(model: ActionCLIP, samples: list[Sample]) -> None:
    classifier = VideoClassifier(model, LABELS, batch_size=2)
    seen: list[VideoResult] = []
    result = evaluate(classifier, samples, multi_label=False, on_result=seen.append)
    assert [r.path for r in seen] == [s.path for s in samples]
    assert [r.num_frames for r in seen] == [30, 9, None, 3, 12, 8, 10]
    assert [f.reason for f in result.failures] == ["not-a-video"]
    right = [
        r.prediction is not None and r.prediction.top(1)[0][0] == LABELS[s.labels[0]]
        for r, s in zip(seen, samples, strict=True)
    ]
    assert result.metrics["top1"] == pytest.approx(sum(right) / 7)
    assert int(result.confusion.sum()) == 6


def test_subsets_are_scored_as_if_there_were_no_other_classes(
    model: ActionCLIP, samples: list[Sample]
) -> None:
    # Among five labels and among two, with all views and templates, the scores themselves.
    few = [3, 1]
    views = {"num_clips": 2, "num_crops": 3, "batch_size": 4}
    paths = [sample.path for sample in samples[:2]]
    of_all = VideoClassifier(model, LABELS, **views).stream(paths)
    of_few = VideoClassifier(model, [LABELS[i] for i in few], **views).stream(paths)
    for result, alone in zip(of_all, of_few, strict=True):
        assert result.logits.shape == (6, 16, 5)
        assert result.logits.dtype == torch.float32
        assert torch.equal(fuse_logits(result.logits), result.prediction.scores)
        scores = fuse_logits(result.logits[..., few])
        torch.testing.assert_close(scores, alone.prediction.scores, rtol=0, atol=1e-6)
        other = result.prediction.scores[few]
        assert (other / other.sum() - scores).abs().max() > 1e-4  # not the same thing
    # And the numbers made of them, also over the ranks of one evaluation.
    subsets = [(3, 1), (0, 1, 2, 3, 4), (4, 0)]
    seen: list[VideoResult] = []
    results = evaluate_subsets(
        VideoClassifier(model, LABELS), samples, subsets, multi_label=False, on_result=seen.append
    )
    assert len(seen) == len(samples)
    for subset, result in zip(subsets, results, strict=True):
        own = [
            Sample(s.path, (subset.index(s.labels[0]),), s.start_seconds, s.end_seconds)
            for s in samples
            if s.labels[0] in subset
        ]
        classifier = VideoClassifier(model, [LABELS[i] for i in subset])
        assert_same(result, evaluate(classifier, own, multi_label=False))


def test_stopping_ends_early_and_leaves_no_threads(
    model: ActionCLIP, samples: list[Sample]
) -> None:
    classifier = VideoClassifier(model, LABELS, batch_size=1)
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 2

    with pytest.raises(StoppedError):
        evaluate(classifier, samples * 50, multi_label=False, should_stop=should_stop)
    assert len(asked) == 2
    assert not [t for t in threading.enumerate() if t.name.startswith("actionclip-decode")]


@pytest.mark.parametrize("num_ranks", [2, 3, 9])
def test_any_number_of_ranks_gives_the_same(num_ranks: int, monkeypatch) -> None:
    """Threads stand in for processes: seven videos, of which three have no scores."""
    torch.manual_seed(0)
    oracle = Oracle({path: torch.rand(5).tolist() for path in "abcd"}, damaged="cd")
    samples = [Sample(path, (i % 5,)) for i, path in enumerate("xabycdz")]
    alone = evaluate(oracle, samples, multi_label=False)
    both = evaluate(oracle, samples, multi_label=True)
    assert [failure.path for failure in alone.failures] == ["x", "y", "z"]
    oracle.asked.clear()
    results = in_threads(
        num_ranks, lambda: evaluate(oracle, samples, multi_label=False), monkeypatch
    )
    assert sorted(oracle.asked) == sorted("xabycdz")
    for result in results:
        assert_same(result, alone)
    for result in in_threads(
        num_ranks, lambda: evaluate(oracle, samples, multi_label=True), monkeypatch
    ):
        assert_same(result, both)


def test_any_number_of_ranks_gives_the_same_subsets(monkeypatch) -> None:
    torch.manual_seed(0)
    oracle = Oracle({path: torch.rand(5).tolist() for path in "abcdefg"}, damaged="cd")
    samples = [Sample(path, (i % 5,)) for i, path in enumerate("xabycdzefg")]
    subsets = [(4, 1), (1, 0, 3)]

    def work() -> list[Evaluation]:
        return evaluate_subsets(oracle, samples, subsets, multi_label=False)

    alone = work()
    assert [result.num_videos for result in alone] == [4, 6]
    for results in in_threads(3, work, monkeypatch):
        for result, other in zip(results, alone, strict=True):
            assert_same(result, other)


def in_threads(num_ranks: int, work: Callable[[], Any], monkeypatch) -> list[Any]:
    """Run the same work as so many ranks at once."""
    own = threading.local()
    parts: dict[int, Any] = {}
    barrier = threading.Barrier(num_ranks, timeout=10)

    def gather(part: Any) -> list[Any]:
        parts[own.rank] = part
        barrier.wait()
        found = [parts[i] for i in range(num_ranks)]
        barrier.wait()  # before one puts the next part there
        return found

    def as_rank(i: int) -> Any:
        own.rank = i
        return work()

    monkeypatch.setattr(module, "rank", lambda: own.rank)
    monkeypatch.setattr(module, "world_size", lambda: num_ranks)
    monkeypatch.setattr(module, "gather_objects", gather)
    monkeypatch.setattr(module, "reduce_max", lambda values: [max(*gather(values[0]), 0)])
    with ThreadPoolExecutor(num_ranks) as executor:
        return list(executor.map(as_rank, range(num_ranks)))


def assert_same(result: Evaluation, other: Evaluation) -> None:
    assert vars(result) | {"confusion": None} == vars(other) | {"confusion": None}
    if other.confusion is not None:
        assert torch.equal(result.confusion, other.confusion)


def test_one_rank_that_stops_stops_all(monkeypatch) -> None:
    oracle = Oracle({path: one_hot(0) for path in "abc"})
    samples = [Sample(path, (0,)) for path in "abc"]

    def work() -> str:
        is_second = module.rank() == 1
        try:
            evaluate(oracle, samples, multi_label=False, should_stop=lambda: is_second)
        except StoppedError:
            return "stopped"
        return "went on"

    assert in_threads(2, work, monkeypatch) == ["stopped", "stopped"]


def test_a_stop_reaches_all_ranks_soon(monkeypatch) -> None:
    """Also if one rank has a video more, and each could go on for long."""
    paths = [str(i) for i in range(20 * module.EXCHANGE_VIDEOS + 1)]
    oracle = Oracle({path: one_hot(0) for path in paths})
    samples = [Sample(path, (0,)) for path in paths]

    def work() -> int:
        seen: list[VideoResult] = []
        is_second = module.rank() == 1
        with pytest.raises(StoppedError):
            evaluate(
                oracle,
                samples,
                multi_label=False,
                on_result=seen.append,
                should_stop=lambda: is_second and len(seen) > module.EXCHANGE_VIDEOS,
            )
        return len(seen)

    assert in_threads(2, work, monkeypatch) == [2 * module.EXCHANGE_VIDEOS] * 2


@pytest.mark.parametrize("num_videos", [1, 2, 31, 32, 33, 48, 49])
def test_ranks_exchange_equally_often(num_videos: int, monkeypatch) -> None:
    oracle = Oracle({str(i): one_hot(0) for i in range(num_videos)})
    samples = [Sample(str(i), (0,)) for i in range(num_videos)]

    def work() -> int:
        return evaluate(oracle, samples, multi_label=False).num_scored

    # The stand-ins for collectives would mix an exchange with the end of another rank.
    assert in_threads(2, work, monkeypatch) == [num_videos] * 2


RANK = """
import pickle
from actionclip import distributed
from actionclip.classifier import VideoClassifier
from actionclip.evaluate import evaluate
from actionclip.weights import load

labels, samples = pickle.load(open("task.pkl", "rb"))
distributed.start("cpu")
rank = distributed.rank()
classifier = VideoClassifier(load("model.safetensors", device="cpu"), labels)
seen = []
result = evaluate(classifier, samples, multi_label=False, on_result=seen.append)
distributed.stop()
pickle.dump((result, [r.path for r in seen]), open(f"result{rank}.pkl", "wb"))
"""


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gloo_processes_give_the_same(
    num_ranks: int, model: ActionCLIP, samples: list[Sample], tmp_path: Path
) -> None:
    save(model, tmp_path / "model.safetensors")
    (tmp_path / "task.pkl").write_bytes(pickle.dumps((LABELS, samples)))
    port = free_port()
    processes = []
    for i in range(num_ranks):
        place = {"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
        env = os.environ | {key: str(value) for key, value in place.items()}
        env |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen([sys.executable, "-c", RANK], cwd=tmp_path, env=env))
    assert [process.wait(timeout=120) for process in processes] == [0] * num_ranks
    alone = evaluate(VideoClassifier(model, LABELS), samples, multi_label=False)
    for i in range(num_ranks):
        result, seen = pickle.loads((tmp_path / f"result{i}.pkl").read_bytes())
        assert_same(result, alone)
        assert seen == [sample.path for sample in samples[i::num_ranks]]

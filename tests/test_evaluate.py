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
from actionclip.evaluate import Evaluation, Failure, StoppedError, evaluate
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.weights import save

LABELS = ["archery", "bowling", "juggling balls", "diving", "fencing"]


class Oracle:
    """Stands in for a classifier: scores by path, an error for those it does not know."""

    def __init__(self, scores: dict[str, list[float]], damaged: Iterable[str] = ()) -> None:
        self.labels = tuple(LABELS[: len(next(iter(scores.values())))])
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
            prediction = Prediction(self.labels, torch.tensor(self.scores[path]))
            status = "damaged" if path in self.damaged else "ok"
            yield VideoResult(path, status, num_frames=9, prediction=prediction)


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


def in_threads(num_ranks: int, work: Callable[[], Any], monkeypatch) -> list[Any]:
    """Run the same work as so many ranks at once."""
    own = threading.local()
    parts: dict[int, Any] = {}
    barrier = threading.Barrier(num_ranks, timeout=10)

    def gather(part: object) -> list[object]:
        parts[own.rank] = part
        barrier.wait()
        return [parts[i] for i in range(num_ranks)]

    def as_rank(i: int) -> Any:
        own.rank = i
        return work()

    monkeypatch.setattr(module, "rank", lambda: own.rank)
    monkeypatch.setattr(module, "world_size", lambda: num_ranks)
    monkeypatch.setattr(module, "gather_objects", gather)
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

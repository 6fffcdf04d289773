"""The loop: what a run learns does not depend on when it is stopped or how it is cut up."""

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor
from training_files import BROKEN, CLASSES, write_all

from actionclip import distributed
from actionclip import train as loop
from actionclip.annotations import VideoList, read_video_list
from actionclip.augment import Augmentation
from actionclip.classifier import VideoClassifier
from actionclip.errors import InputError, TooManyBadError, TrainingError
from actionclip.evaluate import evaluate
from actionclip.recipe import Recipe
from actionclip.runs import RunFolder
from actionclip.train import Running, Towers, Trainer
from actionclip.weights import digest, load

pytestmark = pytest.mark.usefixtures("one_thread")

# Everything random at once: dropout of the head, stochastic depth, augmentation, parts of
# which the last is smaller. 12 videos: 2 steps an epoch.
RECIPE = Recipe(
    epochs=2,
    batch_size=5,
    micro_batch=2,
    learning_rate=1e-3,
    warmup_epochs=0.5,
    drop_path=0.3,
    clip_gradient=5.0,
    templates=("a video of {}", "{}"),
    augmentation=Augmentation(resolution=32),
    average_from=1,
)
# Nothing random but the order: what is left must not depend on how a batch is cut up.
PLAIN = replace(RECIPE, micro_batch=None, drop_path=0.0, augmentation=None, average_from=None)
RUNNING = Running(workers=0, log_every=1, max_bad=1)


class Crash(BaseException):
    """Ends a run as a power cut would: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("data"))


def build(
    data: Path,
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    running: Running = RUNNING,
    val: bool = True,
    model: str = "model",
    should_stop: Callable[[], bool] = lambda: False,
) -> Trainer:
    return Trainer(
        load(data / f"{model}.safetensors", device="cpu"),
        read_video_list(data / "train"),
        recipe,
        RunFolder(folder),
        val=read_video_list(data / "val") if val else None,
        running=running,
        should_stop=should_stop,
    )


def finish(trainer: Trainer, *, resume: bool = False) -> str:
    """Run to the end, or until stopped; returns the weights' digest."""
    if resume and trainer.folder.last.exists():
        trainer.resume()
    elif distributed.rank() == 0:
        trainer.folder.check_free()
        trainer.folder.start({}, CLASSES)
    torch.manual_seed(int(time.time()))  # nothing may depend on the state of this
    for _ in trainer.run():
        pass
    return digest(trainer.model)


def at_call(number: int, act: Callable[[], bool]) -> Callable[[], bool]:
    """Return a `should_stop` that acts from the `number`-th time on that it is asked.

    The 0th is before the first step.
    """
    calls = iter(range(1000))
    return lambda: next(calls) >= number and act()


def crash() -> bool:
    raise Crash


def learned(folder: Path) -> dict[str, Any]:
    """Return what a run leaves behind, but for its speed."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "metrics": [{k: v for k, v in r.items() if k != "clips_per_second"} for r in lines],
        "bad": (folder / "bad_samples.jsonl").read_text(),
        "best": (folder / "best.safetensors").read_bytes(),
        "average": (folder / "average.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """Digest and files of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    weights = finish(build(data, folder / "run"))
    return weights, learned(folder / "run")


def test_records(whole: tuple[str, dict[str, Any]], data: Path) -> None:
    metrics = whole[1]["metrics"]
    kinds = [(r["kind"], r["step"], r["epoch"]) for r in metrics]
    expected = []
    for step in range(1, 5):
        expected.append(("train", step, step / 2))
        if step % 2 == 0:
            expected.append(("eval", step, step / 2))
    expected.append(("average", 4, 2.0))
    assert kinds == expected
    first, second = metrics[0], metrics[1]
    # The first step of the warm-up has a rate of 0, the second is past it; the head's is tenfold.
    assert first["lr"] == {"text": 0, "visual": 0, "head": 0}
    assert second["lr"]["head"] == pytest.approx(10 * second["lr"]["text"])
    assert 0.5e-3 < second["lr"]["text"] <= 1e-3
    assert all(math.isfinite(r["loss"]) for r in metrics if r["kind"] == "train")
    evaluation = metrics[2]
    assert evaluation["videos"] == 4
    assert evaluation["failed"] == 0
    assert evaluation["data_sha256"] == read_video_list(data / "val").digest
    bad = [json.loads(line) for line in whole[1]["bad"].splitlines()]
    assert bad
    assert {Path(fault["path"]) for fault in bad} == {data / BROKEN}
    assert all(fault["replaced"] and fault["reason"] == "not-a-video" for fault in bad)
    assert [(fault["step"] + 1) // 2 for fault in bad] == [fault["epoch"] for fault in bad]


# An epoch asks six times: after two steps and four videos of the evaluation. The evaluation of
# the average asks four times more.
@pytest.mark.parametrize("call", [0, 1, 2, 4, 7, 14])
def test_stopped_and_resumed(
    call: int, data: Path, tmp_path: Path, whole: tuple[str, dict[str, Any]]
) -> None:
    trainer = build(data, tmp_path, should_stop=at_call(call, lambda: True))
    finish(trainer)
    epoch, asked = divmod(max(call - 1, 0), 6)
    assert trainer.progress.step == (min(2 * epoch + min(asked + 1, 2), 4) if call else 0)
    assert trainer.progress.evaluated == epoch
    assert not trainer.folder.average.exists()
    assert finish(build(data, tmp_path), resume=True) == whole[0]
    assert learned(tmp_path) == whole[1]


@pytest.mark.parametrize(("call", "save_every"), [(1, 1000), (4, 1), (8, 1000), (16, 1)])
def test_crashed_and_resumed(
    call: int, save_every: int, data: Path, tmp_path: Path, whole: tuple[str, dict[str, Any]]
) -> None:
    running = replace(RUNNING, save_every=save_every)
    trainer = build(data, tmp_path, running=running, should_stop=at_call(call, crash))
    with pytest.raises(Crash):
        finish(trainer)
    (tmp_path / "last.pt.99.part").write_text("half a state")
    (tmp_path / "film.mp4.part").write_text("not ours")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tr')
    assert (tmp_path / "last.pt").exists() == (call > 6 or (call > 1 and save_every == 1))
    assert finish(build(data, tmp_path), resume=True) == whole[0]
    assert learned(tmp_path) == whole[1]
    assert [path.name for path in tmp_path.glob("*.part")] == ["film.mp4.part"]


def test_workers_change_nothing(
    data: Path, tmp_path: Path, whole: tuple[str, dict[str, Any]]
) -> None:
    running = replace(RUNNING, workers=2)
    trainer = build(data, tmp_path, running=running, should_stop=at_call(9, lambda: True))
    finish(trainer)
    assert trainer.progress.step == 4
    assert finish(build(data, tmp_path, running=running), resume=True) == whole[0]
    assert learned(tmp_path) == whole[1]


def test_a_finished_run_has_nothing_to_do(data: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    weights = finish(build(data, tmp_path, recipe, val=False))
    before = learned(tmp_path)
    trainer = build(data, tmp_path, recipe, val=False)
    trainer.resume()
    assert list(trainer.run()) == []
    assert digest(trainer.model) == weights
    assert learned(tmp_path) == before


# Without --val the end of an epoch asks nobody: the second step of the second epoch is the last.
def test_stopped_before_the_average_is_written(data: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = replace(PLAIN, average_from=1)
    finish(build(data, whole, recipe, val=False))
    finish(build(data, cut, recipe, val=False, should_stop=at_call(4, lambda: True)))
    assert torch.load(cut / "last.pt")["average"]["count"] == 2
    assert not (cut / "average.safetensors").exists()
    finish(build(data, cut, recipe, val=False), resume=True)
    assert learned(cut) == learned(whole)


def test_the_average_is_that_of_the_epochs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = []

    def noted(classifier: VideoClassifier, *arguments: Any, **options: Any) -> Any:
        evaluated.append(digest(classifier.model))
        return evaluate(classifier, *arguments, **options)

    monkeypatch.setattr(loop, "evaluate", noted)
    trainer = build(data, tmp_path, replace(PLAIN, epochs=3, average_from=2))
    trainer.folder.start({}, CLASSES)
    epochs = []
    for record in trainer.run():
        if record["kind"] == "eval" and record["epoch"] >= 2:
            epochs.append({k: v.double() for k, v in trainer.model.state_dict().items()})
    average = load(trainer.folder.average, device="cpu")
    for name, value in average.state_dict().items():
        expected = torch.stack([state[name] for state in epochs]).mean(0)
        assert (value - expected).abs().max() < 1e-6, name
    assert record["kind"] == "average"
    assert evaluated[2:] == [digest(trainer.model), digest(average)]
    # The run itself ends with its own weights, and a state that needs no average any more.
    assert epochs[-1].keys() == trainer.model.state_dict().keys()
    assert all(torch.equal(epochs[-1][k], v) for k, v in trainer.model.state_dict().items())
    assert "average" not in trainer.folder.load_state(trainer.folder.last)


def test_no_average_unless_asked(data: Path, tmp_path: Path) -> None:
    finish(build(data, tmp_path, PLAIN, should_stop=at_call(3, lambda: True)))
    assert sorted(torch.load(tmp_path / "last.pt")) == [
        *("log_sizes", "model", "optimizer", "progress", "scaler", "settings")
    ]
    finish(build(data, tmp_path, PLAIN), resume=True)
    assert not (tmp_path / "average.safetensors").exists()
    assert {record["kind"] for record in RunFolder(tmp_path).records("metrics")} == {
        *("train", "eval")
    }


def test_speed_counts_only_what_this_process_did(data: Path, tmp_path: Path) -> None:
    running = replace(RUNNING, log_every=4)
    recipe = replace(RECIPE, batch_size=2)  # 6 steps an epoch
    trainer = build(data, tmp_path, recipe, running=running, should_stop=at_call(3, lambda: True))
    finish(trainer)
    trainer = build(data, tmp_path, recipe, running=running)
    trainer.resume()
    start = time.monotonic()
    record = next(iter(trainer.run()))
    assert record["step"] == 4
    assert record["clips_per_second"] * (time.monotonic() - start) < 3 * recipe.batch_size


def losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.run() if record["kind"] == "train"]


def assert_same_weights(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        other = state[key]
        if key.endswith("in_proj_bias"):
            # The keys' bias changes no attention. Its gradient is rounding, which Adam scales up.
            value, other = (x.view(3, -1)[::2] for x in (value, other))
        assert (other - value).abs().max() < 1e-5, key


def test_parts_and_recomputation_change_nothing(data: Path, tmp_path: Path) -> None:
    results = {}
    for name, micro_batch, recompute in (
        ("plain", None, False),
        ("parts", 2, False),
        ("recomputed", None, True),
        ("both", 3, True),
    ):
        # Without the head, whose dropout is drawn for each part.
        trainer = build(
            data,
            tmp_path / name,
            replace(PLAIN, micro_batch=micro_batch),
            running=replace(RUNNING, recompute=recompute),
            val=False,
            model="plain",
        )
        trainer.folder.start({}, CLASSES)
        results[name] = losses(trainer), trainer.model.state_dict()
    expected, state = results.pop("plain")
    start = load(data / "plain.safetensors").state_dict()
    assert any((state[key] - start[key]).abs().max() > 1e-4 for key in state)
    for other, weights in results.values():
        assert other == pytest.approx(expected, abs=1e-5)
        assert_same_weights(weights, state)


def test_parts_are_encoded_twice_but_for_the_first(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []
    forward = Towers.forward

    def noted(towers: Towers, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = forward(towers, *inputs)
        encoded.append((torch.is_grad_enabled(), outputs[0].detach()))
        return outputs

    monkeypatch.setattr(Towers, "forward", noted)
    finish(build(data, tmp_path, replace(RECIPE, epochs=1), val=False))
    assert len(encoded) == 2 * 5
    for step in (encoded[:5], encoded[5:]):
        kinds = [(learns, len(videos)) for learns, videos in step]
        assert kinds == [(False, 2), (False, 1), (True, 2), (True, 2), (True, 1)]
        # What is random is the same both times.
        assert torch.equal(step[0][1], step[3][1])
        assert torch.equal(step[1][1], step[4][1])


def test_recomputation_repeats_what_was_drawn(
    data: Path, tmp_path: Path, whole: tuple[str, dict[str, Any]]
) -> None:
    running = replace(RUNNING, recompute=True)
    finish(build(data, tmp_path, running=running))
    other = [r["loss"] for r in learned(tmp_path)["metrics"] if r["kind"] == "train"]
    expected = [r["loss"] for r in whole[1]["metrics"] if r["kind"] == "train"]
    assert other == pytest.approx(expected, abs=1e-5)


def poison(trainer: Trainer, path: str) -> None:
    """Make the embedding of one video no number."""
    towers = trainer.towers
    assert isinstance(towers, Towers)
    encode = trainer._encode

    def poisoned(module: torch.nn.Module, part: int, batch: Any) -> Any:
        video, text, scale = encode(module, part, batch)
        hit = torch.tensor([p == path for p in batch.paths])
        return torch.where(hit[:, None], video * math.nan, video), text, scale

    trainer._encode = poisoned  # type: ignore[method-assign]


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_loss_that_is_no_number_stops_the_run(
    micro_batch: int | None, data: Path, tmp_path: Path
) -> None:
    trainer = build(data, tmp_path, replace(PLAIN, micro_batch=micro_batch))
    start = digest(trainer.model)
    path = str(data / "train" / CLASSES[0] / "2.mp4")
    poison(trainer, path)
    with pytest.raises(TrainingError, match="not finite") as caught:
        finish(trainer)
    message = str(caught.value)
    step = trainer.progress.step + 1
    assert f"the loss is not finite in step {step} (rank 0: {path});" in message
    assert "\n" not in message
    if step == 1:
        assert digest(trainer.model) == start
    assert not trainer.folder.last.exists() or step > 2


def test_a_gradient_that_is_no_number_stops_the_run(data: Path, tmp_path: Path) -> None:
    trainer = build(data, tmp_path, PLAIN)
    trainer.model.clip.visual.proj.register_hook(lambda grad: grad * math.inf)
    start = digest(trainer.model)
    with pytest.raises(TrainingError, match=r"the gradient is not finite in step 1 \(all ranks\)"):
        finish(trainer)
    assert digest(trainer.model) == start


def test_bad_videos_within_the_limit(
    data: Path, tmp_path: Path, whole: tuple[str, dict[str, Any]]
) -> None:
    # An epoch draws ten videos, and the broken one at most once.
    assert finish(build(data, tmp_path, running=replace(RUNNING, max_bad=0.1))) == whole[0]
    assert learned(tmp_path) == whole[1]
    epochs = [fault["epoch"] for fault in RunFolder(tmp_path).records("bad_samples")]
    assert 1 <= len(epochs) == len(set(epochs)) <= 2


def test_too_many_bad_videos(data: Path, tmp_path: Path) -> None:
    trainer = build(data, tmp_path, running=replace(RUNNING, max_bad=0.05))
    with pytest.raises(TooManyBadError) as caught:
        finish(trainer)
    epoch = trainer.progress.step // 2 + 1
    message = str(caught.value)
    assert (
        f"1 of the 10 videos of epoch {epoch} cannot be used so far, more than --max-bad 0.05"
        in message
    )
    assert str(data / BROKEN) in message
    assert str(tmp_path / "bad_samples.jsonl") in message
    assert "\n" not in message
    (fault,) = RunFolder(tmp_path).records("bad_samples")
    assert fault["step"] == trainer.progress.step + 1


def test_a_disk_that_is_gone(data: Path, tmp_path: Path) -> None:
    trainer = build(data, tmp_path)
    nowhere = [replace(sample, path=f"{sample.path}.gone") for sample in trainer.clips.samples]
    trainer.clips.samples = nowhere
    with pytest.raises(TooManyBadError, match=r"50 of the 10 videos of epoch 1"):
        finish(trainer)


def test_an_evaluation_names_what_it_could_not_use(data: Path, tmp_path: Path) -> None:
    trainer = build(data, tmp_path, running=RUNNING)
    assert trainer.val is not None
    gone = replace(trainer.val.samples[1], path=str(tmp_path / "gone.mp4"))
    trainer.val = replace(trainer.val, samples=(*trainer.val.samples[:1], gone))
    records = [record for record in trainer.run() if record["kind"] != "train"]
    assert [record["failed"] for record in records] == [1, 1, 1]
    listed = [r for r in RunFolder(tmp_path).records("bad_samples") if r["part"] == "val"]
    assert [(r["path"], r["reason"]) for r in listed] == [(gone.path, "missing")] * 3


def test_what_runs_out_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = build(data, tmp_path)
    monkeypatch.setattr(trainer, "_loss", too_much)
    with pytest.raises(TrainingError, match=r"out of memory in step 1; use --micro-batch"):
        finish(trainer)


def test_a_worker_that_is_killed_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(data, tmp_path, running=replace(RUNNING, workers=1))

    def kill(*_: Any) -> Any:
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid or 0, signal.SIGKILL)
        time.sleep(5)  # the signal of its end comes here

    monkeypatch.setattr(trainer, "_backward", kill)
    with pytest.raises(TrainingError, match=r"reads videos died \(DataLoader worker .*fewer --wor"):
        finish(trainer)


def renamed(videos: VideoList) -> VideoList:
    return replace(videos, class_names=tuple(name.upper() for name in videos.class_names))


def test_wrong_input(data: Path, tmp_path: Path) -> None:
    model = load(data / "model.safetensors", device="cpu")
    videos, val = read_video_list(data / "train"), read_video_list(data / "val")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match=r"val has other classes than .*train"):
        Trainer(model, videos, RECIPE, folder, val=renamed(val))
    with pytest.raises(InputError, match="batch_size is 13 and there are 12 videos"):
        Trainer(model, videos, replace(RECIPE, batch_size=13), folder)
    with pytest.raises(InputError, match=r"weights are torch\.bfloat16; load the model in float32"):
        Trainer(model.bfloat16(), videos, RECIPE, folder)
    assert not folder.path.exists()
    for name, value in (("workers", -1), ("log_every", 0), ("save_every", 0)):
        with pytest.raises(InputError, match=f"{name} is {value}; use at least"):
            Running(**{name: value})
    with pytest.raises(InputError, match=r"max_bad is 1.5; use a share"):
        Running(max_bad=1.5)


def test_other_settings_are_named(data: Path, tmp_path: Path) -> None:
    finish(build(data, tmp_path, should_stop=at_call(1, lambda: True)))
    state = (tmp_path / "last.pt").read_bytes()
    other = build(data, tmp_path, replace(RECIPE, epochs=4, seed=7), val=False)
    with pytest.raises(InputError) as caught:
        other.resume()
    message = str(caught.value)
    assert f"{tmp_path} was started with other settings (" in message
    for text in ("recipe.epochs was 2, is 4", "recipe.seed was 0, is 7", "data.val was"):
        assert text in message
    assert message.count(" was ") == 4
    assert "\n" not in message
    assert (tmp_path / "last.pt").read_bytes() == state


# Several processes.


def work(rank: int, port: int, data: Path, folder: Path) -> None:
    """Be one of two processes and do everything that the tests below look at."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    distributed.start("cpu", timeout_seconds=30)
    results: dict[str, Any] = {}
    for name, micro_batch in (("plain", None), ("parts", 2), ("ones", 1)):
        recipe = replace(PLAIN, micro_batch=micro_batch, average_from=1)
        trainer = build(data, folder / name, recipe, val=False, model="plain")
        if rank == 0:
            trainer.folder.start({}, CLASSES)
        results[name] = losses(trainer), trainer.model.state_dict()

    results["whole"] = finish(build(data, folder / "whole"))
    for call in (1, 3):
        # Only one process is asked to stop; in the evaluation each has two videos.
        stop = at_call(call, lambda: rank == 1)
        trainer = build(data, folder / f"cut{call}", should_stop=stop)
        finish(trainer)
        results[f"step{call}"] = trainer.progress.step
        distributed.barrier()
        results[f"cut{call}"] = finish(build(data, folder / f"cut{call}"), resume=True)

    path = str(data / "train" / CLASSES[0] / "2.mp4")
    trainer = build(data, folder / "poisoned", PLAIN)
    poison(trainer, path)
    before = digest(trainer.model)
    try:
        finish(trainer)
    except TrainingError as error:
        results["message"] = str(error)
        results["unchanged"] = digest(trainer.model) == before
        results["poisoned step"] = trainer.progress.step
    torch.save(results, folder / f"{rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def ranks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    processes.run(2, work, processes.free_port(), data, folder, seconds=90)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", ["plain", "parts", "ones"])
def test_two_processes_learn_what_one_does(
    name: str, ranks: tuple[Path, list[Any]], data: Path, tmp_path: Path
) -> None:
    recipe = replace(PLAIN, average_from=1)
    trainer = build(data, tmp_path, recipe, val=False, model="plain")
    trainer.folder.start({}, CLASSES)
    expected, state = losses(trainer), trainer.model.state_dict()
    average = load(ranks[0] / name / "average.safetensors", device="cpu").state_dict()
    assert_same_weights(average, load(trainer.folder.average, device="cpu").state_dict())
    for result in ranks[1]:
        other, weights = result[name]
        assert other == pytest.approx(expected, abs=1e-5)
        assert_same_weights(weights, state)


def test_two_processes_stop_together_and_resume_exactly(ranks: tuple[Path, list[Any]]) -> None:
    folder, results = ranks
    assert results[0]["whole"] == results[1]["whole"]
    for call, step in ((1, 1), (3, 2)):
        for result in results:
            assert result[f"step{call}"] == step
            assert result[f"cut{call}"] == result["whole"]
        assert learned(folder / f"cut{call}") == learned(folder / "whole")


def test_all_processes_stop_at_a_loss_that_is_no_number(ranks: tuple[Path, list[Any]]) -> None:
    _, (first, second) = ranks
    assert first["message"] == second["message"]
    assert first["poisoned step"] == second["poisoned step"]
    assert first["unchanged"] == second["unchanged"]
    assert "the loss is not finite in step" in first["message"]

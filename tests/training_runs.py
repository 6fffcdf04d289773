"""Trainings as processes of their own: quickly started, signalled, killed, and compared.

The processes come from a server that has imported the command once, and do what torchrun's do:
the same arguments and environment, and once one has died the others are told to end.
"""

import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import processes
import torch
from training_files import CLASSES

from actionclip import distributed
from actionclip.annotations import read_video_list
from actionclip.cli import train as command
from actionclip.dataset import build_loader
from actionclip.errors import TrainingError
from actionclip.recipe import Recipe
from actionclip.runs import RunFolder
from actionclip.train import Running, Trainer
from actionclip.weights import digest, load

# Everything random and all kinds of records, six steps, saved after each.
OPTIONS = (
    *("--train", "train", "--val", "val", "--model", "model.safetensors", "--device", "cpu"),
    *("--precision", "fp32", "--epochs", "3", "--batch-size", "5", "--micro-batch", "2"),
    *("--lr", "1e-3", "--warmup-epochs", "0.5", "--drop-path", "0.3", "--average-from", "2"),
    *("--log-every", "1", "--save-every", "1", "--max-bad", "1", "--stall-timeout", "60"),
)
# What the command imports, some of it late; the server has it all.
PRELOAD = ["actionclip.cli.train", "torch._dynamo", "matplotlib.backends.backend_agg"]
# How long anything here may take before it counts as hung; a training takes about a second.
HANG_SECONDS = 120

# Where a signal can meet a training, in the order in which it comes there.
MOMENTS = ("loading", "first step", "middle", "evaluation", "saving", "average")


@dataclass(frozen=True)
class Orders:
    """What a process does besides its training.

    Attributes:
        signals: to send itself at a moment.
        moment: one of `MOMENTS`.
        file_bytes: the largest file that it may write; None for any.
    """

    signals: Sequence[int] = ()
    moment: str = ""
    file_bytes: int | None = None


class Training:
    """One start of the command, as one process or several.

    Args:
        data: folder of `training_files.write_all`, where the command runs.
        output: of the run; what the processes say is written beside it.
        arguments: besides `OPTIONS`.
        ranks: number of processes.
        orders: for the first of them.
    """

    def __init__(
        self,
        data: Path,
        output: Path,
        *arguments: str,
        ranks: int = 1,
        orders: Orders | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.output = output
        self.log = output.with_name(f"{output.name}.log")
        self.log.unlink(missing_ok=True)
        argv = [*OPTIONS, "--output", str(output), *arguments]
        port = processes.free_port() if ranks > 1 else None
        self.ranks: list[BaseProcess] = [
            context.Process(
                target=_train,
                args=(rank, ranks, port, data, self.log, argv, None if rank else orders),
            )
            for rank in range(ranks)
        ]
        self.started = time.monotonic()
        for process in self.ranks:
            process.start()

    def wait(self, seconds: float = HANG_SECONDS) -> bool:
        """Wait for the end of all processes; returns whether it came."""
        deadline = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        return not any(process.is_alive() for process in self.ranks)

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.ranks]

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one process."""
        pid = self.ranks[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self, rank: int) -> float:
        """Kill one process, tell the others to end; returns the seconds until they have."""
        self.signal(signal.SIGKILL, rank)
        self.ranks[rank].join(HANG_SECONDS)
        start = time.monotonic()
        for process in self.ranks:
            if process.is_alive():
                process.terminate()
        self.wait()
        seconds = time.monotonic() - start
        self.clear()
        return seconds

    def clear(self) -> None:
        """Leave no process behind, not even one that hangs."""
        for process in self.ranks:
            process.kill()
            process.join(HANG_SECONDS)

    @property
    def lines(self) -> list[str]:
        """What the command said so far."""
        start = "actionclip-train: "
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.removeprefix(start) for line in lines if line.startswith(start)]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Return what torchrun tells its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _train(
    rank: int,
    world: int,
    port: int | None,
    data: Path,
    log: Path,
    argv: Sequence[str],
    orders: Orders | None,
) -> None:
    """Be one process of a training."""
    # Those that read videos are made as in a program that no server has started.
    multiprocessing.set_start_method("fork", force=True)

    if port is not None:
        os.environ |= rank_environment(rank, world, port)
    os.environ["ACTIONCLIP_HOME"] = str(log.parent / "home")
    os.chdir(data)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if orders is not None:
        if orders.file_bytes is not None:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (orders.file_bytes, most))
        if orders.moment:
            _at(orders.moment, lambda: [os.kill(os.getpid(), each) for each in orders.signals])
    sys.exit(command.main(argv))


def _at(moment: str, act: Callable[[], object]) -> None:
    """Let this process act once when its training comes to a moment."""
    pending = [act]

    def now() -> None:
        while pending:
            pending.pop()()

    def before(owner: Any, name: str, condition: Callable[..., bool] = lambda *_: True) -> None:
        original = getattr(owner, name)

        def disturbed(*arguments: Any, **options: Any) -> Any:
            if condition(*arguments):
                now()
            return original(*arguments, **options)

        setattr(owner, name, disturbed)

    match moment:
        case "loading":
            before(command, "read_data")
        case "first step":
            before(Trainer, "_backward")
        case "middle":
            before(Trainer, "_backward", lambda trainer, _: trainer.progress.step == 2)
        case "evaluation":
            before(command.Bar, "count_video")
        case "saving":
            _during_save(now)
        case "average":
            before(Trainer, "_finish_average")


def _during_save(act: Callable[[], object]) -> None:
    """Act when a state is written in part."""
    save = torch.save

    class Written:
        def __init__(self, file: Any) -> None:
            self.file, self.size = file, 0

        def write(self, data: Any) -> int:
            self.size += len(data)
            if self.size > 1_000_000:
                act()
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    torch.save = lambda state, file: save(state, Written(file))


def result(output: Path) -> dict[str, Any]:
    """Return all that a training leaves behind but its speed, weights as hashes."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    names = ("bad_samples.jsonl", "best.safetensors", "average.safetensors")
    weights = hashlib.sha256()
    for name, value in sorted(torch.load(output / "last.pt")["model"].items()):
        weights.update(name.encode() + value.numpy().tobytes())
    return {
        "metrics": [{**json.loads(line), "clips_per_second": 0} for line in lines],
        "weights": weights.hexdigest(),
        **{
            name: hashlib.sha256((output / name).read_bytes()).hexdigest()
            for name in names
            if (output / name).exists()
        },
    }


def unreadable(output: Path) -> list[str]:
    """Return which of a run's states are there and cannot be read, told without our reader."""
    found = []
    for name in ("last.pt", "previous.pt"):
        if (output / name).exists():
            try:
                assert zipfile.ZipFile(output / name).testzip() is None
                torch.load(output / name)
            except Exception as error:
                found.append(f"{name}: {error}")
    return found


def flip_a_bit(path: Path) -> None:
    """Change a bit in the middle of a file, in weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@dataclass
class Tally:
    """What became of trainings that were killed.

    Attributes:
        kills: how many kills there were.
        same: those of trainings that ended as if nothing had happened.
        no_state: those that left an unreadable state, or none after there had been one.
        seconds: the longest time after a kill until all processes had ended.
        notes: what went wrong.
    """

    kills: int = 0
    same: int = 0
    no_state: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


def kill_at_random(
    data: Path, scratch: Path, *, ranks: int, workers: int, kills: int, seed: int
) -> Tally:
    """Kill trainings at random moments, resume them each time, and compare how they end."""
    arguments = ("--workers", str(workers), "--resume", "latest")
    whole = Training(data, scratch / "whole", *arguments, ranks=ranks)
    if not whole.wait() or set(whole.codes) != {0}:
        whole.clear()
        return Tally(notes=[f"the undisturbed run ended with {whole.codes}: {whole.lines[-1:]}"])
    length, expected = time.monotonic() - whole.started, result(whole.output)
    tally, drawn = Tally(), random.Random(seed)
    output = scratch / "run"
    while tally.kills < kills:
        killed, had_state = 0, False
        while True:
            training = Training(data, output, *arguments, ranks=ranks)
            if tally.kills + killed == kills or training.wait(drawn.uniform(0, length)):
                break
            tally.seconds = max(tally.seconds, training.kill(drawn.randrange(ranks)))
            killed += 1
            faults = unreadable(output)
            has_state = (output / "last.pt").exists() or (output / "previous.pt").exists()
            if faults or (had_state and not has_state):
                tally.no_state += 1
                tally.notes.append(f"after a kill: {faults or 'no state'}")
            had_state = has_state
        training.wait()
        training.clear()
        tally.kills += killed
        if set(training.codes) == {0} and result(output) == expected:
            tally.same += killed
        else:
            tally.notes.append(f"ended with {training.codes}: {training.lines[-1:]}")
        shutil.rmtree(output, ignore_errors=True)
    return tally


@dataclass(frozen=True)
class Stop:
    """What a training did that got signals at one of `MOMENTS`.

    Attributes:
        moment: when they came.
        code: of its exit.
        line: its last one.
        seconds: from its start to its end.
    """

    moment: str
    code: int | None
    line: str
    seconds: float


def stop_at_moments(data: Path, output: Path, number: int) -> Iterator[Stop]:
    """Stop a training at each of `MOMENTS` in turn, resumed each time, then let it end."""
    for moment in (*MOMENTS, ""):
        orders = Orders((number,), moment)
        training = Training(data, output, "--resume", "latest", "--workers", "0", orders=orders)
        training.wait()
        training.clear()
        seconds = time.monotonic() - training.started
        yield Stop(moment, training.codes[0], training.lines[-1], seconds)


def wait_for_lines(training: Training, count: int) -> None:
    """Wait until a training's metrics have so many lines."""
    path = training.output / "metrics.jsonl"
    deadline = time.monotonic() + HANG_SECONDS
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline, training.lines[-3:]
        assert None in training.codes, training.lines[-3:]
        time.sleep(0.01)


def reading_process(training: Training) -> int:
    """Return a process that reads videos for the first one, on Linux."""
    pid = training.ranks[0].pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])


def rank_process(launcher: int, rank: int) -> int:
    """Return the process that a launcher started as this rank, on Linux."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


# A loss that is no number.

CASES = {
    "contrastive": Recipe(precision="fp32"),
    "contrastive in parts": Recipe(micro_batch=2),
    "contrastive, fp16": Recipe(precision="fp16"),
    "classes": Recipe(loss="classes"),
    "classes in parts": Recipe(loss="classes", micro_batch=2),
    "classes, fp16": Recipe(loss="classes", precision="fp16"),
}


def poisoned(data: Path, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """Let a video of the second of two ranks have no number as embedding in step 2.

    Returns:
        For each of `CASES` what both ranks then have: the message, the path of the video, and
        whether the weights are those from before the step.
    """
    port = processes.free_port()
    processes.run(2, _be_poisoned, port, data, scratch, seconds=HANG_SECONDS)
    ranks = [torch.load(scratch / f"{rank}.pt") for rank in range(2)]
    return {case: [found[case] for found in ranks] for case in CASES}


def _be_poisoned(rank: int, port: int, data: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, 2, port)
    distributed.start("cpu", timeout_seconds=HANG_SECONDS)
    torch.save(
        {case: _stop_of(rank, case, data, scratch) for case in CASES}, scratch / f"{rank}.pt"
    )
    distributed.stop()


def _stop_of(rank: int, case: str, data: Path, scratch: Path) -> dict[str, Any]:
    recipe = replace(CASES[case], epochs=2, batch_size=8, warmup_epochs=0, augmentation=None)
    trainer = Trainer(
        load(data / "plain.safetensors", device="cpu"),
        read_video_list(data / "train"),
        replace(recipe, templates=("{}",), learning_rate=1e-3),
        RunFolder(scratch / case),
        running=Running(workers=0, log_every=1, max_bad=1),
    )
    loader = build_loader(trainer.clips, trainer._sampler(), 0)
    path = list(loader)[1].paths[2]
    weights = {}

    def poison(outputs: tuple[torch.Tensor, ...], part: int) -> tuple[torch.Tensor, ...]:
        """Spoil the third video, the first of the second part or the third of the only one."""
        if trainer.progress.step == 1:
            weights.setdefault("before", digest(trainer.model))
            if rank == 1 and part == (recipe.micro_batch is not None):
                row = torch.arange(len(outputs[0])) == (0 if recipe.micro_batch else 2)
                first = torch.where(row[:, None], math.nan, outputs[0])
                return first, *outputs[1:]
        return outputs

    encode, compare = trainer._encode, trainer._compare
    trainer._encode = lambda t, part, *rest: poison(encode(t, part, *rest), part)
    trainer._compare = lambda t, part, *rest: poison(compare(t, part, *rest), part)
    if rank == 0:
        trainer.folder.start({}, trainer.train.class_names)
    try:
        for _ in trainer.run():
            pass
    except TrainingError as error:
        unchanged = digest(trainer.model) == weights["before"]
        return {"message": str(error), "path": path, "unchanged": unchanged}
    return {"message": "", "path": path, "unchanged": False}


# Broken videos.

MANY = 400


def write_many(data: Path, name: str, broken: int) -> None:
    """Write a list of `MANY` videos: names of a few clips, and so many that are none."""
    clips = {text: (data / "train" / text / "0.mp4") for text in CLASSES}
    drawn = set(random.Random(broken).sample(range(MANY), broken))
    for i in range(MANY):
        text = CLASSES[i % len(CLASSES)]
        path = data / name / text / f"{i}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i not in drawn:
            os.link(clips[text], path)
        elif i % 2:
            path.write_bytes(clips[text].read_bytes()[:1000])
        else:
            path.write_text("no video")


def train_on_many(data: Path, output: Path, name: str, *, stop: bool = False) -> Training:
    """Train an epoch on such a list; on demand stopped on the way and resumed."""
    arguments = (
        *("--train", name, "--epochs", "1", "--average-from", "1", "--batch-size", "50"),
        *("--micro-batch", "50", "--save-every", "1000", "--workers", "0", "--max-bad", "0.01"),
        *("--no-augmentation", "--resume", "latest"),
    )
    for moment in ("middle", "") if stop else ("",):
        training = Training(data, output, *arguments, orders=Orders((signal.SIGTERM,), moment))
        training.wait()
        training.clear()
    return training

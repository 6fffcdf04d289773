"""What does one busy core cost the image encoder, whose threads spin while they wait?

    python benchmarks/bench_busy.py [--repeats 5] [--json FILE]

Each way of waiting is set in the environment of a process of its own, which encodes one video of
8 frames whenever it is told to: on the quiet machine, and beside an unrelated program that
keeps one core busy. `default` is PyTorch's own setting, `commands` what our commands set before
they import it; the others are there to choose from. The embeddings of all must agree.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import measure
import torch

from actionclip.cli.console import set_up
from actionclip.inference import pack
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.clip import cast_encoders
from actionclip.precision import automatic_dtype
from actionclip.published import MODELS

COMMANDS = "commands"
WAYS: dict[str, dict[str, str]] = {
    "default": {},
    COMMANDS: {},  # filled in by the commands' own function
    "no spinning": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
set_up(WAYS[COMMANDS])
# Whatever the user or the suite has set must not reach the processes.
VARIABLES = {*WAYS[COMMANDS], "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS"}
# Sums of the same embeddings, added up in another order by another number of threads.
TOLERANCE = 1e-4


def serve(model_name: str) -> None:
    """In a process of its own: encode a video for each line that comes, and print the seconds."""
    torch.manual_seed(0)
    model = ActionCLIP(ActionCLIPConfig(MODELS[model_name].config.clip)).eval()
    dtype = automatic_dtype(torch.device("cpu"))
    cast_encoders(model.clip, dtype)
    packed = pack(model)
    videos = torch.randn(1, 8, 3, 224, 224)
    with torch.inference_mode():
        for _ in range(3):
            embedding = packed.encode_video(videos).float()
        print(float(embedding.abs().mean()), torch.get_num_threads(), str(dtype), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            packed.encode_video(videos)
            print(time.perf_counter() - start, flush=True)


@dataclass
class Server:
    """A process with its own way of waiting, ready to encode."""

    process: subprocess.Popen[str]
    embedding: float
    threads: int
    dtype: str

    def seconds(self) -> float:
        """Let it encode a video once."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(_answer(self.process))


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the encoding process ended with code {process.wait()}")
    return line


@contextlib.contextmanager
def serving(model: str, settings: dict[str, str]) -> Iterator[Server]:
    """Start a process in an environment without the user's own settings."""
    environment = {name: os.environ[name] for name in os.environ if name not in VARIABLES}
    process = subprocess.Popen(
        [sys.executable, __file__, "--model", model, "--serve"],
        env=environment | settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        embedding, threads, dtype = _answer(process).split()
        yield Server(process, float(embedding), int(threads), dtype)
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy meanwhile, with a program that has nothing to do with ours."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def time_all(servers: dict[str, Server], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return for each way the seconds of every round, quiet and busy."""
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"quiet": [], "busy": []} for name in servers
    }
    for _ in range(repeats):
        for name, server in servers.items():
            seconds[name]["quiet"].append(measure.undisturbed(server.seconds)[0])
            with busy_core():
                seconds[name]["busy"].append(measure.undisturbed(server.seconds)[0])
    return seconds


def summarise(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict]:
    """Return for each way what a busy core costs, and what the way costs without one."""
    summary = {}
    for name, rounds in seconds.items():
        slowdowns = _ratios(rounds["busy"], rounds["quiet"])
        losses = _ratios(rounds["quiet"], seconds["default"]["quiet"])
        summary[name] = {
            "settings": WAYS[name],
            "quiet_milliseconds": round(1000 * statistics.median(rounds["quiet"]), 1),
            "busy_milliseconds": round(1000 * statistics.median(rounds["busy"]), 1),
            "slower_when_busy": _spread(slowdowns),
            "quiet_over_default": _spread(losses),
        }
    return summary


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _spread(ratios: list[float]) -> list[float]:
    """Return the median, the lowest and the highest."""
    return [round(value, 3) for value in (statistics.median(ratios), min(ratios), max(ratios))]


def print_summary(summary: dict[str, dict]) -> None:
    for name, way in summary.items():
        slower, low, high = way["slower_when_busy"]
        print(
            f"  {name:12} {way['quiet_milliseconds']:8.1f} ms, with a busy core "
            f"{way['busy_milliseconds']:8.1f} ms: x{slower:.2f} [{low:.2f}..{high:.2f}]; "
            f"quiet over default x{way['quiet_over_default'][0]:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="ViT-B/32", choices=[m for m in MODELS if "ViT" in m])
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model)
        return
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(serving(arguments.model, settings))
            for name, settings in WAYS.items()
        }
        right = servers["default"].embedding
        for name, server in servers.items():
            assert abs(server.embedding - right) < TOLERANCE * right, f"{name} disagrees"
        seconds = time_all(servers, arguments.repeats)
    summary = summarise(seconds)
    dtype = servers["default"].dtype.removeprefix("torch.")
    print(f"{arguments.model}, 8 frames, {dtype}, {servers['default'].threads} threads")
    print_summary(summary)
    ours = seconds[COMMANDS]
    row = measure.row(
        "one busy core", {"the quiet machine": _ratios(ours["quiet"], ours["busy"])}, "limit"
    )
    if arguments.json:
        measure.write_json(
            arguments.json,
            {"rows": [row], "model": arguments.model, "dtype": dtype, "ways": summary},
        )


if __name__ == "__main__":
    main()

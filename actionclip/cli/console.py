"""Start a command as a program of its own, and end it.

The console scripts and `python -m actionclip` enter here, before anything imports PyTorch, which
reads the settings below when it is imported. `main` of a command does without all this.
"""

import importlib
import os
import signal
import sys
from collections.abc import MutableMapping, Sequence
from typing import NoReturn

# The compiler, and the server of the processes that decode, which has a socket in a folder.
LEAVE_THINGS = ("torch._inductor", "multiprocessing.forkserver")


def zeroshot() -> NoReturn:
    """Run `actionclip-zeroshot`."""
    run("zeroshot")


def train() -> NoReturn:
    """Run `actionclip-train`."""
    run("train")


def eval() -> NoReturn:
    """Run `actionclip-eval`."""
    run("eval")


def check() -> NoReturn:
    """Run `actionclip-check`."""
    run("check")


def run(command: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and end the program with its exit code."""
    set_up(os.environ)
    if command == "train" and hasattr(signal, "SIGUSR1"):
        # Slurm's announcement of the end; there is nothing to save before the command hears it.
        signal.signal(signal.SIGUSR1, lambda *_: leave(143))
    try:
        code = call(command, argv)
    except KeyboardInterrupt:  # while the command was imported; it handles its own
        print(f"actionclip-{command}: interrupted", file=sys.stderr)
        leave(130)
    # Only this one is worth it, and not if it has to clean up.
    if command == "zeroshot" and sys.modules.keys().isdisjoint(LEAVE_THINGS):
        leave(code)
    sys.exit(code)


def call(command: str, argv: Sequence[str] | None = None) -> int:
    """Import a command and run it; returns its exit code."""
    code: int = importlib.import_module(f"actionclip.cli.{command}").main(argv)
    return code


def set_up(environ: MutableMapping[str, str]) -> None:
    """Choose how PyTorch's threads wait for each other, unless the user did."""
    if "OMP_WAIT_POLICY" not in environ:
        # They spin, by default for milliseconds, so that a single core which is busy with another
        # program made an encoder 17 times slower. This often costs nothing on idle cores.
        environ.setdefault("GOMP_SPINCOUNT", "10000")


def leave(code: int) -> NoReturn:
    """End the program at once: taking PyTorch apart takes half as long as importing it.

    For a command that has closed its files and ended its threads, and started no process.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        sys.exit(code)  # Python says at its exit what it could not write
    os._exit(code)

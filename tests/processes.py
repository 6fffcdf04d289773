"""Several processes on this machine, in place of those that torchrun starts."""

import multiprocessing
import socket
import time
from collections.abc import Callable


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(world: int, work: Callable[..., None], *arguments: object, seconds: float) -> None:
    """Let `world` processes do `work(rank, *arguments)`; all must end well and in time."""
    # A server that imports torch once and is never threaded: quick and safe to fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    processes = [
        context.Process(target=work, args=(rank, *arguments), daemon=True) for rank in range(world)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world

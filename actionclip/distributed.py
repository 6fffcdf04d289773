"""Processes of one training or evaluation run, started by torchrun: who am I, and collect.

Every function also works in a single process, where it does next to nothing. In several,
each call except for the ranks is a collective: all processes must make it, in the same order.
Models and losses know nothing of processes; the loops around them call this.
"""

import os
import time
import uuid
from collections.abc import Sequence
from datetime import timedelta
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from actionclip.errors import InputError

Item = TypeVar("Item")

# Seconds between two looks of the first process for the others.
LOOK_SECONDS = 0.02


def start(device_type: Literal["cpu", "cuda"], timeout_seconds: float = 600.0) -> None:
    """Join the other processes that torchrun started; alone, do nothing.

    Args:
        device_type: "cuda" takes the GPU of the local rank and NCCL, "cpu" takes gloo.
        timeout_seconds: how long a collective waits for the slowest process before it fails.

    Raises:
        InputError: if torchrun's environment is incomplete, or there are fewer GPUs than
            processes on this machine, or some do not come in time.
    """
    if "WORLD_SIZE" not in os.environ:
        return
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: start several processes with "
            "torchrun, or unset WORLD_SIZE"
        )
    if device_type == "cuda":
        if local_rank() >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK is {local_rank()} but this machine shows {torch.cuda.device_count()} "
                "GPUs: start no more processes than that (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank())
    backend = "nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = _fresh_part(store, rank, world_size, timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _fresh_part(
    store: dist.Store, rank: int, world_size: int, timeout_seconds: float
) -> dist.Store:
    """Agree with the others on a part of the store that holds nothing yet.

    torchrun keeps the store when it restarts the processes, with the addresses of those that
    have ended. Whoever finds one tries for ever to reach it: so hung some restarts (torch
    2.13). The number of the restart cannot tell them apart, as each machine counts its own.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"answer/{own}").decode()
        store.set(f"heard/{name}/{rank}", "")
        return dist.PrefixStore(name, store)
    deadline = time.monotonic() + timeout_seconds
    absent = list(range(1, world_size))
    while absent := [i for i in absent if not store.check([f"heard/{own}/{i}"])]:
        if time.monotonic() > deadline:
            raise InputError(
                f"of {world_size} processes {', '.join(map(str, absent))} did not come within "
                f"{timeout_seconds:g} s; start all of them"
            )
        for i in absent:
            # It may be the question of a process that has ended; the next one asks anew.
            if store.check([f"asks/{i}"]):
                store.set(f"answer/{store.get(f'asks/{i}').decode()}", own)
        time.sleep(LOOK_SECONDS)
    return dist.PrefixStore(own, store)


def lost_another(error: RuntimeError) -> bool:
    """Return whether an error says that another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def stop() -> None:
    """Leave the other processes; alone, do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Return the number of this process on this machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def gather_rows(x: Tensor) -> tuple[Tensor, slice]:
    """Concatenate the rows of all processes in rank order.

    Gradients are summed: each process receives what all losses together say about its rows.
    Shares of a loss (`losses.contrastive_kl` with `rows`) therefore need no division, and the
    gradients of parameters must be summed over the processes, not averaged.

    Args:
        x: (n, ...) with any type and any n, 0 included; the rest of the shape is the same
            everywhere. Gradients are summed in its type. If it requires a gradient, it must
            in all processes, and all must run the backward pass.

    Returns:
        (N, ...) rows of all processes, and where those of this one stand.
    """
    if world_size() == 1:
        return x, slice(0, len(x))
    counts = [int(count) for count in _all_gather(torch.tensor([len(x)], device=x.device))]
    stop_row = list(accumulate(counts))[rank()]
    return _GatherRows.apply(x, counts), slice(stop_row - len(x), stop_row)


class _GatherRows(torch.autograd.Function):
    """Gather rows in the forward pass; sum and hand back gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        # Collectives want equal shapes.
        padded = x.new_zeros(max(counts), *x.shape[1:])
        padded[: len(x)] = x
        parts = zip(_all_gather(padded), counts, strict=True)
        return torch.cat([part[:count] for part, count in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()], None


def _all_gather(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return parts


def gather_objects(item: Item) -> list[Item]:
    """Return the items of all processes in rank order; they must be picklable."""
    items: list[Any] = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def reduce_max(values: Sequence[float]) -> list[float]:
    """Return the largest of every number over all processes; none may be NaN.

    What one process must tell all, such as that it was asked to stop, is a number 0 or 1.
    """
    if world_size() == 1:
        return list(values)
    on_gpu = dist.get_backend() == "nccl"
    largest = torch.tensor(values, dtype=torch.float64, device="cuda" if on_gpu else "cpu")
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


def share_buffers(module: nn.Module) -> None:
    """Give all processes the buffers of the first, such as the statistics of batch norms."""
    if world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait until all processes are here."""
    # To read the result is what waits on a GPU.
    reduce_max([0.0])

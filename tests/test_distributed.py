"""Several processes with gloo: the loss of one, shared out, and the small collectives."""

import os
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip import distributed
from actionclip.errors import InputError
from actionclip.losses import contrastive_kl

# Rows of every process: uneven, and one process without any.
COUNTS = {2: [8, 3], 3: [5, 0, 6]}
TOTAL = 11
LOSSES = {
    f"{kind}, {'fused' if fused else 'dense'}": (kind, fused)
    for kind in ("single", "multi-hot")
    for fused in (False, True)
}


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("video", "text"):
            setattr(self, name, nn.Parameter(torch.randn(6, 4, generator=generator)))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))


def draw_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    classes = torch.randint(0, 4, (TOTAL,), generator=generator)
    return {
        "video": torch.randn(TOTAL, 6, generator=generator),
        "text": torch.randn(TOTAL, 6, generator=generator),
        "single": classes,
        "multi-hot": F.one_hot(classes, 5).roll(1, 0) + F.one_hot(classes, 5) > 0,
    }


def train(batch: dict[str, Tensor], kind: str, fused: bool) -> list[Tensor]:
    """Return this process's share of the loss and of the gradients."""
    towers = Towers()
    # One call for both, so that all processes gather and sum in the same order.
    embeddings = torch.stack([batch["video"] @ towers.video, batch["text"] @ towers.text], 1)
    gathered, rows = distributed.gather_rows(embeddings)
    labels, _ = distributed.gather_rows(batch[kind])
    loss = contrastive_kl(
        *gathered.unbind(1), labels, towers.logit_scale.exp(), fused=fused, rows=rows
    )
    loss.backward()
    grads = [parameter.grad for parameter in towers.parameters()]
    return [loss.detach(), *(grad for grad in grads if grad is not None)]


def work(rank: int, ports: dict[int, int], folder: Path) -> None:
    """Be one process of two, then of three, and store what came out."""
    torch.set_num_threads(1)
    for world, port in ports.items():
        if rank >= world:
            continue
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        distributed.start("cpu", timeout_seconds=30)
        first = sum(COUNTS[world][:rank])
        mine = slice(first, first + COUNTS[world][rank])
        batch = {name: values[mine] for name, values in draw_batch().items()}
        before = time.time()
        time.sleep(0.2 * rank)
        distributed.barrier()
        results: dict[str, Any] = {name: train(batch, *LOSSES[name]) for name in LOSSES}
        results |= {
            "waited": time.time() - before,
            "ranks": (distributed.rank(), distributed.local_rank(), distributed.world_size()),
            "rows": [distributed.gather_rows(values) for values in batch.values()],
            "half": distributed.gather_rows(torch.full((rank,), rank, dtype=torch.bfloat16)),
            "nothing": distributed.gather_rows(torch.zeros(0, 3)),
            "objects": distributed.gather_objects({"rank": rank, "files": ["a"] * rank}),
            "largest": distributed.reduce_max([rank, -rank, 0.5]),
        }
        torch.save(results, folder / f"{rank}_of_{world}.pt")
        distributed.stop()
    if rank < 2:
        # The second process stays away from a collective; the first must not wait for ever.
        os.environ |= {"WORLD_SIZE": "2", "MASTER_PORT": str(ports[2])}
        distributed.start("cpu", timeout_seconds=1)
        if rank == 0:
            start = time.monotonic()
            try:
                distributed.barrier()
            except RuntimeError:
                (folder / "gave_up").write_text(str(time.monotonic() - start))
        else:
            patience = time.monotonic() + 20
            while not (folder / "gave_up").exists() and time.monotonic() < patience:
                time.sleep(0.05)
        distributed.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let three processes do everything that these tests look at."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = {world: processes.free_port() for world in COUNTS}
    processes.run(3, work, ports, folder, seconds=120)
    return folder


def results(folder: Path, world: int) -> list[dict[str, Any]]:
    paths = [folder / f"{rank}_of_{world}.pt" for rank in range(world)]
    return [torch.load(path, weights_only=False) for path in paths]


worlds = pytest.mark.parametrize("world", COUNTS)


@worlds
@pytest.mark.parametrize("name", LOSSES)
def test_shares_sum_to_the_loss_of_one_process(folder: Path, world: int, name: str) -> None:
    whole = train(draw_batch(), *LOSSES[name])
    shares = [result[name] for result in results(folder, world)]
    assert len(whole) == 4
    for expected, *parts in zip(whole, *shares, strict=True):
        torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)


@worlds
def test_every_process_gets_all_rows(folder: Path, world: int) -> None:
    for rank, result in enumerate(results(folder, world)):
        assert result["ranks"] == (rank, rank, world)
        first = sum(COUNTS[world][:rank])
        for (rows, where), expected in zip(result["rows"], draw_batch().values(), strict=True):
            assert torch.equal(rows, expected)
            assert rows.dtype == expected.dtype
            assert where == slice(first, first + COUNTS[world][rank])
        half, where = result["half"]
        assert half.tolist() == [1.0, 2.0, 2.0][: 2 * world - 3]
        assert where == slice(max(0, rank - 1), max(0, 2 * rank - 1))
        assert result["nothing"][0].shape == (0, 3)


@worlds
def test_every_process_learns_what_one_knows(folder: Path, world: int) -> None:
    for result in results(folder, world):
        assert result["objects"] == [{"rank": r, "files": ["a"] * r} for r in range(world)]
        assert result["largest"] == [world - 1, 0, 0.5]


@worlds
def test_a_barrier_waits_for_the_last(folder: Path, world: int) -> None:
    assert all(result["waited"] > 0.2 * (world - 1) for result in results(folder, world))


def test_a_collective_gives_up_on_a_missing_process(folder: Path) -> None:
    assert 0.9 < float((folder / "gave_up").read_text()) < 10


def test_nothing_to_do_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    distributed.start("cuda")
    assert (distributed.rank(), distributed.local_rank(), distributed.world_size()) == (0, 0, 1)
    x = torch.ones(3, 2, requires_grad=True)
    rows, where = distributed.gather_rows(x)
    assert rows is x
    assert where == slice(0, 3)
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.reduce_max([1, 0.0]) == [1, 0]
    distributed.barrier()
    distributed.stop()


def test_errors_say_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="LOCAL_RANK is 3 but this machine shows 2 GPUs"):
        distributed.start("cuda")
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.delenv("RANK")
    with pytest.raises(InputError, match="WORLD_SIZE is set but not RANK, MASTER_ADDR"):
        distributed.start("cpu")

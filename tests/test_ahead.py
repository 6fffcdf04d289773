"""Threads that work ahead: the order stays, little is taken, and they end."""

import threading

import pytest

from actionclip.ahead import map_ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actionclip-test")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_few_items_are_taken(workers: int) -> None:
    taken = []

    def items():
        for i in range(20):
            taken.append(i)
            yield i

    results = map_ahead(lambda i: i * i, items(), workers, "test")
    for i in range(20):
        assert next(results) == i * i
        assert len(taken) <= i + max(1, 2 * workers)
        assert bool(threads()) == (workers > 0)
    assert list(results) == []
    assert threads() == []


@pytest.mark.parametrize(("batch", "ahead"), [(1, 4), (2, 4), (5, 7)])
def test_the_next_batch_is_done_while_the_caller_is_busy(batch: int, ahead: int) -> None:
    done = threading.Semaphore(0)
    taken = []
    results = map_ahead(
        lambda _: done.release(), map(taken.append, range(99)), 2, "test", batch=batch
    )
    next(results)
    for _ in range(ahead):
        assert done.acquire(timeout=20)
    assert not done.acquire(blocking=False)
    assert len(taken) == ahead
    results.close()


def test_workers_work_side_by_side() -> None:
    barrier = threading.Barrier(2, timeout=20)
    assert list(map_ahead(lambda _: barrier.wait() >= 0, range(4), 2, "test")) == [True] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_turn_and_ends_the_threads(workers: int) -> None:
    results = map_ahead(lambda i: 1 // (i - 2), range(9), workers, "test")
    assert [next(results), next(results)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert threads() == []


def test_closing_ends_the_threads() -> None:
    results = map_ahead(abs, iter(range(10**9)), 2, "test")
    assert next(results) == 0
    results.close()
    assert threads() == []

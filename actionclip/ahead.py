"""Work on many items in threads, a few ahead of whoever takes the results.

Between the list of videos and the model, so that neither decoding nor encoding waits for the
other. Knows nothing of what the work is.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    name: str,
    *,
    batch: int = 1,
    stop: Callable[[], object] = lambda: None,
) -> Generator[Result, None, None]:
    """Do the same work on every item, and yield the results in the order of the items.

    Closing the generator ends the threads; work that has begun is finished or broken off first.

    Args:
        work: called in a thread; what it raises is raised here, in its item's turn.
        items: any number, taken ahead of the results: one a worker and, besides, as many as there
            are workers or results in a batch, whichever is more.
        workers: threads; 0 works in turn, in the thread of the caller.
        name: of the threads.
        batch: results that the caller collects before it is busy for a while.
        stop: called at the end, also an early one, to break off work that has begun.
    """
    if workers == 0:
        yield from map(work, items)
        return
    source = iter(items)
    executor = ThreadPoolExecutor(workers, thread_name_prefix=f"actionclip-{name}")
    waiting: deque[Future[Result]] = deque()
    try:
        # One item in hand and, however small the batch, one done, so that a slow one holds up few.
        ahead = workers + max(workers, batch)
        while True:
            room = ahead - len(waiting)
            waiting.extend(executor.submit(work, item) for item in islice(source, room))
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        stop()
        executor.shutdown()

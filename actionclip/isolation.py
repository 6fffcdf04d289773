"""Do work in child processes, so that one that crashes or hangs costs its own result only.

Decoders are native code, and a hostile file may end the process that decodes it. Stands between
`ahead`, whose threads call it, and the work. Knows nothing of what the work is.
"""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, TypeVar

from actionclip.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A server that has imported what the work needs forks children within milliseconds, and has no
# threads whose locks they would inherit. Windows has no such thing.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

# A child may die of what it did before, or by a system that ran out of memory; twice is the item.
_TRIES = 2


class LostWorkError(Exception):
    """A child did not finish its work.

    Attributes:
        reason: "crashed" or "timeout".
        message: one sentence for people.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def prepare(modules: Sequence[str]) -> None:
    """Let the server of the children import modules, while the caller goes on.

    Only the first call of a process does anything; `Isolated` makes it too, but later.

    Raises:
        InputError: if the system starts no process.
    """
    if _METHOD == "forkserver":
        from multiprocessing import forkserver

        context = multiprocessing.get_context(_METHOD)
        context.set_forkserver_preload(list(modules))
        # Ctrl-C reaches every process of a terminal. The parent is the one to act on it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _starting():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"no process of its own can be started for the work ({error.strerror}); check TMPDIR "
            "and the limits on processes, or do without (--workers 0)"
        ) from error


class Isolated(Generic[Item, Result]):
    """A function that runs in child processes, as many as there are calls at a time.

    Leaving it as a context ends the children, also those in the middle of their work.

    Args:
        work: what to do with an item; it, the items and the results must be picklable. What it
            raises is raised by the call.
        seconds: how long one item may take.
        set_up: called once in every child.
        modules: what the children need, see `prepare`.
    """

    def __init__(
        self,
        work: Callable[[Item], Result],
        seconds: float,
        set_up: Callable[[], object],
        modules: Sequence[str],
    ) -> None:
        self._work = work
        self._seconds = seconds
        self._set_up = set_up
        self._modules = modules
        self._idle: list[_Child] = []
        self._all: set[_Child] = set()
        self._lock = threading.Lock()
        self._is_closed = False

    def __call__(self, item: Item) -> Result:
        """Do the work on an item; any number of threads may call this at a time.

        Raises:
            LostWorkError: if two children died of it, or one took too long.
            InputError: if the system starts no child.
        """
        for _ in range(_TRIES):
            child = self._take()
            try:
                result, error = child.do(item, self._seconds)
            except _DiedError as died:
                self._drop(child)
                end = died
                continue
            except BaseException:
                self._drop(child)
                raise
            self._idle.append(child)
            if error is not None:
                raise error
            return result
        raise LostWorkError("crashed", f"the process that worked on it {end}, {_TRIES} times")

    def __enter__(self) -> "Isolated[Item, Result]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._is_closed = True
        for child in list(self._all):
            self._drop(child)

    def _take(self) -> "_Child":
        with suppress(IndexError):
            return self._idle.pop()
        with self._lock:  # one at a time, as the first one starts the server
            if self._is_closed:
                raise LostWorkError("crashed", "the work was stopped")
            prepare(self._modules)
            with _starting():
                child = _Child(self._work, self._set_up)
            self._all.add(child)
        return child

    def _drop(self, child: "_Child") -> None:
        with self._lock:
            if child in self._all:
                self._all.remove(child)
                child.end()


class _DiedError(Exception):
    """A child ended in the middle of its work."""


class _Child:
    """One child process and the connection to it."""

    def __init__(self, work: Callable[[Any], Any], set_up: Callable[[], object]) -> None:
        context = multiprocessing.get_context(_METHOD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, work, set_up), daemon=True
        )
        self.process.start()
        theirs.close()  # the child's own copy is now the last, so that its end is noticed

    def do(self, item: object, seconds: float) -> tuple[Any, Exception | None]:
        """Have the child work on an item; returns the result, or the error it raised."""
        try:
            self.connection.send(item)
            if not self.connection.poll(seconds):
                raise LostWorkError("timeout", f"it took over {seconds:g} seconds, and was stopped")
            result, error = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _DiedError(self._how_it_ended()) from error
        return result, error

    def _how_it_ended(self) -> str:
        try:
            self.process.join()
            code = self.process.exitcode
            assert code is not None
            return f"ended with code {code}" if code >= 0 else f"got {signal.Signals(-code).name}"
        except ValueError:  # a signal without a name, or another thread has closed the process
            return "was stopped"

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        self.process.close()


def _serve(
    connection: Connection, work: Callable[[Any], Any], set_up: Callable[[], object]
) -> None:
    """Work on what comes until the other end is closed; the body of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):  # the parent has ended
            return
        result, failure = None, None
        try:
            result = work(item)
        except Exception as error:
            failure = error
        connection.send((result, failure))

"""Do work in child processes, so that one that crashes or hangs costs its own result only.

Decoders are native code, and a hostile file may end the process that decodes it. Stands between
`ahead`, whose threads call it, and the work. Knows nothing of what the work is.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from actionclip.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")

# A server that has imported what the work needs forks children within milliseconds, and has no
# threads whose locks they would inherit. Windows has no such thing.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

# A child may die of what it did before, or by a system that ran out of memory; twice is the item.
_TRIES = 2
# Work may keep a limit of its own; only what hangs in native code is past it by so much.
_GRACE_SECONDS = 10.0
# A child that has to import everything by itself on a busy machine needs some of it.
_START_SECONDS = 120.0
# What a child that is killed needs; one that waits for a dead disk cannot be killed.
_END_SECONDS = 5.0
# The largest that the system's calls take, 23 days.
_LONGEST_SECONDS = 2_000_000.0


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
            with _starting(), _without_current_folder():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_current_folder() -> Iterator[None]:
    """Let Python programs started now import nothing from the folder they are started in."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        raise InputError(
            f"no process of its own can be started for the work ({reason}); check TMPDIR, which "
            "must be short and writable, and the limits on processes"
        ) from error


class Isolated(Generic[Item, Result]):
    """A function that runs in child processes, as many as there are calls at a time.

    Not for use in a daemonic process, which may have no children.

    Args:
        work: what to do with an item; it, the items and the results must be picklable. What it
            raises is raised by the call.
        seconds: how long one item may take, by a limit of the work itself.
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
        self._seconds = min(seconds + _GRACE_SECONDS, _LONGEST_SECONDS)
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
            InputError: if no child can be started.
        """
        for _ in range(_TRIES):
            child = self._take()
            try:
                result, error = child.do(item, self._seconds)
            except _DiedError:
                end = self._drop(child, _END_SECONDS)
                continue
            except BaseException:
                self._drop(child)
                raise
            self._idle.append(child)
            if error is not None:
                raise error
            return result
        raise LostWorkError("crashed", f"the process that worked on it {end}, {_TRIES} times")

    def close(self) -> None:
        """End the children, also those in the middle of their work."""
        with self._lock:
            self._is_closed = True
        for child in list(self._all):
            self._drop(child)

    def _take(self) -> "_Child":
        with suppress(IndexError):
            while True:
                child = self._idle.pop()
                with self._lock:
                    if child in self._all and child.process.is_alive():
                        return child
                self._drop(child)
        with self._lock:  # one at a time, as the first one starts the server
            if self._is_closed:
                raise LostWorkError("crashed", "the work was stopped")
            prepare(self._modules)
            with _starting():
                child = _Child(self._work, self._set_up, self._seconds)
            self._all.add(child)
        return child

    def _drop(self, child: "_Child", patience: float = 0.0) -> str:
        """End a child, see `_Child.end`."""
        with self._lock:
            if child not in self._all:
                return "was stopped"
            self._all.remove(child)
            return child.end(patience)


class _DiedError(Exception):
    """A child ended in the middle of its work."""


class _Child:
    """One child process and the connection to it."""

    def __init__(
        self, work: Callable[[Any], Any], set_up: Callable[[], object], seconds: float
    ) -> None:
        context = multiprocessing.get_context(_METHOD)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(  # type: ignore[attr-defined]
            target=_serve, args=(theirs, work, set_up, seconds), daemon=True
        )
        self.process.start()
        theirs.close()  # the child's own copy is now the last, so that its end is noticed
        try:
            if self.connection.poll(_START_SECONDS):
                self.connection.recv()
                return
            self.end(0.0)
            end = f"said nothing for {_START_SECONDS:g} seconds"
        except (EOFError, OSError):
            end = self.end(_END_SECONDS)
        raise InputError(
            f"a process that should work {end} at its start; a script that uses such processes "
            'has to work under `if __name__ == "__main__":`'
        )

    def do(self, item: object, seconds: float) -> tuple[Any, Exception | None]:
        """Have the child work on an item; returns the result, or the error it raised."""
        try:
            self.connection.send(item)
            if not self.connection.poll(seconds):
                raise LostWorkError("timeout", f"it took over {seconds:g} seconds, and was stopped")
            result, error = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _DiedError from error
        return result, error

    def end(self, patience: float) -> str:
        """End the process, if it does not end by itself in that time; returns how it ended."""
        self.process.join(patience)
        self.process.kill()
        self.process.join(_END_SECONDS)
        code = self.process.exitcode
        self.connection.close()
        if code is None:
            return "cannot be ended"
        self.process.close()
        if code >= 0:
            return f"ended with code {code}"
        with suppress(ValueError):  # a real-time signal has no name
            return f"got {signal.Signals(-code).name}"
        return f"got signal {-code}"


def _serve(
    connection: Connection,
    work: Callable[[Any], Any],
    set_up: Callable[[], object],
    seconds: float,
) -> None:
    """Work on what comes until the other end is closed; the body of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up()
    connection.send(None)
    while True:
        result, failure = None, None
        try:
            item = connection.recv()
            with _alarm(seconds + _GRACE_SECONDS):
                try:
                    result = work(item)
                except Exception as error:
                    failure = error
            connection.send((result, failure))
        except (EOFError, OSError):  # the parent has ended
            return


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """End this process after some time: work may hang in code that lets no thread run."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)

"""End a process that hangs, and say where.

A long run on many machines waits for disks, GPUs and other processes, and one that never answers
would hold all the others for ever. Knows nothing of what the run does but what it is told.
"""

import faulthandler
import multiprocessing
import os
import threading
from types import TracebackType

from actionclip.cli.command import ExitCode
from actionclip.errors import one_line

# Looks taken in the time that is allowed. Time in which this process was stopped as a whole, such
# as by a scheduler, is one look, and does not count.
LOOKS = 50
# What the process may take to say where it hangs; a pipe that nobody reads takes nothing more.
LAST_WORDS_SECONDS = 5.0


class Watchdog:
    """Within its context, ends the process by `ExitCode.STALLED` when nothing was done for long.

    Args:
        prog: name of the command, for its last line.
        seconds: how long it may do nothing; 0 for any time.
    """

    def __init__(self, prog: str, seconds: float) -> None:
        self.prog = prog
        self.seconds = seconds
        self.done = "the start"

    def note(self, done: str) -> None:
        """Take down what the process has just done."""
        self.done = done
        self.looks = 0

    def __enter__(self) -> "Watchdog":
        self.looks = 0
        self._over = threading.Event()
        if self.seconds > 0:
            name = "actionclip-watchdog"
            threading.Thread(target=self._watch, args=(self._over,), name=name, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(self.seconds / LOOKS):
            self.looks += 1
            if self.looks > LOOKS:
                self._end()

    def _end(self) -> None:
        # The only clock that Python's lock does not stop, which the stacks are written under; it
        # ends with exit code 1, and what it says itself goes nowhere.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        faulthandler.dump_traceback_later(LAST_WORDS_SECONDS, exit=True, file=nowhere)
        # By file number: the main thread may hold the locks of the streams.
        faulthandler.dump_traceback(2)
        text = one_line(
            # From torchrun: it may be in joining the others that this process hangs.
            f"rank {os.environ.get('RANK', '0')}: stalled: nothing done for {self.seconds:g} s "
            f"since {self.done}; the stacks above show where it waits: for videos (the disk, "
            "--workers), for another process, or for the disk of --output"
        )
        os.write(2, f"{self.prog}: {text}\n".encode())
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(ExitCode.STALLED)

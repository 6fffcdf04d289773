"""What children do in the tests of isolation; they import it by its name."""

import os
import signal
import time
from pathlib import Path

from actionclip.errors import VideoError
from actionclip.reading import Reading, ViewReader
from actionclip.video import Span


def set_up() -> None:
    """Let the children have something that only this gives them."""
    os.environ["SET_UP"] = "yes"


def leave() -> None:
    """End at once."""
    os._exit(7)


def work(item: object) -> object:
    """Do what the item says: crash, hang, raise, leave, or return it."""
    match item:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "leave":
            leave()
        case ("interrupt", pid):
            time.sleep(0.5)
            os.kill(pid, signal.SIGINT)
            time.sleep(3600)
        case "hang":
            time.sleep(3600)
        case "raise":
            raise VideoError("a.mp4", "empty", "nothing in it")
        case "pid":
            return os.getpid()
        case "set up":
            return os.environ.get("SET_UP")
        case ("crash once", folder):
            marker = Path(folder, "marker")
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return "second try"
        case ("meet", folder, count):
            Path(folder, str(os.getpid())).touch()
            deadline = time.monotonic() + 20
            while len(os.listdir(folder)) < count:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    return item


class FragileReader(ViewReader):
    """Reads videos, and dies or hangs where the name of one says so."""

    def __call__(self, span: Span) -> Reading:
        for item in ("crash", "hang"):
            if item in os.path.basename(span.path):
                work(item)
        return super().__call__(span)

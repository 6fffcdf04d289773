"""A server of one file that answers as badly as wanted, and processes that ask it."""

import contextlib
import hashlib
import http.server
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import actionclip.download as download

BODY = random.Random(0).randbytes(600_000)
SHA256 = hashlib.sha256(BODY).hexdigest()
NAME = "ViT-B-32.pt"

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Plays the server's answers in turn, the last one for ever."""

    server: "Server"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers)))
            number = len(server.requests) - 1
        answer = server.answers[min(number, len(server.answers) - 1)]
        with contextlib.suppress(ConnectionError):
            answer(self)

    def log_message(self, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.answers: list[Answer] = [serve()]
        self.ended = threading.Event()
        self.base = f"http://127.0.0.1:{self.server_address[1]}"
        self.url = f"{self.base}/models/{SHA256}/{NAME}"


def serve(
    body: bytes = BODY,
    *,
    cut: int | None = None,
    etag: str | None = '"one"',
    ranges: bool = True,
    length: int | None = None,
    announce: bool = True,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Answer as a static file server would, cutting the connection after `cut` bytes."""

    def answer(handler: Handler) -> None:
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and ranges and handler.headers.get("If-Range") in (None, etag):
            start = int(asked[1])
            if start >= len(body):
                handler.send_response(416)
                handler.send_header("Content-Range", f"bytes */{len(body)}")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                return
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            handler.send_response(200)
        if etag:
            handler.send_header("ETag", etag)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        if announce:
            handler.send_header(
                "Content-Length", str(len(body) - start if length is None else length)
            )
        handler.end_headers()
        handler.wfile.write(body[start:cut])

    return answer


def status(
    code: int, location: str | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    def answer(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        if location:
            handler.send_header("Location", location)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def stall(after: int) -> Answer:
    """Send some bytes, then nothing, without closing."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", '"one"')
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[:after])
        handler.server.ended.wait(20)

    return answer


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.ended.is_set():
        handler.wfile.write(b"x" * 65536)


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        running.ended.set()
        running.shutdown()
        running.server_close()
        thread.join()


def files(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.endswith(".lock"))


def dripping(handler: Handler) -> None:
    """Answer like `serve`, slowly enough to be killed at any byte."""

    class Slow:
        def write(self, data: bytes) -> None:
            for start in range(0, len(data), 20_000):
                file.write(data[start : start + 20_000])
                time.sleep(0.005)

        def flush(self) -> None:
            file.flush()

    file, handler.wfile = handler.wfile, Slow()  # type: ignore[assignment]
    try:
        serve()(handler)
    finally:
        handler.wfile = file


# Without the package's own imports, which bring torch: sixteen of those take long.
CHILD = """
import resource, sys, types
package = types.ModuleType("actionclip")
package.__path__ = [sys.argv[1]]
sys.modules["actionclip"] = package
from actionclip.download import fetch
if sys.argv[6]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[6]), int(sys.argv[6])))
print(fetch(sys.argv[2], sha256=sys.argv[3] or None, filename=sys.argv[4], cache_dir=sys.argv[5],
            allow_http=True))
"""


def child(
    server: Server, folder: Path, sha256: str = SHA256, most_bytes: int | None = None
) -> subprocess.Popen:
    """Start a process that fetches the file, and may write no more than some bytes to one."""
    package = os.path.dirname(download.__file__)
    limit = "" if most_bytes is None else str(most_bytes)
    arguments = [package, server.url, sha256, NAME, str(folder), limit]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_part(folder: Path, size: int) -> None:
    """Wait until so much is received, or all of it."""
    part = folder / f"{NAME}.part"
    deadline = time.monotonic() + 60
    while not (folder / NAME).exists():
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_size >= size:
                return
        assert time.monotonic() < deadline, "nothing was received"
        time.sleep(0.001)


def fault_after_kill(folder: Path, size: int) -> str:
    """Kill a download once `size` bytes are there, fetch again; return what was wrong, if any."""
    with running_server() as server:
        server.answers = [dripping]
        process = child(server, folder)
        wait_for_part(folder, size)
        process.kill()
        process.communicate()
        path = folder / NAME
        if path.exists() and path.read_bytes() != BODY:
            return "a wrong file under the final name"
        was_complete, asked = path.exists(), len(server.requests)
        server.answers = [serve()]
        out, error = child(server, folder).communicate(timeout=60)
        if (out, error) != (f"{path}\n", "") or path.read_bytes() != BODY:
            return f"the next call failed: {error.strip()[-300:]}"
        later = server.requests[asked:]
        if size > 0 and not was_complete and "Range" not in later[0][1]:
            return "the next call did not resume"
    return ""


def faults_after_dead_owner(folder: Path, number: int) -> list[str]:
    """Let `number` processes ask, kill the one that downloads halfway; return what was wrong."""
    with running_server() as server:
        server.answers = [stall(len(BODY) // 2), serve()]
        owner = child(server, folder)
        wait_for_part(folder, len(BODY) // 2)
        others = [child(server, folder) for _ in range(number - 1)]
        time.sleep(1)  # most of them wait by now; those that come later find the same
        owner.kill()
        owner.communicate()
        results = [process.communicate(timeout=120) for process in others]
        faults = [
            error[-300:] for out, error in results if (out, error) != (f"{folder / NAME}\n", "")
        ]
        if (folder / NAME).read_bytes() != BODY:
            faults.append("wrong content")
        if len(server.requests) != 2 or "Range" not in server.requests[1][1]:
            faults.append(f"{len(server.requests)} requests, 2 expected, the second for the rest")
    return faults

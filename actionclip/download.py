"""Fetch one published file into the cache, or find that it is there already.

A file counts only with the SHA-256 it was published with: checked after every
download and again on every use. Where none was published, the server's own statement
or else what came first decides, noted beside the file as `.sha256`. What was received of
an interrupted download stays there as `.part` and is resumed; only complete, verified
files get their name. Many processes may ask for one file at the same time: one of them
fetches it. What the files are, and which models they make, is `weights`' business.
"""

import base64
import contextlib
import hashlib
import http.client
import os
import re
import secrets
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from typing import IO, Any

from tqdm import tqdm

from actionclip.errors import DownloadError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

# Twice the largest published file with its optimiser state; ends a body without end.
_MAX_BYTES = 8 * 2**30
_MAX_REDIRECTS = 5
_READ_BYTES = 2**18
# Answers that another try may change; the rest of 4xx stays what it is.
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds, and how often to try.

    Attributes:
        connect_seconds: for a connection, handshake included.
        read_seconds: for the next bytes.
        tries: in a row without a new byte.
        first_pause_seconds: before the second try; doubled before each later one.
        total_seconds: for the whole download.
        lock_seconds: for another process that fetches the same file.
        sleep: replaced in tests.
    """

    connect_seconds: float = 10.0
    read_seconds: float = 30.0
    tries: int = 5
    first_pause_seconds: float = 1.0
    total_seconds: float = 4 * 3600.0
    lock_seconds: float = 1800.0
    sleep: Callable[[float], None] = time.sleep


def cache_directory(environ: Mapping[str, str]) -> str:
    """Return the folder that downloaded files are kept in.

    `ACTIONCLIP_HOME`, else `$XDG_CACHE_HOME/actionclip`, else `~/.cache/actionclip`.
    """
    home = environ.get("ACTIONCLIP_HOME")
    if home:
        return os.path.expanduser(home)
    cache = environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(os.path.expanduser(cache), "actionclip")


def mirror_for(url: str, environ: Mapping[str, str]) -> str | None:
    """Return the mirror to ask instead of the host of `url`, or None.

    `ACTIONCLIP_MIRROR` stands in for every host, `HF_ENDPOINT` for huggingface.co.
    """
    hugging_face = urllib.parse.urlsplit(url).hostname == "huggingface.co"
    endpoint = environ.get("HF_ENDPOINT") if hugging_face else None
    return environ.get("ACTIONCLIP_MIRROR") or endpoint or None


def offline_wanted(environ: Mapping[str, str]) -> bool:
    """Tell whether `ACTIONCLIP_OFFLINE` or `HF_HUB_OFFLINE` forbids connections."""
    names = ("ACTIONCLIP_OFFLINE", "HF_HUB_OFFLINE")
    return any(environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def fetch(
    url: str,
    *,
    sha256: str | None,
    filename: str,
    size: int | None = None,
    cache_dir: str | None = None,
    mirror: str | None = None,
    offline: bool | None = None,
    verify: bool = True,
    allow_http: bool = False,
    also_look_in: Sequence[str] = (),
    progress: bool | None = None,
    patience: Patience | None = None,
) -> str:
    """Return the path of a verified file, downloading it if it is not there.

    Args:
        url: where the file is published, https.
        sha256: 64 lower-case hexadecimal digits. None, where nobody published them: what
            the server states counts, else what it sends. What is used first, also a file
            put there by hand, is noted in `<filename>.sha256` and has to stay as it is.
        filename: its name in the cache; from our own table, never from a server.
        size: in bytes, where known.
        cache_dir: created if need be. None asks `cache_directory`.
        mirror: a URL that replaces scheme and host of `url`; may hold `user:password@`.
            None asks `mirror_for`.
        offline: never connect. None asks `offline_wanted`.
        verify: False trusts a file that is in the cache already.
        allow_http: accept plain http, for a mirror in one's own network.
        also_look_in: folders where other programs may have put the same file. It is
            used if its checksum is right and passed over if not, or if `sha256` is None.
        progress: show a bar on stderr; None shows it on a terminal only.
        patience: time-outs and tries.

    Raises:
        DownloadError: if the file cannot be had, with the URL and the remedy.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.@-]*", filename, re.ASCII):
        raise DownloadError(f"{filename!r} is not a plain file name")
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise DownloadError(f"{sha256!r} is not the SHA-256 of {filename}: 64 digits 0-9, a-f")
    # The only place of this module that reads the environment.
    if cache_dir is None:
        cache_dir = cache_directory(os.environ)
    if mirror is None:
        mirror = mirror_for(url, os.environ)
    if offline is None:
        offline = offline_wanted(os.environ)
    path = os.path.join(cache_dir, filename)
    note = None if sha256 else f"{path}.sha256"

    def known() -> str | None:
        return _noted(note) if note else sha256

    def found() -> str | None:
        if _is_wanted(path, known(), size, verify):
            return path
        others = (os.path.join(folder, filename) for folder in also_look_in if sha256)
        return next((other for other in others if _is_wanted(other, sha256, size, True)), None)

    present = found()
    if present is not None:
        return present
    source = _Source(_mirrored(url, mirror), known(), note, size, allow_http)
    if offline:
        state = "is missing"
        if os.path.exists(path):
            state = "is no file"
        if os.path.isfile(path):
            state = f"does not have its {'checksum' if source.sha256 else f'{size} bytes'}"
        checksum = f", SHA-256 {source.sha256}," if source.sha256 else ""
        raise DownloadError(
            f"{path} {state} and downloads are switched off (offline): fetch {source.shown}"
            f"{checksum} elsewhere and put it there{source.or_forget}"
        )
    patience = patience or Patience()
    with _disk(cache_dir):
        os.makedirs(cache_dir, exist_ok=True)
    with _locked(f"{path}.lock", patience):
        # Whoever held the lock before may have fetched it.
        present = found()
        if present is None:
            download = _Download(source, path, patience, progress)
            received = download.run()
            if note and download.expected:
                _write_note(note, received)
    return present or path


def note_checksum(path: str) -> None:
    """Let a file of `fetch` without a published checksum keep its content, once that is good.

    What was downloaded with a checksum that its host stated is noted already; this is for other
    downloads and for files that were put there by hand.

    Raises:
        DownloadError: if the note cannot be written.
    """
    note = f"{path}.sha256"
    # A shared folder that others fill; what is in it is theirs to check.
    if os.access(os.path.dirname(path), os.W_OK) and _noted(note) is None:
        _write_note(note, _digest_of(path))


def _is_wanted(path: str, sha256: str | None, size: int | None, verify: bool) -> bool:
    if not os.path.isfile(path) or (size is not None and os.path.getsize(path) != size):
        return False
    if not verify or sha256 is None:
        return True
    return _digest_of(path) == sha256


def _digest_of(path: str) -> str:
    with _disk(path):
        return str(_digest(path).hexdigest())


def _noted(note: str) -> str | None:
    """Return the SHA-256 that the first use of a file left beside it, if any."""
    if not os.path.exists(note):
        return None
    with _disk(note), open(note, encoding="latin-1") as file:
        found = re.match(r"([0-9a-f]{64})\s", file.read(1000))
    if not found:
        raise DownloadError(f"{note} does not hold a SHA-256; remove it")
    return found[1]


def _write_note(note: str, sha256: str) -> None:
    """Keep the SHA-256 of a file, as `sha256sum` would write it, whole or not at all."""
    name = os.path.basename(note.removesuffix(".sha256"))
    # A random name keeps writers apart, on any machine that shares the folder.
    partial = f"{note}.{secrets.token_hex(8)}.part"
    with _disk(note):
        with open(partial, "w", encoding="ascii") as file:
            file.write(f"{sha256}  {name}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, note)


def _digest(path: str) -> Any:
    digest = hashlib.sha256()
    # Large, so that a thread which hashes meets the others, at the interpreter's lock, rarely.
    buffer = bytearray(2**23)
    view = memoryview(buffer)
    with open(path, "rb") as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest


@contextlib.contextmanager
def _disk(path: str) -> Iterator[None]:
    """Turn what the disk refuses into one line. Nothing inside may use the network."""
    try:
        yield
    except OSError as error:
        raise DownloadError(
            f"cannot use {path}: {error.strerror or error}; free some space there or set "
            "ACTIONCLIP_HOME to another folder"
        ) from error


@contextlib.contextmanager
def _locked(path: str, patience: Patience) -> Iterator[None]:
    """Hold a lock file; the system releases it when its owner ends in any way."""
    with contextlib.ExitStack() as stack:
        with _disk(path):
            file = stack.enter_context(open(path, "ab"))
        deadline = time.monotonic() + patience.lock_seconds
        while True:
            with _disk(path):
                if try_lock(file):
                    break
            if time.monotonic() > deadline:
                raise DownloadError(
                    f"another process has held {path} for {patience.lock_seconds:.0f} s; wait "
                    "for its download or end it, then try again"
                )
            patience.sleep(0.2)
        # Never removed: a process that has it open would lock another file than the next.
        yield


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed; returns whether no other process has done so."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _mirrored(url: str, mirror: str | None) -> str:
    if not mirror:
        return url
    parts = urllib.parse.urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{mirror.rstrip('/')}{parts.path}{query}"


def _shown(url: str) -> str:
    """Return a URL without what may be secret: user, password and query."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


class _Source:
    """What to ask for, and what the answer must be."""

    def __init__(
        self, url: str, sha256: str | None, note: str | None, size: int | None, allow_http: bool
    ) -> None:
        self.shown = _shown(url)
        self.sha256 = sha256
        # What else helps against a wrong checksum that comes from a note.
        self.or_forget = f", or remove {note} to accept another version" if note and sha256 else ""
        self.size = size
        self.allow_http = allow_http
        parts = urllib.parse.urlsplit(url)
        login, _, host = parts.netloc.rpartition("@")
        self._url = urllib.parse.urlunsplit(parts._replace(netloc=host))
        self._login = urllib.parse.unquote(login)
        _check_scheme(url, allow_http)

    def request(self, headers: Mapping[str, str]) -> urllib.request.Request:
        """Return a request; the login stays with this host if it redirects."""
        request = urllib.request.Request(self._url, headers=dict(headers))
        if self._login:
            token = base64.b64encode(self._login.encode("utf-8")).decode("ascii")
            request.add_unredirected_header("Authorization", f"Basic {token}")
        return request


def _check_scheme(url: str, allow_http: bool) -> None:
    scheme = urllib.parse.urlsplit(url).scheme
    if scheme != "https" and not (scheme == "http" and allow_http):
        raise DownloadError(f"{_shown(url)}: refused, only https addresses are fetched")


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = _MAX_REDIRECTS

    def __init__(self, allow_http: bool) -> None:
        self._allow_http = allow_http

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Follow to https, or from http to http where that is allowed."""
        _check_scheme(newurl, self._allow_http and req.type == "http")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Stated(urllib.request.BaseHandler):
    """Remembers the checksum and the size that the last answer with a checksum stated.

    The Hugging Face hub does so for large files, in the answer that redirects to the host
    of the content.

    Source: huggingface_hub 2.4, `file_download.py` and `constants.py`.
    """

    sha256: str | None = None
    size: int | None = None

    def http_response(
        self, request: urllib.request.Request, response: http.client.HTTPResponse
    ) -> http.client.HTTPResponse:
        mark = response.headers.get("X-Linked-Etag", "")
        # Of a small file it is another kind of hash, with fewer digits.
        if found := re.fullmatch('(?:W/)?"?([0-9a-f]{64})"?', mark):
            self.sha256 = found[1]
            self.size = _number(response.headers.get("X-Linked-Size", ""))
        return response

    https_response = http_response


def _patient(connection: type[http.client.HTTPConnection], read_seconds: float) -> Any:
    """Return a connection class with one time-out to connect and another to read."""

    class Connection(connection):  # type: ignore[misc, valid-type]
        def connect(self) -> None:
            super().connect()
            self.sock.settimeout(read_seconds)

    return Connection


class _Http(urllib.request.HTTPHandler):
    def __init__(self, read_seconds: float) -> None:
        super().__init__()
        self._connection = _patient(http.client.HTTPConnection, read_seconds)

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, read_seconds: float) -> None:
        super().__init__()
        self._connection = _patient(http.client.HTTPSConnection, read_seconds)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req, context=ssl.create_default_context())


class _Passing(Exception):
    """A fault that another try may not meet."""


class _Whole(Exception):
    """The part is all that the server has."""


class _Download:
    """One file on its way from a source to a path, over as many tries as it takes."""

    def __init__(
        self, source: _Source, path: str, patience: Patience, progress: bool | None
    ) -> None:
        self._source = source
        self._path = path
        self._part = f"{path}.part"
        # The server's mark of the version that the part belongs to.
        self._mark = f"{path}.part.etag"
        self._patience = patience
        self._progress = progress
        self._deadline = time.monotonic() + patience.total_seconds
        self._stated = _Stated()
        self._opener = urllib.request.build_opener(
            self._stated,
            _Redirects(source.allow_http),
            _Http(patience.read_seconds),
            _Https(patience.read_seconds),
        )

    def run(self) -> str:
        """Leave the verified file at its path and return its SHA-256, or raise."""
        for _ in range(2):  # wrong bytes get one more chance, from the start
            got = self._receive_all()
            if got == (self.expected or got):
                with _disk(self._path):
                    os.replace(self._part, self._path)
                    _remove(self._mark)
                return got
            with _disk(self._part):
                _remove(self._part)
                _remove(self._mark)
        raise DownloadError(
            f"{self._source.shown}: wrong content, expected SHA-256 {self.expected}, got {got}; "
            "nothing was kept, try again later or another mirror (ACTIONCLIP_MIRROR)"
            f"{self._source.or_forget}"
        )

    @property
    def expected(self) -> str | None:
        """SHA-256 that the content must have, as far as anyone has told."""
        return self._source.sha256 or self._stated.sha256

    def _receive_all(self) -> str:
        """Try until the body is complete; return its SHA-256."""
        failures = 0
        furthest = self._received()
        while True:
            try:
                return self._receive()
            except _Passing as error:
                reason = error
            if self._received() > furthest:
                failures = 0
                furthest = self._received()
            failures += 1
            if failures >= self._patience.tries or time.monotonic() > self._deadline:
                raise DownloadError(
                    f"{self._source.shown}: {reason}; gave up with {self._received()} bytes, "
                    "the next call goes on from there"
                ) from reason
            self._patience.sleep(self._patience.first_pause_seconds * 2 ** (failures - 1))

    def _received(self) -> int:
        return os.path.getsize(self._part) if os.path.exists(self._part) else 0

    def _receive(self) -> str:
        """Ask once for what is missing and append it to the part."""
        start, digest, headers = 0, hashlib.sha256(), {}
        total: int | None
        mark = self._known_mark()
        if mark:
            with _disk(self._part):
                start, digest = self._received(), _digest(self._part)
            # All there, but the process ended before it could rename.
            if digest.hexdigest() == self.expected:
                return digest.hexdigest()
            headers = {"Range": f"bytes={start}-", "If-Range": mark}
        try:
            response = self._open(headers)
        except _Whole:
            return str(digest.hexdigest())
        with response:
            if response.status == 206:
                total = self._resumed_total(response, start)
            else:
                # The whole file, because it changed or the server cannot resume.
                start, digest, total = 0, hashlib.sha256(), _content_length(response)
            self._check_announced(total)
            if not self.expected:
                self._check_unverified(response, total)
            with contextlib.ExitStack() as stack:
                with _disk(self._part):
                    # Unbuffered, so that no write is left for `close` to fail at.
                    file = stack.enter_context(open(self._part, "ab" if start else "wb", 0))
                if not start:
                    self._remember_mark(response)
                received = self._copy(response, file, digest, start, total)
                with _disk(self._part):
                    os.fsync(file.fileno())
        if total is not None and received < total:
            raise _Passing(f"the connection ended after {received} of {total} bytes")
        return str(digest.hexdigest())

    def _copy(
        self,
        response: http.client.HTTPResponse,
        file: FileIO,
        digest: Any,
        received: int,
        total: int | None,
    ) -> int:
        expected = self._source.size if total is None else total
        limit = _MAX_BYTES if expected is None else expected
        with tqdm(
            total=expected,
            initial=received,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc=os.path.basename(self._path),
            # None: tqdm shows nothing where stderr is not a terminal.
            disable=None if self._progress is None else not self._progress,
        ) as bar:
            while received != total:
                if time.monotonic() > self._deadline:
                    raise _Passing(f"not done after {self._patience.total_seconds:.0f} s")
                with _passing_faults(self._source.shown):
                    chunk = response.read1(_READ_BYTES)
                if not chunk:
                    break
                received += len(chunk)
                if received > limit:
                    raise DownloadError(f"{self._source.shown}: sends more than {limit} bytes")
                with _disk(self._part):
                    _write_all(file, chunk)
                digest.update(chunk)
                bar.update(len(chunk))
        return received

    def _open(self, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        try:
            with _passing_faults(self._source.shown):
                response: http.client.HTTPResponse = self._opener.open(
                    self._source.request(headers), timeout=self._patience.connect_seconds
                )
                return response
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {http.client.responses.get(error.code, '')}"
            if error.code == 416:
                # Of the version of the part, or else the mark would have made it send all.
                asked = headers.get("Range", "").removeprefix("bytes=").removesuffix("-")
                if error.headers.get("Content-Range") == f"bytes */{asked}":
                    raise _Whole from error
                # The part is not a beginning of what the server has.
                with _disk(self._part):
                    _remove(self._mark)
                raise _Passing(reason) from error
            if error.code in _PASSING_STATUS:
                raise _Passing(reason) from error
            if 300 <= error.code < 400:
                reason = f"more than {_MAX_REDIRECTS} redirects, or a loop of them"
            raise DownloadError(f"{self._source.shown}: {reason.strip()}") from error

    def _check_announced(self, total: int | None) -> None:
        size = self._stated.size if self._source.size is None else self._source.size
        limit = _MAX_BYTES if size is None else size
        if total is not None and (total > limit or size not in (None, total)):
            raise DownloadError(
                f"{self._source.shown}: announces {total} bytes where {limit} are expected"
            )

    def _check_unverified(self, response: http.client.HTTPResponse, total: int | None) -> None:
        """Refuse what only a checksum could tell from the whole file."""
        problem = None
        if total is None:
            problem = "states neither the length nor the checksum of the file"
        elif response.headers.get_content_type() == "text/html":
            problem = "answers with a web page"
        if problem:
            raise DownloadError(
                f"{self._source.shown}: the server {problem}; try another mirror "
                f"(ACTIONCLIP_MIRROR), or fetch it elsewhere and put it at {self._path}"
            )

    def _resumed_total(self, response: http.client.HTTPResponse, start: int) -> int:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
        if not found or int(found[1]) != start:
            with _disk(self._mark):
                _remove(self._mark)
            raise _Passing("the server answers with another range than the one asked for")
        return int(found[2])

    def _known_mark(self) -> str | None:
        """Return the mark of the part, or None if it has to start again."""
        if not self._received() or not os.path.exists(self._mark):
            return None
        with _disk(self._mark), open(self._mark, encoding="latin-1") as file:
            return file.read(1000) or None

    def _remember_mark(self, response: http.client.HTTPResponse) -> None:
        mark = response.headers.get("ETag") or ""
        # A weak mark (W/"...") may stay while the bytes change.
        if not re.fullmatch(r'"[ -~]{1,500}"', mark):
            # Two versions of one second would be mixed, which only a checksum tells.
            mark = (self.expected and response.headers.get("Last-Modified")) or ""
        with _disk(self._mark):
            _remove(self._mark)
            if re.fullmatch("[ -~]{1,600}", mark):
                with open(self._mark, "w", encoding="latin-1") as file:
                    file.write(mark)


@contextlib.contextmanager
def _passing_faults(shown: str) -> Iterator[None]:
    """Turn faults of the network into `_Passing`; refusals by its rules pass through."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DownloadError(f"{shown}: its certificate is refused: {reason}") from error
        raise _Passing(reason) from error


def _content_length(response: http.client.HTTPResponse) -> int | None:
    return _number(response.headers.get("Content-Length", ""))


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _write_all(file: FileIO, chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:
        left = left[file.write(left) :]


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)

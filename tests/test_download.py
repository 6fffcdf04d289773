"""Files arrive whole and verified, or not at all, from servers of every kind."""

import errno
import hashlib
import os
import random
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from download_server import (
    BODY,
    NAME,
    SHA256,
    Answer,
    Handler,
    Server,
    child,
    endless,
    fault_after_kill,
    faults_after_dead_owner,
    files,
    running_server,
    serve,
    stall,
    status,
)

import actionclip.download as download
from actionclip.download import Patience, cache_directory, fetch, mirror_for, offline_wanted
from actionclip.errors import DownloadError


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as running:
        yield running


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ACTIONCLIP_MIRROR", "ACTIONCLIP_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACTIONCLIP_HOME", str(tmp_path / "home"))


PATIENCE = Patience(
    connect_seconds=2, read_seconds=0.3, lock_seconds=0.3, total_seconds=20, sleep=lambda _: None
)


def get(url: str, folder: Path, **changes: object) -> str:
    arguments: dict = {
        "sha256": SHA256,
        "filename": NAME,
        "size": len(BODY),
        "cache_dir": str(folder),
        "allow_http": True,
        "patience": PATIENCE,
    }
    return fetch(url, **{**arguments, **changes})


# --- what a good server gives --------------------------------------------------------


def test_first_call_downloads_and_the_second_does_not(server: Server, tmp_path: Path) -> None:
    path = get(server.url, tmp_path / "new" / "cache")
    assert path == str(tmp_path / "new" / "cache" / NAME)
    assert Path(path).read_bytes() == BODY
    assert files(tmp_path / "new" / "cache") == [NAME]
    assert get(server.url, tmp_path / "new" / "cache") == path
    assert len(server.requests) == 1


def test_size_need_not_be_known(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(announce=False)]
    assert Path(get(server.url, tmp_path, size=None)).read_bytes() == BODY


def test_empty_cache_directory_argument_asks_the_environment(
    server: Server, tmp_path: Path
) -> None:
    assert get(server.url, tmp_path, cache_dir=None) == str(tmp_path / "home" / NAME)


def test_damaged_cached_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY[:-1] + b"?")
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert len(server.requests) == 1


def test_verify_can_be_switched_off_for_cached_files(server: Server, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY[:-1] + b"?")
    get(server.url, tmp_path, verify=False)
    assert server.requests == []
    (tmp_path / NAME).write_bytes(b"short")
    assert Path(get(server.url, tmp_path, verify=False)).read_bytes() == BODY


def test_file_of_another_program_is_used(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    other.mkdir()
    (other / NAME).write_bytes(BODY)
    found = get(server.url, tmp_path / "cache", also_look_in=[str(tmp_path / "gone"), str(other)])
    assert found == str(other / NAME)
    assert server.requests == []
    (other / NAME).write_bytes(BODY[:-1])
    assert get(server.url, tmp_path / "cache", also_look_in=[str(other)]) == str(
        tmp_path / "cache" / NAME
    )


def test_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    server.answers = [status(302, "/elsewhere"), status(307, "/there"), serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert [path for path, _ in server.requests][1:] == ["/elsewhere", "/there"]


# --- interruptions -------------------------------------------------------------------


@pytest.mark.parametrize("cut", random.Random(1).sample(range(len(BODY)), 20))
def test_cut_connection_is_resumed(server: Server, tmp_path: Path, cut: int) -> None:
    server.answers = [serve(cut=cut), serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert files(tmp_path) == [NAME]
    assert server.requests[1][1]["Range"] == f"bytes={cut}-"
    assert server.requests[1][1]["If-Range"] == '"one"'


def test_many_cuts_with_progress_do_not_exhaust_the_tries(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(cut=cut) for cut in range(50_000, len(BODY), 50_000)] + [serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert len(server.requests) == 12


def test_tries_without_progress_are_counted(server: Server, tmp_path: Path) -> None:
    pauses: list[float] = []
    patience = Patience(read_seconds=0.3, sleep=pauses.append)
    server.answers = [serve(cut=1000)]
    message = f"{server.url}: the connection ended after 1000 of 600000 bytes; gave up with 1000"
    with pytest.raises(DownloadError, match=re.escape(message)):
        get(server.url, tmp_path, patience=patience)
    assert len(server.requests) == 5
    assert pauses == [1, 2, 4, 8]
    assert NAME not in files(tmp_path)


def test_next_call_resumes(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(cut=1000)]
    with pytest.raises(DownloadError):
        get(server.url, tmp_path)
    server.answers = [serve()]
    server.requests.clear()
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert [headers["Range"] for _, headers in server.requests] == ["bytes=1000-"]


def test_complete_part_needs_no_connection(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    (tmp_path / f"{NAME}.part.etag").write_text('"one"')
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests == []


def test_stalled_server_is_left_and_resumed(server: Server, tmp_path: Path) -> None:
    server.answers = [stall(5000), serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[1][1]["Range"] == "bytes=5000-"


def test_silent_server_is_given_up(server: Server, tmp_path: Path) -> None:
    server.answers = [lambda handler: handler.server.ended.wait(20)]
    patience = Patience(connect_seconds=60, read_seconds=0.1, tries=2, sleep=lambda _: None)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="timed out"):
        get(server.url, tmp_path, patience=patience)
    assert time.monotonic() - start < 5  # not the time-out of the connection
    assert len(server.requests) == 2


def test_whole_download_is_bounded_in_time(server: Server, tmp_path: Path) -> None:
    def drip(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        while not handler.server.ended.wait(0.02):
            handler.wfile.write(b"x")

    server.answers = [drip]
    patience = Patience(total_seconds=0.3, sleep=lambda _: None)
    with pytest.raises(DownloadError, match="not done after 0 s"):
        get(server.url, tmp_path, patience=patience)


def test_server_that_ignores_ranges_starts_again(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(cut=1000), serve(ranges=False)]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY


def test_changed_file_starts_again(server: Server, tmp_path: Path) -> None:
    other = bytes(reversed(BODY))
    server.answers = [serve(other, cut=1000, etag='"old"'), serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[1][1]["If-Range"] == '"old"'
    assert len(server.requests) == 2


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_mark_nothing_is_resumed(
    server: Server, tmp_path: Path, etag: str | None
) -> None:
    server.answers = [serve(cut=1000, etag=etag), serve(etag=etag)]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert "Range" not in server.requests[1][1]


def test_wrong_range_starts_again(server: Server, tmp_path: Path) -> None:
    def wrong(handler: Handler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 0-9/{len(BODY)}")
        handler.send_header("Content-Length", "10")
        handler.end_headers()
        handler.wfile.write(BODY[:10])

    server.answers = [serve(cut=1000), wrong, serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert "Range" not in server.requests[2][1]


def test_part_longer_than_the_file_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY + b"more")
    (tmp_path / f"{NAME}.part.etag").write_text('"one"')
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_passing_answers_are_tried_again(server: Server, tmp_path: Path, code: int) -> None:
    server.answers = [status(code), serve()]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_final_answers_are_not(server: Server, tmp_path: Path, code: int) -> None:
    server.answers = [status(code)]
    with pytest.raises(DownloadError, match=f"{re.escape(server.url)}: the server answers {code}"):
        get(server.url, tmp_path)
    assert len(server.requests) == 1


def test_refused_connection_names_the_url(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/{NAME}"
        with pytest.raises(DownloadError, match=f"{url}: .*refused"):
            get(url, tmp_path)


# --- wrong content -------------------------------------------------------------------


def test_wrong_bytes_are_tried_once_more_and_removed(server: Server, tmp_path: Path) -> None:
    wrong = BODY[:-1] + bytes([BODY[-1] ^ 1])
    server.answers = [serve(wrong)]
    got = hashlib.sha256(wrong).hexdigest()
    message = f"{server.url}: wrong content, expected SHA-256 {SHA256}, got {got}"
    with pytest.raises(DownloadError, match=re.escape(message)):
        get(server.url, tmp_path)
    assert len(server.requests) == 2
    assert files(tmp_path) == []


def test_wrong_part_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"?" * 1000)
    (tmp_path / f"{NAME}.part.etag").write_text('"one"')
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert len(server.requests) == 2


def test_announced_length_must_fit(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(length=10**12)]
    with pytest.raises(DownloadError, match="announces 1000000000000 bytes where 600000 are"):
        get(server.url, tmp_path)
    with pytest.raises(DownloadError, match="announces 1000000000000 bytes where 8589934592 are"):
        get(server.url, tmp_path, size=None)
    server.answers = [serve(length=599_999)]
    with pytest.raises(DownloadError, match="announces 599999 bytes where 600000 are"):
        get(server.url, tmp_path)
    with pytest.raises(DownloadError, match="wrong content"):
        get(server.url, tmp_path, size=None)
    assert files(tmp_path) == []


def test_endless_body_is_stopped(server: Server, tmp_path: Path) -> None:
    server.answers = [endless]
    with pytest.raises(DownloadError, match="sends more than 600000 bytes"):
        get(server.url, tmp_path)
    assert (tmp_path / f"{NAME}.part").stat().st_size <= len(BODY)


# --- without a published checksum ----------------------------------------------------

HUB = "https://huggingface.co/microsoft/xclip-base-patch32/resolve/main/pytorch_model.bin"
OTHER = bytes(reversed(BODY))
NOTE = f"{NAME}.sha256"


def get_unpinned(url: str, folder: Path, **changes: object) -> str:
    return get(url, folder, **{"sha256": None, "size": None, **changes})


def get_and_note(url: str, folder: Path) -> str:
    """Do as `load` does with a file that turned out to be good."""
    path = get_unpinned(url, folder)
    download.note_checksum(path)
    return path


def stated(body: bytes = BODY) -> dict[str, str]:
    """Return what the Hugging Face hub says of a large file."""
    digest = hashlib.sha256(body).hexdigest()
    return {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body))}


def hub(body: bytes = BODY) -> Answer:
    """Answer as the hub does, which keeps large files on another host."""
    return status(302, "/cdn", stated(body))


def note(body: bytes = BODY) -> str:
    return f"{hashlib.sha256(body).hexdigest()}  {NAME}\n"


def test_statement_of_a_redirect_is_believed_and_noted(server: Server, tmp_path: Path) -> None:
    server.answers = [status(307, "/renamed"), hub(), serve()]
    path = get_unpinned(HUB, tmp_path, mirror=server.base)
    assert Path(path).read_bytes() == BODY
    assert server.requests[0][0] == "/microsoft/xclip-base-patch32/resolve/main/pytorch_model.bin"
    assert files(tmp_path) == [NAME, NOTE]
    assert (tmp_path / NOTE).read_text() == note()
    assert get_unpinned(HUB, tmp_path, mirror=server.base) == path
    assert len(server.requests) == 3


def test_mirror_of_the_hub_is_held_to_its_statement(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.base)
    server.answers = [serve(OTHER, headers=stated())]
    with pytest.raises(DownloadError, match=f"wrong content, expected SHA-256 {SHA256}, got"):
        get_unpinned(HUB, tmp_path)


@pytest.mark.parametrize("form", ["{}", '"{}"', 'W/"{}"'])
def test_wrong_statement_is_an_error(server: Server, tmp_path: Path, form: str) -> None:
    got = hashlib.sha256(OTHER).hexdigest()
    server.answers = [serve(OTHER, headers={"X-Linked-Etag": form.format(SHA256)})]
    message = f"{server.url}: wrong content, expected SHA-256 {SHA256}, got {got}; nothing was kept"
    with pytest.raises(DownloadError, match=re.escape(message)) as caught:
        get_unpinned(server.url, tmp_path)
    assert ".sha256" not in str(caught.value)
    assert len(server.requests) == 2
    assert files(tmp_path) == []


def test_stated_size_must_be_the_announced_one(server: Server, tmp_path: Path) -> None:
    server.answers = [hub(), serve(BODY + b"more")]
    with pytest.raises(DownloadError, match="announces 600004 bytes where 600000 are expected"):
        get_unpinned(server.url, tmp_path)


def test_statement_makes_up_for_a_missing_length(server: Server, tmp_path: Path) -> None:
    server.answers = [hub(), serve(announce=False)]
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY


def test_statement_counts_over_https_too() -> None:
    stated = download._Stated()
    assert stated in urllib.request.build_opener(stated).process_response["https"]  # type: ignore[attr-defined]


def test_pinned_checksum_outweighs_what_is_stated(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(headers={"X-Linked-Etag": "0" * 64})]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert files(tmp_path) == [NAME]


# The last two are hashes of another kind: git's, and the content's own of the host.
@pytest.mark.parametrize(
    "headers", [{}, {"X-Linked-Etag": '"' + "a" * 40 + '"'}, {"X-Xet-Hash": "b" * 64}]
)
def test_without_a_statement_the_first_content_counts(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.answers = [serve(headers=headers), serve(OTHER)]
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert files(tmp_path) == [NAME]  # it may still turn out to be no weights
    get_and_note(server.url, tmp_path)
    assert (tmp_path / NOTE).read_text() == note()
    get_unpinned(server.url, tmp_path)
    assert len(server.requests) == 1


def test_content_that_cannot_be_judged_is_refused(server: Server, tmp_path: Path) -> None:
    server.answers = [serve(announce=False)]
    remedy = re.escape(f"put it at {tmp_path / NAME}")
    with pytest.raises(DownloadError, match=f"neither the length nor the checksum .*{remedy}"):
        get_unpinned(server.url, tmp_path)
    server.answers = [serve(headers={"Content-Type": "text/html; charset=utf-8"})]
    with pytest.raises(DownloadError, match="the server answers with a web page"):
        get_unpinned(server.url, tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("first", [[], [hub()]], ids=["nothing", "stated"])
def test_unpinned_download_is_resumed(server: Server, tmp_path: Path, first: list[Answer]) -> None:
    server.answers = [*first, serve(cut=1000), *first, serve()]
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[-1][1]["Range"] == "bytes=1000-"
    assert files(tmp_path) == ([NAME, NOTE] if first else [NAME])


@pytest.mark.parametrize("first", [[], [hub()]], ids=["nothing", "stated"])
def test_unpinned_part_of_an_older_version_starts_again(
    server: Server, tmp_path: Path, first: list[Answer]
) -> None:
    older = [hub(OTHER)] if first else []
    server.answers = [*older, serve(OTHER, cut=1000, etag='"old"'), *first, serve()]
    assert Path(get_and_note(server.url, tmp_path)).read_bytes() == BODY
    assert (tmp_path / NOTE).read_text() == note()


def test_mixed_versions_are_noticed_by_the_statement(server: Server, tmp_path: Path) -> None:
    """A host that keeps its mark while the content changes."""
    server.answers = [hub(OTHER), serve(OTHER, cut=1000), hub(), serve(), hub(), serve()]
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[3][1]["Range"] == "bytes=1000-"
    assert len(server.requests) == 6


@pytest.mark.parametrize("first", [[], [hub()]], ids=["nothing", "stated"])
def test_date_is_mark_enough_only_with_a_statement(
    server: Server, tmp_path: Path, first: list[Answer]
) -> None:
    dated = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    cut = serve(cut=1000, etag=None, headers=dated)
    server.answers = [*first, cut, *first, serve(headers=dated)]
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert ("Range" in server.requests[-1][1]) is bool(first)


def test_complete_part_without_a_checksum_is_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(BODY)
    (tmp_path / f"{NAME}.part.etag").write_text('"one"')
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert files(tmp_path) == [NAME]
    assert [headers.get("Range") for _, headers in server.requests] == [f"bytes={len(BODY)}-"]


def test_complete_part_of_an_older_version_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(OTHER)
    (tmp_path / f"{NAME}.part.etag").write_text('"old"')
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY


def test_noted_file_that_was_damaged_is_fetched_again(server: Server, tmp_path: Path) -> None:
    get_and_note(server.url, tmp_path)
    (tmp_path / NAME).write_bytes(BODY[:-1] + b"?")
    assert Path(get_unpinned(server.url, tmp_path, verify=False)).read_bytes() != BODY
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == BODY
    assert len(server.requests) == 2


def test_another_version_needs_the_note_removed(server: Server, tmp_path: Path) -> None:
    get_and_note(server.url, tmp_path)
    (tmp_path / NAME).unlink()
    server.answers = [serve(OTHER, headers=stated(OTHER))]
    remedy = re.escape(f"or remove {tmp_path / NOTE} to accept another version")
    with pytest.raises(DownloadError, match=f"expected SHA-256 {SHA256}, .*{remedy}"):
        get_unpinned(server.url, tmp_path)
    (tmp_path / NOTE).unlink()
    assert Path(get_unpinned(server.url, tmp_path)).read_bytes() == OTHER
    assert (tmp_path / NOTE).read_text() == note(OTHER)


def test_note_that_says_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / NOTE).write_text("")
    with pytest.raises(DownloadError, match=r"\.sha256 does not hold a SHA-256; remove it"):
        get_unpinned("https://host/x", tmp_path)


def test_file_of_another_program_needs_a_checksum(server: Server, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / NAME).write_bytes(OTHER)
    path = get_unpinned(server.url, tmp_path, also_look_in=[str(tmp_path / "clip")])
    assert Path(path).read_bytes() == BODY


# --- where it may go -----------------------------------------------------------------


def test_redirect_loop_ends(server: Server, tmp_path: Path) -> None:
    server.answers = [status(302, f"/hop{i}") for i in range(20)]
    with pytest.raises(DownloadError, match="more than 5 redirects"):
        get(server.url, tmp_path, patience=Patience())  # a stall must not become a retry
    assert len(server.requests) == 6


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_redirect_to_another_scheme_is_refused(server: Server, tmp_path: Path, target: str) -> None:
    server.answers = [status(302, target)]
    with pytest.raises(DownloadError):
        get(server.url, tmp_path)
    assert files(tmp_path) == []


def redirect(source: str, target: str, allow_http: bool) -> None:
    handler = download._Redirects(allow_http)
    handler.redirect_request(urllib.request.Request(source), None, 302, "", {}, target)


def test_redirect_never_goes_down_to_http() -> None:
    redirect("https://a/", "https://b/", False)
    redirect("http://a/", "http://b/", True)
    redirect("http://a/", "https://b/", True)
    for allow_http in (True, False):
        with pytest.raises(DownloadError, match="http://b/: refused, only https"):
            redirect("https://a/", "http://b/", allow_http)


@pytest.mark.parametrize("scheme", ["http", "file", "ftp"])
def test_only_https_is_fetched(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(DownloadError, match=f"{scheme}://host/x: refused, only https"):
        get(f"{scheme}://host/x", tmp_path, allow_http=False)


def test_refused_certificate_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(self: object, request: urllib.request.Request, timeout: float) -> None:
        tried.append(timeout)
        raise urllib.error.URLError(ssl.SSLCertVerificationError(1, "self-signed certificate"))

    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    with pytest.raises(DownloadError, match=r"https://host/x: its certificate is refused: .*self"):
        get("https://host/x", tmp_path)
    assert tried == [2]


def test_mirror_replaces_the_host_and_keeps_its_login(server: Server, tmp_path: Path) -> None:
    mirror = server.base.replace("http://", "http://user:pass%20word@") + "/prefix/"
    server.answers = [status(302, f"{server.base}/moved"), status(404)]
    with pytest.raises(DownloadError, match="answers 404") as caught:
        get("https://host/a/b.pt?x=secret", tmp_path, mirror=mirror)
    (first, headers), (_, redirected) = server.requests
    assert first == "/prefix/a/b.pt?x=secret"
    assert headers["Authorization"] == "Basic dXNlcjpwYXNzIHdvcmQ="
    assert "Authorization" not in redirected
    for secret in ("user", "pass", "word", "secret"):
        assert secret not in str(caught.value)


def test_proxy_of_the_environment_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.base)
    monkeypatch.delenv("no_proxy", raising=False)
    assert Path(get("http://host.invalid/x.pt", tmp_path)).read_bytes() == BODY
    assert [path for path, _ in server.requests] == ["http://host.invalid/x.pt"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/b", "..", ".hidden", "", "a\\b", "a\nb", "x\0y", "é.pt"],
)
def test_hostile_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DownloadError, match="is not a plain file name"):
        get("https://host/x", tmp_path, filename=name)


def test_short_checksum_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"64 digits"):
        get("https://host/x", tmp_path, sha256="abc")


# --- offline and the environment -----------------------------------------------------


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", forbidden)


@pytest.mark.usefixtures("no_sockets")
def test_offline_with_the_file_connects_to_nothing(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    url = "https://host/x"
    assert get(url, tmp_path, offline=True) == str(tmp_path / NAME)


@pytest.mark.usefixtures("no_sockets")
@pytest.mark.parametrize("variable", ["ACTIONCLIP_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_without_the_file_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    message = f"{tmp_path / NAME} is missing .* fetch https://host/x, SHA-256 {SHA256},"
    with pytest.raises(DownloadError, match=message) as caught:
        get("https://host/x", tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / NAME).write_bytes(b"x" * len(BODY))
    with pytest.raises(DownloadError, match="does not have its checksum"):
        get("https://host/x", tmp_path)


@pytest.mark.usefixtures("no_sockets")
def test_file_put_there_by_hand_is_noted(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    assert get_unpinned(HUB, tmp_path, offline=True, verify=False) == str(tmp_path / NAME)
    assert files(tmp_path) == [NAME]
    assert get_unpinned(HUB, tmp_path, offline=True) == str(tmp_path / NAME)
    assert files(tmp_path) == [NAME]  # its content may still turn out to be bad
    download.note_checksum(str(tmp_path / NAME))
    assert (tmp_path / NOTE).read_text() == note()
    get_unpinned(HUB, tmp_path, offline=True)
    (tmp_path / NAME).write_bytes(OTHER)
    download.note_checksum(str(tmp_path / NAME))
    assert (tmp_path / NOTE).read_text() == note()
    message = (
        f"{tmp_path / NAME} does not have its checksum and downloads are switched off (offline): "
        f"fetch {HUB}, SHA-256 {SHA256}, elsewhere and put it there, or remove {tmp_path / NOTE} "
        "to accept another version"
    )
    with pytest.raises(DownloadError, match=re.escape(message)):
        get_unpinned(HUB, tmp_path, offline=True)


def test_folder_that_nobody_may_write_to_gets_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NAME).write_bytes(BODY)
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (str(tmp_path), os.W_OK))
    download.note_checksum(str(tmp_path / NAME))
    assert files(tmp_path) == [NAME]


@pytest.mark.usefixtures("no_sockets")
def test_offline_message_without_a_checksum(tmp_path: Path) -> None:
    remedy = re.escape(f"(offline): fetch {HUB} elsewhere and put it there")
    with pytest.raises(DownloadError, match=f"{NAME} is missing .*{remedy}$"):
        get_unpinned(HUB, tmp_path, offline=True)
    (tmp_path / NAME).write_bytes(b"short")
    with pytest.raises(DownloadError, match=f"{NAME} does not have its 600000 bytes .*{remedy}$"):
        get_unpinned(HUB, tmp_path, offline=True, size=len(BODY))
    (tmp_path / NAME).unlink()
    (tmp_path / NAME).mkdir()
    with pytest.raises(DownloadError, match=f"{NAME} is no file and downloads .*{remedy}$"):
        get_unpinned(HUB, tmp_path, offline=True)


def test_environment_names_the_mirror(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIONCLIP_MIRROR", server.base)
    get("https://host/x.pt", tmp_path)
    assert [path for path, _ in server.requests] == ["/x.pt"]


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_directory({}) == "/home/me/.cache/actionclip"
    assert cache_directory({"XDG_CACHE_HOME": "/x"}) == "/x/actionclip"
    assert cache_directory({"XDG_CACHE_HOME": "/x", "ACTIONCLIP_HOME": "~/a"}) == "/home/me/a"


def test_mirror_for() -> None:
    hub, other = "https://huggingface.co/a", "https://openaipublic.azureedge.net/a"
    assert mirror_for(hub, {}) is None
    assert mirror_for(hub, {"HF_ENDPOINT": "https://hf"}) == "https://hf"
    assert mirror_for(other, {"HF_ENDPOINT": "https://hf"}) is None
    both = {"HF_ENDPOINT": "https://hf", "ACTIONCLIP_MIRROR": "https://m"}
    assert mirror_for(hub, both) == mirror_for(other, both) == "https://m"


@pytest.mark.parametrize(
    ("value", "wanted"), [("1", True), ("TRUE", True), ("0", False), ("", False)]
)
def test_offline_wanted(value: str, wanted: bool) -> None:
    assert offline_wanted({"ACTIONCLIP_OFFLINE": value}) is wanted
    assert offline_wanted({"HF_HUB_OFFLINE": value}) is wanted
    assert offline_wanted({}) is False


# --- the disk ------------------------------------------------------------------------


def test_cache_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DownloadError, match=r"cannot use .*file.*set ACTIONCLIP_HOME") as caught:
        get(server.url, tmp_path / "file" / "cache")
    assert "\n" not in str(caught.value)
    assert server.requests == []


def test_full_disk(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_write_all", full)
    with pytest.raises(DownloadError, match="No space left on device; free some space"):
        get(server.url, tmp_path)
    assert len(server.requests) == 1
    assert NAME not in files(tmp_path)


def test_file_that_may_not_grow(server: Server, tmp_path: Path) -> None:
    """The system's own refusal, where a quota or a limit of the process stops a file."""
    out, error = child(server, tmp_path, most_bytes=100_000).communicate(timeout=60)
    assert out == ""
    assert "DownloadError: cannot use" in error.splitlines()[-1]
    assert "File too large; free some space there or set ACTIONCLIP_HOME" in error
    assert files(tmp_path) == [f"{NAME}.part", f"{NAME}.part.etag"]
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[1][1]["Range"] == "bytes=100000-"


def test_short_writes_are_completed() -> None:
    class Slow:
        written = b""

        def write(self, chunk: memoryview) -> int:
            self.written += bytes(chunk[:3])
            return min(3, len(chunk))

    file = Slow()
    download._write_all(file, b"0123456789")  # type: ignore[arg-type]
    assert file.written == b"0123456789"


# --- several processes ---------------------------------------------------------------


@pytest.mark.parametrize(("number", "sha256"), [(16, SHA256), (4, "")])
def test_many_processes_make_one_request(
    server: Server, tmp_path: Path, number: int, sha256: str
) -> None:
    def slowly(handler: Handler) -> None:
        time.sleep(0.5)
        serve()(handler)

    server.answers = [slowly]
    children = [child(server, tmp_path, sha256) for _ in range(number)]
    results = [process.communicate(timeout=60) for process in children]
    assert results == [(f"{tmp_path / NAME}\n", "")] * number
    assert len(server.requests) == 1
    assert (tmp_path / NAME).read_bytes() == BODY
    assert files(tmp_path) == [NAME]


def test_many_writers_of_a_note(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i}.bin").write_bytes(BODY)
    paths = [str(tmp_path / f"{i}.bin") for i in range(20) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(download.note_checksum, paths))
    assert len(list(tmp_path.iterdir())) == 40


def test_killed_process_leaves_something_to_resume(server: Server, tmp_path: Path) -> None:
    server.answers = [stall(300_000), serve()]
    process = child(server, tmp_path)
    part = tmp_path / f"{NAME}.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size == 300_000):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert NAME not in files(tmp_path)
    assert Path(get(server.url, tmp_path)).read_bytes() == BODY
    assert server.requests[1][1]["Range"] == "bytes=300000-"


@pytest.mark.parametrize("size", random.Random(2).sample(range(len(BODY)), 3))
def test_killed_at_any_byte(tmp_path: Path, size: int) -> None:
    assert fault_after_kill(tmp_path, size) == ""
    assert files(tmp_path) == [NAME]


def test_others_go_on_where_a_killed_process_stopped(tmp_path: Path) -> None:
    assert faults_after_dead_owner(tmp_path, 4) == []
    assert files(tmp_path) == [NAME]


def test_waiting_for_the_lock_is_bounded(server: Server, tmp_path: Path) -> None:
    with (
        download._locked(str(tmp_path / f"{NAME}.lock"), PATIENCE),
        pytest.raises(DownloadError, match=r"another process has held .* for 0 s"),
    ):
        get(server.url, tmp_path)
    assert server.requests == []


# --- the bar -------------------------------------------------------------------------


def test_bar_goes_to_stderr_and_only_where_it_is_wanted(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(server.url, tmp_path / "a")
    assert capsys.readouterr() == ("", "")
    get(server.url, tmp_path / "b", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert NAME in err
    assert "586k/586k" in err

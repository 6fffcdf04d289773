"""Children that crash, hang or raise cost their own item, and none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import isolated_work
import pytest

from actionclip import isolation
from actionclip.ahead import map_ahead
from actionclip.errors import InputError, VideoError
from actionclip.isolation import Isolated, LostWorkError

SECONDS = 30.0


@pytest.fixture
def isolated():
    work = Isolated(isolated_work.work, SECONDS, isolated_work.set_up, ["actionclip.reading"])
    with closing(work) as isolated:
        yield isolated


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.02)


def test_the_work_is_done_elsewhere_by_one_child_after_the_other(isolated) -> None:
    pids = {isolated("pid") for _ in range(5)}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert isolated("set up") == "yes"
    assert "SET_UP" not in os.environ
    assert isolated({"any": [1, b"2"]}) == {"any": [1, b"2"]}


def test_an_error_is_raised_here_and_the_child_goes_on(isolated) -> None:
    before = isolated("pid")
    with pytest.raises(VideoError, match=r"^a\.mp4: empty: nothing in it$") as caught:
        isolated("raise")
    assert (caught.value.path, caught.value.reason) == ("a.mp4", "empty")
    assert isolated("pid") == before


@pytest.mark.parametrize(("item", "end"), [("crash", "got SIGSEGV"), ("leave", "code 7")])
def test_a_crash_costs_one_item(isolated, item: str, end: str) -> None:
    before = isolated("pid")
    with pytest.raises(LostWorkError, match=f"{end}, 2 times") as caught:
        isolated(item)
    assert caught.value.reason == "crashed"
    assert isolated("pid") != before


def test_a_child_that_dies_once_is_replaced(isolated, tmp_path: Path) -> None:
    assert isolated(("crash once", str(tmp_path))) == "second try"


def test_a_child_that_died_while_it_was_idle_is_replaced(isolated) -> None:
    os.kill(isolated("pid"), signal.SIGKILL)
    assert isolated("here") == "here"


def test_a_child_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_GRACE_SECONDS", 1)
    work = Isolated(isolated_work.work, 2, isolated_work.set_up, ["actionclip.reading"])
    with closing(work) as isolated:
        pid = isolated("pid")
        with pytest.raises(LostWorkError, match=r"took over 3 seconds") as caught:
            isolated("hang")
        assert caught.value.reason == "timeout"
        wait_until_gone(pid)
        assert isolated("here") == "here"


def test_threads_have_a_child_each(isolated, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        items = [("meet", str(tmp_path), 3)] * 3
        assert list(pool.map(isolated, items)) == items
    assert len(os.listdir(tmp_path)) == 3


def test_leaving_does_not_wait_for_the_work() -> None:
    work = Isolated(isolated_work.work, 600, isolated_work.set_up, ["actionclip.reading"])
    with ThreadPoolExecutor(1) as pool:
        with closing(work) as isolated:
            pid = isolated("pid")
            hanging = pool.submit(isolated, "hang")
            time.sleep(0.2)
        wait_until_gone(pid)
        with pytest.raises(LostWorkError):
            hanging.result(timeout=20)


def test_an_interrupted_list_does_not_wait_either(tmp_path: Path) -> None:
    """The interruption comes while the caller waits for a result."""
    work = Isolated(isolated_work.work, 600, isolated_work.set_up, ["actionclip.reading"])
    items: list = ["here", ("interrupt", os.getpid()), "hang", "hang"]
    results = map_ahead(work, items, 2, "test", stop=work.close)
    assert next(results) == "here"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(results)
    assert time.monotonic() < started + 60


def test_nothing_is_imported_from_the_current_folder(isolated, tmp_path: Path) -> None:
    for name in ("struct", "random", "torch", "signal"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    command = [str(Path(sys.executable).with_name("actionclip-zeroshot")), "a.mp4", "b.mp4"]
    command += ["--model", "tiny", "--labels", "a red circle growing"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "owned").exists()
    assert (result.returncode, result.stderr.count("\n")) == (3, 3), result.stderr


def test_children_that_died_while_they_were_idle(isolated, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(isolated, [("meet", str(tmp_path), 2)] * 2))
    for name in os.listdir(tmp_path):
        os.kill(int(name), signal.SIGKILL)
    assert isolated("here") == "here"


def test_children_that_end_at_their_start() -> None:
    work = Isolated(isolated_work.work, SECONDS, isolated_work.leave, ["actionclip.reading"])
    with (
        closing(work) as isolated,
        pytest.raises(InputError, match=r"ended with code 7 at its start; a script that uses such"),
    ):
        isolated("here")


def test_any_limit_of_time_can_be_asked_for() -> None:
    with closing(Isolated(isolated_work.work, float("inf"), isolated_work.set_up, [])) as isolated:
        assert isolated("here") == "here"


PARENT = """
import contextlib, sys, threading
sys.path.insert(0, {tests!r})
import isolated_work
from actionclip.isolation import Isolated
if __name__ == "__main__":
    isolated = Isolated(isolated_work.work, 600, isolated_work.set_up, ["actionclip.reading"])
    with contextlib.closing(isolated):
        print(isolated("pid"), flush=True)
        if {is_busy!r}:
            threading.Thread(target=isolated, args=["hang"]).start()
        sys.stdin.read()
"""


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_their_parent(number: int, is_busy: bool, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parent), is_busy=is_busy))
    parent = subprocess.Popen(
        [sys.executable, script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.5 * is_busy)
    if number == signal.SIGINT:  # as Ctrl-C: to all of them; only the parent may say a word
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    _, err = parent.communicate(timeout=30)
    assert err.count("KeyboardInterrupt") == (number == signal.SIGINT)
    wait_until_gone(child)


def test_nothing_stays_open(isolated) -> None:
    isolated("here")
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(LostWorkError):
            isolated("leave")
    isolated("here")
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 1


def test_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", refuse)
    with closing(
        Isolated(isolated_work.work, 9, isolated_work.set_up, ["actionclip.reading"])
    ) as isolated:
        message = r"started for the work \(Resource temporarily unavailable\); check TMPDIR"
        with pytest.raises(InputError, match=message):
            isolated("here")

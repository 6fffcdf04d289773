"""How a command starts and ends as a program of its own, and what it does without."""

import argparse
import ast
import gc
import importlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import actionclip
from actionclip import published
from actionclip.cli import command, options
from actionclip.cli.console import set_up
from actionclip.errors import DownloadError
from actionclip.precision import PRECISIONS
from actionclip.weights import KINDS


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_help_and_mistakes_do_not_wait_for_pytorch() -> None:
    result = run(
        "import sys; from actionclip.cli import console, zeroshot\n"
        "assert zeroshot.main(['-h']) == 0\n"
        "assert zeroshot.main(['a.mp4', '--labels', 'x', '--crops', '2']) == 2\n"
        "assert zeroshot.main(['a.mp4', '--labels', 'x', '--top-k', '0']) == 2\n"
        "assert zeroshot.main(['a.mp4', '--labels', 'none.txt']) == 2\n"
        "assert not {'torch', 'av', 'numpy', 'tqdm'} & set(sys.modules)\n"
    )
    assert (result.returncode, result.stderr.count("\n")) == (0, 3)


def test_names_that_the_options_list() -> None:
    assert options.KINDS == KINDS
    assert tuple(PRECISIONS) == options.PRECISIONS


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "5"}, {"GOMP_SPINCOUNT": "5"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_the_user_chooses_how_threads_wait(chosen: dict, expected: dict) -> None:
    set_up(chosen)
    assert chosen == expected


def test_threads_wait_as_chosen_before_pytorch_is_imported() -> None:
    result = run(
        "import os, sys; from actionclip.cli import console, zeroshot\n"
        "os.environ.pop('GOMP_SPINCOUNT', None)\n"
        "zeroshot.main = lambda argv: print(argv, os.environ['GOMP_SPINCOUNT'],"
        " 'torch' in sys.modules) or 4\n"
        "console.run('zeroshot', ['x'])"
    )
    assert (result.stdout, result.returncode) == ("['x'] 10000 False\n", 4)


@pytest.mark.parametrize("name", ["zeroshot", "train", "eval", "check"])
def test_console_scripts(name: str) -> None:
    code = (
        "import sys, types; from actionclip.cli import console\n"
        "module = types.SimpleNamespace(main=lambda argv: print(argv) or 3)\n"
        f"sys.modules['actionclip.cli.{name}'] = module\n"
        f"console.{name}()"
    )
    result = run(code)
    assert (result.stdout, result.returncode) == ("None\n", 3)


def test_leaving_writes_what_was_printed_and_nothing_is_taken_apart() -> None:
    result = run(
        "import atexit, sys; from actionclip.cli.console import leave\n"
        "atexit.register(print, 'taken apart')\n"
        "print('printed', end=''); print('said', end='', file=sys.stderr); leave(3)"
    )
    assert (result.stdout, result.stderr, result.returncode) == ("printed", "said", 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_leaving_does_not_hide_what_could_not_be_written() -> None:
    code = "from actionclip.cli.console import leave; print('lost'); leave(0)"
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert result.returncode != 0
    assert b"No space left" in result.stderr


def test_leaving_without_streams() -> None:
    code = "import sys; from actionclip.cli.console import leave; sys.stdout = None; leave(5)"
    assert run(code).returncode == 5


def test_imports_collect_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    with command.quick_imports():
        assert gc.isenabled()  # nothing is left to import, and this program's garbage is its own
    assert gc.get_freeze_count() == 0
    monkeypatch.delitem(sys.modules, "torch")
    with command.quick_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with pytest.raises(KeyError), command.quick_imports():
            raise KeyError
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_name_is_imported_when_it_is_used() -> None:
    result = run(
        "import sys, actionclip\n"
        "assert 'torch' not in sys.modules\n"
        "from actionclip import InputError\n"
        "assert 'torch' not in sys.modules\n"
        "assert actionclip.video.read_frames\n"
        "assert 'torch' in sys.modules and 'actionclip.weights' not in sys.modules\n"
        "from actionclip import *\n"
        "assert load is actionclip.load is sys.modules['actionclip.weights'].load\n"
    )
    assert result.returncode == 0, result.stderr


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(actionclip.__file__).read_text())
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("actionclip"):
            seen |= {alias.name: node.module for alias in node.names}
    assert sorted(seen) == sorted(actionclip.__all__)
    assert set(actionclip.__all__) <= set(dir(actionclip))
    for name, module in seen.items():
        if module == "actionclip":
            assert getattr(actionclip, name) is importlib.import_module(f"actionclip.{name}")
        else:
            value = getattr(importlib.import_module(module), name)
            assert getattr(actionclip, name) is value
    with pytest.raises(AttributeError, match="'actionclip' has no attribute 'lood'"):
        actionclip.lood  # noqa: B018


def test_a_begun_fetch_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    def fetch(url: str, filename: str, **options: object) -> str:
        fetched.append(filename)
        if filename == "RN50.pt":
            raise DownloadError("no network")
        return filename

    monkeypatch.setattr(published.download, "fetch", fetch)
    with published.begun_fetch("no-such-model"):
        assert not published._begun
    with published.begun_fetch("ViT-B/32"):
        assert published.fetch("ViT-B/32") == "ViT-B-32.pt"
        assert fetched == ["ViT-B-32.pt"]
        assert published.fetch("ViT-B/32") == "ViT-B-32.pt"
        assert published.fetch("ViT-B/16") == "ViT-B-16.pt"
        assert fetched == ["ViT-B-32.pt", "ViT-B-32.pt", "ViT-B-16.pt"]
    with published.begun_fetch("RN50"), pytest.raises(DownloadError, match="no network"):
        published.fetch("RN50")
    with published.begun_fetch("ViT-B/32"):
        assert published.fetch("ViT-B/32", "elsewhere") == "ViT-B-32.pt"
    assert not published._begun  # forgotten, although nobody took it


@pytest.mark.parametrize(
    ("interruption", "code"), [(KeyboardInterrupt, 130), (command._TerminatedError, 143)]
)
def test_a_signal_that_breaks_a_clean_up_is_a_signal(
    interruption: type[BaseException], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(_: argparse.Namespace) -> command.ExitCode:
        try:
            raise interruption
        finally:
            threading.Lock().release()  # RuntimeError

    assert command.run(command.build_parser("p", "d"), work, []) == code
    assert "internal error" not in capsys.readouterr().err


def test_a_full_disk_on_standard_output_has_its_code(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "actionclip", "zeroshot", str(tmp_path / "no.mp4")]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [*arguments, "--labels", "a red circle", "--model", "tiny", "--format", "json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert process.returncode == 5
    assert "Exception ignored" not in process.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_imports(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import may drop what a signal raises, and leave half of a module behind."""
    monkeypatch.delitem(sys.modules, "torch")
    imported = []

    def work(_: argparse.Namespace) -> command.ExitCode:
        with command.quick_imports():
            signal.raise_signal(number)
            imported.append("all of it")
        return command.ExitCode.DONE

    assert command.run(command.build_parser("p", "d"), work, []) == 128 + number
    assert imported == ["all of it"]
    gc.unfreeze()


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """The server of the processes that decode has a socket in a folder of its own."""
    command = [sys.executable, "-m", "actionclip", "zeroshot", "a.mp4", "b.mp4"]
    command += ["--model", "tiny", "--labels", "a red circle growing"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 3
    assert os.listdir(tmp_path) == []

"""`python -m actionclip env`: what a report needs, without what it must not have."""

import platform
import sys

import av
import pytest
import torch

from actionclip import __version__
from actionclip.__main__ import main as package_main
from actionclip.cli.env import main


def report(capsys) -> dict[str, list[str]]:
    """Run the command and return its lines by name."""
    assert main([]) == 0
    lines: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        lines.setdefault(line[:12].rstrip(), []).append(line[12:])
    return lines


def test_names_every_version(capsys):
    lines = report(capsys)
    assert lines["actionclip"] == [__version__]
    assert lines["Python"][0].startswith(platform.python_version())
    assert lines["torch"] == [torch.__version__]
    assert lines["av"] == [av.__version__]
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    assert f"libavcodec {libavcodec}," in lines["FFmpeg"][0]
    assert {"numpy", "ftfy", "regex", "tqdm", "CPU"} <= lines.keys()
    assert len(lines.get("GPU", [])) == torch.cuda.device_count()


def test_settings_are_shown_without_passwords(capsys, monkeypatch):
    monkeypatch.setenv("ACTIONCLIP_MIRROR", "https://me:a/b@mirror.example/path")
    monkeypatch.setenv("ACTIONCLIP_HOME", "/cache\x1b[2J")
    monkeypatch.setenv("SECRET_ACTIONCLIP_TOKEN", "hidden")
    variables = report(capsys)["variable"]
    assert "ACTIONCLIP_MIRROR=https://***@mirror.example/path" in variables
    assert "ACTIONCLIP_HOME=/cache\\x1b[2J" in variables
    assert not any("hidden" in value for value in variables)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("me:secret@mirror/x", "***@mirror/x"),
        ("me:se/cret@mirror/x", "***@mirror/x"),
        ("https://mirror/?token=secret", "https://mirror/?***"),
        ("https://mirror/x#secret", "https://mirror/x?***"),
        ("https://me:se?cret@mirror/x", "https://***@mirror/x"),
        ("me:se\ncret@mirror/?a\nsecret", "***@mirror/?***"),
        ("https://mirror/x", "https://mirror/x"),
    ],
)
@pytest.mark.parametrize("name", ["ACTIONCLIP_MIRROR", "HF_ENDPOINT"])
def test_secrets_of_other_urls(capsys, monkeypatch, name, value, shown):
    monkeypatch.setenv(name, value)
    assert f"{name}={shown}" in report(capsys)["variable"]


def test_says_what_is_broken(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    lines = report(capsys)
    assert lines["av"][0].startswith("cannot be imported (")
    assert lines["torch"] == [torch.__version__]


def test_is_a_command_of_the_package(capsys):
    assert package_main(["env", "--version"]) == 0
    assert capsys.readouterr().out == f"actionclip {__version__}\n"

"""See which files a command opens and whether it reaches for the network, with strace."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STRACE = shutil.which("strace")

# Where Python, its packages, the C library and the kernel keep what they may load at any time.
LIBRARIES = tuple(
    os.path.join(folder, "")
    for folder in (
        sys.prefix,
        sys.base_prefix,
        str(Path(__file__).parents[1] / "actionclip"),
        *("/lib", "/lib64", "/usr/lib", "/usr/share/locale", "/usr/share/zoneinfo"),
        *("/sys/devices/system", "/dev/shm"),
    )
)
# Not all of these folders: a password or a key may lie beside them.
_FILES = frozenset(
    {
        *("/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/urandom"),
        *("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/self/fd", "/proc/self/maps"),
    }
)
_CALL = re.compile(r"(?:\d+ +)?(\w+)\((.*)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_OPENING = {"open", "openat", "openat2"}


@dataclass(frozen=True)
class Trace:
    """The system calls of a command and its children.

    Attributes:
        opened: what they opened, or tried to, in order.
        network: their calls about sockets, but for those between processes of this machine.
        executed: the programs that they started.
    """

    opened: list[str]
    network: list[str]
    executed: list[str]


def run(
    command: Sequence[str], record: Path, **options
) -> tuple[subprocess.CompletedProcess, Trace]:
    """Run a command under strace; `options` are those of `subprocess.run`."""
    assert STRACE is not None
    calls = "trace=network,openat,open,openat2,execve"
    watched = [STRACE, "-f", "--seccomp-bpf", "-xx", "-s", "8192", "-e", calls, "-o", str(record)]
    done = subprocess.run([*watched, *command], **options)
    return done, parse(record.read_text(), options.get("cwd") or os.getcwd())


def parse(text: str, folder: str | os.PathLike[str]) -> Trace:
    """Read what strace wrote about a command that ran in a folder."""
    trace = Trace([], [], [])
    for line in text.splitlines():
        call = _CALL.match(line)
        if call is None:  # the end of a process, or of a call that another interrupted
            continue
        name, arguments = call.groups()
        texts = [bytes.fromhex(t.replace("\\x", "")) for t in _TEXT.findall(arguments)]
        if name in _OPENING:
            trace.opened.append(os.path.join(folder, os.fsdecode(texts[0])))
        elif name == "execve":
            trace.executed.append(os.fsdecode(texts[0]))
        elif name in ("socket", "connect", "bind") and "AF_UNIX" not in arguments:
            trace.network.append(line)
    return trace


def is_library(path: str) -> bool:
    return path.startswith(LIBRARIES) or path in _FILES

"""`python -m actionclip env`: the versions and settings that a bug report needs.

Beside the flow from video to prediction: works also where a dependency is broken, and says which.
"""

import argparse
import importlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

from actionclip import __version__
from actionclip.cli import command
from actionclip.cli.command import ExitCode
from actionclip.errors import one_line

PROG = "python -m actionclip env"

PACKAGES = ("torch", "av", "numpy", "ftfy", "regex", "tqdm")
VARIABLES = re.compile(
    r"ACTIONCLIP_.*|HF_(ENDPOINT|HUB_OFFLINE)|(OMP|GOMP)_.*|CUDA_VISIBLE_DEVICES"
)


def build_parser() -> command.OneLineParser:
    """Describe the command's arguments."""
    return command.build_parser(PROG, "Print the versions and settings that a report needs.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(), env, argv)


def env(args: argparse.Namespace) -> ExitCode:
    """Print one line for each thing that a result may depend on."""
    for name, value in (*versions(), *hardware(), *settings(os.environ)):
        print(f"{name:12}{one_line(value)}")
    return ExitCode.DONE


def versions() -> Iterator[tuple[str, str]]:
    """Yield the name and version of all that runs, or what is wrong with it."""
    yield "actionclip", __version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            yield name, importlib.metadata.version(name)
        except (ImportError, OSError) as error:
            yield name, f"cannot be imported ({error})"
    if sys.modules.get("av"):
        libraries = sys.modules["av"].library_versions.items()
        yield "FFmpeg", ", ".join(f"{name} {'.'.join(map(str, v))}" for name, v in libraries)


def hardware() -> Iterator[tuple[str, str]]:
    """Yield what PyTorch computes on."""
    if not sys.modules.get("torch"):
        return
    import torch

    yield (
        "CPU",
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
    )
    for i in range(torch.cuda.device_count()):
        yield "GPU", f"{torch.cuda.get_device_name(i)}, CUDA {torch.version.cuda}"


def settings(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the environment variables that change what happens, without secrets of URLs."""
    for name in sorted(environ):
        if VARIABLES.fullmatch(name):
            yield "variable", f"{name}={_without_secrets(environ[name])}"


def _without_secrets(value: str) -> str:
    """Hide what stands before the host of a URL, also of one without a scheme, and its query."""
    without_name = re.sub(r"(?s)^([\w+.-]+://)?.*@", r"\1***@", value)
    return re.sub("(?s)[?#].*", "?***", without_name)

"""Run the CPU benchmarks one after another and rewrite the table of benchmarks/README.md.

    python -m benchmarks               all of them, in about half an hour on 2 quiet cores
    python -m benchmarks NAME...       some of them
    python -m benchmarks --table       only rewrite the table

`--videos FOLDER` names real videos to decode; without it `video` has only rendered ones.

From the root of the repository, with any Python in which the package is installed. Each script
is a process of its own. One that fails stops no other, and its old results stay.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from actionclip.video import find_videos
from benchmarks import table

# What each script is started with; what is not said here is its default.
SUITE: dict[str, tuple[str, ...]] = {
    "encode": ("--repeats", "3"),
    "text": (),
    "video": ("--repeats", "3"),
    "preprocess": (),
    "start": (),
    "load": (),
    "loss": (),
    "train": (),
    "busy": (),
    "pipeline": (),
}
# A script that takes several times its share of the half hour hangs.
LIMIT_SECONDS = 1200
# Without it a program beside makes each parallel region wait for a time slice, see bench_busy.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000"}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(SUITE)}")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="real videos to decode")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in SUITE]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(SUITE)}")
    names = () if args.table else args.names or SUITE
    if args.videos and not args.videos.is_dir():
        parser.error(f"--videos {args.videos} is no folder")
    failed = [name for name in names if not run(name, args.videos)]
    table.rewrite()
    if failed:
        print(f"failed, their old rows stay: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, videos: Path | None) -> bool:
    """Run a script and keep its results; returns whether it succeeded."""
    arguments = list(SUITE[name])
    if name == "video" and videos is not None:
        arguments += ["--rendered", *find_videos(videos.resolve())]
    script = Path("benchmarks") / f"bench_{name}.py"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / f"{name}.json"
        command = [sys.executable, str(script), *arguments, "--json", str(written)]
        print(f"== {script}", flush=True)
        code = call(command)
        if code == 0:
            shutil.copyfile(written, table.RESULTS / written.name)
    print(f"== {'done' if code == 0 else 'FAILED'} in {time.monotonic() - started:.0f} s\n")
    return code == 0


def call(command: list[str]) -> int:
    """Run a command of the suite from the root; it and what it started ends with this."""
    process = subprocess.Popen(
        command,
        cwd=table.HERE.parent,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=hasattr(os, "killpg"),
    )
    try:
        return process.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        print(f"stopped after {LIMIT_SECONDS} s", file=sys.stderr)
        return 1
    finally:
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError):  # all have ended
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `call` ends what it started
    sys.exit(main())

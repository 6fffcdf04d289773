"""Put the package under fire and write what was measured: benchmarks/results/reliability.md.

    python -m benchmarks.reliability             all of it, in about an hour on 2 cores
    python -m benchmarks.reliability NAME...     some of it
    python -m benchmarks.reliability --page      only write the page again

From the root of the repository, with the Python that has the package and its test extra. What is
not run keeps its last results. `--small` runs a little of everything and writes nothing.
"""

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks import measure
from benchmarks.reliability import page
from benchmarks.reliability.figures import Figure

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # they write the hostile files

NAMES = ("videos", "weights", "training", "bulk", "supply", "text")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(NAMES)}")
    parser.add_argument("--small", action="store_true", help="try a little, and write nothing")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in NAMES]:
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    holds = True
    for name in () if args.page else args.names or NAMES:
        started = time.monotonic()
        figures = list(run(name, args.small))
        holds = holds and all(figure.holds for figure in figures)
        if not args.small:
            results = {
                "seconds": round(time.monotonic() - started),
                "machine": measure.machine(),
                "figures": [asdict(figure) for figure in figures],
            }
            path = page.RESULTS / f"{name}.json"
            path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if not args.small:
        page.rewrite()
    return 0 if holds else 1


def run(name: str, small: bool) -> Iterator[Figure]:
    """Run a module; yields its figures, and one more if it breaks off."""
    print(f"== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            module = importlib.import_module(f"benchmarks.reliability.{name}")
            for figure in module.measure(Path(folder), small):
                mark = "holds" if figure.holds else "FAILS"
                print(f"{figure.bar} {mark}: {figure.question}: {figure.answer}", flush=True)
                if figure.note:
                    print(f"    {figure.note}", flush=True)
                yield figure
        except Exception as error:
            traceback.print_exc()
            yield Figure("-", f"{name} runs to its end", type(error).__name__, False, str(error))


if __name__ == "__main__":
    sys.exit(main())

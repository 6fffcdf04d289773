"""Run the commands as `python -m actionclip COMMAND ...`."""

import sys
from collections.abc import Callable, Sequence

from actionclip.cli import console

COMMANDS = ("zeroshot", "train", "eval", "check", "synthetic", "env")


def main(argv: Sequence[str], call: Callable[[str, Sequence[str]], int] = console.call) -> int:
    """Hand over to the command named by the first argument."""
    if argv and argv[0] in COMMANDS:
        return call(argv[0], argv[1:])
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    usage = f"usage: python -m actionclip {{{','.join(COMMANDS)}}} ..."
    print(usage, file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], console.run))

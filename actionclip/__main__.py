"""Run the commands as `python -m actionclip COMMAND ...`."""

import sys

from actionclip.cli import check, eval, synthetic, train, zeroshot

COMMANDS = {
    "zeroshot": zeroshot.main,
    "train": train.main,
    "eval": eval.main,
    "check": check.main,
    "synthetic": synthetic.main,
}


def main(argv: list[str]) -> int:
    """Hand over to the command named by the first argument."""
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    asked_for_help = argv[:1] in (["-h"], ["--help"])
    usage = f"usage: python -m actionclip {{{','.join(COMMANDS)}}} ..."
    print(usage, file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

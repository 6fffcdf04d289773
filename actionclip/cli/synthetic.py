"""`python -m actionclip synthetic`: render the clips that the model `tiny` learns from."""

import argparse
import os
from collections.abc import Sequence

from tqdm import tqdm

from actionclip.cli import command
from actionclip.cli.command import ExitCode
from actionclip.errors import InputError, OutputError
from actionclip.synthetic import PARTS, part_sentences, write_clip, write_dataset

PROG = "python -m actionclip synthetic"

EPILOG = """\
examples:
  %(prog)s clip.mp4 --sentence "a red circle moving left"
  %(prog)s clips/train --part train --clips-per-sentence 100
  %(prog)s clips/unseen --part unseen --clips-per-sentence 5
"""


def build_parser() -> command.OneLineParser:
    """Describe the command's arguments."""
    parser = command.build_parser(
        PROG, "Render short clips of moving shapes: one video, or a folder per sentence."
    )
    parser.epilog = EPILOG
    parser.add_argument("output", metavar="OUT", help="video file to write, or folder for many")
    parser.add_argument("--sentence", metavar="S", help="write one clip that shows this")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="train",
        help="train and seen share four fifths of the sentences, unseen has the rest; still has "
        "shapes at rest (%(default)s)",
    )
    parser.add_argument(
        "--clips-per-sentence", type=int, default=10, metavar="N", help="in a folder (%(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split and all clips (%(default)s)"
    )
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that render at a time (%(default)s)"
    )
    return parser


def work(args: argparse.Namespace) -> ExitCode:
    """Write one clip or a folder of them."""
    for name in ("clips_per_sentence", "processes"):
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} is {getattr(args, name)}; give at least 1")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}; give 0 or more")
    try:
        if args.sentence is not None:
            write_clip(args.output, args.sentence, args.seed)
        else:
            write_folder(args)
    except OSError as error:
        reason = error.strerror or error
        if args.sentence is None and os.path.isfile(args.output):
            reason = "it is a file; name a folder, or say what to show with --sentence"
        raise OutputError(f"{args.output}: cannot be written ({reason})") from error
    return ExitCode.DONE


def write_folder(args: argparse.Namespace) -> None:
    """Write all clips of a part, with a bar."""
    total = len(part_sentences(args.part, args.seed)) * args.clips_per_sentence
    paths = write_dataset(
        args.output, args.part, args.clips_per_sentence, args.seed, processes=args.processes
    )
    for _ in tqdm(paths, total=total, unit="clip", disable=None):
        pass
    labels = os.path.join(args.output, "labels.txt")
    command.say(PROG, f"{args.output}: {total} clips; all sentences to choose from: {labels}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command.run(build_parser(), work, argv)

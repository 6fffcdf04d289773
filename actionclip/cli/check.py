"""`actionclip-check`: decode every video of a data set and list what is broken."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain

import torch
from tqdm import tqdm

from actionclip.ahead import map_ahead
from actionclip.annotations import Sample, describe
from actionclip.classifier import VideoResult
from actionclip.cli import command, data_options
from actionclip.cli.command import ExitCode
from actionclip.cli.report import WRITERS, open_output, refuse_to_overwrite, row
from actionclip.errors import InputError, VideoError
from actionclip.isolation import Isolated, LostWorkError
from actionclip.video import Limits, decode

PROG = "actionclip-check"

EPILOG = """\
exit codes:
  0 every video is there and whole  2 the command or its input was wrong
  3 some are missing or broken      5 the output cannot be written
  1 an error of this program        130, 143 interrupted, terminated

examples:
  %(prog)s clips/
  %(prog)s train.csv --videos /data/kinetics --format jsonl --output checked.jsonl
  %(prog)s ucfTrainTestlist/ --split test1
"""

# An hour for one video: to read all of a film takes longer than to read a few of its frames.
LIMITS = Limits(max_seconds=3600.0)


def build_parser() -> command.OneLineParser:
    """Describe the command's arguments."""
    parser = command.build_parser(
        PROG, "Decode every frame of a data set's videos and list the missing and broken ones."
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "data", metavar="DATA", help="folder with a folder per class, or a list in a known format"
    )
    data_options.add(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="videos decoded at a time (default: one a core)",
    )
    parser.add_argument(
        "--format",
        choices=tuple(WRITERS),
        default="table",
        help="the table holds the videos with a fault, the others all (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="write there, not to standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(), check, argv)


def check(args: argparse.Namespace) -> ExitCode:
    """Decode every video of the list and report each that is not whole."""
    if args.workers < 1:
        raise InputError(f"--workers is {args.workers}, it must be at least 1")
    refuse_to_overwrite(args.output, (args.data, args.labels))
    videos = data_options.read(args, args.data)
    for line in describe(videos):
        command.say(PROG, line)
    counts = {"ok": 0, "damaged": 0, "error": 0, "missing": 0}
    total = len(videos.samples) + len(videos.missing)
    hidden = not sys.stderr.isatty()
    one_thread = partial(torch.set_num_threads, 1)
    decode_all = partial(decode_one, limits=LIMITS)
    isolated = Isolated(decode_all, LIMITS.max_seconds, one_thread, [__name__])
    with open_output(args.output) as file:
        writer = WRITERS[args.format](file, predicts=False)
        check_one = partial(decode_isolated, isolated)
        decoded = map_ahead(check_one, videos.samples, args.workers, "check", stop=isolated.close)
        results = chain(decoded, (report_missing(name, videos.root) for name in videos.missing))
        for result in tqdm(results, total=total, unit="video", disable=hidden, file=sys.stderr):
            counts["missing" if result.reason == "missing" else result.status] += 1
            with tqdm.external_write_mode(file=sys.stderr):
                if args.format != "table" or result.status != "ok":
                    writer.write(row(result, top_k=0))
        writer.close()
    summary = ", ".join(f"{count} {status}" for status, count in counts.items())
    command.say(PROG, f"{total} videos: {summary}")
    return ExitCode.DONE if counts["ok"] == total else ExitCode.SOME_FAILED


def report_missing(name: str, root: str) -> VideoResult:
    """Return the result of a video that a list names and nobody finds."""
    return VideoResult(name, "error", "missing", f"not in {root}; restore it or use --videos")


def decode_isolated(isolated: Isolated[Sample, VideoResult], sample: Sample) -> VideoResult:
    """Decode a sample in a child process, and report one that does not answer."""
    try:
        return isolated(sample)
    except LostWorkError as error:
        return VideoResult(sample.path, "error", error.reason, error.message)


def decode_one(sample: Sample, limits: Limits) -> VideoResult:
    """Decode every frame of a sample and keep none."""
    nothing = torch.zeros(())
    try:
        video = decode(
            sample.path,
            range,
            start_seconds=sample.start_seconds,
            end_seconds=sample.end_seconds,
            transform=lambda frame: nothing,
            limits=limits,
        )
    except VideoError as error:
        return VideoResult(sample.path, "error", error.reason, error.message)
    if video.damaged:
        return VideoResult(sample.path, "damaged", "damaged", video.damage, video.num_frames)
    return VideoResult(sample.path, "ok", num_frames=video.num_frames)

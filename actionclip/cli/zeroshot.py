"""`actionclip-zeroshot`: recognise actions in video files among given labels.

What needs PyTorch is imported once the arguments are understood, so that help and mistakes
do not wait for it.
"""

import argparse
import os
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING

from actionclip.cli import command, options
from actionclip.cli.command import ExitCode
from actionclip.cli.report import (
    WRITERS,
    Row,
    open_output,
    refuse_to_overwrite,
    row,
)
from actionclip.errors import InputError, OutputError
from actionclip.labels import read_labels

if TYPE_CHECKING:
    from tqdm import tqdm

    from actionclip.classifier import VideoClassifier

PROG = "actionclip-zeroshot"

EPILOG = """\
exit codes:
  0 every video has scores    2 the command or its input was wrong
  3 some videos failed        5 the output cannot be written
  1 an error of this program  130, 143 interrupted, terminated

examples:
  %(prog)s juggling.mp4 --labels "juggling balls" archery bowling
  %(prog)s clips/ --labels labels.txt --model ViT-B/16 --format jsonl > scores.jsonl
  find . -name '*.mp4' | %(prog)s - --labels labels.csv --top-k 1 --format csv
"""


def build_parser() -> command.OneLineParser:
    """Describe the command's arguments."""
    parser = command.build_parser(
        PROG,
        "Recognise actions in videos by matching them against sentences made from labels.",
    )
    parser.epilog = EPILOG
    parser.add_argument(
        "videos",
        nargs="+",
        metavar="VIDEO",
        help="video file, folder of videos or of frames, or - for a list on standard input",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        metavar="L",
        help="labels, or one file: .txt with a label a line, or .csv with columns id,name",
    )
    options.add_model_options(parser)
    options.add_view_options(parser)
    options.add_text_options(parser)
    options.add_running_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--top-k", type=int, default=5, metavar="K", help="best labels shown for each video (5)"
    )
    output.add_argument("--format", choices=tuple(WRITERS), default="table")
    output.add_argument(
        "--output",
        metavar="FILE",
        help="write there, not to standard output; the same command goes on after a crash",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(), zeroshot, argv)


def zeroshot(args: argparse.Namespace) -> ExitCode:
    """Classify every video that the arguments name and report each."""
    if args.top_k < 1:
        raise InputError(f"--top-k is {args.top_k}, it must be at least 1")
    refuse_mixed_up_files(args)
    labels = read_labels(args.labels)
    is_alone = len(args.videos) == 1 and args.videos[0] != "-" and not os.path.isdir(args.videos[0])
    if args.workers > 0 and not is_alone:
        from actionclip.isolation import prepare

        # The processes that decode import PyTorch while this one does.
        prepare(["actionclip.reading"])
    from actionclip.published import begun_fetch

    # A published file is verified while PyTorch is imported.
    with begun_fetch(args.model):
        with command.quick_imports():
            from actionclip.cli import building
        model = building.load_model(args, building.pick_device(args.device))
    classifier = building.build_classifier(args, labels, model, isolated=not is_alone)
    paths: Iterable[str] = expand(args.videos)
    if "-" not in args.videos:
        paths = list(paths)  # so that the progress bar knows where it ends
    counts = {"ok": 0, "damaged": 0, "error": 0}
    num_old = 0
    with closing(write_rows(args, classifier, paths)) as rows:
        bar = progress(rows, paths)
        for each, is_new in bar:
            counts[each["status"]] += 1
            num_old += not is_new
            if each["status"] != "ok" and is_new:
                with bar.external_write_mode(file=sys.stderr):
                    command.say(PROG, f"{each['path']}: {each['reason']}: {each['message']}")
    total = sum(counts.values())
    if total == 0:
        raise InputError("standard input named no videos; write one path a line")
    if total > 1:
        summary = ", ".join(f"{count} {status}" for status, count in counts.items())
        known = f"; {num_old} of them known from before" if num_old else ""
        command.say(PROG, f"{total} videos: {summary}{known}")
    return ExitCode.SOME_FAILED if counts["error"] else ExitCode.DONE


def write_rows(
    args: argparse.Namespace, classifier: "VideoClassifier", paths: Iterable[str]
) -> Generator[tuple[Row, bool], None, None]:
    """Write the row of every video where the arguments say; yield it, and whether it is new.

    A file has the rows of finished videos whatever happens: as JSON lines in itself, in another
    format in FILE.part until it is written as a whole.
    """
    from tqdm import tqdm

    from actionclip.cli.building import settings_of
    from actionclip.cli.journal import Journal, replace_output

    def classify(paths: Iterable[str]) -> Generator[Row, None, None]:
        if not classifier.isolated:  # a video that is alone, for which all threads decode
            paths = list(paths)
        with closing(classifier.stream(paths)) as results:
            for result in results:
                yield row(result, args.top_k)

    if args.output is None or is_stream(args.output):
        with open_output(args.output) as file, closing(classify(paths)) as rows:
            writer = WRITERS[args.format](file)
            for each in rows:
                with tqdm.external_write_mode(file=sys.stderr):
                    writer.write(each)
                yield each, True
            writer.close()
        return
    output = os.path.realpath(args.output)  # a link stays one
    kept = output if args.format == "jsonl" else f"{output}.part"
    with Journal(kept, {**settings_of(classifier), "top_k": args.top_k}) as journal:
        with closing(journal.complete(paths, classify)) as completed:
            yield from completed
        if args.format == "jsonl":
            if dropped := journal.finish():
                what = "rows of other videos, settings or earlier tries were there, and are not"
                command.say(PROG, f"{args.output}: {dropped} {what}")
        else:
            replace_output(output, args.format, journal.rows())
    if kept != output:
        with suppress(FileNotFoundError):
            os.remove(kept)


def is_stream(output: str) -> bool:
    """Tell whether an output takes rows but keeps none: a pipe, a device, `/dev/stdout`."""
    if os.path.abspath(output).startswith(("/dev/", "/proc/")):
        return True
    return os.path.exists(output) and not os.path.isfile(output)


def refuse_mixed_up_files(args: argparse.Namespace) -> None:
    """Refuse an output that cannot be or is an input, and videos that became labels."""
    refuse_to_overwrite(args.output, (*args.videos, *args.labels, args.model))
    if args.output and not os.path.isdir(os.path.dirname(args.output) or "."):
        raise OutputError(f"cannot write the results to {args.output}: there is no such folder")
    if args.output and os.path.isdir(args.output):
        raise OutputError(f"cannot write the results to {args.output}: it is a folder; name a file")
    for label in args.labels:
        suffix = os.path.splitext(label)[1].lower()
        if suffix not in ("", ".txt", ".csv") and os.path.isfile(label):
            raise InputError(
                f"label {label!r} is a file; name videos before --labels, and a list of labels "
                ".txt or .csv"
            )


def expand(names: Sequence[str]) -> Iterator[str]:
    """Yield the videos that the arguments stand for.

    A folder stands for the videos in it. One without videos is passed on, so that it
    is read as a folder of frames or gets a row that says why it cannot be.
    """
    from actionclip.video import find_files

    for name in names:
        for path in listed_on_stdin() if name == "-" else [name]:
            if os.path.isdir(path):
                videos, num_others = find_files(path)
                if videos and num_others:
                    others = "other files in it are left out, as they are not called like videos"
                    command.say(PROG, f"{path}: {num_others} {others}")
                yield from videos or [path]
            else:
                yield path


def listed_on_stdin() -> Iterator[str]:
    """Yield the paths on standard input, one a line."""
    if sys.stdin is None:
        raise InputError("standard input is closed; - needs a list of videos there")
    for line in sys.stdin.buffer:
        if path := os.fsdecode(line.rstrip(b"\r\n")):
            yield path


def progress(rows: Iterator[tuple[Row, bool]], paths: Iterable[str]) -> "tqdm[tuple[Row, bool]]":
    """Show a bar on standard error, where that is a terminal and there is more than one video."""
    from tqdm import tqdm

    total = len(paths) if isinstance(paths, list) else None
    hidden = not sys.stderr.isatty() or total == 1
    return tqdm(rows, total=total, unit="video", disable=hidden, file=sys.stderr)

"""`actionclip-eval`: measure how well a model recognises the actions of labelled videos."""

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from actionclip import __version__, distributed
from actionclip.annotations import VideoList
from actionclip.annotations import describe as describe_data
from actionclip.classifier import VideoClassifier
from actionclip.cli import command, options
from actionclip.cli.command import ExitCode, one_line
from actionclip.cli.plots import METRICS, draw_confusion
from actionclip.cli.report import open_output
from actionclip.errors import MissingExtraError, OutputError
from actionclip.evaluate import Evaluation, evaluate
from actionclip.precision import PRECISION_NAMES

PROG = "actionclip-eval"

# How long a process waits for those whose videos take longer. torchrun notices dead ones itself.
PATIENCE_SECONDS = 24 * 3600.0

EPILOG = """\
files in --output:
  results.json    what was evaluated, with what, and how well; as with --format json
  per_class.csv   a line a class
  confusion.npz   counts [right, predicted] and class_names (one label a video)
  confusion.png   the same as a picture, with actionclip[viz]

exit codes:
  0 every video has scores    2 the command or its input was wrong
  3 some videos failed        5 the output cannot be written
  1 an error of this program  130, 143 interrupted, terminated

examples:
  %(prog)s --data clips/ --model best.safetensors
  %(prog)s --data ucfTrainTestlist/ --videos UCF-101/ --split test1 --model best.safetensors
  %(prog)s --data val.csv --labels kinetics.csv --clips 10 --crops 3 --output results/
  torchrun --nproc-per-node 8 -m actionclip eval --data val.csv --model best.safetensors
"""


def build_parser() -> command.OneLineParser:
    """Describe the command's arguments."""
    parser = command.build_parser(
        PROG, "Measure how well a model recognises the actions of labelled videos."
    )
    parser.epilog = EPILOG
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        required=True,
        help="labelled videos: a folder with a folder for each class, or a list in a known format",
    )
    options.add_data_options(data)
    options.add_model_options(parser)
    options.add_view_options(parser)
    options.add_text_options(parser)
    options.add_running_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=("table", "json"), default="table")
    output.add_argument("--output", metavar="DIR", help="folder for the files below")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(), evaluate_data, argv)


def evaluate_data(args: argparse.Namespace) -> ExitCode:
    """Evaluate the model on the data; the first process reports."""
    device = options.join_processes(args.device, PATIENCE_SECONDS)
    try:
        is_first = distributed.rank() == 0
        if not is_first:
            warnings.simplefilter("ignore")  # the first process says the same
        videos = options.read_data(args, args.data)
        if is_first and args.output is not None:
            make_folder(args.output)  # a mistake should not be found after the last video
        classifier = options.build_classifier(args, videos.class_names, device)
        share = len(videos.samples[:: distributed.world_size()])
        hidden = not (is_first and sys.stderr.isatty())
        with tqdm(total=share, unit="video", disable=hidden, file=sys.stderr) as bar:
            evaluation = evaluate(
                classifier,
                videos.samples,
                multi_label=videos.multi_label,
                on_result=lambda _: bar.update(),
            )
    finally:
        distributed.stop()
    if not is_first:
        return ExitCode.DONE  # torchrun would take any other for a reason to end the first process
    report(args, videos, classifier, evaluation)
    return ExitCode.SOME_FAILED if evaluation.failures else ExitCode.DONE


def report(
    args: argparse.Namespace,
    videos: VideoList,
    classifier: VideoClassifier,
    evaluation: Evaluation,
) -> None:
    """Say what went wrong, then write the numbers."""
    for failure in evaluation.failures:
        command.say(PROG, f"{failure.path}: {failure.reason}: {failure.message}")
    if videos.missing:
        command.say(
            PROG,
            f"videos listed but not found: {len(videos.missing)}, such as {videos.missing[0]}; "
            "they are in no number",
        )
    results = describe(args, videos, classifier, evaluation)
    text = json.dumps(results, indent=1) + "\n"
    if args.output is not None:
        write_files(args.output, evaluation, text)
    with open_output(None) as file:
        file.write(text if args.format == "json" else table(results, describe_data(videos)))


def describe(
    args: argparse.Namespace,
    videos: VideoList,
    classifier: VideoClassifier,
    evaluation: Evaluation,
) -> dict[str, Any]:
    """Return the numbers beside everything that they depend on, as the JSON object."""
    model = classifier.model
    return {
        "metrics": evaluation.metrics,
        "videos": {
            "evaluated": evaluation.num_videos,
            "scored": evaluation.num_scored,
            "damaged": evaluation.num_damaged,
            "failed": len(evaluation.failures),
            "unlabelled": evaluation.num_unlabelled,
            "missing": len(videos.missing),
        },
        "classes": {
            "all": len(videos.class_names),
            "without_videos": evaluation.num_classes_without_videos,
        },
        "data": {
            "source": videos.source,
            "layout": videos.layout,
            "split": args.split,
            "videos": videos.root,
            "sha256": videos.digest,
            "notes": videos.notes,
        },
        "model": {
            "name": args.model,
            "temporal": model.config.temporal,
            "frames": model.num_frames,
            "resolution": model.input_resolution,
        },
        "settings": {
            "clips": classifier.num_clips,
            "crops": classifier.num_crops,
            "templates": classifier.templates,
            "raw_labels": classifier.raw_labels,
            "scale": classifier.scale,
            "precision": PRECISION_NAMES[model.dtype],
            "device": str(model.device),
            "strict": classifier.strict,
        },
        "actionclip": __version__,
        "failures": [vars(failure) for failure in evaluation.failures],
        "missing": videos.missing,
    }


def table(results: dict[str, Any], data: Sequence[str]) -> str:
    """Return the same object as lines for people."""
    model, settings, counts = results["model"], results["settings"], results["videos"]
    kinds = ("damaged", "failed", "unlabelled")
    others = "".join(f", {counts[kind]} {kind}" for kind in kinds if counts[kind])
    if empty := results["classes"]["without_videos"]:
        others += f"; {empty} of {results['classes']['all']} classes have none"
    rows = [
        *zip(["data", *[""] * len(data)], data, strict=False),
        ("model", f"{model['name']}: {model['temporal']}, {model['frames']} frames of "
         f"{model['resolution']} pixels"),
        ("views", f"{settings['clips']} temporal x {settings['crops']} spatial, "
         f"{len(settings['templates'])} templates"),
        ("with", f"actionclip {results['actionclip']}, {settings['precision']} on "
         f"{settings['device']}"),
        ("videos", f"{counts['evaluated']}: {counts['scored']} scored{others}"),
        ("", ""),
    ]  # fmt: skip
    lines = [f"{name:8}{one_line(text)}".rstrip() for name, text in rows]
    lines += [f"{METRICS[key]:20}{value:9.2%}" for key, value in results["metrics"].items()]
    return "\n".join(lines) + "\n"


def make_folder(path: str) -> None:
    """Make the folder for the results, unless it is there."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def write_files(folder: str, evaluation: Evaluation, results: str) -> None:
    """Write what `--output` promises; results.json comes last."""
    names = [row.name for row in evaluation.per_class]
    with open_output(str(Path(folder, "per_class.csv"))) as file:
        write_per_class(file, evaluation)
    if evaluation.confusion is not None:
        path = str(Path(folder, "confusion.npz"))
        try:
            np.savez_compressed(path, counts=evaluation.confusion.numpy(), class_names=names)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            draw_confusion(evaluation.confusion, names, str(Path(folder, "confusion.png")))
        except MissingExtraError as error:
            command.say(PROG, f"no confusion.png: {error}")
    with open_output(str(Path(folder, "results.json"))) as file:
        file.write(results)


def write_per_class(file: Any, evaluation: Evaluation) -> None:
    """Write a line a class: id,name,videos and its metrics, empty without videos."""
    metrics = dict.fromkeys(name for row in evaluation.per_class for name in row.metrics)
    writer = csv.DictWriter(file, ("id", "name", "videos", *metrics), lineterminator="\n")
    writer.writeheader()
    for i, row in enumerate(evaluation.per_class):
        values = {name: f"{value:.6f}" for name, value in row.metrics.items()}
        writer.writerow({"id": i, "name": row.name, "videos": row.num_videos, **values})

"""`actionclip-eval`: measure how well a model recognises the actions of labelled videos.

Among all classes, or by a protocol of the zero-shot literature: the mean over splits or over
subsets of the classes, base and novel classes (ViFi-CLIP, arXiv:2212.03640), each also for
models between a pretrained and a fine-tuned one (WiSE-FT, arXiv:2109.01903).
"""

import argparse
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean, stdev
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from actionclip import __version__, distributed
from actionclip.annotations import VideoList, keep_classes, read_video_list
from actionclip.annotations import describe as describe_data
from actionclip.classifier import VideoClassifier, VideoResult
from actionclip.cli import building, command, data_options, options
from actionclip.cli.command import ExitCode
from actionclip.cli.plots import METRICS, draw_confusion, draw_ratios
from actionclip.cli.report import csv_cell, open_output
from actionclip.ensembling import interpolate
from actionclip.errors import InputError, MissingExtraError, OutputError, one_line
from actionclip.evaluate import Evaluation, draw_subsets, evaluate_subsets
from actionclip.labels import read_labels
from actionclip.models.base import VideoTextModel
from actionclip.precision import PRECISION_NAMES
from actionclip.prompts import comparison_key
from actionclip.weights import load

PROG = "actionclip-eval"

# How long a process waits for those whose videos take longer. torchrun notices dead ones itself.
PATIENCE_SECONDS = 24 * 3600.0

RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Options that decide what the numbers mean; reported where one is given.
PROTOCOL = ("without", "subsets", "seed", "base", "interpolate")

EPILOG = """\
files in --output:
  results.json    what was evaluated, with what, and how well; as with --format json
  per_class.csv   a line a class
  confusion.npz   counts [right, predicted] and class_names (one label a video)
  confusion.png   the same as a picture, with actionclip[viz]
  ratios.png      of --interpolate instead of these three, with actionclip[viz]
of several splits, subsets, or base and novel classes, each has a folder with these three

exit codes:
  0 every video has scores    2 the command or its input was wrong
  3 some videos failed        5 the output cannot be written
  1 an error of this program  130, 143 interrupted, terminated

examples:
  %(prog)s --data clips/ --model best.safetensors
  %(prog)s --data ucfTrainTestlist/ --videos UCF-101/ --split test1 --model best.safetensors
  %(prog)s --data val.csv --labels kinetics.csv --clips 10 --crops 3 --output results/
  %(prog)s --data hmdb51_splits/ --split test1 test2 test3 --model best.safetensors
  %(prog)s --data k600_val.csv --labels kinetics600.csv --without kinetics400.csv \\
      --subsets 3 160 --model best.safetensors
  %(prog)s --data clips/ --base run/labels.txt --model run/best.safetensors \\
      --interpolate ViT-B/16 --output results/
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
    data_options.add(data, several_splits=True)
    _add_class_options(parser)
    model = options.add_model_options(parser)
    model.add_argument(
        "--interpolate",
        metavar="PRETRAINED",
        help="evaluate models between this one and --model, which was fine-tuned from it",
    )
    model.add_argument(
        "--ratios",
        type=float,
        nargs="+",
        metavar="W",
        help="their weights are (1 - W) x PRETRAINED + W x --model "
        f"({' '.join(f'{ratio:g}' for ratio in RATIOS)})",
    )
    options.add_view_options(parser)
    options.add_text_options(parser)
    options.add_running_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=("table", "json"), default="table")
    output.add_argument("--output", metavar="DIR", help="folder for the files below")
    return parser


def _add_class_options(parser: argparse.ArgumentParser) -> None:
    """Add what says among which classes videos are recognised."""
    classes = parser.add_argument_group("classes (FILE as for --labels)")
    classes.add_argument("--without", metavar="FILE", help="leave out the classes in FILE")
    parts = classes.add_mutually_exclusive_group()
    parts.add_argument(
        "--subsets",
        nargs="+",
        metavar=("N", "SIZE"),
        help="recognise videos among N random subsets of SIZE classes, or among those of each "
        "FILE, and report the mean",
    )
    parts.add_argument(
        "--base",
        metavar="FILE",
        help="recognise videos of the (base) classes in FILE among these, all others among the "
        "other (novel) classes, and report the harmonic mean",
    )
    classes.add_argument("--seed", type=int, metavar="S", help="another draw of --subsets (0)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(), evaluate_data, argv)


@dataclass(frozen=True)
class Protocol:
    """Which videos are recognised among which classes.

    Attributes:
        lists: one list of videos, or one for each split; all of the same classes.
        names: those of the parts that have results of their own: splits, subsets, or base and
            novel classes; empty where the only result is that of all videos and classes.
        subsets: for each part the positions of its classes, unless the parts are splits.
        has_novel: whether the parts are base and novel classes.
    """

    lists: tuple[VideoList, ...]
    names: tuple[str, ...] = ()
    subsets: tuple[tuple[int, ...], ...] = ()
    has_novel: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.lists[0].class_names

    @property
    def classes(self) -> tuple[int, ...]:
        """Positions of all classes that videos are recognised among."""
        if self.subsets:
            return tuple(sorted(set().union(*self.subsets)))
        return tuple(range(len(self.class_names)))


@dataclass(frozen=True)
class Outcome:
    """How well one model does.

    Attributes:
        whole: of each list, among all classes of the protocol.
        parts: of each part of the protocol.
        ratio: of the weights, if the model stands between two others.
    """

    whole: tuple[Evaluation, ...]
    parts: tuple[Evaluation, ...]
    ratio: float | None = None

    @property
    def num_failed(self) -> int:
        return sum(len(evaluation.failures) for evaluation in self.whole)


def evaluate_data(args: argparse.Namespace) -> ExitCode:
    """Evaluate the model on the data; the first process reports."""
    device = building.join_processes(args.device, PATIENCE_SECONDS)
    try:
        is_first = distributed.rank() == 0
        if not is_first:
            warnings.simplefilter("ignore")  # the first process says the same
        check_options(args)
        protocol = read_protocol(args)
        if is_first and args.output is not None:
            # A mistake should not be found after the last video.
            for name in ("", *([] if args.interpolate else protocol.names)):
                make_folder(os.path.join(args.output, name))
        outcomes = []
        total = count_videos(protocol) * (len(args.ratios) if args.interpolate else 1)
        hidden = not (is_first and sys.stderr.isatty())
        with tqdm(total=total, unit="video", disable=hidden, file=sys.stderr) as bar:
            for ratio, model in models(args, device):
                classifier = building.build_classifier(args, protocol.class_names, model)
                outcomes.append(follow(protocol, classifier, ratio, lambda _: bar.update()))
    finally:
        distributed.stop()
    if not is_first:
        return ExitCode.DONE  # torchrun would take any other for a reason to end the first process
    report(args, protocol, classifier, outcomes)
    return ExitCode.SOME_FAILED if any(o.num_failed for o in outcomes) else ExitCode.DONE


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together, and complete the others."""
    splits = args.split or []
    if len(splits) > 1 and (args.subsets or args.base):
        raise InputError(
            f"--split {' '.join(splits)} with {'--subsets' if args.subsets else '--base'}; name "
            "one split"
        )
    if len(set(splits)) < len(splits):
        raise InputError(f"--split {' '.join(splits)} names a split twice; name each once")
    if args.subsets and _are_numbers(args.subsets):
        args.seed = args.seed or 0
    elif args.seed is not None:
        raise InputError(f"--seed {args.seed} draws subsets; use it with --subsets N SIZE")
    if args.ratios and args.interpolate is None:
        raise InputError("--ratios are between two models; name the other with --interpolate")
    args.ratios = sorted(set(args.ratios or RATIOS))
    for ratio in args.ratios:
        if not 0 <= ratio <= 1:
            raise InputError(f"--ratios has {ratio:g}; use 0 (PRETRAINED) to 1 (--model)")


def read_protocol(args: argparse.Namespace) -> Protocol:
    """Read the videos and find out among which classes they are to be recognised."""
    lists = _read_lists(args)
    if len(lists) > 1:
        return Protocol(lists, tuple(args.split))
    videos = lists[0]
    if videos.multi_label and (args.subsets or args.base):
        raise InputError(
            f"{args.data}: its videos may have several labels; --subsets and --base need one each"
        )
    if args.base:
        base = _positions(videos, "--base", args.base)
        novel = tuple(sorted({*range(len(videos.class_names))} - {*base}))
        if not novel:
            raise InputError(f"--base {args.base}: it names all classes, and none is left as novel")
        return Protocol(lists, ("base", "novel"), (base, novel), has_novel=True)
    if args.subsets:
        subsets = _read_subsets(videos, args)
        names = (f"subset{number}" for number in range(1, len(subsets) + 1))
        return Protocol(lists, tuple(names), tuple(subsets))
    return Protocol(lists)


def _read_lists(args: argparse.Namespace) -> tuple[VideoList, ...]:
    """Read the list of videos, or one for each split, without the classes to leave out."""
    names = None if args.labels is None else read_labels([args.labels])
    lists = [
        read_video_list(args.data, videos=args.videos, class_names=names, split=split)
        for split in args.split or [None]
    ]
    class_names = lists[0].class_names
    if any(videos.class_names != class_names for videos in lists):
        raise InputError(
            f"{args.data}: the splits {' '.join(args.split)} name different classes; give all of "
            "them with --labels FILE"
        )
    if args.without:
        named = {comparison_key(name): name for name in _read_names("--without", args.without)}
        others = [name for name in class_names if comparison_key(name) not in named]
        if len(others) in (0, len(class_names)):
            amount = "none" if others else "all"
            raise InputError(f"--without {args.without}: it names {amount} of the classes")
        for name in class_names:
            named.pop(comparison_key(name), None)
        if named and distributed.rank() == 0:
            command.say(
                PROG,
                f"--without {args.without}: {len(named)} of its names are no class of the data, "
                f"such as {next(iter(named.values()))!r}",
            )
        lists = [keep_classes(videos, others) for videos in lists]
    return tuple(lists)


def _read_subsets(videos: VideoList, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Return the positions of the classes of each of --subsets."""
    if not _are_numbers(args.subsets):
        return [_positions(videos, "--subsets", file) for file in args.subsets]
    if len(args.subsets) != 2:
        raise InputError(f"--subsets {' '.join(args.subsets)}: use N SIZE, such as 3 160")
    num_subsets, size = map(int, args.subsets)
    try:
        return draw_subsets(videos.class_names, num_subsets, size, args.seed)
    except InputError as error:
        raise InputError(f"--subsets {' '.join(args.subsets)}: {error}") from error


def _are_numbers(values: Sequence[str]) -> bool:
    return all(value.removeprefix("-").isdecimal() for value in values)


def _read_names(option: str, file: str) -> list[str]:
    """Return the class names in a label file."""
    if Path(file).suffix.lower() not in (".txt", ".csv"):
        raise InputError(f"{option} {file}: is no label file; give a .txt or a .csv")
    return read_labels([file])


def _positions(videos: VideoList, option: str, file: str) -> tuple[int, ...]:
    """Return the positions of the classes that a file names."""
    names = _read_names(option, file)
    try:
        kept = keep_classes(videos, names).class_names
    except InputError as error:
        raise InputError(f"{option} {file}: {error}") from error
    return tuple(videos.class_names.index(name) for name in kept)


def count_videos(protocol: Protocol) -> int:
    """Return how many videos this process decodes for one model."""
    classes = set(protocol.classes)
    used = [
        [sample for sample in videos.samples if classes.intersection(sample.labels)]
        for videos in protocol.lists
    ]
    return sum(len(part[distributed.rank() :: distributed.world_size()]) for part in used)


def models(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[float | None, VideoTextModel]]:
    """Yield the models to evaluate, with their ratios if they stand between two others."""
    model = building.load_model(args, device)
    if args.interpolate is None:
        yield None, model
        return
    pretrained = load(
        args.interpolate, num_frames=model.num_frames, device="cpu", activation=args.activation
    )
    for ratio in args.ratios:
        yield ratio, interpolate(pretrained, model, ratio)
        warnings.simplefilter("ignore")  # of the next one they would be the same


def follow(
    protocol: Protocol,
    classifier: VideoClassifier,
    ratio: float | None,
    on_result: Callable[[VideoResult], None],
) -> Outcome:
    """Evaluate one model as a protocol says."""
    found = [
        evaluate_subsets(
            classifier,
            videos.samples,
            [*protocol.subsets, protocol.classes],
            multi_label=videos.multi_label,
            on_result=on_result,
        )
        for videos in protocol.lists
    ]
    whole = tuple(evaluations[-1] for evaluations in found)
    are_splits = len(protocol.lists) > 1
    return Outcome(whole, whole if are_splits else tuple(found[0][:-1]), ratio)


def report(
    args: argparse.Namespace,
    protocol: Protocol,
    classifier: VideoClassifier,
    outcomes: Sequence[Outcome],
) -> None:
    """Say what went wrong, then write the numbers."""
    # Between two models half precision may overflow, so that some have more failures.
    outcome = max(outcomes, key=lambda outcome: outcome.num_failed)
    for evaluation in outcome.whole:
        for failure in evaluation.failures:
            command.say(PROG, f"{failure.path}: {failure.reason}: {failure.message}")
    if missing := [name for videos in protocol.lists for name in videos.missing]:
        command.say(
            PROG,
            f"videos listed but not found: {len(missing)}, such as {missing[0]}; "
            "they are in no number",
        )
    rows = [summarize(protocol, outcome) for outcome in outcomes]
    summary = {"ratios": rows} if args.interpolate else rows[0]
    results = {**summary, **describe(args, protocol, classifier, outcome)}
    text = json.dumps(results, indent=1) + "\n"
    if args.output is not None:
        if args.interpolate:
            draw(lambda path: draw_ratios(rows, path), args.output, "ratios.png")
        elif protocol.names:
            for name, evaluation in zip(protocol.names, outcome.parts, strict=True):
                write_files(os.path.join(args.output, name), evaluation)
        else:
            write_files(args.output, outcome.whole[0])
        with open_output(os.path.join(args.output, "results.json")) as file:
            file.write(text)
    data = describe_data(protocol.lists[0])
    for videos in protocol.lists[1:]:
        source, _, *others = describe_data(videos)  # the classes are the same
        data += [source, *others]
    with open_output(None) as file:
        file.write(text if args.format == "json" else table(results, data))


def summarize(protocol: Protocol, outcome: Outcome) -> dict[str, Any]:
    """Return the numbers of one model: those of the parts, and what stands for all of them."""
    summary: dict[str, Any] = {} if outcome.ratio is None else {"ratio": outcome.ratio}
    metrics = [evaluation.metrics for evaluation in outcome.parts or outcome.whole]
    if protocol.has_novel:
        base, novel = (values["top1"] for values in metrics)
        mean = harmonic_mean([base, novel])
        summary["metrics"] = {"base_top1": base, "novel_top1": novel, "harmonic_mean": mean}
    else:
        shared = [key for key in metrics[0] if all(key in values for values in metrics)]
        columns = {key: [values[key] for values in metrics] for key in shared}
        summary["metrics"] = {key: fmean(column) for key, column in columns.items()}
        if len(metrics) > 1:
            summary["std"] = {key: stdev(column) for key, column in columns.items()}
    if outcome.parts:
        summary["parts"] = [
            {
                "name": name,
                "metrics": evaluation.metrics,
                "videos": count([evaluation]),
                "classes": count_classes([evaluation]),
            }
            for name, evaluation in zip(protocol.names, outcome.parts, strict=True)
        ]
    return summary


def count(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """Return what became of the videos."""
    return {
        "evaluated": sum(evaluation.num_videos for evaluation in evaluations),
        "scored": sum(evaluation.num_scored for evaluation in evaluations),
        "damaged": sum(evaluation.num_damaged for evaluation in evaluations),
        "failed": sum(len(evaluation.failures) for evaluation in evaluations),
        "unlabelled": sum(evaluation.num_unlabelled for evaluation in evaluations),
    }


def count_classes(evaluations: Sequence[Evaluation]) -> dict[str, int]:
    """Return how many classes there are, and how many of them have no videos anywhere."""
    rows = list(zip(*(evaluation.per_class for evaluation in evaluations), strict=True))
    empty = sum(not any(result.num_videos for result in row) for row in rows)
    return {"all": len(rows), "without_videos": empty}


def describe(
    args: argparse.Namespace,
    protocol: Protocol,
    classifier: VideoClassifier,
    outcome: Outcome,
) -> dict[str, Any]:
    """Return what the numbers depend on, for the JSON object."""
    model = classifier.model
    missing = [name for videos in protocol.lists for name in videos.missing]
    data = [
        {
            "source": videos.source,
            "layout": videos.layout,
            "split": split,
            "videos": videos.root,
            "sha256": videos.digest,
            "notes": videos.notes,
        }
        for videos, split in zip(protocol.lists, args.split or [None], strict=True)
    ]
    given = {
        option: getattr(args, option) for option in PROTOCOL if getattr(args, option) is not None
    }
    return {
        **({"protocol": given} if given else {}),
        "videos": {**count(outcome.whole), "missing": len(missing)},
        "classes": count_classes(outcome.whole),
        "data": data if len(data) > 1 else data[0],
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
        "failures": [vars(failure) for whole in outcome.whole for failure in whole.failures],
        "missing": missing,
    }


def table(results: dict[str, Any], data: Sequence[str]) -> str:
    """Return the same object as lines for people."""
    model, settings, counts = results["model"], results["settings"], results["videos"]
    kinds = ("damaged", "failed", "unlabelled")
    others = "".join(f", {counts[kind]} {kind}" for kind in kinds if counts[kind])
    if empty := results["classes"]["without_videos"]:
        others += f"; {empty} of {results['classes']['all']} classes have none"
    given = " ".join(
        f"--{option} {' '.join(value) if isinstance(value, list) else value}"
        for option, value in results.get("protocol", {}).items()
    )
    templates = len(settings["templates"])
    text = f"{templates} templates" if templates else "linear classifier"
    rows = [
        *zip(["data", *[""] * len(data)], data, strict=False),
        ("model", f"{model['name']}: {model['temporal']}, {model['frames']} frames of "
         f"{model['resolution']} pixels"),
        ("views", f"{settings['clips']} temporal x {settings['crops']} spatial, {text}"),
        ("with", f"actionclip {results['actionclip']}, {settings['precision']} on "
         f"{settings['device']}"),
        *([("options", given)] if given else []),
        ("videos", f"{counts['evaluated']}: {counts['scored']} scored{others}"),
        ("", ""),
    ]  # fmt: skip
    lines = [f"{name:8}{one_line(text)}".rstrip() for name, text in rows]
    if "ratios" in results:
        lines += grid([{"ratio": f"{row['ratio']:g}", **cells(row)} for row in results["ratios"]])
    elif "parts" in results:
        lines += grid(part_rows(results))
    else:
        lines += [f"{METRICS[key]:20}{value:9.2%}" for key, value in results["metrics"].items()]
    return "\n".join(lines) + "\n"


def part_rows(results: dict[str, Any]) -> list[dict[str, str]]:
    """Return a row for each part, and those that stand for all of them."""
    rows = []
    for part in results["parts"]:
        counts = {"videos": part["videos"]["evaluated"], "classes": part["classes"]["all"]}
        numbers = {name: str(number) for name, number in counts.items()}
        rows.append({"": part["name"], **numbers, **cells(part)})
    if "std" in results:
        rows.append({"": "mean", **cells({"metrics": results["metrics"]})})
        rows.append({"": "std", **cells({"metrics": results["std"]})})
    if "harmonic_mean" in results["metrics"]:
        rows.append({"": "harmonic mean", "top-1": f"{results['metrics']['harmonic_mean']:.2%}"})
    return rows


def cells(summary: dict[str, Any]) -> dict[str, str]:
    """Return metrics as columns of a table, with their standard deviation if there is one."""
    deviations = summary.get("std", {})
    return {
        METRICS[key]: f"{value:.2%}" + (f" +- {deviations[key]:.2%}" if key in deviations else "")
        for key, value in summary["metrics"].items()
    }


def grid(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return the lines of a table whose columns are the keys of its rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            one_line(cell).rjust(width) if i else one_line(cell).ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def make_folder(path: str) -> None:
    """Make the folder for the results, unless it is there."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {path}: {error.strerror or error}") from error


def write_files(folder: str, evaluation: Evaluation) -> None:
    """Write what `--output` promises of one evaluation."""
    names = [row.name for row in evaluation.per_class]
    with open_output(os.path.join(folder, "per_class.csv")) as file:
        write_per_class(file, evaluation)
    matrix = evaluation.confusion
    if matrix is not None:
        path = os.path.join(folder, "confusion.npz")
        try:
            np.savez_compressed(path, counts=matrix.numpy(), class_names=names)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
        draw(lambda path: draw_confusion(matrix, names, path), folder, "confusion.png")


def draw(picture: Callable[[str], None], folder: str, name: str) -> None:
    """Draw a picture, or say what is missing for it."""
    try:
        picture(os.path.join(folder, name))
    except MissingExtraError as error:
        command.say(PROG, f"no {name}: {error}")


def write_per_class(file: Any, evaluation: Evaluation) -> None:
    """Write a line a class: id,name,videos and its metrics, empty without videos."""
    metrics = dict.fromkeys(name for row in evaluation.per_class for name in row.metrics)
    writer = csv.DictWriter(file, ("id", "name", "videos", *metrics), lineterminator="\n")
    writer.writeheader()
    for i, row in enumerate(evaluation.per_class):
        values = {name: f"{value:.6f}" for name, value in row.metrics.items()}
        name = csv_cell(row.name)
        writer.writerow({"id": i, "name": name, "videos": row.num_videos, **values})

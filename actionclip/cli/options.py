"""Options that several commands share, and the classifier that they describe."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from actionclip import distributed
from actionclip.annotations import VideoList, read_video_list
from actionclip.classifier import VideoClassifier
from actionclip.errors import InputError
from actionclip.labels import read_labels, read_templates
from actionclip.models.base import VideoTextModel
from actionclip.precision import PRECISION_NAMES, PRECISIONS, automatic_dtype
from actionclip.weights import KINDS, load


def add_data_options(group: Any, data: str = "the data", *, several_splits: bool = False) -> None:
    """Add what helps to read a data set, or several splits of one."""
    group.add_argument("--videos", metavar="DIR", help="folder that the paths of a list start from")
    group.add_argument(
        "--labels",
        metavar="FILE",
        help="the classes: .txt with a label a line, or .csv with columns id,name "
        f"(default: those that {data} names)",
    )
    group.add_argument(
        "--split",
        metavar="S",
        nargs="+" if several_splits else None,
        help=f"part of {data}, such as train1 or val"
        + ("; of several, the mean is reported" if several_splits else ""),
    )


def read_data(args: argparse.Namespace, data: str) -> VideoList:
    """Read the data set that the options above describe."""
    class_names = None if args.labels is None else read_labels([args.labels])
    return read_video_list(data, videos=args.videos, class_names=class_names, split=args.split)


def add_model_options(parser: argparse.ArgumentParser, temporal: str | None = None) -> Any:
    """Add what says which model runs where; returns the group, for more of it.

    Args:
        parser: gets the options.
        temporal: visual prompt of weights that leave it open, for the help.
    """
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="ViT-B/16",
        metavar="NAME_OR_PATH",
        help="published name, or a weight file or folder (default: %(default)s)",
    )
    model.add_argument(
        "--temporal",
        metavar="PROMPT",
        help=f"visual prompt, if the weights leave it open: {', '.join(KINDS)} "
        f"({temporal or 'meanp'})",
    )
    model.add_argument(
        "--activation",
        choices=("quick_gelu", "gelu"),
        help="activation, if the weights do not tell (gelu for most open_clip models)",
    )
    model.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    model.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="auto is bf16 where the hardware multiplies it natively, else fp32",
    )
    return model


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how much of a video the model sees."""
    views = parser.add_argument_group("frames and views")
    views.add_argument("--frames", type=int, metavar="T", help="frames taken from each view")
    views.add_argument("--clips", type=int, default=1, metavar="V", help="temporal views (1)")
    views.add_argument(
        "--crops", type=int, default=1, choices=(1, 3), help="spatial views of each (1)"
    )


def add_text_options(
    parser: argparse.ArgumentParser,
    templates: str = "the model's own, 16 sentences for CLIP",
    raw_labels: str = "as the model was trained, for CLIP the latter",
) -> None:
    """Add what says how labels become sentences; the help names these two defaults."""
    text = parser.add_argument_group("text")
    text.add_argument(
        "--templates",
        metavar="NAME_OR_FILE",
        help="actionclip (16 sentences), none (the label alone), or a file with a template a line "
        f"(default: {templates})",
    )
    text.add_argument(
        "--raw-labels",
        action=argparse.BooleanOptionalAction,
        help='use labels as they are, or read "BrushHair" and "brush_hair" as "brush hair" '
        f"(default: {raw_labels})",
    )


def add_running_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how videos go through the model."""
    running = parser.add_argument_group("running")
    running.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="views encoded at a time (8)"
    )
    running.add_argument(
        "--workers", type=int, default=2, metavar="N", help="decoding threads, 0 for none (2)"
    )
    running.add_argument(
        "--strict", action="store_true", help="treat damaged videos as failed, without scores"
    )


def load_model(args: argparse.Namespace, device: torch.device) -> VideoTextModel:
    """Load the model that the options above ask for."""
    return load(
        args.model,
        temporal=args.temporal,
        num_frames=args.frames,
        device=device,
        dtype=PRECISIONS[pick_precision(args.precision, device)],
        activation=args.activation,
    )


def build_classifier(
    args: argparse.Namespace, labels: Sequence[str], model: VideoTextModel
) -> VideoClassifier:
    """Make the classifier that the options above ask for."""
    templates = None if args.templates is None else read_templates(args.templates)
    return VideoClassifier(
        model,
        labels,
        templates=templates,
        num_clips=args.clips,
        num_crops=args.crops,
        raw_labels=args.raw_labels,
        batch_size=args.batch_size,
        workers=args.workers,
        strict=args.strict,
    )


def join_processes(device: str | None, timeout_seconds: float) -> torch.device:
    """Join the processes that torchrun started, and return the device of this one.

    Raises:
        InputError: if the device cannot be used, or is one GPU for several processes.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    distributed.start("cuda" if name.startswith("cuda") else "cpu", timeout_seconds)
    if distributed.world_size() > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"--device {name} for several processes; say cuda, and each takes one")
        name = f"cuda:{distributed.local_rank()}"
    return pick_device(name)


def pick_device(name: str | None) -> torch.device:
    """Return the device called `name`, by default a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used here ({reason}); try cpu") from error
    return device


def pick_precision(name: str, device: torch.device) -> Any:
    """Return the precision called `name`, the device's own for "auto"."""
    return PRECISION_NAMES[automatic_dtype(device)] if name == "auto" else name

"""What the shared options stand for: a device, a precision, a model and its classifier."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from actionclip import __version__, distributed
from actionclip.classifier import VideoClassifier
from actionclip.conversion import config_to_json
from actionclip.errors import InputError
from actionclip.labels import read_templates
from actionclip.models.base import VideoTextModel
from actionclip.precision import PRECISION_NAMES, PRECISIONS, automatic_dtype
from actionclip.weights import digest, load


def load_model(args: argparse.Namespace, device: torch.device) -> VideoTextModel:
    """Load the model that the options ask for."""
    return load(
        args.model,
        temporal=args.temporal,
        num_frames=args.frames,
        device=device,
        dtype=PRECISIONS[pick_precision(args.precision, device)],
        activation=args.activation,
    )


def build_classifier(
    args: argparse.Namespace,
    labels: Sequence[str],
    model: VideoTextModel,
    *,
    isolated: bool = True,
) -> VideoClassifier:
    """Make the classifier that the options ask for."""
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
        isolated=isolated,
        compile=args.compile,
    )


def settings_of(classifier: VideoClassifier) -> dict[str, Any]:
    """Return all that decides the scores of a video besides the video, as plain JSON."""
    model = classifier.model
    return {
        "actionclip": __version__,
        "weights": digest(model),
        "config": config_to_json(model.config),
        "preprocessing": repr(model.preprocessing),
        "labels": classifier.labels,
        "templates": classifier.templates,
        "raw_labels": classifier.raw_labels,
        "num_clips": classifier.num_clips,
        "num_crops": classifier.num_crops,
        "scale": classifier.scale,
        "limits": repr(classifier.limits),
        "strict": classifier.strict,
    }


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

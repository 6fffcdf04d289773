"""Options that several commands share: what they are called, not what they stand for.

Nothing here imports PyTorch, so that a command can answer a mistake, or `-h`, at once.
"""

import argparse
from typing import Any

# The names in `weights.KINDS` and `precision.PRECISIONS`, which PyTorch comes with.
KINDS = ("meanp", "conv1d", "lstm", "transf", "transf_cls", "joint", "shift", "xclip")
PRECISIONS = ("fp32", "bf16", "fp16")


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
        "--workers", type=int, default=2, metavar="N", help="decoding processes, 0 for none (2)"
    )
    running.add_argument(
        "--compile",
        action="store_true",
        help="compile the image encoder first: up to a minute, for long lists of videos",
    )
    running.add_argument(
        "--strict", action="store_true", help="treat damaged videos as failed, without scores"
    )

"""`actionclip-train`: fine-tune a model on labelled videos."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from types import FrameType
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from actionclip import __version__, distributed
from actionclip.annotations import (
    VideoList,
    base_classes,
    describe,
    few_shot,
    keep_classes,
    read_video_list,
    whole_videos,
)
from actionclip.augment import Augmentation, has_direction
from actionclip.cli import building, command, data_options, options
from actionclip.cli.command import ExitCode
from actionclip.cli.plots import draw_curves
from actionclip.cli.watchdog import Watchdog
from actionclip.errors import InputError, MissingExtraError, OutputError, TrainingError
from actionclip.labels import read_labels, read_templates
from actionclip.losses import Target
from actionclip.mixing import Mixing
from actionclip.models.actionclip import ActionCLIP
from actionclip.models.base import VideoTextModel
from actionclip.recipe import RECIPES, Loss, ParameterGroup, Recipe, Schedule
from actionclip.runs import RunFolder
from actionclip.train import SCORE, Record, Running, Trainer
from actionclip.weights import digest, load

PROG = "actionclip-train"

EPILOG = """\
The result, RUN/best.safetensors, is a model for --model of every command.

exit codes:
  0 trained to the end              4 too many videos cannot be used, see --max-bad
  2 the command or its input was    5 the run's files cannot be written
    wrong, or a loss not finite     6 nothing was done for --stall-timeout
  1 an error of this program        130 interrupted, 143 terminated (SIGTERM or SIGUSR1); the
                                      state was saved

examples:
  %(prog)s --train clips/train --val clips/val --model ViT-B/16 --temporal transf --output RUN
  %(prog)s --recipe xclip --train clips/train --model ViT-B/16 --output RUN
  %(prog)s --recipe vifi -h     # with the defaults of that recipe
  %(prog)s --train train.csv --videos /data --batch-size 128 --micro-batch 16 --output RUN
  %(prog)s ... --output RUN --resume latest
  torchrun --nproc-per-node 4 -m actionclip train ...
  torchrun --nproc-per-node 4 --max-restarts 3 -m actionclip train ... --resume latest
"""

# How long a run may do nothing: longer than it takes to save or to compile.
STALL_SECONDS = 1800.0
# How much longer a process waits for another one, so that its watchdog speaks first; and how long
# in all if none watches.
GRACE_SECONDS = 60.0
NO_LIMIT_SECONDS = 30 * 24 * 3600.0

# What --from-scratch leaves of the weights, as `load` calls it.
PRETRAINED: dict[str | None, bool | Literal["image", "text"]] = {
    None: True,
    "both": False,
    "image": "text",
    "text": "image",
}


def build_parser(recipe_name: str = "actionclip") -> command.OneLineParser:
    """Describe the command's arguments, which a recipe gives their defaults."""
    recipe = RECIPES[recipe_name]
    assert recipe.augmentation is not None
    parser = command.build_parser(PROG, "Fine-tune a model on labelled videos.")
    parser.epilog = EPILOG
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        default=recipe_name,
        help="published recipe that all options are set by which are not given; shown here: "
        "%(default)s",
    )
    _add_data_options(parser)
    model = options.add_model_options(parser, recipe.temporal)
    frames = recipe.num_frames or 8
    model.add_argument(
        "--frames",
        type=int,
        metavar="T",
        help=f"frames taken from a video (those of the weights, else {frames})",
    )
    model.add_argument(
        "--from-scratch",
        choices=("both", "image", "text"),
        nargs="?",
        const="both",
        metavar="TOWER",
        help="draw initial weights for the named model; image or text for that encoder only",
    )
    model.add_argument(
        "--new-head",
        action="store_true",
        help="leave the visual prompt of the weights behind and start --temporal anew",
    )
    model.add_argument(
        "--unimodal",
        action="store_true",
        help="train a linear classifier by cross-entropy instead of comparing with sentences, the "
        "paper's baseline; it knows no other classes",
    )
    if recipe_name == "actionclip":
        options.add_text_options(parser)
    else:
        names = "the former" if recipe.raw_labels else "the latter"
        options.add_text_options(parser, " or ".join(map(repr, recipe.templates)), names)
    _add_recipe_options(parser, recipe)
    _add_lock_options(parser, recipe)
    _add_augmentation_options(parser, recipe.augmentation)
    _add_running_options(parser, Running())
    return parser


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--train",
        metavar="DATA",
        required=True,
        help="folder with a folder per class, or a list in a known format",
    )
    data.add_argument("--val", metavar="DATA", help="likewise, to evaluate on after each epoch")
    data_options.add(data, "the training data")
    data.add_argument("--val-split", metavar="S", help="part of --val, such as test1")
    data.add_argument(
        "--classes",
        metavar="WHICH",
        help="train and evaluate on these only: base (the half with most training videos), or a "
        "label file",
    )
    data.add_argument(
        "--whole-videos",
        action="store_true",
        help="do not cut videos to one of their actions where the list says when these happen",
    )
    data.add_argument("--shots", type=int, metavar="K", help="use only K videos of each class")


def _add_number(
    group: argparse._ArgumentGroup, name: str, default: float, metavar: str, text: str = ""
) -> None:
    """Add an option for a number of the default's type, which the help shows."""
    shown = f"{text} (%(default)g)".strip()
    group.add_argument(name, type=type(default), default=default, metavar=metavar, help=shown)


def _add_recipe_options(parser: argparse.ArgumentParser, default: Recipe) -> None:
    recipe = parser.add_argument_group("recipe (defaults: those of --recipe)")
    number = partial(_add_number, recipe)
    recipe.add_argument(
        "--loss",
        choices=get_args(Loss),
        default=default.loss,
        help="compare the videos of a batch with one another's sentences, or each with the "
        "sentences of all classes (%(default)s)",
    )
    recipe.add_argument(
        "--target",
        choices=get_args(Target),
        default=default.target,
        help="what matching videos and texts share in the contrastive loss: all (the paper), or "
        "softmax(10) (the official code) (%(default)s)",
    )
    number(
        "--label-smoothing", default.label_smoothing, "S", "share of a target for all classes alike"
    )
    _add_switch(recipe, "--mixing", default.mixing is not None, "Mixup and CutMix of whole videos")
    number(
        "--distill",
        default.distillation,
        "W",
        "weight of the distance to the embeddings of the model before training",
    )
    number("--epochs", default.epochs, "N")
    number("--batch-size", default.batch_size, "N", "videos of a step, over all processes")
    recipe.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="encode N videos at a time, for less memory, with the same result",
    )
    number("--lr", default.learning_rate, "RATE", "learning rate of the text encoder")
    number("--visual-lr-ratio", default.visual_ratio, "R", "rate of the image encoder over --lr")
    number("--head-lr-ratio", default.head_ratio, "R", "rate of what is added to CLIP over --lr")
    number("--weight-decay", default.weight_decay, "W")
    _add_switch(recipe, "--decay-biases", default.decay_biases, "decay biases and positions, too")
    shown = "a tenth of --epochs" if default.warmup_epochs is None else f"{default.warmup_epochs:g}"
    recipe.add_argument(
        "--warmup-epochs",
        type=float,
        default=default.warmup_epochs,
        metavar="E",
        help=f"(default: {shown})",
    )
    recipe.add_argument(
        "--schedule",
        choices=get_args(Schedule),
        default=default.schedule,
        help="of the rate after warm-up; whole-cosine is as far as without one (%(default)s)",
    )
    number("--lowest-lr-ratio", default.lowest_ratio, "R", "rate at the end of a cosine over --lr")
    number(
        "--lr-every",
        default.rate_every,
        "N",
        "steps between changes of the rate; the official code has 10",
    )
    recipe.add_argument(
        "--clip-gradient", type=float, metavar="NORM", help="longest gradient (any)"
    )
    number(
        "--drop-path", default.drop_path, "P", "stochastic depth, growing to P at the last block"
    )
    recipe.add_argument(
        "--frame-position-std",
        type=float,
        metavar="S",
        help="spread of a new transf head's frame positions (0.02)",
    )
    recipe.add_argument(
        "--average-from",
        type=int,
        metavar="E",
        help="also write the mean of the weights after epochs E to the last",
    )
    number("--seed", default.seed, "S")


def _add_switch(group: argparse._ArgumentGroup, name: str, default: bool, text: str) -> None:
    """Add an option that can also be turned off."""
    action = argparse.BooleanOptionalAction
    shown = "yes" if default else "no"
    group.add_argument(name, action=action, default=default, help=f"{text} ({shown})")


def _add_lock_options(parser: argparse.ArgumentParser, default: Recipe) -> None:
    lock = parser.add_argument_group("what is trained")
    for tower, blocks in (("image", default.lock_image), ("text", default.lock_text)):
        lock.add_argument(
            f"--lock-{tower}",
            type=blocks_or_none,
            nargs="?",
            const=0,
            default=blocks,
            metavar="N",
            help=f"lock the {tower} encoder, but for its last N blocks if N is given; none trains "
            f"all of it ({'none' if blocks is None else blocks})",
        )
    _add_switch(lock, "--lock-scale", default.lock_scale, "lock the temperature")


def blocks_or_none(text: str) -> int | None:
    """Read how many blocks of an encoder are trained, None for all of it."""
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from error


def _add_augmentation_options(parser: argparse.ArgumentParser, default: Augmentation) -> None:
    group = parser.add_argument_group("augmentation (defaults: those of --recipe)")
    shown = f"{default.randaugment_ops} {default.randaugment_magnitude}"
    group.add_argument(
        "--no-augmentation",
        action="store_true",
        help="train on the centre crop of evaluation; --mixing is apart from that",
    )
    group.add_argument(
        "--randaugment",
        type=int,
        nargs=2,
        default=(default.randaugment_ops, default.randaugment_magnitude),
        metavar=("N", "M"),
        help=f"N operations of magnitude M, 0 to 30; 0 0 for none ({shown})",
    )
    group.add_argument(
        "--flip",
        choices=("auto", "yes", "no"),
        default="auto",
        help="mirror half of the videos; auto does not where a label names left or right",
    )
    _add_number(group, "--jitter", default.jitter, "P", "share of videos with changed colours")
    _add_number(group, "--grayscale", default.grayscale, "P", "share of videos without colour")
    group.add_argument(
        "--crop-scales",
        type=float,
        nargs="+",
        default=default.scales,
        metavar="S",
        help="sides of the crop over the short side of the frame (1 0.875 0.75 0.66)",
    )
    group.add_argument(
        "--crop-positions",
        type=int,
        choices=(5, 13),
        default=default.crop_positions,
        help="places of a crop: corners and centre, or more between them (%(default)s)",
    )
    group.add_argument(
        "--per-frame",
        action="store_true",
        help="draw RandAugment and colours for every frame anew, as the official code does",
    )


def _add_running_options(parser: argparse.ArgumentParser, default: Running) -> None:
    running = parser.add_argument_group("running")
    running.add_argument("--output", metavar="RUN", required=True, help="folder of the run's files")
    running.add_argument(
        "--resume",
        choices=("latest",),
        help="go on where RUN was stopped, or start if nothing is saved there; the same command "
        "with the same result",
    )
    number = partial(_add_number, running)
    workers = min(default.workers, os.cpu_count() or 1)
    number("--workers", workers, "N", "processes that read videos, for each training process")
    number("--log-every", default.log_every, "N", "steps between lines of metrics.jsonl")
    number("--save-every", default.save_every, "N", "steps between saved states, beside each epoch")
    number(
        "--max-bad", default.max_bad, "SHARE", "stop if more of an epoch's videos cannot be used"
    )
    number(
        "--stall-timeout",
        STALL_SECONDS,
        "SECONDS",
        "end a run that does nothing for so long; 0 for none",
    )
    running.add_argument(
        "--checkpoint-activations", action="store_true", help="use less memory and more time"
    )
    running.add_argument("--compile", action="store_true", help="compile the model first")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return command.run(build_parser(chosen_recipe(argv)), train, argv)


def chosen_recipe(argv: Sequence[str] | None) -> str:
    """Return the name after --recipe, if it is one; the parser complains otherwise."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--recipe", nargs="?")
    name = parser.parse_known_args(argv)[0].recipe
    return name if name in RECIPES else next(iter(RECIPES))


def train(args: argparse.Namespace) -> ExitCode:
    """Read the data, build everything, and train to the end or until a signal."""
    if not args.output:
        raise InputError("--output is empty; name a folder")
    if args.from_scratch == "both" and args.new_head:
        raise InputError("--from-scratch has nothing that --new-head could replace; drop one")
    if args.unimodal:
        check_unimodal(args)
    elif args.loss == "contrastive" and RECIPES[args.recipe].loss == "classes":
        raise InputError(
            f"--loss contrastive contradicts --recipe {args.recipe}; take --recipe actionclip, "
            "with the options of the other that you want"
        )
    if not 0 <= args.stall_timeout <= NO_LIMIT_SECONDS:
        raise InputError(
            f"--stall-timeout is {args.stall_timeout:g}; use seconds, up to {NO_LIMIT_SECONDS:.0f}"
        )
    patience = (args.stall_timeout or NO_LIMIT_SECONDS) + GRACE_SECONDS
    watchdog = Watchdog(PROG, args.stall_timeout)
    # Nothing is to be saved yet, and PyTorch waits for the others without hearing of a signal. The
    # watchdog is for gloo, which waits far longer than it is told.
    with watchdog, handled_by(signal.SIG_DFL):
        device = building.join_processes(args.device, patience)
    try:
        with stop_signals() as stopped_by:
            return _train(args, device, watchdog, stopped_by)
    except InputError as error:
        raise in_terms_of_options(error) from error
    except OutputError as error:
        if not RunFolder(args.output).has_state:
            raise
        raise OutputError(f"{error}; once it can, go on with --resume latest") from error
    except RuntimeError as error:
        if not distributed.lost_another(error):
            raise
        raise TrainingError("another process has ended; its own message says why") from error
    finally:
        distributed.stop()


def _train(
    args: argparse.Namespace,
    device: torch.device,
    watchdog: Watchdog,
    stopped_by: "list[signal.Signals]",
) -> ExitCode:
    is_first = distributed.rank() == 0
    if not is_first:
        warnings.simplefilter("ignore")  # the first process says the same
    recipe = build_recipe(args, device)
    running = Running(
        workers=args.workers,
        log_every=args.log_every,
        save_every=args.save_every,
        max_bad=args.max_bad,
        recompute=args.checkpoint_activations,
        compile=args.compile,
    )
    folder = RunFolder(args.output)
    is_resumed = args.resume is not None and is_resumable(folder)
    if not is_resumed:
        folder.check_free()
    videos, val = read_data(args)
    torch.manual_seed(args.seed % 2**63)  # for weights that no file holds
    model = load_start(args, recipe, device)
    if args.unimodal:
        if not isinstance(model, ActionCLIP):
            raise InputError(
                "--unimodal is for ActionCLIP's visual prompts, and this would be an X-CLIP; name "
                "another --temporal"
            )
        if model.config.class_names != videos.class_names:
            if model.linear is not None:
                tell(
                    "the linear classifier of the weights is for other classes; a new one is "
                    "started"
                )
            model.classify_linearly(videos.class_names)
    elif model.linear is not None:
        raise InputError(
            f"--model {args.model} has a linear classifier; train it on with --unimodal, or start "
            "anew with --new-head"
        )
    recipe = fit_recipe(recipe, args, model, videos)
    bar = Bar(hidden=not (is_first and sys.stderr.isatty()))
    trainer = Trainer(
        model,
        videos,
        recipe,
        folder,
        val=val,
        running=running,
        should_stop=lambda: bool(stopped_by),
        on_video=bar.count_video,
        on_progress=watchdog.note,
    )
    if is_resumed:
        if fault := trainer.resume():
            tell(f"{fault}; going on from the state before it")
        tell(f"going on at step {trainer.progress.step} of {trainer.num_steps}")
    else:
        if args.resume:
            tell(f"{folder.path} holds no saved state; starting at the first step")
        if is_first:
            folder.start(describe_run(args, trainer, running, device), videos.class_names)
    for line in (*table(trainer.groups), describe_steps(trainer, device)):
        tell(line)
    bar.start(trainer)
    board = open_tensorboard(args.output, trainer.progress.step) if is_first else None
    try:
        with watchdog:
            for record in trainer.run():
                bar.show(record)
                if board is not None:
                    write_tensorboard(board, record)
    finally:
        bar.close()
        if board is not None:
            board.close()
    if is_first:
        draw(folder)
    # A signal to one process has stopped all of them.
    if signals := [each for caught in distributed.gather_objects(stopped_by) for each in caught]:
        tell(f"{signals[0].name}: saved step {trainer.progress.step}; go on with --resume latest")
        interrupted = signals[0] == signal.SIGINT
        return ExitCode.INTERRUPTED if interrupted else ExitCode.TERMINATED
    if is_first:
        tell(f"after the last step: weights sha256 {digest(model)}")
        tell(f"{folder.best}: the model of the {'best' if val else 'last'} epoch")
        if recipe.average_from is not None:
            tell(f"{folder.average}: the mean of epochs {recipe.average_from} to {recipe.epochs}")
    return ExitCode.DONE


def check_unimodal(args: argparse.Namespace) -> None:
    """Refuse what would do nothing without sentences."""
    given = {
        "--templates": args.templates is not None,
        "--raw-labels": args.raw_labels is not None,
        "--lock-text": args.lock_text != RECIPES[args.recipe].lock_text,
        "--from-scratch text": args.from_scratch == "text",
    }
    if useless := [option for option, is_given in given.items() if is_given]:
        raise InputError(f"--unimodal reads no sentences; drop {' and '.join(useless)}")


def load_start(args: argparse.Namespace, recipe: Recipe, device: torch.device) -> VideoTextModel:
    """Load the model to start from; what it leaves open is as the recipe has it."""
    model = load(
        args.model,
        temporal=args.temporal,
        num_frames=args.frames,
        device=device,
        pretrained=PRETRAINED[args.from_scratch],
        activation=args.activation,
        new_head=args.new_head,
        default_temporal=recipe.temporal,
        default_num_frames=recipe.num_frames,
    )
    found = model.config.temporal
    if args.temporal is None and recipe.temporal not in (None, found):
        tell(f"the weights have the visual prompt {found}, which stays")
    return model


def read_data(args: argparse.Namespace) -> tuple[VideoList, VideoList | None]:
    """Read the lists, and say what they were taken for."""
    videos = data_options.read(args, args.train)
    class_names = videos.class_names
    if args.classes is not None:
        names = pick_classes(args.classes, videos)
        try:
            videos = keep_classes(videos, names)
        except InputError as error:
            raise InputError(f"--classes {args.classes}: {error}") from error
    if args.whole_videos:
        videos = whole_videos(videos)
    if args.shots is not None:
        videos = few_shot(videos, args.shots, args.seed)
    val = None
    if args.val is not None:
        try:
            val = read_video_list(
                args.val, videos=args.videos, class_names=class_names, split=args.val_split
            )
        except InputError as error:
            raise InputError(
                f"{error}; --val has the classes of --train, or of --labels"
            ) from error
        if args.classes is not None:
            val = keep_classes(val, videos.class_names)
    for name, data in (("train", videos), ("val", val)):
        for line in describe(data) if data else ():
            tell(f"{name}: {line}")
    return videos, val


def pick_classes(which: str, videos: VideoList) -> Sequence[str]:
    """Return the names of the classes that --classes stands for."""
    if which == "base":
        return base_classes(videos)
    names = read_labels([which])
    if names == [which]:
        raise InputError(f"--classes is {which!r}; say base, or name a .txt or .csv of labels")
    return names


def build_recipe(args: argparse.Namespace, device: torch.device) -> Recipe:
    """Gather what decides the result, but for what depends on the model and the data."""
    recipe = RECIPES[args.recipe]
    return replace(
        recipe,
        # The baseline compares with its classes, whatever the recipe does.
        loss="classes" if args.unimodal else args.loss,
        target=args.target,
        label_smoothing=args.label_smoothing,
        mixing=(recipe.mixing or Mixing()) if args.mixing else None,
        distillation=args.distill,
        epochs=args.epochs,
        batch_size=args.batch_size,
        micro_batch=args.micro_batch,
        learning_rate=args.lr,
        visual_ratio=args.visual_lr_ratio,
        head_ratio=args.head_lr_ratio,
        weight_decay=args.weight_decay,
        decay_biases=args.decay_biases,
        warmup_epochs=args.warmup_epochs,
        schedule=args.schedule,
        lowest_ratio=args.lowest_lr_ratio,
        rate_every=args.lr_every,
        clip_gradient=args.clip_gradient,
        drop_path=args.drop_path,
        lock_image=args.lock_image,
        lock_text=args.lock_text,
        lock_scale=args.lock_scale,
        frame_position_std=args.frame_position_std,
        average_from=args.average_from,
        precision=building.pick_precision(args.precision, device),
        augmentation=None if args.no_augmentation else build_augmentation(args),
        seed=args.seed,
    )


def build_augmentation(args: argparse.Namespace) -> Augmentation:
    """Gather what is done to frames; the resolution is the model's, once it is known."""
    return Augmentation(
        resolution=1,
        scales=tuple(args.crop_scales),
        flip=0.0 if args.flip == "no" else 0.5,
        jitter=args.jitter,
        grayscale=args.grayscale,
        randaugment_ops=args.randaugment[0],
        randaugment_magnitude=args.randaugment[1],
        crop_positions=args.crop_positions,
        per_frame=args.per_frame,
    )


def fit_recipe(
    recipe: Recipe, args: argparse.Namespace, model: VideoTextModel, videos: VideoList
) -> Recipe:
    """Complete the recipe with what depends on the model and the data."""
    augmentation = recipe.augmentation
    if augmentation is not None:
        augmentation = replace(augmentation, resolution=model.input_resolution)
        if args.flip == "auto" and has_direction(videos.class_names):
            tell("no video is mirrored, because labels name a direction; --flip yes does it")
            augmentation = replace(augmentation, flip=0.0)
    # ActionCLIP's sentences are only the first choice of models that have no others.
    source = model.config if args.recipe == "actionclip" else recipe
    templates = source.templates if args.templates is None else read_templates(args.templates)
    raw_labels = source.raw_labels if args.raw_labels is None else args.raw_labels
    return replace(
        recipe,
        temporal=model.config.temporal,
        num_frames=model.num_frames,
        augmentation=augmentation,
        templates=tuple(templates),
        raw_labels=raw_labels,
    )


def in_terms_of_options(error: InputError) -> InputError:
    """Name the option where an error starts with the name of a field behind it."""
    renamed = {
        "learning_rate": "--lr",
        "visual_ratio": "--visual-lr-ratio",
        "head_ratio": "--head-lr-ratio",
        "rate_every": "--lr-every",
        "lowest_ratio": "--lowest-lr-ratio",
        "distillation": "--distill",
        "num_frames": "--frames",
        "shots": "--shots",
        "scales": "--crop-scales",
        "randaugment_ops": "--randaugment",
        "randaugment_magnitude": "--randaugment",
    }
    known = {f.name for kind in (Recipe, Augmentation, Running) for f in fields(kind)}
    name, _, rest = str(error).partition(" ")
    if name not in known and name not in renamed:
        return error
    return InputError(f"{renamed.get(name, '--' + name.replace('_', '-'))} {rest}")


def is_resumable(folder: RunFolder) -> bool:
    """Return whether the folder holds a state, which all processes must see alike."""
    some, not_all = distributed.reduce_max([folder.has_state, not folder.has_state])
    if some and not_all:
        raise InputError(f"{folder.last} is there for some processes only; use a shared disk")
    return bool(some)


def describe_run(
    args: argparse.Namespace, trainer: Trainer, running: Running, device: torch.device
) -> dict[str, Any]:
    """Return what config.json holds."""
    data = {"train": trainer.train, "val": trainer.val}
    return {
        "actionclip": __version__,
        "torch": torch.__version__,
        "data": {
            part: {
                "source": videos.source,
                "layout": videos.layout,
                "videos": len(videos.samples),
                "missing": len(videos.missing),
                "root": videos.root,
                "split": args.split if part == "train" else args.val_split,
                "notes": videos.notes,
                "class_names": videos.class_names,
                "sha256": videos.digest,
            }
            for part, videos in data.items()
            if videos is not None
        },
        "classes": args.classes,
        "shots": args.shots,
        "whole_videos": args.whole_videos,
        "start": {
            "weights": args.model,
            "from_scratch": args.from_scratch,
            "new_head": args.new_head,
            "sha256": digest(trainer.model),
        },
        "model": trainer.settings["model"],
        "recipe": asdict(trainer.recipe),
        "steps": trainer.num_steps,
        "running": {
            **asdict(running),
            "device": str(device),
            "processes": distributed.world_size(),
        },
    }


def table(groups: Sequence[ParameterGroup]) -> list[str]:
    """Return lines that say what is trained, what is locked, and at which rate."""
    lines = [f"{'part':8}{'trained':>14}{'locked':>14}{'learning rate':>16}"]
    for group in groups:
        if group.num_trained or group.num_locked:
            rate = f"{group.learning_rate:g}" if group.num_trained else "-"
            lines.append(f"{group.name:8}{group.num_trained:>14,}{group.num_locked:>14,}{rate:>16}")
    return lines


def describe_steps(trainer: Trainer, device: torch.device) -> str:
    """Return a line on the steps of the run, and on the videos that they leave out."""
    recipe, num_videos = trainer.recipe, len(trainer.clips)
    line = (
        f"epochs: {recipe.epochs}, steps in each: {trainer.steps_per_epoch}, videos in a step: "
        f"{recipe.batch_size}; {recipe.precision} on {device}"
    )
    if rest := num_videos - trainer.steps_per_epoch * recipe.batch_size:
        line += f"; left out of an epoch, others each time, as they do not fill a batch: {rest}"
    if unlabelled := len(trainer.train.samples) - num_videos:
        line += f"; left out without a label: {unlabelled}"
    return line


class Bar:
    """The progress bar: steps of the run, then videos of an evaluation."""

    def __init__(self, *, hidden: bool) -> None:
        self.hidden = hidden
        self.bar: Any = None
        self.num_videos = 0
        self.epoch: list[tuple[int, float, float]] = []  # steps, loss, clips/s of each record
        self.step = 0

    def start(self, trainer: Trainer) -> None:
        """Show the steps of a run."""
        self.step = trainer.progress.step
        self.bar = tqdm(
            total=trainer.num_steps,
            initial=trainer.progress.step,
            unit="step",
            disable=self.hidden,
            file=sys.stderr,
        )

    def count_video(self) -> None:
        """Note a video of an evaluation."""
        self.num_videos += 1
        self.bar.set_postfix_str(f"evaluating, {self.num_videos} videos")

    def show(self, record: Record) -> None:
        """Show what a record says, evaluations on a line of their own."""
        if record["kind"] == "train":
            rates = "/".join(f"{rate:.1e}" for rate in dict.fromkeys(record["lr"].values()))
            loss, speed = record["loss"], record["clips_per_second"]
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, lr {rates}, {speed:.1f} clips/s", refresh=False
            )
            self.bar.update(record["step"] - self.bar.n)
            self.epoch.append((record["step"] - self.step, loss, speed))
            self.step = record["step"]
            if record["epoch"] == int(record["epoch"]):
                self._end_epoch(record["epoch"], rates)
            return
        self.num_videos = 0
        names = (*SCORE.values(), "top5", "mean_class_accuracy")
        scores = ", ".join(f"{name} {record[name]:.2%}" for name in names if name in record)
        failed = f", {record['failed']} failed" if record["failed"] else ""
        with tqdm.external_write_mode(file=sys.stderr):
            what = "average" if record["kind"] == "average" else f"epoch {record['epoch']:g}"
            tell(f"{what}: {scores}{failed}")

    def _end_epoch(self, epoch: float, rates: str) -> None:
        """Say in a line what the bar would have shown, on average over the epoch."""
        steps = sum(count for count, _, _ in self.epoch)
        loss = sum(count * loss for count, loss, _ in self.epoch) / steps
        speed = steps / sum(count / speed for count, _, speed in self.epoch)
        self.epoch.clear()
        if self.hidden:
            tell(f"epoch {epoch:g}: loss {loss:.3f}, lr {rates}, {speed:.1f} clips/s")

    def close(self) -> None:
        self.bar.close()


def tell(text: str) -> None:
    """Write a line to standard error, on one process only."""
    if distributed.rank() == 0:
        command.say(PROG, text)


def draw(folder: RunFolder) -> None:
    """Draw the curves, if matplotlib is there and there is something to draw."""
    records = folder.records("metrics")
    if records:
        try:
            draw_curves(records, str(folder.path / "curves.png"))
        except MissingExtraError as error:
            tell(f"no curves.png: {error}")


def open_tensorboard(folder: str, step: int) -> Any:
    """Return a writer for TensorBoard, if that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # What a killed run logged after its latest state is not shown twice.
    return SummaryWriter(folder, purge_step=step + 1)


def write_tensorboard(board: Any, record: Record) -> None:
    """Show the numbers of a record in TensorBoard."""
    numbers = {**record, **{f"lr/{name}": rate for name, rate in record.get("lr", {}).items()}}
    for name, number in numbers.items():
        if name != "step" and isinstance(number, int | float):
            board.add_scalar(f"{record['kind']}/{name}", number, record["step"])


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGUSR1 be handled in another way than so far."""
    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has not all of them
    before = {}
    try:
        for each in (getattr(signal, name) for name in names if hasattr(signal, name)):
            before[each] = signal.signal(each, handler)
    except ValueError:  # not the main thread: the caller's handlers stay
        pass
    try:
        yield
    finally:
        for each, former in before.items():
            signal.signal(each, former)


@contextmanager
def stop_signals() -> "Iterator[list[signal.Signals]]":
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of acting on them; a second one acts as usual.

    But for SIGUSR1, by which Slurm announces the end: it may come to a launcher and its processes,
    which hear of it from both, and never is the wish to end without saving.
    """
    caught: list[signal.Signals] = []
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        if distributed.rank() == 0:
            text = f"{caught[0].name}: saving after this step; once more to stop at once"
            # Not print, which this may have interrupted in the middle of a line.
            with suppress(OSError):
                os.write(2, f"\n{PROG}: {text}\n".encode())
        for each, handler in before.items():
            signal.signal(each, handler)

    with handled_by(note):
        yield caught

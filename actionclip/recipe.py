"""The training recipe: every value that decides what a run learns, and what follows from them.

Values -> learning rate of a step, groups of parameters with their rates, which of them are
locked. The defaults are those of the paper. Knows the model, but no data and no loop.

Source: ActionCLIP (arXiv:2109.08472), section 4.1, and its code where the paper is silent.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from actionclip.augment import Augmentation
from actionclip.errors import InputError
from actionclip.losses import Target
from actionclip.models.actionclip import ActionCLIP
from actionclip.models.clip import VisionTransformer
from actionclip.models.layers import ResidualAttentionBlock, Transformer
from actionclip.models.resnet import ModifiedResNet
from actionclip.models.temporal import TemporalTransformer
from actionclip.prompts import TEMPLATES

Schedule = Literal["cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """What a run learns from its data; the same recipe and data give the same weights on CPU.

    Attributes:
        epochs: passes over the data.
        batch_size: videos of one optimiser step, over all processes; all are each other's
            negatives.
        micro_batch: videos that a process encodes at a time; None encodes its part at once.
        learning_rate: of the text encoder and the temperature.
        visual_ratio: that of the image encoder over `learning_rate`.
        head_ratio: that of the temporal head over `learning_rate`.
        weight_decay: of AdamW, on all parameters.
        betas: of AdamW.
        warmup_epochs: over which the rates grow from 0, linearly; may be a fraction. None is a
            tenth of the epochs.
        schedule: what follows: "cosine" falls to 0 at the end, "constant" stays.
        rate_every: steps between changes of the rate; ActionCLIP's code has 10.
        target: see `losses.contrastive_kl`; ActionCLIP's code has "official".
        clip_gradient: longest gradient, its norm over all parameters; None does not clip.
        drop_path: probability with which the last block of each encoder skips a branch; it
            grows from 0 at the first one, linearly.
        lock_image: None trains the image encoder, 0 locks it, N trains only its last N
            blocks (of a ResNet: stages) and what follows them.
        lock_text: likewise for the text encoder.
        frame_position_std: of a new `transf` head's frame positions; None is 0.02, as in CLIP.
        average_from: epoch, counted from 1, from which on the weights after each one are
            averaged, beside the training; None averages none.
        precision: in which the encoders multiply. Weights are always fp32.
        templates: sentences with `{}` for the class name; each video draws one.
        raw_labels: fill class names in as they are, see `VideoClassifier`.
        augmentation: None shows the centre crop of evaluation.
        seed: of every random choice.
    """

    epochs: int = 50
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 5e-6
    visual_ratio: float = 1.0
    head_ratio: float = 10.0
    weight_decay: float = 0.2
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_epochs: float | None = None
    schedule: Schedule = "cosine"
    rate_every: int = 1
    target: Target = "uniform"
    clip_gradient: float | None = None
    drop_path: float = 0.0
    lock_image: int | None = None
    lock_text: int | None = None
    frame_position_std: float | None = None
    average_from: int | None = None
    precision: Precision = "fp32"
    templates: tuple[str, ...] = TEMPLATES["actionclip"]
    raw_labels: bool = False
    augmentation: Augmentation | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "rate_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise InputError(f"micro_batch is {self.micro_batch}; use at least 1")
        for name in (
            "visual_ratio",
            "head_ratio",
            "weight_decay",
            "warmup_epochs",
            "lock_image",
            "lock_text",
            "seed",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(f"{name} is {value}; use 0 or more")
        for name in ("learning_rate", "clip_gradient", "frame_position_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; use a positive number")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path is {self.drop_path}; use a probability below 1")
        if self.average_from is not None and not 1 <= self.average_from <= self.epochs:
            raise InputError(
                f"average_from is {self.average_from} of {self.epochs} epochs; use 1 to "
                f"{self.epochs}"
            )
        for name, kind in (("schedule", Schedule), ("target", Target), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{name} is {getattr(self, name)!r}; choose from {choices}")
        if self.warmup >= self.epochs:
            raise InputError(
                f"warmup_epochs is {self.warmup:g} of {self.epochs} epochs; use fewer, or the rate "
                "never reaches its height"
            )

    @property
    def warmup(self) -> float:
        """Epochs over which the rates grow."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the share of its learning rate that a parameter gets in a step.

    Args:
        recipe: its warm-up, schedule and epochs count.
        step: from 0, over the whole run.
        steps_per_epoch: optimiser steps of one epoch.

    Returns:
        0 to 1. The first step of a warm-up has 0, as in ActionCLIP's code.

    Source: spec 7; `rate_every=10` gives the schedule of ActionCLIP's code.
    """
    epoch, iteration = divmod(step, steps_per_epoch)
    # The rate changes at the first iteration of an epoch and at each `rate_every`-th.
    changed = max(0, (iteration + 1) // recipe.rate_every * recipe.rate_every - 1)
    now = epoch + changed / steps_per_epoch
    if now < recipe.warmup:
        return now / recipe.warmup
    if recipe.schedule == "constant":
        return 1.0
    falling = recipe.epochs - recipe.warmup
    return (1 + math.cos(math.pi * min((now - recipe.warmup) / falling, 1))) / 2


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: "text", "visual" or "head".
        learning_rate: at its highest.
        trained: the parameters that learn.
        num_locked: how many numbers of the group do not.
    """

    name: str
    learning_rate: float
    trained: tuple[nn.Parameter, ...]
    num_locked: int

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)


def prepare(model: ActionCLIP, recipe: Recipe) -> list[ParameterGroup]:
    """Lock what the recipe locks and sort the rest into groups, in place.

    Returns:
        The groups text (with the temperature), visual and head, the last one without
        parameters for prompts that have none. `joint`'s time embedding belongs to visual.

    Raises:
        InputError: if more blocks are to be unlocked than the encoder has.
    """
    _set_drop_path(model, recipe.drop_path)
    _lock(model, recipe)
    if recipe.frame_position_std is not None:
        is_new = any(name.startswith("temporal.") for name in model.untrained)
        if not isinstance(model.temporal, TemporalTransformer) or not is_new:
            raise InputError("frame_position_std is for a new transf head; leave it out")
        nn.init.normal_(
            model.temporal.frame_position_embeddings.weight, std=recipe.frame_position_std
        )
    groups: dict[str, list[nn.Parameter]] = {"text": [], "visual": [], "head": []}
    for name, parameter in model.named_parameters():
        groups[_group(name)].append(parameter)
    ratios = {"text": 1.0, "visual": recipe.visual_ratio, "head": recipe.head_ratio}
    return [
        ParameterGroup(
            name,
            recipe.learning_rate * ratios[name],
            tuple(p for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters if not p.requires_grad),
        )
        for name, parameters in groups.items()
    ]


def build_optimizer(recipe: Recipe, groups: Iterable[ParameterGroup]) -> torch.optim.AdamW:
    """Return AdamW over the groups, each with the rate that a schedule scales: `peak_lr`."""
    return torch.optim.AdamW(
        [
            {"params": list(g.trained), "name": g.name, "peak_lr": g.learning_rate}
            for g in groups
            if g.trained
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=1e-8,
        weight_decay=recipe.weight_decay,
        fused=True,
    )


def set_train_mode(model: nn.Module) -> None:
    """Put modules into training mode, but locked ones into evaluation mode.

    Batch norms of a locked encoder keep their statistics, and nothing is dropped in it.
    """
    for module in model.modules():
        own = list(module.parameters())
        module.training = not own or any(parameter.requires_grad for parameter in own)


def _group(name: str) -> str:
    if name.startswith("clip.visual."):
        return "visual"
    return "head" if name.startswith(("temporal.", "linear.")) else "text"


def _set_drop_path(model: ActionCLIP, drop_path: float) -> None:
    for encoder in (model.clip.visual, model.clip):
        if isinstance(transformer := getattr(encoder, "transformer", None), Transformer):
            blocks = transformer.resblocks
            for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)), strict=True):
                assert isinstance(block, ResidualAttentionBlock)
                block.drop_path = float(rate)


def _lock(model: ActionCLIP, recipe: Recipe) -> None:
    model.requires_grad_(True)
    clip, visual = model.clip, model.clip.visual
    if recipe.lock_image is not None:
        last: list[nn.Module | Tensor]
        if isinstance(visual, ModifiedResNet):
            blocks = [getattr(visual, f"layer{stage}") for stage in (1, 2, 3, 4)]
            last = [visual.attnpool]
        else:
            assert isinstance(visual, VisionTransformer)
            blocks, last = list(visual.transformer.resblocks), [visual.ln_post, visual.proj]
        visual.requires_grad_(False)
        _unlock(blocks, last, recipe.lock_image, "lock_image")
        if "clip.visual.time_embedding" in model.untrained:
            visual.get_parameter("time_embedding").requires_grad_(True)
    if recipe.lock_text is not None:
        for part in (clip.transformer, clip.token_embedding, clip.ln_final):
            part.requires_grad_(False)
        clip.positional_embedding.requires_grad_(False)
        clip.text_projection.requires_grad_(False)
        text_blocks = list(clip.transformer.resblocks)
        _unlock(text_blocks, [clip.ln_final, clip.text_projection], recipe.lock_text, "lock_text")
    if model.linear is not None:
        for name, parameter in model.named_parameters():
            if _group(name) == "text":
                parameter.requires_grad_(False)


def _unlock(blocks: list[nn.Module], last: list[nn.Module | Tensor], count: int, name: str) -> None:
    """Unlock the last `count` blocks and what follows them."""
    if count > len(blocks):
        raise InputError(
            f"{name} is {count}, and the encoder has {len(blocks)} blocks; use no more"
        )
    if count:
        for part in (*blocks[-count:], *last):
            part.requires_grad_(True)

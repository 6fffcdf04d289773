"""The training recipe: every value that decides what a run learns, and what follows from them.

Values -> learning rate of a step, groups of parameters with their rates, which of them are
locked. The published recipes are in `RECIPES`. Knows the model, but no data and no loop.

Source: ActionCLIP (arXiv:2109.08472), section 4.1, and its code where the paper is silent;
X-CLIP (arXiv:2208.02816), section 4.1, and its code; ViFi-CLIP (arXiv:2212.03640).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from actionclip.augment import Augmentation
from actionclip.errors import InputError
from actionclip.losses import Target
from actionclip.mixing import Mixing
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import VisionTransformer
from actionclip.models.layers import ResidualAttentionBlock, Transformer
from actionclip.models.resnet import ModifiedResNet
from actionclip.models.temporal import TemporalTransformer
from actionclip.models.xclip import is_added
from actionclip.prompts import TEMPLATES

Loss = Literal["contrastive", "classes"]
Schedule = Literal["cosine", "whole-cosine", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """What a run learns from its data; the same recipe and data give the same weights on CPU.

    The defaults are ActionCLIP's.

    Attributes:
        temporal: visual prompt that the recipe is for, or "xclip"; None is any.
        num_frames: T that it is for; None is any.
        loss: "contrastive" compares the videos of a batch with one another's sentences, see
            `losses.contrastive_kl`; "classes" is the cross-entropy of each video over the
            sentences of all classes, as in X-CLIP and ViFi-CLIP.
        target: of the contrastive loss; ActionCLIP's code has "official".
        label_smoothing: share of each target that all classes divide; for "classes" only.
        mixing: how videos and their targets are mixed, for "classes" only; None is not at all.
        distillation: weight of the distance to the embeddings of the model before training,
            see `distillation`; 0 does without. FROSTER has 2.
        epochs: passes over the data.
        batch_size: videos of one optimiser step, over all processes.
        micro_batch: videos that a process encodes at a time; None encodes its part at once.
        learning_rate: of the text encoder and the temperature.
        visual_ratio: that of the image encoder over `learning_rate`.
        head_ratio: that of the temporal head, or of all that X-CLIP adds to CLIP, over
            `learning_rate`.
        weight_decay: of AdamW.
        decay_biases: whether it is on all parameters, as in ActionCLIP's code; X-CLIP's leaves
            out biases, other vectors and CLIP's and its own tables of positions.
        betas: of AdamW.
        warmup_epochs: over which the rates grow from 0, linearly; may be a fraction. None is a
            tenth of the epochs.
        schedule: what follows: "cosine" falls from there to the end; "whole-cosine", X-CLIP's,
            is where it would be without a warm-up, so that the rate drops when that is over;
            "constant" stays.
        lowest_ratio: where a cosine ends, as a share of `learning_rate`; the same rate for all
            parameters. X-CLIP has 1/100.
        rate_every: steps between changes of the rate; ActionCLIP's code has 10.
        clip_gradient: longest gradient, its norm over all parameters; None does not clip.
        drop_path: probability with which the last block of each encoder skips a branch; it
            grows from 0 at the first one, linearly.
        lock_image: None trains the image encoder, 0 locks it, N trains only its last N
            blocks (of a ResNet: stages) and what follows them.
        lock_text: likewise for the text encoder.
        lock_scale: whether the temperature stays as it is, as X-CLIP's with a locked text
            encoder.
        frame_position_std: of a new `transf` head's frame positions; None is 0.02, as in CLIP.
        average_from: epoch, counted from 1, from which on the weights after each one are
            averaged, beside the training; None averages none.
        precision: in which the encoders multiply. Weights are always fp32.
        templates: sentences with `{}` for the class name; each video draws one.
        raw_labels: fill class names in as they are, see `VideoClassifier`.
        augmentation: None shows the centre crop of evaluation.
        seed: of every random choice.
    """

    temporal: str | None = None
    num_frames: int | None = None
    loss: Loss = "contrastive"
    target: Target = "uniform"
    label_smoothing: float = 0.0
    mixing: Mixing | None = None
    distillation: float = 0.0
    epochs: int = 50
    batch_size: int = 128
    micro_batch: int | None = None
    learning_rate: float = 5e-6
    visual_ratio: float = 1.0
    head_ratio: float = 10.0
    weight_decay: float = 0.2
    decay_biases: bool = True
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_epochs: float | None = None
    schedule: Schedule = "cosine"
    lowest_ratio: float = 0.0
    rate_every: int = 1
    clip_gradient: float | None = None
    drop_path: float = 0.0
    lock_image: int | None = None
    lock_text: int | None = None
    lock_scale: bool = False
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
            "distillation",
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
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"label_smoothing is {self.label_smoothing}; use 0 or more, below 1")
        if not 0 <= self.lowest_ratio <= 1:
            raise InputError(f"lowest_ratio is {self.lowest_ratio}; use a share, 0 to 1")
        if self.average_from is not None and not 1 <= self.average_from <= self.epochs:
            raise InputError(
                f"average_from is {self.average_from} of {self.epochs} epochs; use 1 to "
                f"{self.epochs}"
            )
        for name, kind in (
            ("loss", Loss),
            ("schedule", Schedule),
            ("target", Target),
            ("precision", Precision),
        ):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"{name} is {getattr(self, name)!r}; choose from {choices}")
        if self.loss != "classes":
            for name in ("label_smoothing", "mixing"):
                if getattr(self, name):
                    raise InputError(f"{name} is for the loss 'classes'; use that, or do without")
        elif self.target != "uniform":
            raise InputError("target is for the loss 'contrastive'; use that, or leave it out")
        if self.warmup >= self.epochs:
            raise InputError(
                f"warmup_epochs is {self.warmup:g} of {self.epochs} epochs; use fewer, or the rate "
                "never reaches its height"
            )

    @property
    def warmup(self) -> float:
        """Epochs over which the rates grow."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs


# What X-CLIP's training does to frames. The command fills in the resolution, as for any recipe.
_XCLIP_AUGMENTATION = Augmentation(resolution=1, randaugment_ops=0, crop_positions=5)

_XCLIP = Recipe(
    temporal="xclip",
    num_frames=8,
    loss="classes",
    label_smoothing=0.1,
    mixing=Mixing(),
    epochs=30,
    batch_size=256,
    learning_rate=8e-6,
    weight_decay=0.001,
    decay_biases=False,
    warmup_epochs=5,
    schedule="whole-cosine",
    lowest_ratio=0.01,
    lock_text=0,
    lock_scale=True,
    templates=("{}",),
    raw_labels=True,
    augmentation=_XCLIP_AUGMENTATION,
)

RECIPES: dict[str, Recipe] = {
    "actionclip": Recipe(augmentation=Augmentation(resolution=1)),
    # Fully supervised on Kinetics.
    "xclip": _XCLIP,
    # X-CLIP's but for the model, all of which learns at one rate and decays, its sentence and the
    # length. ViFi-CLIP's code does not train the table of tokens; here it is part of the text.
    "vifi": replace(
        _XCLIP,
        temporal="meanp",
        num_frames=32,
        epochs=10,
        head_ratio=1.0,
        decay_biases=True,
        lock_text=None,
        lock_scale=False,
        templates=("a photo of a {}.",),
    ),
}


def rate_at(recipe: Recipe, peak: float, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate that a parameter has in a step.

    Args:
        recipe: its warm-up, schedule, lowest rate and epochs count.
        peak: rate of the parameter at its highest.
        step: from 0, over the whole run.
        steps_per_epoch: optimiser steps of one epoch.

    Returns:
        0 to `peak`. The first step of a warm-up has 0, as in ActionCLIP's code; X-CLIP's also
        takes the rate of step s for s, but one update later.

    Source: spec 7; `rate_every=10` gives the schedule of ActionCLIP's code. X-CLIP: spec 5.
    """
    epoch, iteration = divmod(step, steps_per_epoch)
    # The rate changes at the first iteration of an epoch and at each `rate_every`-th.
    changed = max(0, (iteration + 1) // recipe.rate_every * recipe.rate_every - 1)
    now = epoch + changed / steps_per_epoch
    if now < recipe.warmup:
        return peak * (now / recipe.warmup)
    if recipe.schedule == "constant":
        return peak
    start = 0.0 if recipe.schedule == "whole-cosine" else recipe.warmup
    share = (1 + math.cos(math.pi * min((now - start) / (recipe.epochs - start), 1))) / 2
    lowest = min(recipe.lowest_ratio * recipe.learning_rate, peak)
    return lowest + (peak - lowest) * share


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: "text", "visual" or "head".
        learning_rate: at its highest.
        decayed: the parameters that learn, with weight decay.
        undecayed: those that learn without.
        num_locked: how many numbers of the group do not learn.
    """

    name: str
    learning_rate: float
    decayed: tuple[nn.Parameter, ...]
    undecayed: tuple[nn.Parameter, ...]
    num_locked: int

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        return (*self.decayed, *self.undecayed)

    @property
    def num_trained(self) -> int:
        return sum(parameter.numel() for parameter in self.trained)


def prepare(model: VideoTextModel, recipe: Recipe) -> list[ParameterGroup]:
    """Lock what the recipe locks and sort the rest into groups, in place.

    Returns:
        The groups text (with the temperature), visual and head, the last one without
        parameters for prompts that have none. `joint`'s time embedding belongs to visual, all
        that X-CLIP adds to CLIP to head.

    Raises:
        InputError: if more blocks are to be unlocked than the encoder has, or nothing is left to
            train.
    """
    _set_drop_path(model, recipe.drop_path)
    _lock(model, recipe)
    if recipe.frame_position_std is not None:
        head = getattr(model, "temporal", None)
        is_new = any(name.startswith("temporal.") for name in model.untrained)
        if not isinstance(head, TemporalTransformer) or not is_new:
            raise InputError("frame_position_std is for a new transf head; leave it out")
        nn.init.normal_(head.frame_position_embeddings.weight, std=recipe.frame_position_std)
    ratios = {"text": 1.0, "visual": recipe.visual_ratio, "head": recipe.head_ratio}
    groups = []
    for group, ratio in ratios.items():
        named = [(name, p) for name, p in model.named_parameters() if _group(name) == group]
        trained = [(name, p, _decays(recipe, name, p)) for name, p in named if p.requires_grad]
        groups.append(
            ParameterGroup(
                group,
                recipe.learning_rate * ratio,
                decayed=tuple(p for _, p, decays in trained if decays),
                undecayed=tuple(p for _, p, decays in trained if not decays),
                num_locked=sum(p.numel() for _, p in named if not p.requires_grad),
            )
        )
    if not any(group.num_trained for group in groups):
        raise InputError("all weights are locked and nothing can learn; lock less of the model")
    return groups


def build_optimizer(recipe: Recipe, groups: Iterable[ParameterGroup]) -> torch.optim.AdamW:
    """Return AdamW over the groups, each with the rate that a schedule starts from: `peak_lr`.

    A group of which only a part decays is two for the optimiser, of the same name.
    """
    return torch.optim.AdamW(
        [
            {
                "params": list(parameters),
                "name": group.name,
                "peak_lr": group.learning_rate,
                "weight_decay": decay,
            }
            for group in groups
            for parameters, decay in (
                (group.decayed, recipe.weight_decay),
                (group.undecayed, 0.0),
            )
            if parameters
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=1e-8,
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
    if name.startswith(("temporal.", "linear.")) or is_added(name):
        return "head"
    return "visual" if name.startswith("clip.visual.") else "text"


def _decays(recipe: Recipe, name: str, parameter: nn.Parameter) -> bool:
    # All biases are vectors.
    is_left_out = parameter.ndim < 2 or "positional_embedding" in name
    return recipe.decay_biases or not is_left_out


def _set_drop_path(model: VideoTextModel, drop_path: float) -> None:
    for encoder in (model.clip.visual, model.clip):
        if isinstance(transformer := getattr(encoder, "transformer", None), Transformer):
            blocks = transformer.resblocks
            for block, rate in zip(blocks, torch.linspace(0, drop_path, len(blocks)), strict=True):
                assert isinstance(block, ResidualAttentionBlock)
                block.drop_path = float(rate)


def _lock(model: VideoTextModel, recipe: Recipe) -> None:
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
        for name, parameter in model.named_parameters():
            is_new = name == "clip.visual.time_embedding" and name in model.untrained
            if is_new or _group(name) == "head":  # X-CLIP's messages are within the encoder
                parameter.requires_grad_(True)
    if recipe.lock_text is not None:
        for part in (clip.transformer, clip.token_embedding, clip.ln_final):
            part.requires_grad_(False)
        clip.positional_embedding.requires_grad_(False)
        clip.text_projection.requires_grad_(False)
        text_blocks = list(clip.transformer.resblocks)
        _unlock(text_blocks, [clip.ln_final, clip.text_projection], recipe.lock_text, "lock_text")
    if recipe.lock_scale:
        clip.logit_scale.requires_grad_(False)
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

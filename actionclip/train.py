"""The training loop: a model, a list of videos and a recipe -> trained weights, step by step.

Plain PyTorch, one process or several under torchrun. The contrastive loss compares all videos of
a step, over all processes, also where a process encodes them in several parts: embeddings are
computed without gradients first, but for the first part, and again part by part once the loss
has told each embedding its gradient (arXiv:2101.06983). The loss over classes is a sum over the
videos, so that parts simply add their gradients.

Nothing in a step depends on what happened outside of it: the state is the weights, the
optimiser's moments and a few counters. Yields records for its caller to show; prints nothing.

Source: ActionCLIP (arXiv:2109.08472), sections 3 and 4.1; X-CLIP (arXiv:2208.02816), section 4.1.
"""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from actionclip.annotations import VideoList
from actionclip.averaging import RunningMean
from actionclip.classifier import VideoClassifier
from actionclip.conversion import config_to_json
from actionclip.dataset import Batch, Fault, RunSampler, TrainingClips, build_loader
from actionclip.distillation import Teacher
from actionclip.distributed import (
    gather_objects,
    gather_rows,
    rank,
    reduce_max,
    share_buffers,
    world_size,
)
from actionclip.errors import InputError, TooManyBadError, TrainingError, WeightsError
from actionclip.evaluate import StoppedError, evaluate
from actionclip.losses import class_cross_entropy, class_targets, contrastive_kl, cosine_distance
from actionclip.mixing import Mixture, draw_mixture, mix_frames, mix_targets
from actionclip.models.base import VideoTextModel
from actionclip.models.layers import Transformer
from actionclip.models.xclip import XCLIP
from actionclip.precision import PRECISIONS
from actionclip.prompt_encoding import encode_prompts
from actionclip.prompts import class_prompts
from actionclip.recipe import Recipe, build_optimizer, prepare, rate_at, set_train_mode
from actionclip.runs import RunFolder
from actionclip.tokenizer import words
from actionclip.transforms import normalize
from actionclip.weights import digest

Record = dict[str, Any]

# The number by which the best epoch is chosen, for either kind of list.
SCORE = {False: "top1", True: "mean_average_precision"}


# Views that an evaluation encodes at a time.
EVALUATION_BATCH = 32

_MIXTURE, _TEMPLATE = 2, 3  # keep these random numbers apart from those of `dataset`


@dataclass(frozen=True)
class Running:
    """How a run is carried out; nothing here changes what is learned.

    Attributes:
        workers: processes that read videos ahead of the model; 0 reads in turn.
        log_every: steps between records.
        save_every: steps between saved states; each epoch is saved too.
        max_bad: share of an epoch's videos that may be unusable.
        recompute: save memory by activation checkpointing, see `models.layers.Transformer`.
        compile: let torch.compile make faster kernels of the model first.
    """

    workers: int = 4
    log_every: int = 10
    save_every: int = 1000
    max_bad: float = 0.01
    recompute: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        for name, least in (("workers", 0), ("log_every", 1), ("save_every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; use at least {least}")
        if not 0 <= self.max_bad <= 1:
            raise InputError(f"max_bad is {self.max_bad}; use a share, 0 to 1")


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: optimiser steps done.
        evaluated: epochs whose evaluation is done.
        best: highest score of an evaluation.
        loss_sum: of the steps since the last record.
        loss_count: number of them.
        num_bad: videos of this epoch that had to be replaced.
    """

    step: int = 0
    evaluated: int = 0
    best: float = -1.0
    loss_sum: float = 0.0
    loss_count: int = 0
    num_bad: int = 0


class Towers(nn.Module):
    """What the contrastive loss trains, as the one module that processes synchronise."""

    def __init__(self, model: VideoTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, tokens: Tensor, sentence: Tensor) -> tuple[Tensor, ...]:
        """Encode frames (B, T, 3, R, R) uint8 and S distinct sentences (S, L).

        Args:
            frames: uint8 RGB.
            tokens: (S, L).
            sentence: (B,) which sentence belongs to which video.

        Returns:
            Embeddings (B, D) of videos and of their sentences in fp32, and exp(logit_scale).
        """
        model = self.model
        # The text encoder asks a GPU for the longest sentence, and would wait for the frames too.
        text = model.encode_text(tokens)[sentence]
        video = model.encode_video(normalize(frames, model.pixel_mean, model.pixel_std))
        return video.float(), text.float(), model.clip.logit_scale.exp()


class ClassTowers(nn.Module):
    """What the loss over classes trains, as the one module that processes synchronise."""

    def __init__(self, model: VideoTextModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames: Tensor, tokens: Tensor, text: Tensor | None) -> tuple[Tensor, ...]:
        """Compare frames (B, T, 3, R, R) with the sentences of K classes.

        Args:
            frames: RGB, uint8 or float in [0, 255].
            tokens: (K, L), the sentences.
            text: (K, D), their embeddings if these are known, as those of a locked encoder.

        Returns:
            Logits (B, K), embeddings (B, D) of the videos and, but for a linear classifier,
            (K, D) of the sentences, all in fp32.
        """
        model = self.model
        if text is None and model.linear is None:
            text = model.encode_text(tokens).float()  # before the frames, as in `Towers`
        features = model.video_features(normalize(frames, model.pixel_mean, model.pixel_std))
        video = features[0].float()
        if text is None:
            assert model.linear is not None
            return model.linear(video), video
        return model.compare(features, text), video, text


class Trainer:
    """One training run, from its first step or from where it stopped.

    In several processes, each has one with the same arguments; the first writes the files.

    Args:
        model: on its device; its weights change, its config gets the recipe's templates and
            whether labels are raw.
        train: videos to learn from.
        recipe: what decides the result.
        folder: files of the run.
        val: videos to evaluate on after each epoch, with the class names of `train`. Without
            them the last epoch is the best one.
        running: how it is carried out.
        should_stop: asked before the first step and after each; once true on any process, all
            save and end.
        on_video: called for each video of an evaluation, such as to show progress.
        on_progress: called with what has just been done: a step, a video of an evaluation, a
            save. Whoever is never called again knows that the run hangs, and since when.

    Raises:
        InputError: if the recipe does not fit the data or the model.
    """

    def __init__(
        self,
        model: VideoTextModel,
        train: VideoList,
        recipe: Recipe,
        folder: RunFolder,
        *,
        val: VideoList | None = None,
        running: Running | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        on_video: Callable[[], None] = lambda: None,
        on_progress: Callable[[str], None] = lambda done: None,
    ) -> None:
        self.running = running or Running()
        if val is not None and val.class_names != train.class_names:
            raise InputError(f"{val.source} has other classes than {train.source}")
        if model.linear is not None:
            if train.multi_label:
                raise InputError(
                    f"{train.source} has several labels a video, and a linear classifier with "
                    "cross-entropy takes one; train with sentences"
                )
            if model.config.class_names != train.class_names:
                raise InputError(
                    f"the linear classifier of the model is for other classes than those of "
                    f"{train.source}; start another one (new_head, --new-head)"
                )
        if isinstance(model, XCLIP) and recipe.loss == "contrastive":
            raise InputError(
                "loss is 'contrastive', and X-CLIP changes every sentence for every video, which "
                "that loss does not compare; use 'classes' (--recipe xclip)"
            )
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise InputError(f"weights are {model.dtype}; load the model in float32 to train it")
        self.model = model
        self.train, self.val = train, val
        self.recipe = recipe
        self.folder = folder
        self.should_stop = should_stop
        self.on_video = on_video
        self.on_progress = on_progress
        model.eval()
        # Before the weights change, and before those of a resumed run are read.
        self.teacher = Teacher(model) if recipe.distillation else None
        self.teacher_digest = digest(model) if recipe.distillation else None
        self.groups = prepare(model, recipe)
        locked = {name for name, p in model.named_parameters() if not p.requires_grad}
        self._note_words()
        model.untrained = tuple(name for name in model.untrained if name in locked)
        for module in model.modules():
            if isinstance(module, Transformer):
                module.recompute = self.running.recompute
        self.clips = TrainingClips(
            train,
            recipe,
            model.num_frames,
            model.preprocessing,
            model.config.clip.context_length,
        )
        self.optimizer = build_optimizer(recipe, self.groups)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=recipe.precision == "fp16")
        self.progress = Progress()
        # None if no average is wanted, and once it is done.
        self.average = None if recipe.average_from is None else RunningMean()
        self.steps_per_epoch = self._sampler().steps_per_epoch
        self.num_steps = recipe.epochs * self.steps_per_epoch

        self.is_contrastive = recipe.loss == "contrastive" and model.linear is None
        text_group = next(group for group in self.groups if group.name == "text")
        self.learns_text = any(p is not model.clip.logit_scale for p in text_group.trained)
        # What the sentences were to the text encoder before it learned, (P * K, D).
        self.taught_text: Tensor | None = None
        if self.teacher is not None and self.learns_text:
            self.taught_text = self._encode_all_prompts()
        self.towers: nn.Module = Towers(model) if self.is_contrastive else ClassTowers(model)
        if self.running.compile:
            self.towers.compile()
        self.replica: nn.Module = self.towers
        if world_size() > 1:
            self.replica = DistributedDataParallel(self.towers)

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues, as plain JSON."""
        data = {"train": self.train, "val": self.val}
        recipe = json.loads(json.dumps(asdict(self.recipe)))
        del recipe["micro_batch"]  # memory may turn out too small, and results differ by rounding
        return {
            "model": json.loads(config_to_json(self.model.config)),
            "recipe": recipe,
            "data": {part: videos.digest for part, videos in data.items() if videos},
            "start": self.teacher_digest,
        }

    def resume(self) -> str:
        """Continue from the folder's latest state that is whole.

        Returns:
            What is wrong with a newer one; empty if there is none.

        Raises:
            InputError: if the run there has other settings; the message names them.
            TrainingError: if the folder was changed, or a state cannot be read now.
            WeightsError: if all states are missing or damaged.
        """
        path, state, fault = self._load_state()
        if differences := _differences(json.loads(state["settings"]), self.settings):
            raise InputError(
                f"{self.folder.path} was started with other settings ({'; '.join(differences)}); "
                "use the same ones, or another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self.average = RunningMean(**state["average"]) if "average" in state else None
        if rank() == 0:
            self.folder.go_on_from(path, state)
        return fault

    def _load_state(self) -> tuple[Path, dict[str, Any], str]:
        """Return the newest state that all processes can read, and what is wrong with a newer."""
        faults: list[str] = []
        for path in self.folder.states:
            state: dict[str, Any] = {}
            fault: WeightsError | TrainingError | None = None
            try:
                state = self.folder.load_state(path)
            except (WeightsError, TrainingError) as error:
                fault = error
            # No process goes on before all have opened the file, which may be renamed then.
            found = [each for each in gather_objects(fault) if each is not None]
            if not found:
                return path, state, "; ".join(faults)
            for each in found:
                if isinstance(each, TrainingError):
                    raise each
            faults.append(str(found[0]))
        raise WeightsError(f"{'; '.join(faults)}; start again in another folder")

    def run(self) -> Iterator[Record]:
        """Train to the end, or until asked to stop; state is saved on the way and at the end.

        Yields:
            A record after every `log_every` steps and each evaluation, the same on every
            process, also written to the folder's metrics.

        Raises:
            TrainingError: if a loss or gradient is not finite; no weight has changed then.
            TooManyBadError: if more videos than `max_bad` of an epoch cannot be used.
            OutputError: if the folder cannot be written.
        """
        try:
            yield from self._steps()
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory in step {self.progress.step + 1}; use --micro-batch with a small "
                "number, --checkpoint-activations or a smaller --batch-size"
            ) from error
        except RuntimeError as error:
            # Raised wherever the loop is when a worker ends, not only while waiting for it.
            if "DataLoader worker (pid" not in str(error):
                raise
            raise TrainingError(
                f"a process that reads videos died ({str(error).splitlines()[0]}); if memory or "
                "/dev/shm ran out, use fewer --workers"
            ) from error

    def _steps(self) -> Iterator[Record]:
        if (yield from self._end_epoch()):
            return
        # Before hours of work on the first batch; what is learned so far is that of the start.
        if any(reduce_max([self.should_stop()])):
            self._save()
            return
        on_gpu = self.model.device.type == "cuda"
        loader = build_loader(self.clips, self._sampler(), self.running.workers, pinned=on_gpu)
        set_train_mode(self.model)
        since, first = time.monotonic(), self.progress.step
        for batch in loader:
            stop_asked = self._step(batch)
            step = self.progress.step
            self.on_progress(f"step {step} of {self.num_steps}")
            epoch_ends = step % self.steps_per_epoch == 0
            if epoch_ends or step % self.running.log_every == 0:
                videos = (step - first) * self.recipe.batch_size
                yield self._log(self._train_record(videos / (time.monotonic() - since)))
                since, first = time.monotonic(), step
            if epoch_ends:
                stop_asked = yield from self._end_epoch(stop_asked)
                since = time.monotonic()
            elif stop_asked or step % self.running.save_every == 0:
                self._save()
            if stop_asked:
                return
        yield from self._finish_average()

    def _step(self, batch: Batch) -> bool:
        """Do one optimiser step; returns whether any process was asked to stop."""
        step = self.progress.step
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(self.recipe, group["peak_lr"], step, self.steps_per_epoch)
        loss = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        trained = [p for group in self.groups for p in group.trained]
        norm = nn.utils.get_total_norm([_grad(p) for p in trained])
        if self.recipe.clip_gradient is not None:
            nn.utils.clip_grads_with_norm_(trained, self.recipe.clip_gradient, norm)
        # What each process must tell all, in one exchange: NaN passes through it as it is. It is
        # read at once too, because to read waits for a GPU.
        flags = self._move(
            torch.tensor([self.should_stop(), len(batch.faults), batch.exhausted], dtype=norm.dtype)
        )
        told, _ = gather_rows(torch.cat([torch.stack([loss, norm]), flags])[None])
        losses, norms, stops, faults, exhausted = told.T.tolist()
        if any(faults):
            self._count_bad(gather_objects(batch.faults), any(exhausted))
        # Under fp16 the scaler skips a step whose gradient has overflowed, and halves the scale;
        # below 1 that was not the scale's fault.
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not all(map(math.isfinite, losses if may_overflow else losses + norms)):
            raise self._not_finite(batch, losses)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.loss_sum += sum(losses)
        self.progress.loss_count += 1
        return any(stops)

    def _backward(self, batch: Batch) -> Tensor:
        """Add the gradients of this process's share of the loss, and return the share."""
        if self.is_contrastive:
            return self._backward_contrastive(batch)
        return self._backward_over_classes(batch)

    def _backward_contrastive(self, batch: Batch) -> Tensor:
        parts = batch.split(self.recipe.micro_batch)
        taught = None
        if self.teacher is not None:
            taught = torch.cat([self._teach(self._move(part.frames)) for part in parts])
        # All processes go the same way, or their exchanges would not meet: the first has most.
        largest = -(-self.recipe.batch_size // world_size())
        if largest <= (self.recipe.micro_batch or largest):
            outputs = self._encode(self.replica, 0, batch)
            loss = self._loss(outputs, batch, taught)
            self.scaler.scale(loss * world_size()).backward()
            return loss.detach()

        statistics = [buffer.clone() for buffer in self.model.buffers()]
        with torch.no_grad():
            others = [self._encode(self.towers, i, part) for i, part in enumerate(parts[1:], 1)]
        for buffer, before in zip(self.model.buffers(), statistics, strict=True):
            buffer.copy_(before)  # the pass with gradients counts
        with self._without_sync(len(parts) > 1):
            first = self._encode(self.replica, 0, parts[0])
        cached = [[x.detach().requires_grad_() for x in outputs] for outputs in (first, *others)]
        # Every part has the same temperature, which has no rows.
        whole = [
            torch.cat(column) if column[0].ndim else column[-1]
            for column in zip(*cached, strict=True)
        ]
        loss = self._loss(whole, batch, taught)
        self.scaler.scale(loss * world_size()).backward()
        for i, (part, embeddings) in enumerate(zip(parts, cached, strict=True)):
            with self._without_sync(part is not parts[-1]):
                again = self._encode(self.replica, i, part) if i > 0 else first
                pairs = [
                    (x, before.grad)
                    for x, before in zip(again, embeddings, strict=True)
                    if x.requires_grad and before.grad is not None
                ]
                torch.autograd.backward([x for x, _ in pairs], [gradient for _, gradient in pairs])
        return loss.detach()

    def _backward_over_classes(self, batch: Batch) -> Tensor:
        share, done = torch.zeros((), device=self.model.device), 0
        for i, (frames, targets) in enumerate(self._parts(batch, self._mixture(batch))):
            done += len(frames)
            with self._without_sync(done < len(batch)):
                logits, video, *text = self._compare(self.replica, i, frames)
                loss = class_cross_entropy(logits, targets) / self.recipe.batch_size
                if self.teacher is not None:
                    loss = loss + self._distance(self._teach(frames), video, *text)
                self.scaler.scale(loss * world_size()).backward()
            share += loss.detach()
        return share

    def _mixture(self, batch: Batch) -> Mixture | None:
        """Draw how this process mixes the videos of the step."""
        if self.recipe.mixing is None:
            return None
        seeds = [_MIXTURE, self.recipe.seed, self.progress.step, rank()]
        generator = np.random.Generator(np.random.PCG64(seeds))
        return draw_mixture(len(batch), batch.frames.shape[-1], self.recipe.mixing, generator)

    def _parts(self, batch: Batch, mixture: Mixture | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the frames and targets (B, K) of as many videos as are encoded at a time."""
        size = self.recipe.micro_batch or len(batch)
        num_classes = len(self.train.class_names)
        targets = class_targets(batch.labels, num_classes, self.recipe.label_smoothing)
        if mixture is None:
            for frames, part in zip(batch.frames.split(size), targets.split(size), strict=True):
                yield self._move(frames), self._move(part)
            return
        targets = mix_targets(targets, targets[mixture.partner], mixture)
        parts = (batch.frames.split(size), targets.split(size), mixture.split(size))
        for frames, target, mixed in zip(*parts, strict=True):
            partners = self._move(batch.frames[mixed.partner])
            yield mix_frames(self._move(frames), partners, mixed), self._move(target)

    def _encode(self, towers: nn.Module, part: int, batch: Batch) -> tuple[Tensor, ...]:
        """Encode a part of a batch and its sentences, see `Towers`."""
        self._seed(part)
        tokens, sentence = batch.tokens.unique(dim=0, return_inverse=True)
        with self._autocast():
            return towers(self._move(batch.frames), self._move(tokens), self._move(sentence))

    def _compare(self, towers: nn.Module, part: int, frames: Tensor) -> tuple[Tensor, ...]:
        """Compare a part of a batch with the classes, see `ClassTowers`."""
        self._seed(part)
        prompts = self._class_prompts()
        tokens = self._move(self.clips.tokens[prompts])
        is_known = not self.learns_text and self.model.linear is None
        text = self._known_text[prompts] if is_known else None
        with self._autocast():
            return towers(frames, tokens, text)

    def _seed(self, part: int) -> None:
        """Let what is random in encoding a part depend on nothing but the step and the part."""
        seeds = [self.recipe.seed, self.progress.step, rank(), part]
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]))

    def _class_prompts(self) -> slice:
        """Return which of all prompts stand for the classes in this step: those of a template."""
        seeds = [_TEMPLATE, self.recipe.seed, self.progress.step]
        generator = np.random.Generator(np.random.PCG64(seeds))
        template = int(generator.integers(len(self.recipe.templates)))
        num_classes = len(self.train.class_names)
        return slice(template * num_classes, (template + 1) * num_classes)

    @cached_property
    def _known_text(self) -> Tensor:
        """Embeddings (P * K, D) of all prompts by a text encoder that does not learn."""
        return self._encode_all_prompts()

    def _encode_all_prompts(self) -> Tensor:
        prompts = class_prompts(
            self.recipe.templates, self.train.class_names, raw_labels=self.recipe.raw_labels
        )
        with self._autocast():
            embeddings = encode_prompts(self.model, prompts)
        return embeddings.float().clone()  # the copy may take part in a gradient

    def _teach(self, frames: Tensor) -> Tensor:
        """Return the teacher's embeddings (B, D) of the videos that the model also sees."""
        assert self.teacher is not None
        model = self.model
        with self._autocast():
            return self.teacher(normalize(frames, model.pixel_mean, model.pixel_std)).float()

    def _distance(
        self,
        taught: Tensor,
        video: Tensor,
        text: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Return the share that some videos have in the distance to the teacher.

        Args:
            taught: (B, D), the teacher's embeddings of the videos.
            video: (B, D), those of the model.
            text: (S, D), those of sentences; None if there are none.
            tokens: (S, L), the sentences; None for those of all classes.
        """
        distance = cosine_distance(video, taught).mean()
        if text is not None and self.taught_text is not None:
            prompts = self._class_prompts() if tokens is None else self._find_prompts(tokens)
            distance = distance + cosine_distance(text, self.taught_text[prompts]).mean()
        return self.recipe.distillation * len(video) / self.recipe.batch_size * distance

    def _find_prompts(self, tokens: Tensor) -> list[int]:
        """Return which of all prompts the rows of tokens (S, L) are."""
        return [int((self.clips.tokens == row).all(1).int().argmax()) for row in tokens]

    def _loss(self, outputs: Sequence[Tensor], batch: Batch, taught: Tensor | None) -> Tensor:
        """Return this process's share of the loss over the videos of all processes."""
        video, text, scale = outputs
        both, rows = gather_rows(torch.stack([video, text], 1))
        all_labels, _ = gather_rows(self._move(batch.labels))
        all_video, all_text = both.unbind(1)
        loss = contrastive_kl(
            all_video,
            all_text,
            all_labels,
            scale,
            target=self.recipe.target,
            rows=rows if world_size() > 1 else None,
        )
        return loss if taught is None else loss + self._distance(taught, video, text, batch.tokens)

    def _move(self, x: Tensor) -> Tensor:
        """Copy to the model's device, where there is another, without waiting for it."""
        return x.to(self.model.device, non_blocking=True)

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.recipe.precision]
        return torch.autocast(self.model.device.type, dtype, enabled=dtype != torch.float32)

    def _without_sync(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        if wanted and isinstance(self.replica, DistributedDataParallel):
            return self.replica.no_sync()
        return contextlib.nullcontext()

    def _count_bad(self, faults_by_rank: Sequence[Sequence[Fault]], exhausted: bool) -> None:
        """Write down videos that could not be used, and stop if they are too many."""
        step = self.progress.step
        faults = [fault for faults in faults_by_rank for fault in faults]
        for fault in faults if rank() == 0 else ():
            about = {"part": "train", "step": step + 1, **asdict(fault), "epoch": fault.epoch + 1}
            self.folder.log("bad_samples", about)
        bad = [fault for fault in faults if fault.replaced]
        self.progress.num_bad += len(bad)
        drawn = self.steps_per_epoch * self.recipe.batch_size
        if exhausted or self.progress.num_bad > self.running.max_bad * drawn:
            first = (bad or faults)[0]
            raise TooManyBadError(
                f"{self.progress.num_bad} of the {drawn} videos of epoch "
                f"{step // self.steps_per_epoch + 1} cannot be used so far, more than --max-bad "
                f"{self.running.max_bad:g} allows; one is {first.path} ({first.message}), all are "
                f"in {self.folder.log_file('bad_samples')}"
            )

    def _not_finite(self, batch: Batch, losses: Sequence[float]) -> TrainingError:
        """Find out which videos made the loss or its gradient no number, on which process."""
        paths, mixture = batch.paths, self._mixture(batch)
        with torch.no_grad():
            outputs = torch.cat([torch.cat(rows, 1) for rows in self._rows(batch, mixture)])
        bad = (~outputs.isfinite().all(1)).nonzero()[:, 0].tolist()
        culprits = [paths[i] for i in bad]
        if mixture is not None:
            culprits += [paths[i] for i in mixture.partner[bad].tolist()]
        culprits = list(dict.fromkeys(culprits))
        found = list(enumerate(gather_objects((culprits, paths))))
        # The videos of one process make the contrastive loss of every other one no number, too.
        guilty = [(i, culprits) for i, (culprits, _) in found if culprits] or [
            (i, paths) for i, (_, paths) in found if not math.isfinite(losses[i])
        ]
        what = "loss" if not all(map(math.isfinite, losses)) else "gradient"
        where = "; ".join(f"rank {i}: {_some(paths)}" for i, paths in guilty) or "all ranks"
        return TrainingError(
            f"the {what} is not finite in step {self.progress.step + 1} ({where}); the step has "
            "changed no weight. Start another run with a lower --lr, --clip-gradient 1 or "
            "--precision bf16"
        )

    def _rows(self, batch: Batch, mixture: Mixture | None) -> Iterator[list[Tensor]]:
        """Yield what the model makes of each part of a batch, a row for every video."""
        if self.is_contrastive:
            for i, part in enumerate(batch.split(self.recipe.micro_batch)):
                yield [x for x in self._encode(self.towers, i, part) if x.ndim]
        else:
            for i, (frames, _) in enumerate(self._parts(batch, mixture)):
                yield list(self._compare(self.towers, i, frames)[:2])

    def _end_epoch(self, stop_asked: bool = False) -> Generator[Record, None, bool]:
        """Save and evaluate, if an epoch has just ended; returns whether asked to stop."""
        progress = self.progress
        epoch, rest = divmod(progress.step, self.steps_per_epoch)
        if rest or progress.evaluated == epoch:
            return stop_asked
        if self.val is None:
            self._count_epoch(epoch)
            self._save_best()
            self._save()
            return stop_asked
        self._save()
        if stop_asked:
            return True
        share_buffers(self.model)
        try:
            record = self._evaluate(self.model, self.val)
        except StoppedError:
            return True
        finally:
            set_train_mode(self.model)
        self._count_epoch(epoch)
        if record[SCORE[self.val.multi_label]] > progress.best:
            progress.best = record[SCORE[self.val.multi_label]]
            self._save_best()
        self._log(record)
        self._save()
        yield record
        return False

    def _count_epoch(self, epoch: int) -> None:
        """Note that an epoch is over; what is saved next has it in both counts or in neither."""
        self.progress.evaluated, self.progress.num_bad = epoch, 0
        first = self.recipe.average_from
        if self.average is not None and first is not None and epoch >= first:
            self.average.add(self.model.state_dict())

    def _finish_average(self) -> Iterator[Record]:
        """Evaluate and write the average of the weights, unless there is none or it is done."""
        if self.average is None:
            return
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average.weights)
        record = None
        if self.val is not None:
            try:
                record = self._log({**self._evaluate(model, self.val), "kind": "average"})
            except StoppedError:
                return
        if rank() == 0:
            self.folder.save_average(model)
        self.average = None
        self._save()
        if record is not None:
            yield record

    def _evaluate(self, model: VideoTextModel, val: VideoList) -> Record:
        with self._autocast():
            classifier = VideoClassifier(
                model,
                val.class_names,
                batch_size=EVALUATION_BATCH,
                workers=self.running.workers,
                text_cache=False,  # the weights are others each time
            )
            result = evaluate(
                classifier,
                val.samples,
                multi_label=val.multi_label,
                on_result=lambda _: self._count_video(),
                should_stop=self.should_stop,
            )
        for failure in result.failures if rank() == 0 else ():
            about = {"part": "val", "step": self.progress.step, **asdict(failure)}
            self.folder.log("bad_samples", about)
        return {
            "kind": "eval",
            "step": self.progress.step,
            "epoch": self.progress.step / self.steps_per_epoch,
            **result.metrics,
            "videos": result.num_videos,
            "damaged": result.num_damaged,
            "failed": len(result.failures),
            "data_sha256": val.digest,
        }

    def _count_video(self) -> None:
        self.on_video()
        self.on_progress(f"a video of the evaluation after step {self.progress.step}")

    def _train_record(self, clips_per_second: float) -> Record:
        progress = self.progress
        loss = progress.loss_sum / progress.loss_count
        record = {
            "kind": "train",
            "step": progress.step,
            "epoch": progress.step / self.steps_per_epoch,
            "loss": loss,
            "lr": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            "clips_per_second": clips_per_second,
            "replaced": progress.num_bad,
        }
        if self.model.linear is None:
            record["logit_scale"] = float(self.model.clip.logit_scale.detach().exp())
        progress.loss_sum, progress.loss_count = 0.0, 0
        return record

    def _log(self, record: Record) -> Record:
        if rank() == 0:
            self.folder.log("metrics", record)
        return record

    def _save(self) -> None:
        if rank() == 0:
            state = {
                "settings": json.dumps(self.settings),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": asdict(self.progress),
            }
            if self.average is not None:
                state["average"] = vars(self.average)
            self.folder.save_state(state)
        self.on_progress(f"saving step {self.progress.step}")

    def _save_best(self) -> None:
        if rank() == 0:
            self.folder.save_best(self.model)

    def _sampler(self) -> RunSampler:
        return RunSampler(len(self.clips), self.recipe, self.progress.step, rank(), world_size())

    def _note_words(self) -> None:
        """Write how labels became sentences and, if the model knows few words, those of them."""
        config = replace(
            self.model.config,
            templates=self.recipe.templates,
            raw_labels=self.recipe.raw_labels,
        )
        learns_words = self.model.clip.token_embedding.weight.requires_grad
        knows_few = config.vocabulary is not None
        if learns_words and (knows_few or "clip.token_embedding.weight" in self.model.untrained):
            prompts = class_prompts(
                config.templates, self.train.class_names, raw_labels=self.recipe.raw_labels
            )
            learned = {word for prompt in prompts for word in words(prompt)}
            config = replace(
                config, vocabulary=tuple(sorted({*(config.vocabulary or ()), *learned}))
            )
        self.model.config = config


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Name the settings that differ, with both values."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            shown = [
                text if len(text := str(value)) <= 60 else f"{text[:57]}..." for value in (old, new)
            ]
            found.append(f"{prefix}{key} was {shown[0]}, is {shown[1]}")
    return found

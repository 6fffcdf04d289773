"""Training batches: a list of labelled videos -> frames, sentences and labels of each step.

Everything random about a sample is a function of (seed, epoch, its position in the list),
and everything random about the order one of (seed, epoch). So worker processes hold no state,
and a run can go on at any step. Stands between `annotations` and the training loop, which
normalises and encodes what comes from here.
"""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from actionclip.annotations import Sample, VideoList
from actionclip.augment import augment
from actionclip.errors import InputError, VideoError
from actionclip.prompts import class_prompts
from actionclip.recipe import Recipe
from actionclip.sampling import random_segment_indices
from actionclip.tokenizer import tokenize
from actionclip.transforms import Preprocessing, views
from actionclip.video import DecodedVideo, decode

# A run of broken videos longer than this is not bad luck: the disk is gone, or the folder.
MOST_TRIES = 10

_ORDER, _SAMPLE = 0, 1  # keep the random numbers of the two apart


@dataclass(frozen=True)
class Fault:
    """A video that was drawn and could not be used as it should.

    Attributes:
        path: the video.
        reason: that of `VideoError`, or "damaged" for one that was used in part, or as a whole
            because it ends before the action that was drawn.
        message: one sentence for people.
        replaced: whether another video stands in its place.
        epoch: in which it was drawn.
        index: its position among the labelled videos of the list.
    """

    path: str
    reason: str
    message: str
    replaced: bool
    epoch: int
    index: int


@dataclass
class Batch:
    """The samples of one process in one step.

    Attributes:
        frames: (B, T, 3, R, R) uint8.
        tokens: (B, L) int64, a sentence for each video.
        labels: (B,) int64 classes, or (B, K) bool of a multi-label list.
        paths: the B videos.
        faults: what went wrong on the way.
        exhausted: whether a place could not be filled, so that the batch must not be used.
    """

    frames: Tensor
    tokens: Tensor
    labels: Tensor
    paths: list[str]
    faults: list[Fault] = field(default_factory=list)
    exhausted: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def pin_memory(self) -> "Batch":
        """Move the frames where a GPU copies them from while it computes; for DataLoader."""
        return replace(self, frames=self.frames.pin_memory())

    def split(self, size: int | None) -> "list[Batch]":
        """Cut into batches of at most `size` samples, without their faults."""
        size = size or len(self)
        return [
            Batch(*parts, self.paths[i * size : (i + 1) * size])
            for i, parts in enumerate(
                zip(
                    self.frames.split(size),
                    self.tokens.split(size),
                    self.labels.split(size),
                    strict=True,
                )
            )
        ]


class TrainingClips(Dataset[Batch]):
    """Training samples by (epoch, position in the list).

    Args:
        videos: the list; samples without a label are left out. Of one with actions, one action is
            drawn each time, with the labels of those that it overlaps.
        recipe: templates, augmentation, seed.
        num_frames: T.
        preprocessing: what cuts the frames if the recipe does not augment.
        context_length: tokens L of a sentence.

    Raises:
        InputError: if no video has a label or a prompt is too long.
    """

    def __init__(
        self,
        videos: VideoList,
        recipe: Recipe,
        num_frames: int,
        preprocessing: Preprocessing,
        context_length: int,
    ) -> None:
        self.samples = [sample for sample in videos.samples if sample.labels]
        if not self.samples:
            raise InputError(f"{videos.source} holds no labelled video; there is nothing to learn")
        self.multi_label = videos.multi_label
        self.num_classes = len(videos.class_names)
        self.recipe = recipe
        self.num_frames = num_frames
        self.preprocessing = preprocessing
        prompts = class_prompts(recipe.templates, videos.class_names, raw_labels=recipe.raw_labels)
        self.tokens = tokenize(prompts, context_length)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        """Read one sample; if its video is broken, another one after it in the list.

        Returns:
            A batch of one.
        """
        epoch, index = key
        faults = []
        for attempt in range(MOST_TRIES):
            position = (index + attempt) % len(self)
            sample = self.samples[position]
            seed = [_SAMPLE, self.recipe.seed, epoch, index, attempt]
            generator = np.random.Generator(np.random.PCG64(seed))
            fault = partial(Fault, sample.path, epoch=epoch, index=position)
            try:
                if sample.actions:
                    sample, class_index, frames, damage = self._read_action(sample, generator)
                else:
                    frames, damage = self._read(sample, generator)
                    class_index = sample.labels[generator.integers(len(sample.labels))]
            except VideoError as error:
                faults.append(fault(error.reason, error.message, replaced=True))
                continue
            if damage:
                faults.append(fault("damaged", damage, replaced=False))
            template = int(generator.integers(len(self.recipe.templates)))
            tokens = self.tokens[template * self.num_classes + class_index]
            labels = self._labels(sample)
            return Batch(frames[None], tokens[None], labels[None], [sample.path], faults)
        side = self.preprocessing.resolution
        frames = torch.zeros(1, self.num_frames, 3, side, side, dtype=torch.uint8)
        labels = self._labels(sample)
        return Batch(frames, self.tokens[:1], labels[None], [sample.path], faults, exhausted=True)

    def _read_action(
        self, sample: Sample, generator: np.random.Generator
    ) -> tuple[Sample, int, Tensor, str]:
        """Draw one of a video's actions and read it.

        Returns:
            What was read, the class index of the action, and as `_read`.
        """
        action = sample.actions[generator.integers(len(sample.actions))]
        part = sample.during(action)
        try:
            return part, action.label, *self._read(part, generator)
        except VideoError as error:
            # Some lists have actions after the end of a video.
            if error.reason not in ("no-frames", "no-times"):
                raise
            frames, damage = self._read(sample, generator)
            message = "; ".join(filter(None, [error.message, "the whole video was used", damage]))
            return sample, action.label, frames, message

    def _read(self, sample: Sample, generator: np.random.Generator) -> tuple[Tensor, str]:
        """Decode a random frame of each segment and vary them: (T, 3, R, R) uint8, and damage."""
        augmentation = self.recipe.augmentation
        # Decoding may ask twice for the positions, and must hear the same.
        seed = int(generator.integers(2**63))

        def choose(num_frames: int) -> list[int]:
            random = np.random.Generator(np.random.PCG64(seed))
            return random_segment_indices(num_frames, self.num_frames, random)

        def cut(frame: Tensor) -> Tensor:
            return views(frame, self.preprocessing)[0]

        video: DecodedVideo = decode(
            sample.path,
            choose,
            start_seconds=sample.start_seconds,
            end_seconds=sample.end_seconds,
            transform=None if augmentation else cut,
        )
        frames = video.frames
        return (augment(frames, augmentation, generator) if augmentation else frames), video.damage

    def _labels(self, sample: Sample) -> Tensor:
        if not self.multi_label:
            return torch.tensor(sample.labels[0])
        return torch.zeros(self.num_classes, dtype=torch.bool).index_fill_(
            0, torch.tensor(sample.labels), True
        )


def join(batches: Sequence[Batch]) -> Batch:
    """Concatenate batches."""
    return Batch(
        torch.cat([batch.frames for batch in batches]),
        torch.cat([batch.tokens for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        [path for batch in batches for path in batch.paths],
        [fault for batch in batches for fault in batch.faults],
        any(batch.exhausted for batch in batches),
    )


class RunSampler(Sampler[list[tuple[int, int]]]):
    """The keys of every step from a given one to the end of the run, for one of several ranks.

    Each epoch is a new permutation. What does not fill a batch at its end is left out, as in
    ActionCLIP's code; ranks share each batch as evenly as it goes.

    Args:
        num_samples: in the list.
        recipe: epochs, batch size, seed.
        first_step: from 0, over the whole run.
        rank: of this process.
        world_size: number of processes.

    Raises:
        InputError: if the samples do not fill one batch, or a batch does not go round.
    """

    def __init__(
        self, num_samples: int, recipe: Recipe, first_step: int, rank: int, world_size: int
    ) -> None:
        if recipe.batch_size > num_samples:
            raise InputError(
                f"batch_size is {recipe.batch_size} and there are {num_samples} videos; use "
                f"--batch-size {num_samples} or less"
            )
        if recipe.batch_size < world_size:
            raise InputError(
                f"batch_size is {recipe.batch_size} for {world_size} processes; use at least "
                f"--batch-size {world_size}"
            )
        self.num_samples = num_samples
        self.recipe = recipe
        self.first_step = first_step
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = num_samples // recipe.batch_size

    def __len__(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch - self.first_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.recipe.batch_size
        first_epoch, first = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.recipe.epochs):
            generator = np.random.Generator(np.random.PCG64([_ORDER, self.recipe.seed, epoch]))
            order = generator.permutation(self.num_samples).tolist()
            for step in range(first, self.steps_per_epoch):
                batch = order[step * size : (step + 1) * size]
                yield [(epoch, index) for index in batch[self.rank :: self.world_size]]
            first = 0


def build_loader(
    clips: TrainingClips, sampler: RunSampler, workers: int, *, pinned: bool = False
) -> DataLoader[Batch]:
    """Return the batches of the run, read ahead by worker processes; `pinned` is for a GPU."""
    return DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=join,
        pin_memory=pinned,
        worker_init_fn=_ignore_signals,
        # Its seed is drawn when the loop starts and would change the global random state.
        generator=torch.Generator(),
        prefetch_factor=2 if workers else None,
    )


def _ignore_signals(worker: int) -> None:
    """Leave interruptions to the parent, which still needs the batches that are under way."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has not all of them
            signal.signal(getattr(signal, name), signal.SIG_IGN)

"""VideoClassifier: class names once, then videos to predictions.

Joins the whole flow: chosen frames are decoded and cropped, in worker threads,
while the model encodes the videos before them; the text embeddings are computed
once and kept. Memory holds a few videos' frames, however many there are.
"""

import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from actionclip.ahead import map_ahead
from actionclip.errors import InputError, VideoError
from actionclip.inference import pack
from actionclip.isolation import Isolated, LostWorkError
from actionclip.models.base import VideoTextModel
from actionclip.prompt_encoding import encode_prompts
from actionclip.prompts import TEMPLATES, check_class_names, class_prompts, comparison_key
from actionclip.reading import Reading, ViewReader
from actionclip.similarity import fuse_logits
from actionclip.text_cache import cached_embeddings
from actionclip.tokenizer import words
from actionclip.transforms import normalize
from actionclip.video import Limits, Span

Video = str | os.PathLike[str] | Span


@dataclass(frozen=True)
class Prediction:
    """How well each label fits.

    Attributes:
        labels: the K labels, in the order given.
        scores: (K,) for one video, (B, K) for a list; float32 probabilities that sum to 1.
    """

    labels: tuple[str, ...]
    scores: Tensor

    def top(self, k: int = 5) -> list[tuple[str, float]] | list[list[tuple[str, float]]]:
        """Return the `k` best labels with their scores, best first; for a list, one list each."""
        if self.scores.ndim == 1:
            return top_labels(self.labels, self.scores, k)
        return [top_labels(self.labels, scores, k) for scores in self.scores]


def top_labels(labels: Sequence[str], scores: Tensor, k: int) -> list[tuple[str, float]]:
    """Pair the `k` highest of scores (K,) with their labels, best first."""
    best = scores.topk(min(k, len(labels)))
    return [(labels[i], score) for i, score in zip(best.indices, best.values.tolist(), strict=True)]


@dataclass(frozen=True)
class VideoResult:
    """What became of one video of a stream.

    Attributes:
        path: the video as it was named; of a span, its file.
        status: "damaged" has scores, from the frames that could be decoded.
        reason: one word for programs, unless `status` is "ok".
        message: one sentence for people, unless `status` is "ok".
        num_frames: frames in the video or span, if it could be decoded.
        prediction: None if `status` is "error".
        logits: (V, P, K) float32 on the CPU, of V views, P templates and K labels, of which
            `similarity.fuse_logits` makes the scores; with it, those among some of the labels
            alone. None without a prediction.
    """

    path: str
    status: Literal["ok", "damaged", "error"]
    reason: str | None = None
    message: str | None = None
    num_frames: int | None = None
    prediction: Prediction | None = None
    logits: Tensor | None = None


class VideoClassifier:
    """Recognise actions among given labels.

    Args:
        model: any model of this package; it is put into eval mode. Make a new classifier after its
            weights were changed, or moved to another device.
        labels: K distinct class names; of a linear classifier, some of its own.
        templates: a name in `prompts.TEMPLATES`, or templates with one `{}` each; None is
            the model's own, those it was trained with.
        num_clips: temporal views of a video.
        num_crops: spatial views of each temporal one, 1 (centre) or 3 (along the long side).
        raw_labels: fill labels into the templates as they are, instead of splitting names such
            as "ApplyEyeMakeup" or "brush_hair" into words, which CLIP understands; None does as
            the model's training did. Results always show the label as given.
        scale: multiplier of the cosines before the softmax over labels; None is the
            model's exp(logit_scale). The default is that of the official evaluation: 100 for
            ActionCLIP, exp(logit_scale) for X-CLIP.
        batch_size: views that the model encodes at a time.
        workers: threads that decode videos ahead of the model, or together a video that is alone
            on a list; 0 decodes in turn.
        limits: what a video file may cost; None is the default `Limits()`.
        strict: whether a damaged video is an error instead of being scored by what is left.
        isolated: decode in processes instead of threads, so that a file which crashes or stalls
            a decoder costs its own result only; unless `workers` is 0. As ever with
            `multiprocessing`, a script has to do its work under `if __name__ == "__main__":`.
        text_cache: keep the text embeddings of many labels on disk, beside downloaded files,
            for the next classifier with the same weights and sentences.
        compile: compile the image encoder, see `inference.pack` for what that costs.

    Raises:
        InputError: if the labels are empty, blank, double, too long or unknown to a linear
            classifier, a template has no `{}`, or a number is out of range.
    """

    def __init__(
        self,
        model: VideoTextModel,
        labels: Sequence[str],
        *,
        templates: str | Sequence[str] | None = None,
        num_clips: int = 1,
        num_crops: int = 1,
        raw_labels: bool | None = None,
        scale: float | Literal["official"] | None = "official",
        batch_size: int = 8,
        workers: int = 2,
        limits: Limits | None = None,
        strict: bool = False,
        isolated: bool = False,
        text_cache: bool = True,
        compile: bool = False,
    ) -> None:
        for name, value, least in (
            ("num_clips", num_clips, 1),
            ("batch_size", batch_size, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise InputError(f"{name} is {value}, it must be at least {least}")
        if scale == "official":
            scale = model.evaluation_scale
        if scale is not None and not 0 < scale < math.inf:
            raise InputError(f"scale is {scale}, it must be positive and finite")
        if num_crops not in (1, 3):
            raise InputError(f"num_crops is {num_crops}; use 1 or 3")
        if model.linear is not None and (templates is not None or raw_labels is not None):
            raise InputError(
                "the model has a linear classifier and reads no sentences; leave out templates and "
                "raw_labels"
            )
        if templates is None:
            templates = () if model.linear is not None else model.config.templates
        elif isinstance(templates, str):
            if templates not in TEMPLATES:
                raise InputError(
                    f"templates={templates!r} is unknown; choose from {', '.join(TEMPLATES)} "
                    "or pass a list of templates"
                )
            templates = TEMPLATES[templates]
        self.model = model.eval()
        self._packed = pack(model, compile=compile)
        self.labels = tuple(check_class_names(labels))
        self.templates = tuple(templates)
        self.raw_labels = model.config.raw_labels if raw_labels is None else raw_labels
        self.num_clips = num_clips
        self.num_crops = num_crops
        self.scale = scale
        self.batch_size = batch_size
        self.workers = workers
        self.limits = limits or Limits()
        self.strict = strict
        self.isolated = isolated
        self._reader = ViewReader(
            num_frames=model.num_frames,
            num_clips=num_clips,
            num_crops=num_crops,
            rule=model.config.sampling,
            preprocessing=model.preprocessing,
            limits=self.limits,
            strict=strict,
        )
        if model.linear is None:
            prompts = class_prompts(templates, self.labels, raw_labels=self.raw_labels)
            self._warn_of_unknown_words(prompts)
            encode = cached_embeddings if text_cache else encode_prompts
            self.text_embeddings = encode(model, prompts).unflatten(0, (len(templates), -1))
        else:
            self._positions = self._classifier_positions()
        # A linear classifier does without the text encoder.
        untrained = [
            name
            for name in model.untrained
            if model.linear is None or name.startswith(("clip.visual.", "temporal.", "linear."))
        ]
        if untrained:
            more = f" and {len(untrained) - 1} more" if len(untrained) > 1 else ""
            warnings.warn(
                f"the model holds untrained weights ({untrained[0]}{more}), so its "
                "predictions mean little; train it first or load a checkpoint with "
                f"temporal={model.config.temporal!r}",
                stacklevel=2,
            )

    def _warn_of_unknown_words(self, prompts: Sequence[str]) -> None:
        if self.model.config.vocabulary is None:
            return
        known = set(self.model.config.vocabulary)
        unknown = {word for prompt in prompts for word in words(prompt)} - known
        if unknown:
            warnings.warn(
                "labels use words that the model never learned: "
                f"{', '.join(sorted(unknown))}; it knows: {', '.join(sorted(known))}",
                stacklevel=3,
            )

    def _classifier_positions(self) -> list[int]:
        """Return where the labels stand among the classes of the linear classifier."""
        class_names = self.model.config.class_names
        assert class_names is not None
        position_of = {comparison_key(name): i for i, name in enumerate(class_names)}
        keys = [comparison_key(label) for label in self.labels]
        for label, key in zip(self.labels, keys, strict=True):
            if key not in position_of:
                raise InputError(
                    f"label {label!r} is none of the {len(class_names)} classes of the model's "
                    "linear classifier, which can tell no others; train one with sentences for that"
                )
        return [position_of[key] for key in keys]

    def __call__(self, videos: Video | Tensor | Iterable[Video | Tensor]) -> Prediction:
        """Classify one video or a list of videos.

        Args:
            videos: a path, a `video.Span`, or a tensor of frames (T, 3, H, W) uint8 of any
                size and number, or a list of these.

        Returns:
            Scores (K,) for one video, (B, K) for a list.

        Raises:
            VideoError: if a video cannot be used. Damage that leaves frames to score is a
                warning, unless `strict`.
            InputError: if frames are not of that shape and type, or the list is empty.
        """
        if isinstance(videos, str | os.PathLike | Span | Tensor):
            return Prediction(self.labels, self([videos]).scores[0])
        scores = []
        for outcome in self._classify(videos):
            reading = outcome.reading
            if reading.error is not None:
                raise reading.error
            if reading.damage:
                warnings.warn(f"{reading.name}: damaged: {reading.damage}", stacklevel=2)
            assert outcome.scores is not None
            scores.append(outcome.scores)
        if not scores:
            raise InputError("the list of videos is empty")
        return Prediction(self.labels, torch.stack(scores))

    def stream(self, videos: Iterable[Video]) -> Generator[VideoResult, None, None]:
        """Classify videos one after another, in order, without stopping at a bad one.

        Results come when a batch is full; with `workers=0, batch_size=1` each comes before
        the next video is taken. Closing the generator early ends its threads.

        Args:
            videos: any number of paths or `video.Span`s; taken a few ahead of the results.

        Yields:
            One result for each video.
        """
        if isinstance(videos, str | os.PathLike | Span):
            raise InputError(f"stream takes a list of paths, got the single path {videos!r}")
        for outcome in self._classify(videos):
            reading = outcome.reading
            if reading.error is not None:
                yield VideoResult(
                    reading.name, "error", reading.error.reason, reading.error.message
                )
                continue
            assert outcome.scores is not None
            yield VideoResult(
                reading.name,
                "damaged" if reading.damage else "ok",
                "damaged" if reading.damage else None,
                reading.damage or None,
                reading.num_frames,
                Prediction(self.labels, outcome.scores),
                outcome.logits,
            )

    def _classify(self, videos: Iterable[Video | Tensor]) -> Iterator["_Outcome"]:
        """Decode ahead, gather views into batches, score, and keep the order."""
        pending: list[_Outcome] = []
        # The views of the next batch are cut while the model is busy with this one.
        batch = math.ceil(self.batch_size / (self.num_clips * self.num_crops))
        is_alone = isinstance(videos, Sequence) and len(videos) == 1
        reader = replace(self._reader, threads=max(1, self.workers) if is_alone else 1)
        one_thread = partial(torch.set_num_threads, 1)
        isolated = Isolated(reader, self.limits.max_seconds, one_thread, [ViewReader.__module__])
        is_isolated = self.isolated and self.workers > 0
        read = partial(_read_isolated, isolated) if is_isolated else reader
        readings = map_ahead(
            partial(self._prepare, read),
            videos,
            self.workers,
            "decode",
            batch=batch,
            stop=isolated.close,
        )
        with closing(readings):
            for reading in readings:
                pending.append(_Outcome(reading))
                ready = sum(len(o.reading.views) for o in pending if o.reading.views is not None)
                if ready == 0 or ready >= self.batch_size:
                    yield from self._score(pending)
                    pending = []
            yield from self._score(pending)

    def _prepare(self, read: Callable[[Span], Reading], video: Video | Tensor) -> Reading:
        """Read one video, or take its frames from memory."""
        if isinstance(video, Tensor):
            if video.ndim != 4 or video.shape[1] != 3 or video.dtype != torch.uint8:
                shape = tuple(video.shape)
                raise InputError(f"frames are {shape} {video.dtype}; use (T, 3, H, W) torch.uint8")
            if 0 in video.shape:
                raise InputError(f"frames are {tuple(video.shape)}: there is nothing to see")
            return self._reader.read_frames(video)
        if not isinstance(video, str | os.PathLike | Span):
            raise InputError(
                f"a video is a {type(video).__name__}; pass a path or a tensor (T, 3, H, W) uint8"
            )
        span = video if isinstance(video, Span) else Span(video)
        return read(replace(span, path=os.fspath(span.path)))

    @torch.inference_mode()
    def _score(self, outcomes: "list[_Outcome]") -> "list[_Outcome]":
        """Fill in the scores of the outcomes that have views."""
        usable = [outcome for outcome in outcomes if outcome.reading.views is not None]
        if not usable:
            return outcomes
        views = [outcome.reading.views for outcome in usable]
        pixels = torch.cat([torch.from_numpy(one) for one in views])
        parts = [self._logits(part).float().cpu() for part in pixels.split(self.batch_size)]
        logits = torch.cat(parts).unflatten(0, (len(usable), -1))
        for outcome, own, scores in zip(usable, logits, fuse_logits(logits), strict=True):
            outcome.logits, outcome.scores, outcome.reading.views = own, scores, None
        return outcomes

    def _logits(self, pixels: Tensor) -> Tensor:
        """Compare views (N, T, 3, R, R) uint8 with P templates of K labels: (N, P, K)."""
        mean, std = self.model.preprocessing.mean, self.model.preprocessing.std
        features = self._packed.video_features(normalize(pixels.to(self.model.device), mean, std))
        if self.model.linear is not None:
            logits = self.model.linear(features[0].float())
            return logits[:, None, self._positions]
        texts = self.text_embeddings
        logits = self._packed.compare(features, texts.flatten(0, 1), self.scale)
        return logits.unflatten(1, texts.shape[:2])


def _read_isolated(isolated: Isolated[Span, Reading], span: Span) -> Reading:
    """Read a video in a child process, and note what became of a child that did not answer."""
    try:
        return isolated(span)
    except LostWorkError as error:
        name = os.fspath(span.path)
        return Reading(name, error=VideoError(name, error.reason, error.message))


@dataclass
class _Outcome:
    """One video on its way through the classifier."""

    reading: Reading
    scores: Tensor | None = None
    logits: Tensor | None = None

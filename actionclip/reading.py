"""Read the views of a video that a model scores, or note why there are none.

The first half of video file -> frames -> frame embeddings -> video embedding -> similarity
-> prediction as one picklable function, so that threads or processes can do it ahead of the
model: positions are chosen, decoded, cropped and arranged. Knows no model.
"""

import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from actionclip.errors import VideoError
from actionclip.sampling import Sampling, view_indices
from actionclip.transforms import Preprocessing, views
from actionclip.video import Limits, Span, decode


@dataclass
class Reading:
    """What was read of one video.

    Attributes:
        name: the video as it was named.
        views: (V, T, 3, R, R) uint8 RGB of V views, temporal ones first; None with an error.
        num_frames: frames in the video or span.
        damage: one line on what was lost; empty if nothing was.
        error: why the video cannot be used.
    """

    name: str
    views: np.ndarray | None = None
    num_frames: int | None = None
    damage: str = ""
    error: VideoError | None = None


@dataclass(frozen=True)
class ViewReader:
    """Which views of a video are read, and how.

    Attributes:
        num_frames: T, frames of a view.
        num_clips: temporal views.
        num_crops: spatial views of each.
        rule: how frames are chosen.
        preprocessing: how they are cut.
        limits: what a video may cost.
        strict: whether damage is an error.
        threads: of the decoder, for a video that is alone.
    """

    num_frames: int
    num_clips: int
    num_crops: int
    rule: Sampling
    preprocessing: Preprocessing
    limits: Limits
    strict: bool
    threads: int = 1

    def __call__(self, span: Span) -> Reading:
        """Read a video; one that cannot be used is noted, not raised."""
        name = os.fspath(span.path)
        try:
            video = decode(
                name,
                self._choose,
                start_seconds=span.start_seconds,
                end_seconds=span.end_seconds,
                transform=self._cut,
                limits=self.limits,
                strict=self.strict,
                threads=self.threads,
            )
        except VideoError as error:
            return Reading(name, error=error)
        return Reading(name, self._arrange(video.frames), video.num_frames, video.damage)

    def read_frames(self, frames: Tensor) -> Reading:
        """Take the views from frames (N, 3, H, W) uint8 in memory."""
        cut = [self._cut(frames[i].cpu()) for i in self._choose(len(frames))]
        return Reading("frames", self._arrange(torch.stack(cut)), len(frames))

    def _choose(self, num_frames: int) -> list[int]:
        clips = view_indices(num_frames, self.num_frames, self.num_clips, rule=self.rule)
        return [index for clip in clips for index in clip]

    def _cut(self, frame: Tensor) -> Tensor:
        return views(frame, self.preprocessing, self.num_crops)

    def _arrange(self, frames: Tensor) -> np.ndarray:
        """Turn cropped frames (clips * T, crops, 3, R, R) into views (clips * crops, T, ...)."""
        return frames.unflatten(0, (self.num_clips, -1)).transpose(1, 2).flatten(0, 1).numpy()

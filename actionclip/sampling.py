"""Which frames of a video to look at: integers in, integers out.

First step of the flow video file -> frames -> frame embeddings -> video embedding
-> similarity -> prediction: the number of frames is known, nothing is decoded yet.
All positions are 0-based; frame folders number their files from 1, which is not
this module's concern.

Source: ActionCLIP (arXiv:2109.08472), segment sampling as in TSN (arXiv:1608.00859);
X-CLIP (arXiv:2208.02816), whose evaluation looks half a frame later.
"""

from typing import Literal, get_args

import numpy as np

from actionclip.errors import InputError

Sampling = Literal["actionclip", "xclip"]


def segment_indices(num_frames: int, num_segments: int) -> list[int]:
    """Return the middle frame of each segment: the evaluation sampling.

    Args:
        num_frames: frames in the video, at least 1.
        num_segments: equal spans to cut it into, at least 1.

    Returns:
        `num_segments` ascending positions in [0, num_frames). A video with no more
        frames than segments repeats some of them.

    Raises:
        InputError: if an argument is below 1.
    """
    return view_indices(num_frames, num_segments, 1)[0]


def view_indices(
    num_frames: int, num_segments: int, num_clips: int, *, rule: Sampling = "actionclip"
) -> list[list[int]]:
    """Return the positions of several temporal views, spread inside each segment.

    View v of V takes the frame at the fraction (v + 0.5) / V of every segment, so the
    only view of V = 1 is the evaluation sampling. X-CLIP's code draws its views at random
    instead, as in its training.

    Args:
        num_frames: frames in the video, at least 1.
        num_segments: equal spans to cut it into, at least 1.
        num_clips: number of temporal views, at least 1.
        rule: "actionclip" counts positions from the middle of the first frame, "xclip" from
            its beginning, where position x lies in frame floor(x).

    Returns:
        `num_clips` lists of `num_segments` ascending positions in [0, num_frames). With
        "actionclip", all views of a video with no more frames than segments are equal.

    Raises:
        InputError: if an argument is below 1 or the rule is unknown.
    """
    _check_positive(num_frames=num_frames, num_segments=num_segments, num_clips=num_clips)
    if rule not in get_args(Sampling):
        raise InputError(f'rule is {rule!r}: pass "actionclip" or "xclip"')
    if rule == "xclip":
        # (i + (v + 0.5) / V) * n / S over one denominator.
        return [
            [
                (2 * num_clips * i + 2 * v + 1) * num_frames // (2 * num_clips * num_segments)
                for i in range(num_segments)
            ]
            for v in range(num_clips)
        ]
    if num_frames <= num_segments:
        return [_spread(num_frames, num_segments) for _ in range(num_clips)]
    if num_segments == num_clips == 1:
        # The reference takes n // 2 here, where its own formula gives (n - 1) // 2.
        return [[num_frames // 2]]
    # (i + (v + 0.5) / V) * n / S - 0.5 over one denominator. Exact, where the reference's
    # floats can fall just below an integer (never for S a power of two). Values between
    # -0.5 and 0 truncate to 0.
    denominator = 2 * num_clips * num_segments
    return [
        [
            max(0, (2 * num_clips * i + 2 * v + 1) * num_frames - num_clips * num_segments)
            // denominator
            for i in range(num_segments)
        ]
        for v in range(num_clips)
    ]


def random_segment_indices(
    num_frames: int, num_segments: int, generator: "np.random.Generator"
) -> list[int]:
    """Return one random frame of each segment: the training sampling.

    Of all models: X-CLIP's own never shows the last n mod T frames of a video, and of a short
    one it may show the first frame last.

    Args:
        num_frames: frames in the video, at least 1.
        num_segments: equal spans to cut it into, at least 1.
        generator: the only source of randomness.

    Returns:
        `num_segments` ascending positions in [0, num_frames). A video with no more
        frames than segments gives every frame once and random ones again.

    Raises:
        InputError: if an argument is below 1.
    """
    _check_positive(num_frames=num_frames, num_segments=num_segments)
    if num_frames <= num_segments:
        extra = generator.integers(num_frames, size=num_segments - num_frames)
        return sorted([*range(num_frames), *extra.tolist()])
    starts = _spread(num_frames, num_segments)
    ends = [*starts[1:], num_frames]
    return generator.integers(starts, ends).tolist()


def _spread(num_frames: int, num_segments: int) -> list[int]:
    """Return the first frame of each segment."""
    return [i * num_frames // num_segments for i in range(num_segments)]


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} is {number}; it must be at least 1")

"""The clip that decoding, starting and the pipeline are measured with."""

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

H264 = {"preset": "veryfast"}


def write_moving_noise(
    path: Path,
    width: int,
    height: int,
    *,
    gop: int = 48,
    seed: int = 0,
    codec: str = "libx264",
    options: Mapping[str, str] = H264,
) -> str:
    """Write 10 s of a gradient that moves under noise, a key frame every `gop`; return the path."""
    generator = np.random.default_rng(seed)
    noise = generator.integers(0, 60, (height, width + 300, 3), dtype=np.uint8) // 2
    ramp = np.linspace(0, 190, width, dtype=np.uint8)[None, :, None]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=30, options=dict(options))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = os.cpu_count() or 1
        stream.codec_context.time_base = Fraction(1, 30)
        for i in range(300):
            image = noise[:, i : i + width] + np.roll(ramp, 3 * i, axis=1)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = i
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return str(path)

"""Write small videos of every kind, and decode them the plain way."""

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

ROTATIONS = {  # degrees clockwise -> (a, b, c, d) of the matrix in the track header
    0: (1, 0, 0, 1),
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}


def picture(i: int, width: int, height: int) -> np.ndarray:
    """Return frame i: moving gradients, a red top-left corner and a moving white square."""
    y, x = np.ogrid[:height, :width]
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = (x * 2 + 5 * i) % 256
    image[..., 1] = (y * 3 + 7 * i) % 256
    image[..., 2] = (x + y + 11 * i) % 256
    image[: height // 4, : width // 4] = (255, 0, 0)
    left = 3 * i % max(1, width - 8)
    image[height // 2 : height // 2 + 8, left : left + 8] = 255
    return image


def write_video(
    path: Path,
    num_frames: int = 30,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    bframes: int = 2,
    options: dict[str, str] | None = None,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    times: Sequence[int] | None = None,
) -> Path:
    """Encode `num_frames` pictures, at 25 a second unless `times` (in 1/25 s) says otherwise."""
    with av.open(
        str(path), "w", format=container, container_options=container_options or {}
    ) as output:
        stream = output.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = bframes
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, 25)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts = times[i] if times else i
            frame.time_base = Fraction(1, 25)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def rotate(path: Path, degrees: int) -> Path:
    """Tell players of an .mp4 to turn it clockwise, in its track header (ISO 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    a, b, c, d = ROTATIONS[degrees]
    struct.pack_into(">4i", data, matrix, *(v << 16 for v in (a, b)), 0, c << 16)
    struct.pack_into(">i", data, matrix + 16, d << 16)
    path.write_bytes(data)
    return path


def remux(source: Path, target: Path, *, drop: int = 0) -> Path:
    """Copy the packets into another container, without the first `drop` of them."""
    with av.open(str(source)) as input_, av.open(str(target), "w") as output:
        stream = output.add_stream_from_template(input_.streams.video[0])
        for number, packet in enumerate(input_.demux(video=0)):
            if packet.dts is not None and number >= drop:
                packet.stream = stream
                output.mux(packet)
    return target


def write_two_sizes(path: Path, num_frames: int, sizes: Sequence[tuple[int, int]]) -> Path:
    """Write H.264 whose frames change their size on the way."""
    parts = [
        write_video(
            path.with_suffix(f".{size[0]}"), num_frames, size=size, container="h264", bframes=0
        )
        for size in sizes
    ]
    raw = path.with_suffix(".h264")
    raw.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path if path == raw else retime(raw, path, range(len(sizes) * num_frames))


def retime(source: Path, target: Path, times: Sequence[int]) -> Path:
    """Copy packets that are in presentation order, with new times in 1/25 s."""
    with av.open(str(source)) as input_, av.open(str(target), "w") as output:
        stream = output.add_stream_from_template(input_.streams.video[0])
        packets = [packet for packet in input_.demux(video=0) if packet.size]
        for packet, moment in zip(packets, times, strict=True):
            packet.time_base = Fraction(1, 25)
            packet.pts = packet.dts = moment
            packet.stream = stream
            output.mux(packet)
    return target


def write_sound(path: Path) -> Path:
    """Write one second of silence and no video."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), "fltp", "stereo")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def write_cover_art(path: Path, num_frames: int) -> Path:
    """Write a small video with a larger picture beside it, marked as cover art."""
    with av.open(str(path), "w") as output:
        film = output.add_stream("libx264", rate=25)
        film.width, film.height = 96, 64
        cover = output.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "rgb24"
        cover.disposition = Disposition.attached_pic.value
        frame = av.VideoFrame.from_ndarray(picture(0, 320, 240), format="rgb24")
        output.mux(cover.encode(frame))
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(i, 96, 64), format="rgb24")
            output.mux(film.encode(frame.reformat(format="yuv420p")))
        output.mux(film.encode(None))
    return path


def decode_plainly(path: Path) -> list[np.ndarray]:
    """Decode every frame with PyAV: (3, H, W) uint8 each, rotated."""
    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(container.streams.best("video")):
            pixels = frame.to_ndarray(format="rgb24")
            frames.append(np.rot90(pixels, round(frame.rotation / 90)).transpose(2, 0, 1))
    return frames

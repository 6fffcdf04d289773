"""Write the catalogue of odd and hostile videos, each with what must come of it.

What is expected follows from how a file is made: so many frames were encoded, so many packets
destroyed, such a limit broken. Nothing here was copied from what the package says.
"""

import json
import os
import random
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
import tracing
from av.stream import Disposition
from video_files import (
    retime,
    rotate,
    write_cover_art,
    write_sound,
    write_two_sizes,
    write_video,
)

from actionclip.errors import VideoError
from actionclip.video import decode

FRAMES = 30  # of every video here, unless its row says otherwise
SIDE_OF_BOMB = 16_000  # 256 million pixels, five times the limit


@dataclass(frozen=True)
class Outcome:
    """What came of a file."""

    status: str  # ok, damaged or error
    frames: int | None = None
    reason: str | None = None
    message: str = ""

    @classmethod
    def of_row(cls, row: dict) -> "Outcome":
        """Take it from a row of a command's output."""
        return cls(row["status"], row["frames"], row["reason"], row["message"] or "")


@dataclass(frozen=True)
class Expected:
    """What must come of a file: a number of frames, or one of some reasons."""

    status: str
    frames: Collection[int] = ()
    reasons: Collection[str] = ()

    def difference(self, outcome: Outcome) -> str:
        """Say how an outcome differs; empty if it does not."""
        agrees = outcome.status == self.status and (
            outcome.reason in self.reasons
            if self.status == "error"
            else outcome.frames in self.frames
        )
        return "" if agrees else f"{outcome} instead of {self}"


def ok(frames: int = FRAMES) -> Expected:
    return Expected("ok", (frames,))


def damaged(fewest: int, most: int | None = None) -> Expected:
    return Expected("damaged", range(fewest, (most or fewest) + 1))


def error(*reasons: str) -> Expected:
    return Expected("error", reasons=reasons)


@dataclass(frozen=True)
class Row:
    """One file of the catalogue."""

    name: str  # its class and its name
    expected: Expected
    write: Callable[[Path], object]


def outcome_of(path: str | os.PathLike[str], *, every_frame: bool = True, **options) -> Outcome:
    """Decode all frames, or 8 of them; any exception but `VideoError` is let through."""

    def choose(n: int) -> Sequence[int]:
        return range(n) if every_frame else [i * n // 8 for i in range(8)]

    try:
        video = decode(path, choose, transform=lambda frame: frame[:, :8, :8].sum(), **options)
    except VideoError as caught:
        return Outcome("error", None, caught.reason, caught.message)
    status = "damaged" if video.damaged else "ok"
    return Outcome(status, video.num_frames, None, video.damage)


# Bytes of healthy videos


_encoded: dict[str, bytes] = {}


def encoded(name: str = "a.mp4", num_frames: int = FRAMES, **arguments) -> bytes:
    """Return a video as bytes: without B-frames, and one key frame, so that all are needed."""
    arguments = {"gop": 60, "bframes": 0, **arguments}
    key = repr((name, num_frames, arguments))
    if key not in _encoded:
        with tempfile.TemporaryDirectory() as folder:
            path = write_video(Path(folder, name), num_frames, **arguments)
            _encoded[key] = path.read_bytes()
    return _encoded[key]


def index_first() -> bytes:
    """Return an MP4 whose index comes before the samples."""
    return encoded(container_options={"movflags": "faststart"})


def vp8() -> bytes:
    return encoded("a.webm", codec="libvpx", options=FAST_VPX)


def avi() -> bytes:
    return encoded("a.avi", codec="mpeg4")


def samples(data: bytes, name: str = "a.mp4") -> list[tuple[int, int]]:
    """Return where each packet lies, (position, size)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(data)
        with av.open(str(path)) as container:
            return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def packets(data: bytes) -> tuple[bytes, list[bytes]]:
    """Return the decoder's header of an MP4, and its packets."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.mp4")
        path.write_bytes(data)
        with av.open(str(path)) as container:
            header = bytes(container.streams.video[0].codec_context.extradata)
            return header, [bytes(packet) for packet in container.demux(video=0) if packet.size]


def overwritten(data: bytes, numbers: Collection[int], byte: int = 0xFF) -> bytes:
    """Overwrite packets whole."""
    result = bytearray(data)
    for number, (position, size) in enumerate(samples(data)):
        if number in numbers:
            result[position : position + size] = bytes([byte]) * size
    return bytes(result)


def flipped(data: bytes, number: int = 40, seed: int = 0) -> bytes:
    """Flip single bits anywhere behind the first kilobyte and before the last two."""
    result = bytearray(data)
    generator = np.random.default_rng(seed)
    for position in generator.integers(1000, len(data) - 2000, size=number):
        result[position] ^= 1 << int(generator.integers(8))
    return bytes(result)


def cut(data: bytes, fraction: float) -> bytes:
    return data[: int(len(data) * fraction)]


def cut_behind(data: bytes, number: int, name: str = "a.mp4") -> bytes:
    """Cut in the middle of packet `number`: so many are whole."""
    position, size = samples(data, name)[number]
    return data[: position + size // 2]


# ISO media (ISO/IEC 14496-12)


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + kind + body


def patched(data: bytes, kind: bytes, offset: int, value: bytes) -> bytes:
    """Write over what lies `offset` bytes behind the last that has the name of a box."""
    at = data.rindex(kind) + 4 + offset
    return data[:at] + value + data[at + len(value) :]


SAMPLE_ENTRY = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1")
DATA_REFERENCE = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")


def grown(data: bytes, kinds: Sequence[bytes], more: bytes) -> bytes:
    """Append to the last of the nested boxes named; the samples must lie before them."""
    result = bytearray(data)
    at = 0
    for kind in kinds:
        at = data.index(kind, at)
        size = struct.unpack_from(">I", data, at - 4)[0]
        struct.pack_into(">I", result, at - 4, size + len(more))
    end = at - 4 + size
    return bytes(result[:end]) + more + bytes(result[end:])


def encrypted() -> bytes:
    """Mark the samples as encrypted (ISO/IEC 23001-7) and make them so, with a key of one byte."""
    data = bytearray(encoded())
    for position, size in samples(bytes(data)):
        block = np.frombuffer(bytes(data[position : position + size]), np.uint8) ^ 0x5A
        data[position : position + size] = block.tobytes()
    scheme = box(b"schm", bytes(4), b"cenc", struct.pack(">I", 0x10000))
    defaults = box(b"tenc", bytes(4), bytes([0, 0, 1, 8]), bytes(range(16)))
    protection = box(b"sinf", box(b"frma", b"avc1"), scheme, box(b"schi", defaults))
    return patched(grown(bytes(data), SAMPLE_ENTRY, protection), b"avc1" + bytes(6), -4, b"encv")


def referring(reference: bytes) -> bytes:
    """Let the samples lie in another file (8.7.2)."""
    data = grown(encoded("a.mov"), DATA_REFERENCE, reference)
    data = patched(data, b"dref", 4, struct.pack(">I", 2))
    # The second reference is the one that the sample entry takes.
    return patched(data, b"avc1", 6, struct.pack(">H", 2))


def alias(path: str) -> bytes:
    """Return an alias of QuickTime that names a file."""
    name, text = os.path.basename(path).encode(), path.encode()
    record = bytes(4) + bytes(10) + bytes(28) + bytes(12)
    record += bytes([len(name)]) + name.ljust(63, b"\0") + bytes(16) + struct.pack(">hh", 1, 1)
    record += bytes(16) + struct.pack(">hh", 2, len(text)) + text + bytes(len(text) % 2)
    return box(b"alis", record, struct.pack(">hh", -1, 0))


def compressed_index(size: int) -> bytes:
    """Return an MP4 whose index is compressed and claims, and has, `size` bytes."""
    content = struct.pack(">I", size) + deflated_zeros(size)
    moov = box(b"moov", box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", content)))
    return box(b"ftyp", b"qt  ", bytes(4), b"qt  ") + moov


def deep_boxes() -> bytes:
    data = b""
    for _ in range(2000):
        data = box(b"moov", data)
    return box(b"ftyp", b"isom", bytes(4), b"isom") + data


# Matroska (RFC 9559), because a muxer lets no one lie


def ebml(identifier: str, *content: bytes) -> bytes:
    body = b"".join(content)
    return bytes.fromhex(identifier) + struct.pack(">Q", 1 << 56 | len(body)) + body


def number(value: int) -> bytes:
    return struct.pack(">Q", value)


def matroska(
    blocks: Sequence[tuple[int, bytes]],
    codec: bytes = b"V_MPEG4/ISO/AVC",
    private: bytes = b"",
    *,
    size: tuple[int, int] = (96, 64),
    duration: float | None = None,
    kind: int = 1,
    encoding: bytes = b"",
) -> bytes:
    """Return a Matroska file of one track, with packets (milliseconds, bytes)."""
    info = ebml("2AD7B1", number(1_000_000))
    if duration is not None:
        info += ebml("4489", struct.pack(">d", 1000 * duration))
    track = ebml("D7", number(1)) + ebml("73C5", number(1)) + ebml("83", number(kind))
    track += ebml("86", codec) + encoding
    if private:
        track += ebml("63A2", private)
    if kind == 1:
        track += ebml("E0", ebml("B0", number(size[0])), ebml("BA", number(size[1])))
    cluster = ebml("E7", number(0)) + b"".join(
        ebml("A3", b"\x81", struct.pack(">h", moment), b"\x80" if i == 0 else b"\0", data)
        for i, (moment, data) in enumerate(blocks)
    )
    head = ebml("1A45DFA3", ebml("4282", b"matroska"))
    segment = ebml("1549A966", info) + ebml("1654AE6B", ebml("AE", track))
    return head + ebml("18538067", segment, ebml("1F43B675", cluster))


def h264_matroska(first: int = 0, **arguments) -> bytes:
    """Return the usual video in Matroska, from `first` milliseconds on."""
    header, content = packets(encoded())
    blocks = [(first + 40 * i, data) for i, data in enumerate(content)]
    return matroska(blocks, private=header, **arguments)


# Bombs


def deflated_zeros(size: int) -> bytes:
    """Return `size` zeros as zlib has them, without compressing them one by one."""
    piece = 1 << 16
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(piece)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = zlib.compressobj(9, zlib.DEFLATED, -15)
    tail = rest.compress(bytes(size % piece)) + rest.flush()
    # Adler-32 of zeros alone (RFC 1950): the first sum stays 1, the second counts them.
    checksum = struct.pack(">I", (size % 65521) << 16 | 1)
    return b"\x78\xda" + block * (size // piece) + tail + checksum


def black_png(width: int, height: int) -> bytes:
    """Return a black RGB image (ISO/IEC 15948)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)
    pixels = deflated_zeros(height * (1 + 3 * width))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def png_matroska(size: tuple[int, int], claimed: tuple[int, int]) -> bytes:
    """Return a black image as a video: the codec of BITMAPINFOHEADER "MPNG"."""
    header = struct.pack("<IiiHH4sIiiII", 40, *claimed, 1, 24, b"MPNG", 0, 0, 0, 0, 0)
    return matroska([(0, black_png(*size))], b"V_MS/VFW/FOURCC", header, size=claimed)


def vp8_bomb() -> bytes:
    """Let the key frame of VP8 claim the largest size there is (RFC 6386, 9.1)."""
    data = vp8()
    at = data.index(b"\x9d\x01\x2a") + 3
    return data[:at] + struct.pack("<HH", 16383, 16383) + data[at + 4 :]


def jpeg_bomb() -> bytes:
    """Let the first frame of MJPEG claim another size than the AVI (ITU-T T.81, B.2.2)."""
    data = encoded("a.avi", 3, codec="mjpeg", pix_fmt="yuvj420p")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", SIDE_OF_BOMB, SIDE_OF_BOMB) + data[at + 4 :]


def gif_bomb() -> bytes:
    data = encoded("a.gif", 3, codec="gif", pix_fmt="rgb8")
    return data[:6] + struct.pack("<HH", SIDE_OF_BOMB, SIDE_OF_BOMB) + data[10:]


def h264_bomb(side: int) -> tuple[bytes, list[bytes]]:
    """Return the usual video under the parameters of square frames, ITU-T H.264, 7.3.2.1.1."""
    header, content = packets(encoded(options={"profile": "baseline"}))
    # Identifier, frame numbers of 4 bits, order as decoded, 16 references
    bits = "".join(map(golomb, (0, 0, 2, 16)))
    blocks = golomb(side // 16 - 1)
    bits += "0" + blocks + blocks + "11001"
    bits += "0" * (-len(bits) % 8)
    sequence = b"\x67\x42\xc0\x3e" + int(bits, 2).to_bytes(len(bits) // 8, "big")
    length = int.from_bytes(header[6:8], "big")
    picture = header[8 + length :]
    return header[:6] + struct.pack(">H", len(sequence)) + sequence + picture, content


def h264_bomb_in_matroska(side: int = SIDE_OF_BOMB) -> bytes:
    """Return it under a header that claims small frames."""
    header, content = h264_bomb(side)
    return matroska([(40 * i, data) for i, data in enumerate(content)], private=header)


def h264_bomb_alone() -> bytes:
    """Return it in a form that has no header, each unit after a start code (annex B)."""
    header, content = h264_bomb(SIDE_OF_BOMB)
    length = int.from_bytes(header[6:8], "big")
    units = [header[8 : 8 + length], header[8 + length + 3 :]]
    for data in content:
        while data:
            size = int.from_bytes(data[:4], "big")
            units.append(data[4 : 4 + size])
            data = data[4 + size :]
    return b"".join(b"\0\0\0\1" + unit for unit in units)


def golomb(value: int) -> str:
    """Return the bits of ue(v), ITU-T H.264, 9.1."""
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


def packed_blocks() -> bytes:
    """Return packets that were compressed a thousandfold (RFC 9559, 5.1.4.1.31.6)."""
    encoding = ebml("6D80", ebml("6240", ebml("5034", ebml("4254", number(0)))))
    header, _ = packets(encoded())
    blocks = [(40 * i, deflated_zeros(9_000_000)) for i in range(20)]
    return matroska(blocks, private=header, encoding=encoding)


# Scripts

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{}'\n"
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation>'
    "</AdaptationSet></Period></MPD>"
)
ASX = '<asx version="3.0"><entry><ref href="{}"/></entry></asx>\n'
REDIRECT = "[Reference]\nRef1={}\n"


@dataclass(frozen=True)
class Canary:
    """What scripts name and nobody may touch: files, and a port where somebody listens."""

    folder: Path
    port: int

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/canary.ts"


def write_canary(folder: Path, listener: socket.socket) -> Canary:
    """Write the files that scripts name, healthy videos, into a folder beside the scripts."""
    folder.mkdir(parents=True)
    for name in ("canary.ts", "canary.mp4"):
        write_video(folder / name, 5)
    return Canary(folder, listener.getsockname()[1])


# The catalogue

FAST_VPX = {"cpu-used": "8", "deadline": "realtime"}
FAST_X265 = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}
FAST_AV1 = {"preset": "12", "svtav1-params": "lp=1"}
# From FFmpeg 8 on, swscale refuses color spaces that it took for others before.
NO_COLORS = error("unsupported-colors") if int(av.__version__.split(".")[0]) > 16 else ok()
HDR = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"


def video_row(name: str, expected: Expected | None = None, **arguments) -> Row:
    """Encode the usual video, with these differences."""

    def write(path: Path) -> None:
        write_video(path, **{"num_frames": FRAMES, **arguments})

    return Row(name, expected or ok(arguments.get("num_frames", FRAMES)), write)


def bytes_row(name: str, expected: Expected, make: Callable[[], bytes]) -> Row:
    return Row(name, expected, lambda path: path.write_bytes(make()))


def text_row(name: str, expected: Expected, text: str) -> Row:
    return Row(name, expected, lambda path: path.write_text(text))


def healthy() -> list[Row]:
    return [
        video_row("healthy/h264.mp4"),
        video_row("healthy/h264.mkv"),
        video_row("healthy/h264.ts"),
        video_row("healthy/h264.flv", bframes=0),
        video_row("healthy/h264.mov"),
        video_row("healthy/hevc.mp4", codec="libx265", options=FAST_X265),
        video_row("healthy/vp8.webm", codec="libvpx", bframes=0, options=FAST_VPX),
        video_row("healthy/vp8.ogv", codec="libvpx", bframes=0, options=FAST_VPX, container="ogg"),
        video_row("healthy/vp9.webm", codec="libvpx-vp9", bframes=0, options=FAST_VPX),
        video_row("healthy/av1.mp4", codec="libsvtav1", bframes=0, options=FAST_AV1),
        video_row("healthy/mpeg4.avi", codec="mpeg4", bframes=0),
        video_row("healthy/mpeg4.m4v", codec="mpeg4", bframes=0, container="m4v"),
        video_row("healthy/mpeg1.mpg", codec="mpeg1video", bframes=0, container="mpeg"),
        video_row("healthy/mpeg2.ts", codec="mpeg2video"),
        video_row("healthy/mpeg2.mpeg", codec="mpeg2video", container="mpeg2video"),
        video_row("healthy/prores.mov", codec="prores_ks", pix_fmt="yuv422p10le", bframes=0),
        video_row("healthy/mjpeg.avi", codec="mjpeg", pix_fmt="yuvj420p", bframes=0),
        video_row("healthy/ffv1.mkv", codec="ffv1", bframes=0),
        video_row("healthy/ffv1.nut", codec="ffv1", bframes=0),
        video_row("healthy/wmv2.wmv", codec="wmv2", bframes=0),
        video_row("healthy/h263.3gp", codec="h263", size=(176, 144), bframes=0),
        video_row("healthy/jpeg2000.mov", codec="jpeg2000", bframes=0),
        video_row("healthy/gif.gif", codec="gif", pix_fmt="rgb8", bframes=0),
    ]


def pixels() -> list[Row]:
    interlaced = {"flags": "+ildct+ilme"}
    return [
        video_row("pixels/10-bit.mp4", codec="libx265", pix_fmt="yuv420p10le", options=FAST_X265),
        video_row("pixels/12-bit.mkv", codec="ffv1", pix_fmt="yuv420p12le", bframes=0),
        video_row("pixels/444.mp4", pix_fmt="yuv444p"),
        video_row("pixels/grey.mkv", codec="ffv1", pix_fmt="gray", bframes=0),
        video_row("pixels/alpha.mov", codec="qtrle", pix_fmt="argb", bframes=0),
        video_row("pixels/palette.gif", codec="gif", pix_fmt="bgr8", bframes=0),
        video_row("pixels/interlaced.mp4", options={"x264-params": "tff=1"}),
        video_row("pixels/interlaced.ts", codec="mpeg2video", options=interlaced),
        video_row("pixels/ycgco.mp4", NO_COLORS, options={"x264-params": "colormatrix=YCgCo"}),
        video_row("pixels/ictcp.mkv", NO_COLORS, options={"x264-params": "colormatrix=ICtCp"}),
        video_row("pixels/full-range.mp4", pix_fmt="yuvj420p"),
        video_row("pixels/hdr.mkv", pix_fmt="yuv420p10le", options={"x264-params": HDR}),
    ]


def shapes() -> list[Row]:
    rows = [
        Row(
            f"shapes/rotated-{degrees}.mp4",
            ok(),
            lambda path, degrees=degrees: rotate(write_video(path, FRAMES), degrees),
        )
        for degrees in (90, 180, 270)
    ]
    return [
        *rows,
        video_row("shapes/anamorphic.mp4", options={"x264-params": "sar=4/3"}),
        video_row("shapes/odd.mkv", codec="ffv1", size=(95, 63), bframes=0),
        video_row("shapes/1x1.mkv", codec="ffv1", size=(1, 1), pix_fmt="yuv444p", bframes=0),
        bytes_row("shapes/8k.mkv", ok(1), partial(png_matroska, (7680, 4320), (7680, 4320))),
        video_row("shapes/strip.mkv", error("too-large"), codec="ffv1", size=(4096, 16), bframes=0),
        video_row("shapes/one-frame.mp4", num_frames=1),
        video_row("shapes/three-frames.mp4", num_frames=3),
        video_row("shapes/still.gif", num_frames=1, codec="gif", pix_fmt="rgb8", bframes=0),
        video_row(
            "shapes/still.avif",
            num_frames=1,
            codec="libsvtav1",
            bframes=0,
            options=FAST_AV1,
            container="avif",
        ),
        # No container of the list.
        video_row("shapes/animated.webp", error("not-a-video"), codec="libwebp_anim", bframes=0),
        Row(
            "shapes/two-sizes.mkv",
            ok(20),
            lambda path: write_two_sizes(path, 10, [(96, 64), (64, 48)]),
        ),
        Row(
            "shapes/two-sizes.h264",
            ok(20),
            lambda path: write_two_sizes(path, 10, [(96, 64), (64, 48)]),
        ),
    ]


def times() -> list[Row]:
    irregular = [i * (i + 3) // 2 for i in range(FRAMES)]

    def edit_list(path: Path) -> None:
        """Hide the first ten frames (ISO/IEC 14496-12, 8.6.6)."""
        data = encoded(gop=1)
        with av.open(str(write(path, data))) as container:
            base = container.streams.video[0].time_base
        start = round(10 / 25 / base)
        write(path, patched(data, b"elst", 12, struct.pack(">I", start)))

    def retimed(path: Path, moments: Sequence[int]) -> None:
        source = path.with_suffix(".source.mp4")
        write(source, encoded())
        retime(source, path, moments)
        source.unlink()

    return [
        video_row("times/vfr.mp4", times=irregular),
        video_row("times/vfr.mkv", times=irregular),
        video_row("times/none.h264", container="h264"),
        video_row("times/none.hevc", codec="libx265", container="hevc", options=FAST_X265),
        video_row("times/none.avi", codec="mpeg4", bframes=0),
        bytes_row("times/negative.mkv", ok(), partial(h264_matroska, -600)),
        bytes_row(
            "times/all-equal.mkv",
            ok(),
            lambda: matroska([(0, data) for data in packets(encoded())[1]], private=header_of()),
        ),
        Row("times/edit-list.mp4", ok(20), edit_list),
        video_row("times/open-gop.mp4", options={"x264-params": "open-gop=1:keyint=10"}),
        video_row("times/late.mkv", times=list(range(250, 250 + FRAMES))),
        Row("times/late.ts", ok(), lambda path: retimed(path, range(9000, 9000 + FRAMES))),
        video_row(
            "times/fragmented.mp4",
            gop=10,
            container_options={"movflags": "frag_keyframe+empty_moov"},
        ),
        video_row(
            "times/live.webm",
            codec="libvpx",
            bframes=0,
            options=FAST_VPX,
            container_options={"live": "1"},
        ),
        video_row("times/live.mkv", container_options={"live": "1"}),
    ]


def header_of() -> bytes:
    return packets(encoded())[0]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def other_things() -> list[Row]:
    subtitle = partial(matroska, [(0, b"hello")], b"S_TEXT/UTF8", kind=17)

    def cover_alone(path: Path) -> None:
        """Write a song with the picture of its record."""
        source = path.with_suffix(".source.mp4")
        write_cover_art(source, 3)
        with av.open(str(source)) as film, av.open(str(path), "w") as output:
            sound = output.add_stream("aac", rate=44100)
            art = next(s for s in film.streams.video if s.disposition & Disposition.attached_pic)
            cover = output.add_stream_from_template(art)
            cover.disposition = Disposition.attached_pic.value
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 44100), np.float32), "fltp", "stereo")
            frame.sample_rate = 44100
            output.mux(sound.encode(frame))
            output.mux(sound.encode(None))
            for packet in film.demux(art):
                if packet.size:
                    packet.stream = cover
                    output.mux(packet)
        source.unlink()

    noise = np.random.default_rng(0).bytes(20_000)
    return [
        Row("other/cover-art.mp4", ok(10), lambda path: write_cover_art(path, 10)),
        Row("other/song-with-cover.mp4", error("no-video-stream"), cover_alone),
        Row("other/sound.mp4", error("no-video-stream"), write_sound),
        bytes_row("other/subtitle.mkv", error("no-video-stream"), subtitle),
        bytes_row("other/empty.mp4", error("empty"), bytes),
        bytes_row("other/one-byte.mp4", error("not-a-video"), lambda: b"\0"),
        text_row("other/text.mp4", error("not-a-video"), "hello world\n" * 100),
        text_row("other/html.mkv", error("not-a-video"), "<html><body>404</body></html>" * 50),
        text_row("other/subtitle.srt", error("not-a-video"), "1\n00:00:00,000 --> 00:00:01,000\nx"),
        bytes_row("other/noise.webm", error("not-a-video"), lambda: noise),
        bytes_row("other/zeros.mp4", error("not-a-video"), lambda: bytes(100_000)),
        bytes_row("other/png.mp4", error("not-a-video"), lambda: black_png(64, 64)),
        Row("other/jpeg.mp4", error("not-a-video"), write_jpeg),
        bytes_row("other/zip.mkv", error("not-a-video"), lambda: b"PK\3\4" + noise),
        bytes_row("other/elf.mp4", error("not-a-video"), lambda: b"\x7fELF\2\1\1" + noise),
    ]


def write_jpeg(path: Path) -> None:
    data = encoded("a.avi", 1, codec="mjpeg", pix_fmt="yuvj420p")
    write(path, data[data.index(b"\xff\xd8") : data.rindex(b"\xff\xd9") + 2])


def broken() -> list[Row]:
    """Return files that miss a part, or have a wrong one."""
    unusable = error("damaged", "not-a-video", "no-video-stream", "no-frames")
    none_left = error("damaged", "no-frames", "unsupported-codec")
    huge = struct.pack(">I", 0x7FFFFFFF)

    def index_only() -> bytes:
        data = encoded()
        return data[: data.index(b"ftyp") + 4 + 24] + data[data.index(b"moov") - 4 :]

    def without_index() -> bytes:
        data = encoded()
        return data[: data.index(b"moov") - 4]

    def without_samples() -> bytes:
        return overwritten(encoded(), range(FRAMES), 0)

    def zeroed(kind: bytes) -> bytes:
        data = encoded()
        at = data.index(kind)
        size = struct.unpack_from(">I", data, at - 4)[0]
        return data[: at + 4] + bytes(size - 8) + data[at - 4 + size :]

    return [
        bytes_row("broken/no-index.mp4", error("damaged", "not-a-video"), without_index),
        bytes_row("broken/no-samples.mp4", unusable, index_only),
        bytes_row("broken/zeroed-index.mp4", unusable, lambda: zeroed(b"moov")),
        bytes_row("broken/zeroed-samples.mp4", none_left, without_samples),
        bytes_row("broken/zeroed-parameters.mp4", none_left, lambda: zeroed(b"avcC")),
        bytes_row(
            "broken/offset-past-end.mp4",
            none_left,
            lambda: patched(encoded(), b"stco", 8, struct.pack(">I", 1 << 30)),
        ),
        bytes_row(
            "broken/countless-samples.mp4", unusable, lambda: patched(encoded(), b"stsz", 8, huge)
        ),
        bytes_row(
            "broken/countless-times.mp4", unusable, lambda: patched(encoded(), b"stts", 4, huge)
        ),
        bytes_row(  # those that there are lie where it says
            "broken/countless-chunks.mp4", ok(), lambda: patched(encoded(), b"stco", 4, huge)
        ),
        bytes_row("broken/deep.mp4", unusable, deep_boxes),
        bytes_row("broken/encrypted.mp4", none_left, encrypted),
        bytes_row(
            "broken/unknown-codec.mp4",
            error("unsupported-codec"),
            lambda: encoded().replace(b"avc1", b"zzz1"),
        ),
        bytes_row(
            "broken/three-packets.mp4", damaged(27), lambda: overwritten(encoded(), range(10, 13))
        ),
        bytes_row("broken/half.mp4", error("damaged"), lambda: cut(encoded(), 0.5)),
        bytes_row("broken/most.mp4", error("damaged"), lambda: cut(encoded(), 0.9)),
        bytes_row("broken/half-stream.mp4", damaged(15, 16), lambda: cut_behind(index_first(), 15)),
        bytes_row("broken/most-stream.mp4", damaged(27, 28), lambda: cut_behind(index_first(), 27)),
        bytes_row(
            "broken/half.mkv", damaged(15, 16), lambda: cut_behind(h264_matroska(), 15, "a.mkv")
        ),
        bytes_row("broken/half.webm", damaged(15, 16), lambda: cut_behind(vp8(), 15, "a.webm")),
        bytes_row("broken/most.webm", damaged(27, 28), lambda: cut_behind(vp8(), 27, "a.webm")),
        bytes_row("broken/half.avi", damaged(15, 16), lambda: cut_behind(avi(), 15, "a.avi")),
        bytes_row("broken/half.ts", damaged(10, 18), lambda: cut(encoded("a.ts"), 0.5)),
        # How much is lost depends on what the bits were, and encoders vary from run to run.
        bytes_row("broken/flipped.mp4", damaged(1, 30), lambda: flipped(encoded())),
        bytes_row("broken/flipped.avi", damaged(1, 30), lambda: flipped(avi())),
        bytes_row("broken/garbage-behind.mp4", ok(), lambda: encoded() + bytes(range(256)) * 20),
        bytes_row(
            "broken/garbage-before.mp4", unusable, lambda: bytes(range(256)) * 20 + encoded()
        ),
    ]


def bombs() -> list[Row]:
    """Return small files of frames, packets or an index that would fill the memory."""
    large = error("too-large")
    # The header claims a small frame: only the decoder can refuse the large one.
    refused = error("too-large", "damaged", "no-frames")
    bomb = SIDE_OF_BOMB, SIDE_OF_BOMB
    return [
        bytes_row("bombs/png.mkv", large, partial(png_matroska, bomb, bomb)),
        bytes_row("bombs/png-hidden.mkv", refused, partial(png_matroska, bomb, (96, 64))),
        bytes_row("bombs/vp8.webm", refused, vp8_bomb),
        bytes_row("bombs/jpeg.avi", damaged(2), jpeg_bomb),
        bytes_row("bombs/gif.gif", large, gif_bomb),
        bytes_row("bombs/h264.mkv", refused, h264_bomb_in_matroska),
        bytes_row("bombs/h264.h264", large, h264_bomb_alone),
        bytes_row("bombs/packed-packets.mkv", error("damaged", "no-frames"), packed_blocks),
        bytes_row(
            "bombs/packed-index.mov",
            error("not-a-video", "no-video-stream", "damaged"),
            partial(compressed_index, 200_000_000),
        ),
    ]


def lies() -> list[Row]:
    """Return healthy samples under headers that say something else about them."""
    far = struct.pack(">I", 0x7FFFFFFF)
    return [
        bytes_row("lies/ten-hours.mkv", ok(), partial(h264_matroska, duration=36_000)),
        bytes_row(
            "lies/hundred-hours.mkv", error("too-long"), partial(h264_matroska, duration=360_000)
        ),
        bytes_row("lies/no-duration.mkv", ok(), partial(h264_matroska, duration=float("nan"))),
        bytes_row("lies/huge.mkv", error("too-large"), partial(h264_matroska, size=(65535, 65535))),
        bytes_row("lies/tiny.mkv", ok(), partial(h264_matroska, size=(2, 2))),
        bytes_row(
            "lies/huge.mp4",
            error("too-large"),
            lambda: patched(encoded(), b"avc1", 24, struct.pack(">HH", 65535, 65535)),
        ),
        bytes_row(
            "lies/huge-track.mp4",
            ok(),
            lambda: patched(encoded(), b"tkhd", 76, struct.pack(">II", *[65535 << 16] * 2)),
        ),
        bytes_row("lies/film-length.mp4", ok(), lambda: patched(encoded(), b"mvhd", 16, far)),
        bytes_row(
            "lies/sizes.avi",
            ok(),
            lambda: patched(avi(), b"avih", 36, struct.pack("<II", 65535, 65535)),
        ),
        bytes_row(
            "lies/count.avi",
            ok(),
            lambda: patched(avi(), b"avih", 20, struct.pack("<I", 0xFFFFFFF0)),
        ),
    ]


def scripts(canary: Canary) -> list[Row]:
    """Return texts and references that name other files or a host."""
    ts, mp4 = canary.files[1], canary.files[0]
    near = f"{canary.folder.name}/{ts.name}"
    port = canary.port
    contents = {
        "hls-near.m3u8": HLS.format(near),
        "hls-near.mp4": HLS.format(near),
        "hls-far.m3u8": HLS.format(canary.url),
        "hls-far.ts": HLS.format(canary.url),
        "hls-local.mkv": HLS.format(f"file://{ts}"),
        "hls-nested.mp4": HLS.format(f"concat:{ts}|{ts}"),
        "concat-near.mp4": CONCAT.format(near),
        "concat-absolute.mkv": CONCAT.format(ts),
        "concat.ffconcat": CONCAT.format(near),
        "concat-far.ts": CONCAT.format(canary.url),
        "session.sdp": SDP.format(port),
        "session.mp4": SDP.format(port),
        "dash.mpd": DASH.format(canary.url),
        "dash.mp4": DASH.format(near),
        "list.asx": ASX.format(canary.url),
        "redirect.mov": REDIRECT.format(canary.url),
    }
    rows = [text_row(f"scripts/{name}", error("not-a-video"), x) for name, x in contents.items()]
    url = box(b"url ", bytes(4), f"file://{mp4}\0".encode())
    return [
        *rows,
        # References are not followed: the samples are taken from the file itself.
        bytes_row("scripts/reference.mov", ok(), lambda: referring(url)),
        bytes_row("scripts/alias.mov", ok(), lambda: referring(alias(str(mp4)))),
    ]


def catalogue(canary: Canary) -> list[Row]:
    """Return every row; nothing is written yet."""
    return [
        *healthy(),
        *pixels(),
        *shapes(),
        *times(),
        *other_things(),
        *broken(),
        *bombs(),
        *lies(),
        *scripts(canary),
    ]


@dataclass(frozen=True)
class Everything:
    """All files, and who listens at the port that some name.

    Attributes:
        folder: where the odd names are, and where commands run.
        canary: what the scripts name.
        rows: the row of each file written.
        not_written: rows whose encoder this PyAV lacks.
        oddities: what a caller may name in that folder, and what must come of it.
    """

    folder: Path
    canary: Canary
    rows: dict[Path, Row]
    not_written: list[Row]
    oddities: dict[str, Expected]
    listener: socket.socket

    @property
    def expected(self) -> dict[str, Expected]:
        """What must come of each path, as seen from the folder."""
        return self.oddities | {str(path): row.expected for path, row in self.rows.items()}

    def path(self, name: str) -> Path:
        return next(path for path, row in self.rows.items() if row.name == name)

    def touched_canaries(self, trace: tracing.Trace) -> list[str]:
        """Return what a command opened of the files that only scripts name."""
        opened = map(os.path.normpath, trace.opened)
        return [path for path in opened if path.startswith(str(self.canary.folder))]

    def was_called(self) -> bool:
        """Tell whether anybody has connected to the port."""
        return bool(select.select([self.listener], [], [], 0)[0])


@contextmanager
def write_everything(folder: Path) -> Iterator[Everything]:
    """Write the catalogue and the odd names below a folder, and listen."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        canary = write_canary(folder / "catalogue" / "scripts" / "canary", listener)
        rows, not_written = write_catalogue(folder / "catalogue", canary)
        (folder / "odd").mkdir()
        oddities = write_oddities(folder / "odd", canary)
        yield Everything(folder / "odd", canary, rows, not_written, oddities, listener)


def write_catalogue(folder: Path, canary: Canary) -> tuple[dict[Path, Row], list[Row]]:
    """Write every file; returns the row of each, and the rows that could not be written."""
    written, not_written = {}, []
    for row in catalogue(canary):
        path = folder / row.name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            row.write(path)
        except (av.codec.codec.UnknownCodecError, ValueError):
            path.unlink(missing_ok=True)
            not_written.append(row)
        else:
            written[path] = row
    return written, not_written


# Odd names and things that are no files


def write_oddities(folder: Path, canary: Canary) -> dict[str, Expected]:
    """Return what a caller may name, from within the folder, and what must come of it."""
    healthy_bytes = encoded(num_frames=8)
    lost, no_file = error("missing"), error("not-a-file")
    longest = "n" * 251 + ".mp4"
    names = ["-dash.mp4", "a b.mp4", "a:b.mp4", "100%03d.mp4", "quotes '\".mp4", "file:a.mp4"]
    names += ["new\nline.mp4", os.fsdecode(b"\xff\xfe.mp4"), longest, "\u202egnp.mp4", "$(id);.mp4"]
    for name in names:
        write(folder / name, healthy_bytes)
    os.mkfifo(folder / "fifo.mp4")
    with socket.socket(socket.AF_UNIX) as place:
        # Its address may be no longer than 107 bytes.
        here = os.open(folder, os.O_RDONLY)
        place.bind(f"/proc/self/fd/{here}/socket.mp4")
        os.close(here)
    os.symlink("nowhere.mp4", folder / "dangling.mp4")
    os.symlink("loop.mp4", folder / "loop.mp4")
    os.symlink("a b.mp4", folder / "link.mp4")
    (folder / "nothing").mkdir()
    for place, images in {
        "frames": [black_png(32, 32)] * 3,
        "bombs": [black_png(SIDE_OF_BOMB, SIDE_OF_BOMB)],
        "scripts": [HLS.format(canary.url).encode()],
        "cut": [black_png(320, 320)[:60]],
    }.items():
        (folder / place).mkdir()
        for i, image in enumerate(images):
            write(folder / place / f"{i}.png", image)
    cases = {name: ok(8) for name in (*names, "link.mp4")}
    cases |= {name: no_file for name in ("fifo.mp4", "socket.mp4", "/dev/zero", "/dev/null")}
    cases |= {"nothing": error("no-frames"), "frames": ok(3), "bombs": error("too-large")}
    cases |= {"scripts": error("not-an-image"), "cut": error("damaged")}
    cases |= {"loop.mp4": error("missing", "unreadable"), "dangling.mp4": lost, "nope.mp4": lost}
    cases["n" * 300 + ".mp4"] = error("missing", "unreadable")
    ts = next(path for path in canary.files if path.suffix == ".ts")
    for prefix in (
        "concat:",
        "subfile,,start,0,end,999,,:",
        "file:",
        "data:video/mp2t,",
        "crypto:",
    ):
        cases[f"{prefix}{ts}"] = lost
    cases |= {name: lost for name in (canary.url, "pipe:0", "fd:0", "a b.mp4/", "lavfi:testsrc")}
    if os.geteuid():  # root may read everything
        write(folder / "denied.mp4", healthy_bytes).chmod(0)
        cases["denied.mp4"] = error("permission")
    return cases


# Mutants


def mutant(seed: int) -> tuple[str, bytes]:
    """Return a healthy video with bytes changed, cut out or put in; and its name."""
    generator = random.Random(seed)
    sources = {
        "a.mp4": {"num_frames": 12, "bframes": 2},
        "b.mp4": {"num_frames": 12, "codec": "libx265", "options": FAST_X265},
        "c.mkv": {"num_frames": 12, "bframes": 2},
        "d.webm": {"num_frames": 12, "codec": "libvpx-vp9", "options": FAST_VPX},
        "e.avi": {"num_frames": 12, "codec": "mpeg4"},
        "f.ts": {"num_frames": 12},
        "g.flv": {"num_frames": 12},
        "h.gif": {"num_frames": 4, "codec": "gif", "pix_fmt": "rgb8"},
    }
    name = list(sources)[seed % len(sources)]
    data = bytearray(encoded(name, **sources[name]))
    for _ in range(generator.choice([1, 1, 3, 20])):
        at, length = generator.randrange(len(data)), generator.choice([1, 4, 100])
        change = generator.choice(["change", "change", "cut", "insert"])
        noise = generator.choice([generator.randbytes(length), bytes(length), b"\xff" * length])
        data[at : at + (0 if change == "insert" else length)] = b"" if change == "cut" else noise
    return name, bytes(data)


def decode_mutants(folder: Path, seeds: Sequence[int], seconds: float) -> Iterator[tuple[int, str]]:
    """Decode mutants in child processes, and say of each seed what was wrong; mostly nothing."""
    left = list(seeds)
    while left:

        def work(report: Callable[[object], None], seeds: Sequence[int] = tuple(left)) -> None:
            for seed in seeds:
                name, data = mutant(seed)
                path = write(folder / name, data)
                began, wrong = time.process_time(), ""
                try:
                    for every_frame in (False, True):
                        outcome_of(path, every_frame=every_frame, threads=1 + seed // 8 % 2)
                except BaseException as escaped:
                    wrong = repr(escaped)
                spent = time.process_time() - began
                report(wrong or (f"took {spent:.1f} s" if spent > seconds else ""))

        child = in_child(work, 12 * seconds)
        yield from zip(left, child.reports, strict=False)
        left = left[len(child.reports) :]
        if left:
            yield left.pop(0), child.end


# Processes


@dataclass(frozen=True)
class Child:
    """What came of a child process.

    Attributes:
        reports: what it reported.
        end: how it ended, if not well.
        peak_bytes: the most memory it had above what it began with.
    """

    reports: list
    end: str
    peak_bytes: int


def in_child(work: Callable[[Callable[[object], None]], None], silence_seconds: float) -> Child:
    """Let a fork of this process work and report; end it when it reports nothing for long."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            work(lambda report: os.write(writer, json.dumps(report).encode() + b"\n") and None)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writer, json.dumps({"peak": 1024 * (peak - idle)}).encode() + b"\n")
        except BaseException as escaped:
            os.write(2, f"{escaped!r}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    lines = b""
    end = ""
    while True:
        if not select.select([reader], [], [], silence_seconds)[0]:
            end = f"silent for {silence_seconds:g} s"
            os.kill(process, signal.SIGKILL)
            break
        more = os.read(reader, 1 << 16)
        if not more:
            break
        lines += more
    os.close(reader)
    status = os.waitpid(process, 0)[1]
    reports = [json.loads(line) for line in lines.split(b"\n")[:-1]]
    peak = reports.pop()["peak"] if reports and isinstance(reports[-1], dict) else 0
    if not end and os.WIFSIGNALED(status):
        end = f"ended by signal {os.WTERMSIG(status)}"
    return Child(reports, end, peak)


def measured_outcome(
    path: str | os.PathLike[str], folder: Path, **options
) -> tuple[Outcome, float, int]:
    """Decode 8 frames in a child that works in a folder.

    Returns:
        What came of it, its seconds of CPU and its bytes of memory.
    """

    def work(report: Callable[[object], None]) -> None:
        os.chdir(folder)
        began = time.process_time()
        try:
            outcome = outcome_of(path, every_frame=False, **options)
        except Exception as escaped:
            outcome = Outcome("escaped", message=repr(escaped))
        report([vars(outcome), time.process_time() - began])

    child = in_child(work, 60.0)
    if not child.reports:
        return Outcome("escaped", message=child.end), 0.0, 0
    values, seconds = child.reports[0]
    return Outcome(**values), seconds, child.peak_bytes


# Under strace and through the command

MARK = "/no/such/file/between/two/videos"
DECODE_EACH = f"""
import os, sys
from actionclip.errors import VideoError
from actionclip.video import decode
for path in sys.stdin.buffer.read().split(b"\\0"):
    try:
        open({MARK!r})
    except FileNotFoundError:
        pass
    for threads in 1, 2:
        try:
            decode(os.fsdecode(path), lambda n: [i * n // 8 for i in range(8)], threads=threads)
        except VideoError:
            pass
"""


def trace_decoding(
    paths: Sequence[str], folder: Path, record: Path
) -> tuple[list[str], list[str], str]:
    """Decode 8 frames of each under strace, with one thread and with two.

    Returns:
        What was opened besides the file in hand, calls that reach for the network or start a
        program, and what was written to standard error.
    """
    names = b"\0".join(os.fsencode(path) for path in paths)
    command = [sys.executable, "-c", DECODE_EACH]
    done, trace = tracing.run(
        command, record, input=names, capture_output=True, cwd=folder, timeout=600
    )
    strangers = []
    number = -1
    for opened in trace.opened:
        if opened == MARK:
            number += 1
        elif number >= 0 and not tracing.is_library(opened):
            own = os.path.abspath(os.path.join(folder, paths[number]))
            if opened != own and not opened.startswith(own + os.sep):
                strangers.append(f"{opened} for {paths[number]}")
    if number + 1 != len(paths) or done.returncode:
        strangers.append(f"ended with {done.returncode} after {number + 1} files")
    calls = trace.network + trace.executed[1:]
    return strangers, calls, done.stderr.decode(errors="replace")


@dataclass(frozen=True)
class CommandRun:
    """What `actionclip-zeroshot` did with a list of videos."""

    returncode: int
    rows: list[dict]
    stderr: str
    trace: tracing.Trace | None


def is_argument(path: str) -> bool:
    """Tell whether a list of a path a line cannot hold this one."""
    return "\n" in path


def in_command_order(paths: Iterable[str]) -> list[str]:
    """Return the paths in the order of the command's rows: its list, then its arguments."""
    return sorted(paths, key=is_argument)


def run_command(paths: Sequence[str], folder: Path, record: Path) -> CommandRun:
    """Classify by the tiny model, under strace where there is one."""
    command = [sys.executable, "-m", "actionclip", "zeroshot", "-"]
    command += [path for path in paths if is_argument(path)]
    command += ["--model", "tiny", "--format", "jsonl", "--labels", "archery", "bowling"]
    lines = b"\n".join(os.fsencode(path) for path in paths if not is_argument(path))
    options = {"input": lines, "capture_output": True, "cwd": folder, "timeout": 600}
    trace = None
    if tracing.STRACE is None:
        done = subprocess.run(command, **options)
    else:
        done, trace = tracing.run(command, record, **options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return CommandRun(done.returncode, rows, done.stderr.decode(errors="replace"), trace)

"""Read chosen frames of a video file, decoding little more than what they need.

First half of video file -> frames -> frame embeddings -> video embedding -> similarity
-> prediction: a path and positions in, uint8 RGB frames out. Which positions to take is
the caller's choice (`sampling`), and so is what happens to a frame (`transform`).

The definition of "frame i" is `_decode_all`: open, decode every packet, count what comes
out. `_decode_planned` is its fast twin: it seeks to the key frames that the wanted frames
need (`packet_index`) and lets the decoder skip frames that no other frame refers to. It
checks what it meets and hands over to `_decode_all` at the first surprise, so both give
equal frames.
"""

import math
import os
import re
import stat
import threading
import time
from array import array
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from operator import index as as_int
from typing import Any, BinaryIO, TypeVar

import av

# PyAV imports these two when it opens its first file. Two threads that open files at
# once have been seen to deadlock there, in the import system; so it is done here.
import av.subtitles.codeccontext
import av.subtitles.stream
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from torch import Tensor

from actionclip.errors import InputError, VideoError
from actionclip.packet_index import PacketIndex, Stretch, SurpriseError, is_spare, make_plan

# fmt: off
VIDEO_EXTENSIONS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".flv", ".gif", ".h264", ".hevc", ".m2ts", ".m4v", ".mkv",
    ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".nut", ".ogv", ".ts", ".webm", ".wmv",
})
# fmt: on
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png"})

# Demuxers that read nothing but the file they are given. Playlists and scripts (HLS,
# ffconcat, SDP, DASH) can name other files or hosts, whatever the extension says; only
# this list keeps them out, `protocol_whitelist` alone does not.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,h264,hevc,m4v,flv,"
    "asf,ogg,gif,nut"
)
_IMAGE_SIGNATURES = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PNG\r\n\x1a\n": "png_pipe"}
_OPEN_TIMEOUT_SECONDS = (10, 10)

# Where pts are explicit, one packet is one frame and seeking lands on the key frame asked
# for. AVI invents pts, MPEG-TS seeks by guessing, a VP8 packet may hold a hidden frame.
_PLANNED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
_PLANNED_CODECS = frozenset({"h264", "hevc", "vp9", "av1"})

# As many frames as H.264 lets a decoder hold back (ITU-T H.264, max_num_reorder_frames in
# E.2.1); told to hold back more, libav's aborts the process.
_MOST_HELD_BACK = 16

# These store no times, only a rate; the pts that libav makes up for them may even run backwards.
_FIXED_RATE_CONTAINERS = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo"})

FrameTransform = Callable[[Tensor], Tensor]
_Number = TypeVar("_Number", float, np.ndarray)


@dataclass(frozen=True)
class Limits:
    """What a file may cost before it is refused.

    Attributes:
        max_pixels: width x height of any frame. 8K has 33 million; of 48 million, the 17 frames
            that an H.264 decoder may hold take 2 GB.
        max_aspect: longer side over shorter side; resizing a strip would make it huge.
        max_frames: frames in the file.
        max_hours: duration that the file claims.
        max_seconds: wall-clock time spent on the file.
    """

    max_pixels: int = 48_000_000
    max_aspect: float = 64.0
    max_frames: int = 5_000_000
    max_hours: float = 24.0
    max_seconds: float = 60.0


@dataclass(frozen=True)
class Span:
    """A part of a video that is used as if it were the whole.

    Attributes:
        path: the video file.
        start_seconds: time of the first frame that counts, since the first of the file.
        end_seconds: time from which on no frame counts.

    Raises:
        InputError: if the start is negative or the end is not after it.
    """

    path: str | os.PathLike[str]
    start_seconds: float | None = None
    end_seconds: float | None = None

    def __post_init__(self) -> None:
        start, end = self.start_seconds or 0.0, self.end_seconds
        if not 0 <= start < math.inf:
            raise InputError(f"start_seconds is {start} for {self.path}; use 0 or more")
        if end is not None and not start < end < math.inf:
            raise InputError(
                f"end_seconds is {end} for {self.path}; it must be after the start, {start:g}"
            )

    @property
    def is_whole(self) -> bool:
        return self.start_seconds is None and self.end_seconds is None

    @property
    def bounds(self) -> tuple[float, float]:
        """The times [start, end) as numbers, infinite where nothing bounds them."""
        start, end = self.start_seconds, self.end_seconds
        return -math.inf if start is None else start, math.inf if end is None else end


@dataclass(frozen=True)
class DecodedVideo:
    """The chosen frames of one video and what was lost while decoding them.

    Attributes:
        frames: (T, 3, H, W) uint8 RGB in the order of the chosen positions, or (T, ...)
            of whatever `transform` returned.
        num_frames: frames in the whole video, or in the span of it that was asked for.
        skipped_packets: packets the decoder refused.
        corrupt_frames: frames the decoder marked as damaged.
        truncated: whether the file ends before its own structure says so.
    """

    frames: Tensor
    num_frames: int
    skipped_packets: int = 0
    corrupt_frames: int = 0
    truncated: bool = False

    @property
    def damaged(self) -> bool:
        return bool(self.truncated or self.skipped_packets or self.corrupt_frames)

    @property
    def damage(self) -> str:
        """One line on what was lost; empty if nothing was."""
        parts = []
        if self.truncated:
            parts.append("the file is cut short")
        if self.skipped_packets:
            parts.append(f"{self.skipped_packets} packets could not be decoded")
        if self.corrupt_frames:
            parts.append(f"{self.corrupt_frames} frames are corrupt")
        return f"{', '.join(parts)}; {self.num_frames} frames decoded" if parts else ""


def find_videos(folder: str | os.PathLike[str]) -> list[str]:
    """Return the video files below a folder, sorted by path.

    A file counts if its extension is in `VIDEO_EXTENSIONS`; links to folders are not
    followed.

    Raises:
        VideoError: if the folder, or one below it, cannot be listed.
    """
    return find_files(folder)[0]


def find_files(folder: str | os.PathLike[str]) -> tuple[list[str], int]:
    """Return what `find_videos` does, and the number of other files.

    Raises:
        VideoError: if the folder, or one below it, cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise _os_error(str(error.filename), error)

    videos, num_others = [], 0
    for root, _, names in os.walk(folder, onerror=refuse):
        own = [os.path.join(root, name) for name in names if _is_a(name, VIDEO_EXTENSIONS)]
        videos += own
        num_others += len(names) - len(own)
    return sorted(videos), num_others


def read_frames(
    path: str | os.PathLike[str],
    indices: Sequence[int],
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    transform: FrameTransform | None = None,
    limits: Limits = Limits(),
    strict: bool = False,
    threads: int = 1,
) -> Tensor:
    """Return the frames at given positions of a video.

    Args:
        path: a video file, or a folder of .jpg or .png frames.
        indices: 0-based positions in presentation order; may repeat, in any order.
        start_seconds: see `decode`.
        end_seconds: see `decode`.
        transform: see `decode`.
        limits: see `decode`.
        strict: see `decode`.
        threads: see `decode`.

    Returns:
        (T, 3, H, W) uint8 RGB in the order of `indices`, or (T, ...) of transformed frames.

    Raises:
        InputError: if there are no indices or one is not in [0, number of frames).
        VideoError: if the video cannot be used.
    """
    return decode(
        path,
        lambda _: indices,
        start_seconds=start_seconds,
        end_seconds=end_seconds,
        transform=transform,
        limits=limits,
        strict=strict,
        threads=threads,
    ).frames


def decode(
    path: str | os.PathLike[str],
    choose: Callable[[int], Sequence[int]],
    *,
    start_seconds: float | None = None,
    end_seconds: float | None = None,
    transform: FrameTransform | None = None,
    limits: Limits = Limits(),
    strict: bool = False,
    threads: int = 1,
) -> DecodedVideo:
    """Decode the frames that `choose` picks once the number of frames is known.

    Reads the video stream that FFmpeg calls best (never cover art beside a video),
    rotated as the file asks. Damage is looked for in what has to be decoded: a file that
    is broken elsewhere gives the frames asked for, undamaged.

    Args:
        path: a video file, or a folder of .jpg or .png frames in the order of their names,
            numbers compared as numbers.
        choose: maps the number of frames to 0-based positions in presentation order,
            which may repeat, in any order. Called again if decoding an odd file shows
            another number of frames than its packets promised.
        start_seconds: with `end_seconds`, the span of the video that counts, as if there were
            no other frames: those shown at [start, end), in seconds since the first frame.
            Where a file stores no times (AVI, raw streams), its frame rate gives them.
        end_seconds: None is the end of the video.
        transform: maps a (3, H, W) uint8 RGB frame to a tensor. Runs inside the decoding
            loop, so that no more than one full-size frame is held; may run twice on a
            frame of an odd file. Without it, frames of another size than the first
            chosen one are rescaled to that size, as ffmpeg does.
        limits: what the file may cost.
        strict: whether damage is an error rather than a note in the result.
        threads: how many cores to keep busy. One is best where several files are decoded at
            a time. With more, `transform` may be called in other threads, one at a time.

    Returns:
        The frames in the order of the positions, and what was lost.

    Raises:
        InputError: if `choose` picks nothing or a position that does not exist, the span is
            empty or `threads` is below 1.
        VideoError: if the video cannot be used. Its `reason` is `missing`, `not-a-file`,
            `permission`, `empty`, `unreadable`, `not-a-video`, `no-video-stream`,
            `unsupported-codec`, `unsupported-colors`, `no-frames` (or none in the span),
            `no-times` (for a span), `too-large`, `too-long`, `timeout`, `not-an-image` (in a
            folder) or `damaged`: nothing could be decoded or, with `strict`, not all.
    """
    if threads < 1:
        raise InputError(f"threads is {threads} for {os.fspath(path)!s}; use 1 or more")
    span = Span(os.fspath(path), start_seconds, end_seconds)
    deadline = time.monotonic() + limits.max_seconds
    source = _Source(os.fspath(path), span, transform, limits, deadline, threads)
    if os.path.isdir(path):
        video = _decode_folder(source, choose)
    else:
        _check_file(source.path)
        is_cut_short = _is_cut_short(source)
        try:
            video = _decode_file(source, choose, is_cut_short)
        except VideoError as error:
            if is_cut_short and error.reason in _SIGNS_OF_A_CUT:
                message = "the file is cut short before what is wanted; copy or download it again"
                raise VideoError(source.path, "damaged", message) from None
            raise
    if strict and video.damaged:
        raise VideoError(source.path, "damaged", video.damage)
    return video


_SIGNS_OF_A_CUT = frozenset(
    {"not-a-video", "no-video-stream", "unsupported-codec", "no-frames", "damaged"}
)


@dataclass(frozen=True)
class _Source:
    """What every step of one call needs to know."""

    path: str
    span: Span
    transform: FrameTransform | None
    limits: Limits
    deadline: float
    threads: int = 1

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            message = f"decoding took over {self.limits.max_seconds:g} seconds; raise max_seconds"
            raise VideoError(self.path, "timeout", message)

    def decoder_options(self) -> dict[str, str]:
        """Return what stops a decoder before it holds a frame larger than any header said."""
        pixels = self.limits.max_pixels
        # Coded frames are padded to whole blocks; `check_size` sees them without.
        padded = pixels + pixels // 32 + 64 * 64
        return {"max_pixels": str(min(padded, 2**31 - 1))}  # libav takes no larger one

    def check_size(self, width: int, height: int) -> None:
        if width * height > self.limits.max_pixels:
            raise VideoError(
                self.path,
                "too-large",
                f"a frame of {width} x {height} pixels is above the limit of "
                f"{self.limits.max_pixels}; raise max_pixels or scale the video down",
            )

        if max(width, height) > self.limits.max_aspect * min(width, height):
            raise VideoError(
                self.path,
                "too-large",
                f"a frame of {width} x {height} pixels is more than "
                f"{self.limits.max_aspect:g} times as long as wide; crop it or raise max_aspect",
            )

    def check_length(self, num_frames: int, seconds: float) -> None:
        if num_frames > self.limits.max_frames:
            raise VideoError(
                self.path,
                "too-long",
                f"over {self.limits.max_frames} frames; raise max_frames or cut the video",
            )
        if seconds > 3600 * self.limits.max_hours:
            raise VideoError(
                self.path,
                "too-long",
                f"claims {seconds / 3600:.1f} hours, above the limit of "
                f"{self.limits.max_hours:g}; raise max_hours or cut the video",
            )


class _ChosenFrames:
    """The wanted frames, converted as they come; nothing else is kept."""

    def __init__(self, source: _Source, positions: Sequence[int]) -> None:
        self.source = source
        self.positions = [as_int(position) for position in positions]
        self.wanted = frozenset(self.positions)
        self.size: tuple[int, int] | None = None
        self._frames: dict[int, Any] = {}
        self._lock = threading.Lock()

    def check(self, num_frames: int) -> None:
        """Refuse positions that the video does not have."""
        if not self.positions:
            raise InputError(f"no frames were chosen from {self.source.path}; choose at least one")
        for position in self.positions:
            if not 0 <= position < num_frames:
                raise InputError(
                    f"frame index {position} is out of range: {self.source.path} has "
                    f"{num_frames} frames, 0 to {num_frames - 1}"
                )

    def offer(self, position: int, frame: VideoFrame, reformatter: VideoReformatter) -> None:
        """Keep the frame if its position is wanted; several threads may offer at once."""
        size = frame.width, frame.height
        self.source.check_size(*size)
        if position not in self.wanted:
            return
        # Rescaling comes before rotation: the size to keep is that of the coded picture.
        with self._lock:
            self.size = self.size or size
        transform = self.source.transform
        try:
            image = _to_rgb(frame, self.size if transform is None else size, reformatter)
        except av.FFmpegError as error:  # of color spaces such as ICtCp
            message = (
                f"its colors cannot be converted to RGB ({error.strerror}); convert it to BT.709"
            )
            raise VideoError(self.source.path, "unsupported-colors", message) from None
        if transform is None:
            self._frames[position] = image
            return
        image = np.ascontiguousarray(image)
        with self._lock:
            self._frames[position] = transform(torch.from_numpy(image).permute(2, 0, 1))

    def are_complete(self) -> bool:
        return len(self._frames) == len(self.wanted)

    def stack(self) -> Tensor:
        """Return the frames in the order chosen."""
        frames = [self._frames[position] for position in self.positions]
        if self.source.transform is not None:
            return torch.stack(frames)
        # In the order they lie in memory, several times faster; by NumPy, because waking
        # PyTorch's threads for a copy costs more than the copy where cores are busy.
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _to_rgb(frame: VideoFrame, size: tuple[int, int], reformatter: VideoReformatter) -> np.ndarray:
    """Return a frame as (H, W, 3) uint8 RGB, rotated."""
    width, height = size
    # One reformatter for all frames: to prepare it takes as long as to convert a small frame.
    # Threads to convert a frame cost more than they save for small ones.
    frame_rgb = reformatter.reformat(frame, width, height, "rgb24", threads=1)
    plane = frame_rgb.planes[0]
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[
        :height, : 3 * width
    ]
    image = rows.reshape(height, width, 3)
    if not frame.rotation:
        return image
    turned = np.rot90(image, round(frame.rotation / 90))  # degrees counter-clockwise, as here
    pixels = np.empty(turned.shape, np.uint8)
    for channel in range(3):  # in one step NumPy takes three times as long
        pixels[..., channel] = turned[..., channel]
    return pixels


# Opening


def _check_file(path: str) -> None:
    """Refuse what libav would misread or block on, such as a FIFO."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise _os_error(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "not-a-file", "not a regular file; give a video file or a folder")
    if status.st_size == 0:
        raise VideoError(path, "empty", "the file has 0 bytes; copy or download it again")


def _os_error(path: str, error: OSError | ValueError) -> VideoError:
    if isinstance(error, ValueError):  # a null character, or half of one
        message = "no file can have this name; a list has a path on each line"
        return VideoError(path, "missing", message)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return VideoError(path, "missing", "no such file or folder; check the path")
    if isinstance(error, PermissionError):
        return VideoError(path, "permission", "no permission to read it; change its mode or owner")
    return VideoError(path, "unreadable", f"the system cannot read it: {error.strerror}")


def _open(
    source: _Source,
    path: str,
    image_format: str | None = None,
    *,
    demuxers: str = _CONTAINERS,
    is_probed: bool = True,
) -> InputContainer:
    """Open one file so that libav reads that file and nothing else.

    Args:
        source: what to read.
        path: the file.
        image_format: the format of an image.
        demuxers: the formats that a video may have.
        is_probed: whether frames are decoded to find what the header does not say, which
            takes as long as decoding several of them.
    """
    options = {"protocol_whitelist": "file", "format_whitelist": image_format or demuxers}
    if not is_probed:  # no decoder is allowed; the one that we open later is
        options["codec_whitelist"] = "none"
    try:
        return av.open(
            "file:" + os.path.abspath(path),
            mode="r",
            format=image_format,
            options=source.decoder_options(),
            container_options=options,
            metadata_errors="replace",
            timeout=_OPEN_TIMEOUT_SECONDS,
        )
    except av.error.PermissionError as error:
        raise _os_error(source.path, error) from None
    except av.error.ExitError:
        raise _stalled(source) from None
    except av.error.ArgumentError:  # what the list of containers refuses
        message = "its container format is unknown or not allowed; convert it to MP4 or Matroska"
        raise _OtherContainerError(source.path, "not-a-video", message) from None
    except av.FFmpegError as error:
        message = f"not a video in a known format ({error.strerror}); convert or copy it again"
        raise VideoError(source.path, "not-a-video", message) from None


class _OtherContainerError(VideoError):
    """The container is none of those asked for."""


def _stalled(source: _Source) -> VideoError:
    return VideoError(source.path, "timeout", "reading stalled; check the disk or the network")


def _no_frames(source: _Source, last_seconds: float) -> VideoError:
    start, end = source.span.bounds
    message = (
        f"no frame is shown from {max(start, 0):g} to {end:g} seconds, the last one is at "
        f"{last_seconds:.2f}; correct the span"
    )
    return VideoError(source.path, "no-frames", message)


def _no_decoder(source: _Source) -> VideoError:
    message = "there is no decoder for its video codec; convert it to H.264"
    return VideoError(source.path, "unsupported-codec", message)


@dataclass(frozen=True)
class _OpenVideo:
    """An open file and the stream of it to decode."""

    source: _Source
    container: InputContainer
    stream: VideoStream
    reformatter: VideoReformatter = field(default_factory=VideoReformatter)

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets; an empty one would tell the decoder that the end has come."""
        try:
            for packet in self.container.demux(self.stream):
                self.source.check_time()
                if packet.size:
                    yield packet
        except av.error.ExitError:
            raise _stalled(self.source) from None

    def codec(self) -> str:
        return self.stream.codec_context.codec.canonical_name

    def can_skip(self) -> bool:
        """Tell whether skipping non-reference frames leaves all others as they are."""
        if self.codec() == "hevc":
            # Frames marked so may still be referred to from a higher temporal layer. The
            # number of layers is in the hvcC record (ISO/IEC 14496-15, 8.3.3.1), 0 if unknown.
            record = self.stream.codec_context.extradata or b""
            return len(record) > 21 and record[21] >> 3 & 7 == 1
        # AV1 and VP9 decoders do not skip.
        return self.codec() == "h264"

    def length_size(self) -> int:
        """Return how many bytes tell the length of each NAL unit of a packet, 0 if unknown.

        Source: ISO/IEC 14496-15, 5.3.3.1 (avcC) and 8.3.3.1 (hvcC).
        """
        record = self.stream.codec_context.extradata or b""
        at = 21 if self.codec() == "hevc" else 4
        return (record[at] & 3) + 1 if len(record) > at and record[0] == 1 else 0

    def seconds(self, position: _Number, ticks: _Number | None) -> _Number:
        """Return when frames are shown, in seconds since the first.

        Args:
            position: their positions in presentation order.
            ticks: their pts, less the pts of the first frame.
        """
        # One rounding, by the division at the end: a time such as 0.04 is the same number here
        # as in the list that names it.
        if self.container.format.name in _FIXED_RATE_CONTAINERS and self.stream.guessed_rate:
            rate = self.stream.guessed_rate
            return position * rate.denominator / rate.numerator
        if ticks is None or self.stream.time_base is None:
            message = "its frames have no times, so no span of it can be read; convert it to MP4"
            raise VideoError(self.source.path, "no-times", message)
        base = self.stream.time_base
        return ticks * base.numerator / base.denominator


def _best_video(source: _Source, container: InputContainer) -> _OpenVideo:
    """Find the stream to decode, check its limits and give it one decoder thread."""
    stream = container.streams.best("video")
    if stream is not None and stream.disposition & Disposition.attached_pic:
        others = container.streams.video
        stream = next((s for s in others if not s.disposition & Disposition.attached_pic), None)
    if not isinstance(stream, VideoStream):
        raise VideoError(source.path, "no-video-stream", "it holds no video, perhaps only sound")
    if stream.codec_context is None:
        raise _no_decoder(source)
    source.check_size(stream.codec_context.width, stream.codec_context.height)
    source.check_length(stream.frames, (container.duration or 0) / av.time_base)
    stream.codec_context.thread_count = 1
    stream.codec_context.options = source.decoder_options()
    return _OpenVideo(source, container, stream)


# Is the file whole?


def _is_cut_short(source: _Source) -> bool:
    """Tell whether the file is shorter than its own outermost structure says.

    Libav reads a cut WebM or AVI without a word. MPEG-TS and raw streams have no such
    structure: a cut there cannot be told from the end.
    """
    try:
        with open(source.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _claimed_size(file, size) > size
    except OSError as error:
        raise _os_error(source.path, error) from None


def _claimed_size(file: BinaryIO, size: int) -> int:
    head = file.read(12)
    if head[4:8] in _MP4_FIRST_BOXES:
        return _mp4_end(file, size)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] == _EBML_HEADER:
        return _matroska_end(file, size)
    return 0


_MP4_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# Ours: 13 hours in fragments of a second, each a pair of boxes.
_MOST_BOXES = 100_000
_EBML_HEADER = b"\x1a\x45\xdf\xa3"
_EBML_SEGMENT = b"\x18\x53\x80\x67"


def _mp4_end(file: BinaryIO, size: int) -> int:
    """Return where the last of the boxes that hold a film ends, or 0 if there are too many.

    Source: ISO/IEC 14496-12, 4.2.
    """
    start = end = 0
    for _ in range(_MOST_BOXES):
        file.seek(start)
        header = file.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:
            length = int.from_bytes(header[8:], "big")
        if header[4:8] in (b"moov", b"moof", b"mdat"):
            end = start + length
        start += length
        # Length 0 is "up to the end of the file"; another below 8 is not a box.
        if length < 8 or start >= size:
            return end
    return 0


def _matroska_end(file: BinaryIO, size: int) -> int:
    """Return where the segment ends, or 0 if it does not say. Source: RFC 8794, section 6.2."""
    file.seek(4)
    header = _ebml_size(file) or 0
    if header > size:  # the system may not seek that far
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != _EBML_SEGMENT:
        return 0
    segment = _ebml_size(file)
    return 0 if segment is None else file.tell() + segment


def _ebml_size(file: BinaryIO) -> int | None:
    """Read an EBML length: leading zero bits count its further bytes; all ones is unknown."""
    first = int.from_bytes(file.read(1), "big")
    width = 9 - first.bit_length()
    if width > 8:
        return None
    mask = (1 << 7 * width) - 1
    size = int.from_bytes(bytes([first]) + file.read(width - 1), "big") & mask
    return None if size == mask else size


# The two ways of decoding


def _decode_file(
    source: _Source, choose: Callable[[int], Sequence[int]], is_cut_short: bool
) -> DecodedVideo:
    video = None if is_cut_short else _open_for_plan(source)
    if video is None:
        return _decode_all(source, choose, None, is_cut_short)
    with video.container:
        index = _within(_scan(video), video)
        num_frames = max(1, len(index.shown))
        if index.is_sound:
            chosen = _ChosenFrames(source, choose(num_frames))
            chosen.check(num_frames)
            try:
                _decode_planned(video, index, chosen)
            except (SurpriseError, av.FFmpegError):
                pass  # `_decode_all` decides what this file holds
            else:
                return DecodedVideo(chosen.stack(), num_frames)
    return _decode_all(source, choose, num_frames, is_cut_short)


def _open_for_plan(source: _Source, *, is_probed: bool = False) -> _OpenVideo | None:
    """Open a file if it is of a kind whose header tells enough for a plan."""
    demuxers = ",".join(_PLANNED_CONTAINERS)
    with ExitStack() as stack:
        try:
            container = _open(source, source.path, demuxers=demuxers, is_probed=is_probed)
        except _OtherContainerError:
            return None  # `_decode_all` allows more of them
        stack.enter_context(container)
        streams = container.streams.video
        if len(streams) > 1 and not is_probed:  # their first frames tell which is the best
            return _open_for_plan(source, is_probed=True)
        if streams and streams[0].codec_context is None:
            return None
        video = _best_video(source, container)
        if video.codec() not in _PLANNED_CODECS:
            return None
        stack.pop_all()
        return video


def _scan(video: _OpenVideo) -> PacketIndex:
    """Read all packets and keep one small record of each."""
    times, sizes = array("q"), array("q")
    is_key, is_shown, spare = bytearray(), bytearray(), bytearray()
    is_hevc = video.codec() == "hevc"
    length_size = video.length_size() if video.can_skip() else 0
    is_sound = True
    try:
        for packet in video.packets():
            is_sound = is_sound and packet.pts is not None and not packet.is_corrupt
            times.append(packet.pts or 0)
            sizes.append(packet.size)
            is_key.append(packet.is_keyframe)
            is_shown.append(not packet.is_discard)
            spare.append(length_size > 0 and is_spare(memoryview(packet), is_hevc, length_size))
            video.source.check_length(len(times), 0.0)
    except av.FFmpegError:  # counted by `_decode_all`, which meets it again
        is_sound = False
    pts = np.array(times, dtype=np.int64)
    by_pts = np.argsort(pts, kind="stable")
    shown = by_pts[np.array(is_shown, dtype=bool)[by_pts]]
    if len(shown) == 0:
        raise VideoError(video.source.path, "no-frames", "its video stream is empty")
    is_sound = (
        is_sound
        and bool(is_key[0])
        and bool(pts[shown[0]] >= pts[0])
        and bool((np.diff(pts[by_pts]) > 0).all())
    )
    return PacketIndex(
        pts=pts,
        sizes=np.array(sizes, dtype=np.int64),
        is_spare=np.array(spare, dtype=bool),
        by_pts=by_pts,
        keys=np.flatnonzero(is_key),
        shown=shown,
        is_sound=is_sound,
    )


def _within(index: PacketIndex, video: _OpenVideo) -> PacketIndex:
    """Leave only the frames that are shown in the span asked for."""
    if video.source.span.is_whole:
        return index
    start, end = video.source.span.bounds
    ticks = index.pts[index.shown] - index.pts[index.shown[0]]
    seconds = video.seconds(np.arange(len(ticks)), ticks)
    is_inside = (start <= seconds) & (seconds < end)
    if index.is_sound and not is_inside.any():
        raise _no_frames(video.source, float(seconds[-1]))
    return replace(index, shown=index.shown[is_inside])


@dataclass
class _Job:
    """What the decoders of one file work through together.

    Attributes:
        index: the packets of the file.
        wanted: number of each wanted packet -> position of its frame.
        chosen: takes the frames.
        stretches: what is left to decode; each decoder takes the next.
        decoder_threads: threads of each decoder.
        has_failed: whether a decoder met an error, so that the others need not go on.
    """

    index: PacketIndex
    wanted: dict[int, int]
    chosen: _ChosenFrames
    stretches: Iterator[Stretch]
    decoder_threads: int
    has_failed: bool = False


def _decode_planned(video: _OpenVideo, index: PacketIndex, chosen: _ChosenFrames) -> None:
    """Collect the chosen frames from the stretches of the file that they need.

    Raises:
        SurpriseError: if anything is not as the index says.
    """
    if index.reorder_depth() > _MOST_HELD_BACK:
        raise SurpriseError
    wanted = {int(index.shown[position]): position for position in chosen.wanted}
    context = video.stream.codec_context
    plan = make_plan(index, wanted, context.width * context.height, video.source.threads)
    job = _Job(index, wanted, chosen, iter(plan.stretches), plan.decoder_threads)
    helpers = plan.workers - 1
    with ThreadPoolExecutor(max(1, helpers), "actionclip-decoder") as pool:
        results = [pool.submit(_help, video.source, job) for _ in range(helpers)]
        _work(video, job)
    for result in results:
        result.result()
    if not chosen.are_complete():
        raise SurpriseError


def _help(source: _Source, job: _Job) -> None:
    """Work with a decoder of one's own."""
    video = _open_for_plan(source)
    if video is None:
        raise SurpriseError
    with video.container:
        _work(video, job)


def _work(video: _OpenVideo, job: _Job) -> None:
    """Decode stretches until none is left."""
    context = video.stream.codec_context
    context.thread_count, context.thread_type = job.decoder_threads, "AUTO"
    # A decoder of H.264 that has to guess it leaves out the frames that come out of order.
    depth = {"has_b_frames": str(job.index.reorder_depth())}
    context.options = video.source.decoder_options() | depth
    try:
        for stretch in job.stretches:
            last_pts = -math.inf
            for frame in _stretch_frames(video, job.index, stretch, job.wanted):
                if job.has_failed:
                    return
                _take(frame, video, job, stretch)
                assert frame.pts is not None  # or it was not taken
                if frame.pts < last_pts:  # the decoder goes by another order
                    raise SurpriseError
                last_pts = frame.pts
    except BaseException:
        job.has_failed = True
        raise


def _take(frame: VideoFrame, video: _OpenVideo, job: _Job, stretch: Stretch) -> None:
    """Keep a frame of a stretch if it is wanted, and check that it is the one expected."""
    if frame.is_corrupt or frame.interlaced_frame:  # a field may be a packet
        raise SurpriseError
    number = job.index.packet_at(frame.pts)
    if number == stretch[0] and not frame.key_frame:
        raise SurpriseError
    job.chosen.offer(job.wanted.get(number, -1), frame, video.reformatter)
    # Which size is the first, and so to be kept, is known in order only.
    if job.chosen.size not in (None, (frame.width, frame.height)):
        raise SurpriseError


def _stretch_frames(
    video: _OpenVideo, index: PacketIndex, stretch: Stretch, wanted: Container[int]
) -> Iterator[VideoFrame]:
    """Yield what the decoder gives for a stretch of packets, the wanted frames among it."""
    first, last = stretch
    context = video.stream.codec_context
    can_skip = video.can_skip()
    is_skipping = None
    number = None
    video.container.seek(int(index.pts[first]), stream=video.stream)
    for packet in video.packets():
        # A seek may land on an earlier key packet, never on a later one.
        number = index.packet_at(packet.pts) if number is None else number + 1
        if number < first:
            continue
        if number > last or packet.pts != index.pts[number]:
            raise SurpriseError
        may_skip = can_skip and number not in wanted
        if may_skip and index.is_spare[number]:
            continue
        if may_skip is not is_skipping:
            context.skip_frame = "NONREF" if may_skip else "DEFAULT"
            is_skipping = may_skip
        yield from video.stream.decode(packet)
        if number == last:
            yield from video.stream.decode(None)
            return


def _decode_all(
    source: _Source,
    choose: Callable[[int], Sequence[int]],
    expected: int | None,
    is_cut_short: bool,
) -> DecodedVideo:
    """Decode every packet: the definition of which frame is where.

    Args:
        source: what to read.
        choose: see `decode`.
        expected: the number of frames to choose from, perhaps only a guess; None: unknown.
        is_cut_short: whether the file is known to end early.
    """
    if expected is None:
        with _open(source, source.path, is_probed=False) as container:
            video = _best_video(source, container)
            expected = max(1, len(_within(_scan(video), video).shown))
    chosen = _ChosenFrames(source, choose(expected))
    losses = _Losses(is_cut_short)
    num_frames = 0
    with _open(source, source.path) as container:
        video = _best_video(source, container)
        for frame in _in_span(video, _all_frames(video, losses)):
            chosen.offer(num_frames, frame, video.reformatter)
            num_frames += 1
    if num_frames == 0 and losses.skipped_packets:
        message = (
            f"its frames cannot be decoded or have over {source.limits.max_pixels} pixels; "
            "copy or convert it again"
        )
        raise VideoError(source.path, "damaged", message)
    if num_frames == 0:
        raise VideoError(source.path, "no-frames", "its video stream holds no frame; copy it again")
    if num_frames != expected:
        return _decode_all(source, choose, num_frames, is_cut_short)
    chosen.check(num_frames)
    return DecodedVideo(
        chosen.stack(), num_frames, losses.skipped_packets, losses.corrupt_frames, losses.cut_short
    )


@dataclass
class _Losses:
    cut_short: bool
    skipped_packets: int = 0
    corrupt_frames: int = 0


def _all_frames(video: _OpenVideo, losses: _Losses) -> Iterator[VideoFrame]:
    """Yield every frame that can be decoded, counting what cannot."""
    packets = video.packets()
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            losses.cut_short = True
            packet = None
        try:
            frames = video.stream.decode(packet)
        except av.error.DecoderNotFoundError:
            raise _no_decoder(video.source) from None
        except av.FFmpegError:
            losses.skipped_packets += 1
            frames = []
        for frame in frames:
            losses.corrupt_frames += frame.is_corrupt
            yield frame
        if packet is None:
            return


def _in_span(video: _OpenVideo, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Yield the frames that are shown in the span asked for."""
    if video.source.span.is_whole:
        yield from frames
        return
    start, end = video.source.span.bounds
    seconds, is_empty, first = 0.0, True, None
    for position, frame in enumerate(frames):
        first = frame.pts if position == 0 else first
        ticks = None if frame.pts is None or first is None else frame.pts - first
        seconds = video.seconds(position, ticks)
        if start <= seconds < end:
            is_empty = False
            yield frame
    if is_empty:
        raise _no_frames(video.source, seconds)


def _decode_folder(source: _Source, choose: Callable[[int], Sequence[int]]) -> DecodedVideo:
    """Decode the chosen images of a folder; each image is a frame."""
    if not source.span.is_whole:
        message = "the frames of a folder have no times; use the video file, or the whole folder"
        raise VideoError(source.path, "no-times", message)
    try:
        names = [name for name in os.listdir(source.path) if _is_a(name, IMAGE_EXTENSIONS)]
    except OSError as error:
        raise _os_error(source.path, error) from None
    if not names:
        raise VideoError(
            source.path,
            "no-frames",
            "no .jpg or .png frames in this folder, which is read as one video",
        )
    names.sort(key=by_number)
    source.check_length(len(names), 0.0)
    chosen = _ChosenFrames(source, choose(len(names)))
    chosen.check(len(names))
    losses, reformatter = _Losses(cut_short=False), VideoReformatter()
    for position in sorted(chosen.wanted):
        try:
            chosen.offer(position, _image(source, names[position], losses), reformatter)
        except VideoError as error:
            message = f"frame {names[position]}: {error.message}"
            raise VideoError(source.path, error.reason, message) from None
    return DecodedVideo(chosen.stack(), len(names), corrupt_frames=losses.corrupt_frames)


def _image(source: _Source, name: str, losses: _Losses) -> VideoFrame:
    path = os.path.join(source.path, name)
    _check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError as error:
        raise _os_error(path, error) from None
    image_format = next((f for s, f in _IMAGE_SIGNATURES.items() if head.startswith(s)), None)
    if image_format is None:
        raise VideoError(path, "not-an-image", "neither JPEG nor PNG; convert it")
    if head[12:16] == b"IHDR" and len(head) == 24:  # ISO/IEC 15948, 11.2.2
        source.check_size(int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:], "big"))
    with _open(source, path, image_format) as container:
        frame = next(_all_frames(_best_video(source, container), losses), None)
    if frame is None:
        message = (
            f"it cannot be decoded or has over {source.limits.max_pixels} pixels; "
            "extract the frames again"
        )
        raise VideoError(path, "damaged", message)
    return frame


def by_number(name: str) -> list[tuple[int, str]]:
    """Sort key that puts img_2 before img_10."""
    parts = re.findall(r"([0-9]+)|([^0-9]+)", name)
    return [(int(number or 0), text) for number, text in parts]


def _is_a(name: str, extensions: frozenset[str]) -> bool:
    return os.path.splitext(name)[1].lower() in extensions

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.codec import codecs_available
from PIL import Image
from video_files import (
    ROTATIONS,
    decode_plainly,
    picture,
    remux,
    retime,
    rotate,
    write_cover_art,
    write_sound,
    write_two_sizes,
    write_video,
)

from actionclip import packet_index, video
from actionclip.errors import InputError, VideoError
from actionclip.video import Limits, Span, decode, find_videos, read_frames

OPEN_GOP = {"x264-params": "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"}
X265 = "log-level=none:pools=1:keyint=12:min-keyint=12"
QUICK_VP = {"cpu-used": "8", "deadline": "realtime"}

# name -> (file name, arguments of write_video, whether the plan holds for it)
KINDS = {
    "h264": ("a.mp4", {"num_frames": 60}, True),
    "one long gop": ("a.mp4", {"num_frames": 60, "gop": 250}, True),
    "open gop": ("a.mp4", {"num_frames": 60, "options": OPEN_GOP}, True),
    "open gop mkv": ("a.mkv", {"num_frames": 60, "options": OPEN_GOP}, True),
    "b-pyramid": ("a.mkv", {"bframes": 7, "options": {"x264-params": "b-adapt=0"}}, True),
    "key frames only": ("a.mp4", {"gop": 1, "bframes": 0}, True),
    "fragmented": (
        "a.mp4",
        {"num_frames": 60, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
        True,
    ),
    "variable rate": ("a.mp4", {"times": [i * i // 7 + i for i in range(30)]}, True),
    "late start": ("a.mkv", {"times": list(range(50, 80))}, True),
    "10 bit": ("a.mp4", {"pix_fmt": "yuv420p10le"}, True),
    "odd size": ("a.mp4", {"pix_fmt": "yuv444p", "size": (97, 65)}, True),
    "grey": ("a.mp4", {"pix_fmt": "gray"}, True),
    "full range": ("a.mp4", {"pix_fmt": "yuvj420p"}, True),
    "one frame": ("a.mp4", {"num_frames": 1}, True),
    "three frames": ("a.mp4", {"num_frames": 3}, True),
    "hevc": (
        "a.mp4",
        {"num_frames": 40, "codec": "libx265", "options": {"x265-params": X265}},
        True,
    ),
    "hevc in temporal layers": (
        "a.mp4",
        {
            "num_frames": 40,
            "codec": "libx265",
            "options": {"x265-params": X265 + ":temporal-layers=3:bframes=7:b-adapt=0"},
        },
        True,
    ),
    "vp9": ("a.webm", {"num_frames": 40, "codec": "libvpx-vp9", "options": QUICK_VP}, True),
    "av1": ("a.mp4", {"codec": "libsvtav1", "options": {"preset": "12"}}, True),
    "intra refresh": (
        "a.mp4",
        {"num_frames": 60, "options": {"x264-params": "intra-refresh=1:keyint=15"}},
        None,
    ),
    "interlaced": ("a.mp4", {"options": {"x264-params": "interlaced=1"}}, False),
    "vp8 with hidden frames": (
        "a.webm",
        {"num_frames": 40, "codec": "libvpx", "options": {"auto-alt-ref": "1"}},
        False,
    ),
    "no pts": ("a.h264", {"container": "h264"}, False),
    "h264 avi": ("a.avi", {}, False),
    "h264 ts": ("a.ts", {}, False),
    "h264 flv": ("a.flv", {}, False),
    "mpeg4": ("a.mp4", {"codec": "mpeg4"}, False),
    "mpeg4 avi": ("a.avi", {"codec": "mpeg4"}, False),
    "mjpeg avi": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj420p", "bframes": 0}, False),
    "mpeg2": ("a.mpg", {"codec": "mpeg2video"}, False),
    "prores": ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}, False),
    "alpha": ("a.mkv", {"codec": "ffv1", "pix_fmt": "yuva420p"}, False),
    "palette": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8"}, False),
}


@pytest.fixture
def sequential(monkeypatch):
    """Count the calls of the sequential decoder."""
    calls = []
    original = video._decode_all

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(video, "_decode_all", counted)
    return calls


def index_sets(n):
    """Return all frames, single ones around the ends and key frames, and random sets."""
    generator = np.random.default_rng(n)
    singles = [i for i in (0, 1, 11, 12, 14, n - 1) if i < n]
    drawn = [generator.integers(n, size=size).tolist() for size in (2, 3, 8)]
    return [list(range(n)), *([i] for i in singles), *drawn]


def assert_exact(path, expected, threads=1):
    for indices in index_sets(len(expected)):
        frames = read_frames(path, indices, threads=threads)
        assert frames.dtype == torch.uint8
        np.testing.assert_array_equal(frames.numpy(), np.stack([expected[i] for i in indices]))


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """A video of each kind, its frames, and whether the plan holds for it."""
    name, arguments, is_planned = KINDS[request.param]
    codec = arguments.get("codec", "libx264")
    if codec not in codecs_available:
        pytest.skip(f"this PyAV build cannot write {codec}")
    path = write_video(tmp_path_factory.mktemp("kind") / name, **arguments)
    expected = decode_plainly(path)
    assert len(expected) == arguments.get("num_frames", 30)
    return path, expected, is_planned


def test_chosen_frames_equal_decoding_everything(kind, sequential):
    path, expected, is_planned = kind
    assert_exact(path, expected)
    if is_planned is not None:
        assert bool(sequential) is not is_planned


# Threads


@pytest.fixture
def always_shared(monkeypatch):
    """Share even the smallest work among threads, and list the plans."""
    plans = []
    original = packet_index.make_plan

    def listed(*arguments):
        plans.append(original(*arguments))
        return plans[-1]

    monkeypatch.setattr(video, "make_plan", listed)
    monkeypatch.setattr(packet_index, "_LEAST_WORK", 0)
    monkeypatch.setattr(packet_index, "_LEAST_BYTES", 0)
    return plans


def decoder_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("actionclip-decoder")]


def test_threads_change_nothing(kind, sequential, always_shared):
    path, expected, is_planned = kind
    for threads in (2, 8):
        assert_exact(path, expected, threads)
    if is_planned is not None:
        assert bool(sequential) is not is_planned
    if is_planned and len(expected) > 30:
        assert {plan.workers > 1 or plan.decoder_threads > 1 for plan in always_shared} == {True}
    assert decoder_threads() == []


def test_threads_inside_of_threads(h264_video, always_shared):
    expected = read_frames(h264_video, [0, 20, 40, 59])
    with ThreadPoolExecutor(4) as pool:
        results = [
            pool.submit(read_frames, h264_video, [0, 20, 40, 59], threads=3) for _ in range(20)
        ]
    assert all(torch.equal(result.result(), expected) for result in results)
    assert {plan.workers for plan in always_shared} == {1, 3}


def test_every_decoder_takes_part(h264_video, always_shared):
    names, gate = set(), threading.Barrier(3, timeout=20)
    original = video._stretch_frames

    def met(*arguments):
        if threading.current_thread().name not in names:
            names.add(threading.current_thread().name)
            gate.wait()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video, "_stretch_frames", met)
        frames = read_frames(h264_video, [0, 20, 40, 59], threads=3)
    assert len(names) == 3
    assert torch.equal(frames, read_frames(h264_video, [0, 20, 40, 59]))


@pytest.mark.parametrize("in_helper", [True, False])
@pytest.mark.parametrize("error", [OSError("disk of the transform"), KeyboardInterrupt("now")])
def test_an_error_in_any_thread_stops_all(in_helper, error, h264_video, always_shared):
    main = threading.current_thread()
    failed, after = [], []

    def fail(frame):
        if failed:
            after.append(frame)
        elif (threading.current_thread() is not main) is in_helper:
            failed.append(frame)
            raise error
        time.sleep(0.01)  # so that the other thread has its share
        return frame

    with pytest.raises(type(error), match=str(error)):
        read_frames(h264_video, range(60), transform=fail, threads=2)
    assert failed
    assert len(after) < 3
    assert decoder_threads() == []


def test_a_surprise_in_any_thread_decodes_all(h264_video, sequential, always_shared, monkeypatch):
    main = threading.current_thread()
    original = video._take

    def surprised(*arguments):
        if threading.current_thread() is not main:
            raise packet_index.SurpriseError
        time.sleep(0.01)  # so that the other thread has its share
        original(*arguments)

    monkeypatch.setattr(video, "_take", surprised)
    frames = read_frames(h264_video, range(60), threads=2)
    assert len(sequential) == 1
    np.testing.assert_array_equal(frames.numpy(), np.stack(decode_plainly(h264_video)))


def test_the_time_limit_holds_for_every_thread(h264_video, always_shared):
    def wait(frame):
        time.sleep(0.2)
        return frame

    with pytest.raises(VideoError, match=r"over 0\.1 seconds; raise max_seconds"):
        read_frames(
            h264_video, range(60), transform=wait, threads=3, limits=Limits(max_seconds=0.1)
        )


def test_transforms_run_one_at_a_time(h264_video, always_shared):
    running, most = [], []

    def count(frame):
        running.append(frame)
        time.sleep(0.001)
        most.append(len(running))
        running.pop()
        return frame

    frames = read_frames(h264_video, range(60), transform=count, threads=4)
    assert most == [1] * 60
    assert torch.equal(frames, read_frames(h264_video, range(60)))


def test_a_change_of_size_is_left_to_the_definition(tmp_path, sequential, always_shared):
    path = write_two_sizes(tmp_path / "a.mkv", 12, [(96, 64), (64, 64)])
    frames = read_frames(path, [20, 3])
    for threads in (2, 3):
        assert torch.equal(read_frames(path, [20, 3], threads=threads), frames)
    assert len(sequential) == 3


def test_threads_below_one(h264_video):
    with pytest.raises(InputError, match=r"threads is 0 for .*h264.mp4; use 1 or more"):
        read_frames(h264_video, [0], threads=0)


# What is decoded, and how it is opened


def without_vui(path):
    """Clear vui_parameters_present_flag of a progressive High stream (ITU-T H.264, 7.3.2.1.1)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\x67", data.index(b"avcC"))  # NAL unit of the SPS
    bits = "".join(f"{byte:08b}" for byte in data[start : start + 60])
    at = 32

    def golomb():
        nonlocal at
        zeros = bits.index("1", at) - at
        at += 2 * zeros + 1
        return int(bits[at - zeros - 1 : at], 2) - 1

    assert data[start + 1] == 100
    for _ in range(4):  # id, chroma format, bit depths
        golomb()
    at += 2  # no scaling matrices
    golomb()
    assert golomb() == 0  # the type of picture order count
    golomb()
    golomb()
    at += 1
    golomb()
    golomb()
    at += 2
    if bits[at] == "1":
        at += 1
        for _ in range(4):
            golomb()
        at -= 1
    at += 1
    assert bits[at] == "1"
    data[start + at // 8] &= ~(128 >> at % 8)
    path.write_bytes(data)


def test_frames_in_another_order_than_a_header_says(tmp_path, sequential):
    options = {"x264-params": "b-adapt=0:b-pyramid=normal"}
    path = write_video(tmp_path / "a.mp4", 60, gop=60, bframes=7, options=options)
    without_vui(path)
    expected = decode_plainly(path)
    assert len(expected) == 60
    assert_exact(path, expected)
    assert not sequential


@pytest.mark.parametrize("sizes", [[(64, 64), (96, 64)], [(96, 64), (64, 64)]])
def test_of_several_videos_the_best_is_read(sizes, tmp_path, sequential):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        streams = [output.add_stream("libx264", rate=25) for _ in sizes]
        for stream, size in zip(streams, sizes, strict=True):
            stream.width, stream.height = size
        for i in range(20):
            for stream, size in zip(streams, sizes, strict=True):
                frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 25)
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode(None))
    assert_exact(path, decode_plainly(path))
    assert not sequential


@pytest.mark.skipif(av.__version__ < "18", reason="PyAV 17 crashes where it is asked for a format")
def test_no_frame_is_decoded_to_open_a_file(h264_video):
    source = video._Source(str(h264_video), Span(h264_video), None, Limits(), float("inf"))
    with video._open(source, str(h264_video), is_probed=False) as container:
        assert container.streams.video[0].codec_context.pix_fmt is None
    with video._open(source, str(h264_video)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_libav_also_takes_the_spare_frames_for_such(kind):
    path = kind[0]
    source = video._Source(str(path), Span(path), None, Limits(), float("inf"))
    opened = video._open_for_plan(source)
    if opened is None or not opened.can_skip():
        pytest.skip("nothing can be skipped")
    with opened.container:
        index = video._scan(opened)
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.skip_frame = "NONREF"
        decoded = {frame.pts for frame in container.decode(stream)}
    spare = set(index.pts[index.is_spare].tolist())
    if kind[2]:
        assert spare == set(index.pts.tolist()) - decoded
    else:  # interlaced frames come with messages, and stay
        assert not spare & decoded


def test_only_a_part_is_decoded(h264_video, monkeypatch):
    packets = []
    original = video._OpenVideo.packets

    def counted(self):
        for packet in original(self):
            packets.append(packet.pts)
            yield packet

    monkeypatch.setattr(video._OpenVideo, "packets", counted)
    read_frames(h264_video, [50])
    # The scan reads 60; the frame is in the GOP that starts at 48.
    assert 60 < len(packets) <= 60 + 5


def test_frames_that_no_other_needs_are_skipped(h264_video, monkeypatch):
    decoded = []
    original = video._stretch_frames

    def counted(*arguments):
        for frame in original(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_stretch_frames", counted)
    read_frames(h264_video, [11])
    assert 0 < len(decoded) < 12


def test_temporal_layers_forbid_skipping_in_hevc(tmp_path):
    for layers, can_skip in ((1, True), (3, False)):
        options = {"x265-params": X265 + (":temporal-layers=3" if layers > 1 else "")}
        path = write_video(tmp_path / f"{layers}.mp4", 5, codec="libx265", options=options)
        source = video._Source(str(path), video.Span(path), None, Limits(), float("inf"))
        with video._open(source, str(path)) as container:
            assert video._best_video(source, container).can_skip() is can_skip


def test_frames_with_the_same_time_are_told_apart(tmp_path):
    source = write_video(tmp_path / "source.mkv", 30, bframes=0)
    path = retime(source, tmp_path / "a.mkv", [i // 2 for i in range(30)])
    expected = decode_plainly(path)
    assert len(expected) == 30
    assert_exact(path, expected)


def write_late(path, source, late):
    """Copy packets in presentation order, one of them shown `late` places before its own."""
    with av.open(str(source)) as input_, av.open(str(path), "w") as output:
        stream = output.add_stream_from_template(input_.streams.video[0])
        packets = [packet for packet in input_.demux(video=0) if packet.size]
        for i, packet in enumerate(packets):
            packet.time_base = Fraction(1, 50)
            packet.pts = 201 if i == late + 1 else 200 + 2 * i
            packet.dts, packet.stream = i, stream
            output.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_no_order_of_frames_ends_the_process(name, tmp_path):
    """Libav aborts where its decoder of H.264 is to hold back more than 16 frames."""
    source = write_video(tmp_path / "source.mkv", 60, bframes=0)
    paths = [str(write_late(tmp_path / f"{late}{name}", source, late)) for late in (16, 17, 40)]
    code = (
        "import sys, numpy; from actionclip.video import read_frames\n"
        "for path in sys.argv[1:]: numpy.save(path + '.npy', read_frames(path, range(60)))"
    )
    subprocess.run([sys.executable, "-c", code, *paths], check=True)
    for path in paths:
        np.testing.assert_array_equal(np.load(path + ".npy"), np.stack(decode_plainly(path)))


def test_frames_come_in_the_order_asked_for(h264_video):
    frames = read_frames(h264_video, [40, 3, 40, 0])
    ordered = read_frames(h264_video, [0, 3, 40])
    assert torch.equal(frames, ordered[[2, 1, 2, 0]])
    assert frames.shape == (4, 3, 64, 96)


def test_frames_look_like_what_was_written(h264_video):
    for i in (0, 17, 59):
        expected = picture(i, 96, 64).transpose(2, 0, 1).astype(int)
        error = np.abs(read_frames(h264_video, [i])[0].numpy().astype(int) - expected)
        other = np.abs(read_frames(h264_video, [(i + 5) % 60])[0].numpy().astype(int) - expected)
        assert error.mean() < 12 < other.mean()


def test_an_edit_list_hides_frames(h264_video, tmp_path, sequential):
    path = remux(h264_video, tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    # elst: version and flags, count, duration, media time; start 20 frames of 512 later.
    at = data.index(b"elst") + 16
    (start,) = struct.unpack_from(">i", data, at)
    struct.pack_into(">i", data, at, start + 20 * 512)
    path.write_bytes(data)
    expected = decode_plainly(path)
    assert len(expected) == 40
    np.testing.assert_array_equal(expected[0], decode_plainly(h264_video)[20])
    assert_exact(path, expected)
    assert not sequential


@pytest.fixture(scope="module")
def open_gop_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("open") / "a.mp4", 60, options=OPEN_GOP)


@pytest.mark.parametrize("drop", [5, 9, 13])  # 9: a key frame that follows the frames before it
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_video_cut_out_of_another(drop, name, open_gop_video, tmp_path):
    path = remux(open_gop_video, tmp_path / name, drop=drop)
    assert_exact(path, decode_plainly(path))


@pytest.mark.parametrize("name", ["a.h264", "a.ts", "a.mkv"])
def test_a_change_of_size_rescales_to_the_first_chosen(name, tmp_path):
    path = write_two_sizes(tmp_path / name, 12, [(96, 64), (64, 64)])
    expected = decode_plainly(path)
    assert [frame.shape[2] for frame in expected] == [96] * 12 + [64] * 12
    frames = read_frames(path, [20, 3]).numpy()
    assert frames.shape == (2, 3, 64, 96)
    np.testing.assert_array_equal(frames[1], expected[3])
    assert np.abs(frames[0].astype(int) - picture(8, 96, 64).transpose(2, 0, 1)).mean() < 40
    np.testing.assert_array_equal(read_frames(path, [20])[0].numpy(), expected[20])


@pytest.mark.parametrize("degrees", ROTATIONS)
def test_rotation_is_applied(degrees, tmp_path):
    path = rotate(write_video(tmp_path / "a.mp4", 5), degrees)
    frame = read_frames(path, [2])[0]
    upright = torch.from_numpy(picture(2, 96, 64)).permute(2, 0, 1)
    expected = torch.rot90(upright, -degrees // 90, (1, 2))  # rot90 turns counter-clockwise
    assert frame.shape == expected.shape
    assert (frame.int() - expected.int()).abs().float().mean() < 12
    np.testing.assert_array_equal(frame.numpy(), decode_plainly(path)[2])


def test_the_transform_sees_each_chosen_frame_once(h264_video):
    seen = []

    def shrink(frame):
        seen.append((frame.shape, frame.dtype))
        return frame[:, ::2, ::2].float() / 255

    frames = read_frames(h264_video, [40, 3, 40], transform=shrink)
    assert seen == [((3, 64, 96), torch.uint8)] * 2
    expected = read_frames(h264_video, [40, 3, 40])[:, :, ::2, ::2].float() / 255
    assert torch.equal(frames, expected)


def test_an_error_of_the_transform_is_not_hidden(h264_video):
    def fail(frame):
        raise OSError("disk of the transform")

    with pytest.raises(OSError, match="disk of the transform"):
        read_frames(h264_video, [0], transform=fail)


def test_choose_is_told_the_number_of_frames(h264_video):
    result = decode(h264_video, lambda n: [0, n - 1])
    assert result.num_frames == 60
    assert result.frames.shape == (2, 3, 64, 96)
    assert not result.damaged
    assert result.damage == ""


@pytest.mark.parametrize("index", [60, -1])
def test_an_index_out_of_range_is_named(h264_video, index):
    message = rf"frame index {index} is out of range: .*h264.mp4 has 60 frames, 0 to 59"
    with pytest.raises(InputError, match=message):
        read_frames(h264_video, [0, index])


def test_choosing_nothing_is_an_error(h264_video):
    with pytest.raises(InputError, match="no frames were chosen"):
        read_frames(h264_video, [])


# Spans of time


def times_of(path, frames_a_second=None):
    """Return when each frame is shown, in seconds since the first, decoding everything."""
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.best("video")))
    if frames_a_second:  # no times in the file
        return [i / frames_a_second for i in range(len(frames))]
    return [float((frame.pts - frames[0].pts) * frame.time_base) for frame in frames]


def test_a_span_is_a_video_of_its_own(kind, sequential):
    path, expected, is_planned = kind
    times = times_of(path, 25 if path.suffix in (".avi", ".h264") else None)
    assert times == sorted(times)
    last = times[-1]
    middle = times[len(times) // 2]
    spans = [(None, last / 2 + 0.02), (last / 2, None), (last / 3, last + 0.02)]
    for start, end in (*spans, (middle, middle + 0.001), (0.0, 1e9)):
        inside = [i for i, t in enumerate(times) if (start or 0) <= t < (end or 1e9)]
        counts = []

        def choose(n, counts=counts):
            counts.append(n)
            return [0, n // 2, n - 1]

        result = decode(path, choose, start_seconds=start, end_seconds=end)
        assert counts[-1] == result.num_frames == len(inside)
        chosen = [inside[i] for i in (0, len(inside) // 2, -1)]
        np.testing.assert_array_equal(
            result.frames.numpy(), np.stack([expected[i] for i in chosen])
        )
    if is_planned is not None:
        assert bool(sequential) is not is_planned


def test_a_span_starts_at_its_start_and_stops_before_its_end(h264_video, monkeypatch):
    for codecs in (video._PLANNED_CODECS, frozenset()):
        monkeypatch.setattr(video, "_PLANNED_CODECS", codecs)
        for first in (3, 7, 14, 29, 58):
            # Frames are 0.04 s apart; a decimal number and the time in the file must be equal.
            start, end = round(first * 0.04, 2), round((first + 1) * 0.04, 2)
            result = decode(h264_video, lambda n: [0], start_seconds=start, end_seconds=end)
            assert result.num_frames == 1
        end = round(60 * 0.04, 2)
        frames = read_frames(h264_video, [0], start_seconds=round(59 * 0.04, 2), end_seconds=end)
        assert torch.equal(frames, read_frames(h264_video, [59]))


def test_damage_outside_of_a_span_does_no_harm(damaged_video, h264_video):
    frames = read_frames(damaged_video, [2], start_seconds=1.92, strict=True)
    assert torch.equal(frames, read_frames(h264_video, [50]))
    result = decode(damaged_video, range, start_seconds=0.4, end_seconds=1.2)
    assert result.damaged
    assert result.num_frames == 17


@pytest.mark.parametrize("codecs", [video._PLANNED_CODECS, frozenset()])
def test_a_span_without_frames(codecs, h264_video, monkeypatch):
    monkeypatch.setattr(video, "_PLANNED_CODECS", codecs)
    message = "no frame is shown from 5 to 7.5 seconds, the last one is at 2.36; correct the span"
    with pytest.raises(VideoError, match=message) as caught:
        read_frames(h264_video, [0], start_seconds=5, end_seconds=7.5)
    assert caught.value.reason == "no-frames"
    with pytest.raises(VideoError, match=r"from 0\.01 to 0\.02 seconds"):
        read_frames(h264_video, [0], start_seconds=0.01, end_seconds=0.02)


def test_a_span_without_frames_where_only_decoding_tells(tmp_path):
    path = write_video(tmp_path / "a.h264", container="h264")
    with pytest.raises(VideoError, match=r"from 5 to inf seconds, the last one is at 1\.16"):
        decode(path, lambda n: [n // n - 1], start_seconds=5)  # n is never 0


def test_a_span_of_a_cut_file(tmp_path):
    whole = write_video(tmp_path / "whole.avi", 60, size=(160, 120))
    path = cut(whole, tmp_path / "a.avi", 0.5)
    assert decode(path, lambda n: [0], end_seconds=0.4).num_frames == 10
    with pytest.raises(VideoError, match=r"damaged: the file is cut short .* download"):
        read_frames(path, [0], start_seconds=2)


def test_positions_are_those_of_the_span(h264_video):
    with pytest.raises(InputError, match=r"frame index 10 is out of range: .* 10 frames, 0 to 9"):
        read_frames(h264_video, [10], start_seconds=1, end_seconds=1.4)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (-1, None, "start_seconds is -1 for .*; use 0 or more"),
        (float("nan"), None, "start_seconds is nan"),
        (float("inf"), None, "start_seconds is inf"),
        (2, 2, "end_seconds is 2 for .*; it must be after the start, 2"),
        (None, 0, "end_seconds is 0"),
        (None, float("nan"), "end_seconds is nan"),
    ],
)
def test_an_impossible_span(start, end, message, h264_video):
    with pytest.raises(InputError, match=message):
        read_frames(h264_video, [0], start_seconds=start, end_seconds=end)
    with pytest.raises(InputError, match=message):
        Span(h264_video, start, end)


# Damage


def cut(source: Path, target: Path, fraction: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * fraction)])
    return target


@pytest.fixture(scope="module", params=["a.mp4", "a.webm", "a.mkv", "a.avi"])
def whole_video(request, webm_video, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / request.param
    if request.param == "a.webm":
        return webm_video
    if request.param == "a.mp4":
        return write_video(path, 60, container_options={"movflags": "faststart"})
    return write_video(path, 60, size=(160, 120))


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_a_cut_file_gives_what_is_left_and_says_so(fraction, whole_video, tmp_path):
    path = cut(whole_video, tmp_path / whole_video.name, fraction)
    result = decode(path, lambda n: [0, n - 1])
    assert result.truncated
    assert result.damaged
    assert 10 < result.num_frames < 60
    assert "the file is cut short" in result.damage
    assert f"{result.num_frames} frames decoded" in result.damage
    assert not decode(whole_video, lambda n: [0]).damaged
    np.testing.assert_array_equal(result.frames[0].numpy(), decode_plainly(whole_video)[0])
    with pytest.raises(VideoError, match="damaged: the file is cut short") as caught:
        decode(path, lambda n: [0], strict=True)
    assert caught.value.reason == "damaged"


def test_countless_boxes_are_not_followed():
    box = struct.pack(">I4s", 8, b"free")
    film = struct.pack(">I4s", 1000, b"mdat")

    class Counted(io.BytesIO):
        reads = 0

        def read(self, *arguments):
            self.reads += 1
            return super().read(*arguments)

    for count, end in ((10, 1080), (video._MOST_BOXES - 1, 8 * video._MOST_BOXES + 992)):
        file = Counted(count * box + film)
        assert video._mp4_end(file, count * 8 + 8) == end
    file = Counted(3 * video._MOST_BOXES * box + film)
    assert video._mp4_end(file, 24 * video._MOST_BOXES + 8) == 0
    assert file.reads <= video._MOST_BOXES


@pytest.mark.parametrize("fraction", [0.5, 0.9])
def test_a_cut_transport_stream_is_only_shorter(fraction, tmp_path):
    whole = write_video(tmp_path / "whole.ts", 60)
    path = cut(whole, tmp_path / "a.ts", fraction)
    assert 10 < decode(path, lambda n: [0, n - 1]).num_frames < 60


def test_a_cut_file_without_its_index_is_an_error(h264_video, tmp_path):
    path = cut(h264_video, tmp_path / "a.mp4", 0.9)
    with pytest.raises(VideoError, match=r"damaged: the file is cut short .* download it again"):
        read_frames(path, [0])


@pytest.mark.parametrize("threads", [2, 3])
def test_damage_is_the_same_with_threads(threads, concealed_video, damaged_video, always_shared):
    for path in (concealed_video, damaged_video):
        one = decode(path, lambda n: [0, 22, 26, n - 1])
        many = decode(path, lambda n: [0, 22, 26, n - 1], threads=threads)
        assert one.damaged
        assert many.damage == one.damage
        assert torch.equal(many.frames, one.frames)


@pytest.fixture
def damaged_video(h264_video, tmp_path):
    """60 packets, of which 20 to 22 in file order are overwritten."""
    data = bytearray(h264_video.read_bytes())
    with av.open(str(h264_video)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for position, size in packets[20:23]:
        data[position : position + size] = b"\xff" * size
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    return path


def test_bad_packets_are_skipped_and_counted(damaged_video):
    result = decode(damaged_video, lambda n: [0, 22, n - 1])
    assert result.skipped_packets == 3
    assert result.num_frames == 57
    assert result.damaged
    assert result.damage == "3 packets could not be decoded; 57 frames decoded"
    with pytest.raises(VideoError, match="damaged: 3 packets"):
        read_frames(damaged_video, [22], strict=True)


@pytest.fixture
def concealed_video(h264_video, tmp_path):
    """60 frames of which one is decoded in part."""
    data = bytearray(h264_video.read_bytes())
    with av.open(str(h264_video)) as container:
        position, size = [(p.pos, p.size) for p in container.demux(video=0) if p.size][24]
    data[position + size // 2 : position + size] = bytes(size - size // 2)
    path = tmp_path / "concealed.mp4"
    path.write_bytes(data)
    return path


def test_concealed_damage_is_counted(concealed_video):
    result = decode(concealed_video, lambda n: [0, 26])
    assert result.corrupt_frames == 1
    assert result.damage == "1 frames are corrupt; 60 frames decoded"


def test_frames_away_from_the_damage_are_whole(damaged_video, h264_video):
    frames = read_frames(damaged_video, [0, 50], strict=True)
    assert torch.equal(frames, read_frames(h264_video, [0, 50]))


def test_the_true_count_decides_what_is_out_of_range(damaged_video):
    counts = []

    def choose(n):
        counts.append(n)
        return [22, 58]

    with pytest.raises(InputError, match=r"frame index 58 is out of range: .* has 57 frames"):
        decode(damaged_video, choose)
    assert counts[0] == 60
    assert counts[-1] == 57


@pytest.fixture(scope="module", params=["h264", "vp9", "open gop mkv", "mpeg4 avi"])
def any_video(request, tmp_path_factory):
    name, arguments, _ = KINDS[request.param]
    return write_video(tmp_path_factory.mktemp("any") / name, **{**arguments, "num_frames": 20})


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bits_never_escape_our_errors(any_video, seed, tmp_path):
    data = bytearray(any_video.read_bytes())
    generator = np.random.default_rng(seed)
    for position in generator.integers(len(data), size=15):
        data[position] ^= 1 << int(generator.integers(8))
    path = tmp_path / any_video.name
    path.write_bytes(data)
    with contextlib.suppress(VideoError):
        assert decode(path, lambda n: [0, n // 2, n - 1]).frames.shape[0] == 3


# Files that are no video


def test_a_missing_file(tmp_path):
    with pytest.raises(VideoError, match=r"nope.mp4: missing: no such file") as caught:
        read_frames(tmp_path / "nope.mp4", [0])
    assert caught.value.path == str(tmp_path / "nope.mp4")


@pytest.mark.parametrize("name", ["http://localhost:9/a.mp4", "concat:a.ts", "a\0b.mp4"])
def test_a_name_is_never_a_url(name):
    with pytest.raises(VideoError, match="missing"):
        read_frames(name, [0])


def test_a_fifo_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="not-a-file"):
        read_frames(tmp_path / "a.mp4", [0])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(h264_video, tmp_path):
    path = remux(h264_video, tmp_path / "a.mp4")
    path.chmod(0)
    with pytest.raises(VideoError, match="permission"):
        read_frames(path, [0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello world\n" * 100, "not-a-video"),
        (b"<html><body>404</body></html>" * 50, "not-a-video"),
        (np.random.default_rng(0).bytes(5000), "not-a-video"),
    ],
    ids=["empty", "text", "html", "noise"],
)
def test_files_that_hold_something_else(content, reason, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError) as caught:
        read_frames(path, [0])
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def test_a_jpeg_is_no_video(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.jpg")
    path = (tmp_path / "a.jpg").rename(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="not-a-video"):
        read_frames(path, [0])


@pytest.mark.parametrize("name", ["list.m3u8", "list.mp4", "list.ts"])
@pytest.mark.parametrize(
    "script",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ],
    ids=["hls", "ffconcat", "sdp"],
)
def test_a_script_cannot_name_another_file(script, name, tmp_path):
    other = write_video(tmp_path / "other.ts", 5)
    os.utime(other, (0, 0))
    path = tmp_path / name
    path.write_text(script.format(other.name))
    with pytest.raises(VideoError, match="not-a-video"):
        read_frames(path, [0])
    # Without the list of containers the first two do open the other file.
    assert other.stat().st_atime == 0


def test_sound_alone_is_no_video(tmp_path):
    with pytest.raises(VideoError, match="no-video-stream"):
        read_frames(write_sound(tmp_path / "a.mp4"), [0])


def test_cover_art_is_not_the_video(tmp_path):
    path = write_cover_art(tmp_path / "a.mp4", num_frames=10)
    assert decode(path, lambda n: [0]).num_frames == 10
    assert read_frames(path, [9]).shape == (1, 3, 64, 96)


def test_an_unknown_codec(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(VideoError, match="unsupported-codec"):
        read_frames(path, [0])


@pytest.mark.parametrize(
    "name", ["a b.mp4", "-a.mp4", "a:b.mp4", "100%03d.mp4", "file:a.mp4", "\u00e9.mp4", b"\xff.mp4"]
)
def test_odd_names(name, h264_video, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        Path(os.fsdecode(name)).write_bytes(h264_video.read_bytes())
    except OSError:
        pytest.skip("this file system refuses the name")
    assert read_frames(os.fsdecode(name), [0]).shape == (1, 3, 64, 96)


# Limits


@pytest.mark.parametrize(
    ("limits", "reason", "remedy"),
    [
        (Limits(max_pixels=96 * 64 - 1), "too-large", "96 x 64 .* raise max_pixels"),
        (Limits(max_aspect=1.4), "too-large", "96 x 64 .* raise max_aspect"),
        (Limits(max_frames=59), "too-long", "over 59 frames; raise max_frames"),
        (Limits(max_hours=0.0001), "too-long", "raise max_hours"),
        (Limits(max_seconds=0.0), "timeout", "over 0 seconds; raise max_seconds"),
    ],
)
def test_limits(limits, reason, remedy, h264_video):
    with pytest.raises(VideoError, match=remedy) as caught:
        read_frames(h264_video, [0], limits=limits)
    assert caught.value.reason == reason


def test_a_header_may_lie_about_the_number_of_frames(webm_video):
    with pytest.raises(VideoError, match="too-long"):  # Matroska claims no number at all
        read_frames(webm_video, [0], limits=Limits(max_frames=59))


def test_a_frame_may_be_larger_than_the_header_says(tmp_path):
    path = write_two_sizes(tmp_path / "a.h264", 5, [(64, 64), (96, 64)])
    with pytest.raises(VideoError, match="too-large: a frame of 96 x 64"):
        read_frames(path, [0], limits=Limits(max_pixels=64 * 64))


# Folders


@pytest.fixture
def frame_folder(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(picture(i, 48, 32)).save(folder / f"img_{i + 1:05d}.png")
    (folder / "notes.txt").write_text("not a frame")
    return folder


def test_a_folder_of_images_is_a_video(frame_folder):
    result = decode(frame_folder, lambda n: [3, 0, 3])
    assert result.num_frames == 4
    expected = np.stack([picture(i, 48, 32).transpose(2, 0, 1) for i in (3, 0, 3)])
    np.testing.assert_array_equal(result.frames.numpy(), expected)


def test_unpadded_numbers_are_in_order(tmp_path):
    for i in range(11):
        Image.fromarray(picture(i, 48, 32)).save(tmp_path / f"img_{i}.png")
    frames = read_frames(tmp_path, [2, 9, 10]).numpy()
    expected = np.stack([picture(i, 48, 32).transpose(2, 0, 1) for i in (2, 9, 10)])
    np.testing.assert_array_equal(frames, expected)


def test_jpeg_frames_are_close_to_pillow(tmp_path):
    Image.fromarray(picture(0, 48, 32)).save(tmp_path / "img_%05d.JPG", "JPEG", quality=95)
    expected = np.asarray(Image.open(tmp_path / "img_%05d.JPG").convert("RGB")).astype(int)
    frame = read_frames(tmp_path, [0])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(frame - expected).mean() < 4


def test_folder_errors_name_the_image(frame_folder):
    with pytest.raises(InputError, match=r"frame index 4 is out of range: .*frames has 4 frames"):
        read_frames(frame_folder, [4])
    with pytest.raises(VideoError, match=r"frames: too-large: frame img_00001.png: .*48 x 32"):
        read_frames(frame_folder, [0], limits=Limits(max_pixels=1000))
    (frame_folder / "img_00002.png").write_bytes(b"#EXTM3U")
    with pytest.raises(VideoError, match=r"not-an-image: frame img_00002.png"):
        read_frames(frame_folder, [1])
    (frame_folder / "img_00003.png").write_bytes(b"")
    with pytest.raises(VideoError, match=r"empty: frame img_00003.png"):
        read_frames(frame_folder, [2])
    assert read_frames(frame_folder, [0, 3]).shape == (2, 3, 32, 48)


def test_the_frames_of_a_folder_have_no_times(frame_folder):
    with pytest.raises(VideoError, match="no-times: the frames of a folder have no times"):
        read_frames(frame_folder, [0], start_seconds=0.5)


def test_a_folder_without_images(tmp_path):
    with pytest.raises(VideoError, match=r"no-frames: no \.jpg or \.png frames"):
        read_frames(tmp_path, [0])


def test_find_videos_is_recursive_and_sorted(tmp_path):
    for name in ("b/2.MKV", "b/1.mp4", "a.webm", "c/d/e.avi", "b/notes.txt", "mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [os.path.relpath(path, tmp_path) for path in find_videos(tmp_path)]
    assert found == ["a.webm", "b/1.mp4", "b/2.MKV", "c/d/e.avi"]


def test_find_videos_needs_a_folder(tmp_path):
    with pytest.raises(VideoError, match="nope: missing"):
        find_videos(tmp_path / "nope")


def test_nothing_is_printed(h264_video, tmp_path, capfd):
    path = cut(h264_video, tmp_path / "a.mp4", 0.9)
    with pytest.raises(VideoError):
        read_frames(path, [0])
    assert capfd.readouterr() == ("", "")


def test_memory_does_not_hold_the_video(h264_video, monkeypatch):
    alive = []
    original = video._ChosenFrames.offer

    def watched(self, position, frame, reformatter):
        original(self, position, frame, reformatter)
        alive.append(len(self._frames))

    monkeypatch.setattr(video._ChosenFrames, "offer", watched)
    monkeypatch.setattr(video, "_PLANNED_CODECS", frozenset())
    read_frames(h264_video, [5, 50])
    assert len(alive) == 60
    assert max(alive) == 2


def test_opening_a_file_imports_nothing(h264_video: Path) -> None:
    """An import by the first open, in two threads at once, can deadlock."""
    code = (
        "import sys; from actionclip.video import read_frames; before = set(sys.modules); "
        f"read_frames({str(h264_video)!r}, [0, 20]); print(sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_an_ebml_header_that_claims_more_than_a_disk_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(b"\x1a\x45\xdf\xa3" + b"\x01" + b"\xfe" * 7 + bytes(200))
    with pytest.raises(VideoError) as caught:
        read_frames(path, [0])
    assert caught.value.reason == "not-a-video"


@pytest.mark.parametrize("content", [b"IHDR", b"CgBI" + bytes(30)])
def test_a_png_whose_size_is_not_where_it_should_be(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + content)
    with pytest.raises(VideoError) as caught:
        read_frames(tmp_path, [0])
    assert caught.value.reason in ("damaged", "not-a-video")

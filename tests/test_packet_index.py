import numpy as np
import pytest

from actionclip.packet_index import PacketIndex, SurpriseError, is_spare, make_plan


def make_index(pts, keys, sizes=1000, spare=()):
    pts = np.array(pts)
    by_pts = np.argsort(pts)
    return PacketIndex(
        pts=pts,
        sizes=np.broadcast_to(sizes, pts.shape),
        is_spare=np.isin(np.arange(len(pts)), spare),
        by_pts=by_pts,
        keys=np.array(keys),
        shown=by_pts,
        is_sound=True,
    )


# Two GOPs of 4 packets, in file order I0 P3 B1 B2 | I6 B4 B5 P7: 4 and 5 also need I0.
OPEN_GOP = make_index([0, 3, 1, 2, 6, 4, 5, 7], [0, 4])


def test_a_packet_is_found_by_its_time():
    assert [OPEN_GOP.packet_at(pts) for pts in range(8)] == [0, 2, 3, 1, 5, 6, 4, 7]
    for pts in (None, -1, 8):
        with pytest.raises(SurpriseError):
            OPEN_GOP.packet_at(pts)


def test_stretches_join_where_they_overlap():
    assert OPEN_GOP.stretches([2]) == [(0, 2)]
    assert OPEN_GOP.stretches([7]) == [(4, 7)]
    assert OPEN_GOP.stretches([1, 7]) == [(0, 1), (4, 7)]
    assert OPEN_GOP.stretches([3, 7]) == [(0, 3), (4, 7)]
    assert OPEN_GOP.stretches([7, 5]) == [(0, 7)]


@pytest.mark.parametrize(
    ("pts", "depth"),
    [
        ([0, 1, 2, 3], 0),
        ([0, 2, 1, 4, 3], 1),
        ([0, 4, 2, 1, 3], 2),  # a pyramid: 4 and 2 wait for 1
        ([0, 8, 4, 2, 1, 3, 6, 5, 7], 3),
    ],
)
def test_frames_held_back_for_their_order(pts, depth):
    assert make_index(pts, [0]).reorder_depth() == depth


def plan(keys, wanted, threads, pixels=100_000, length=300, **arguments):
    return make_plan(make_index(range(length), keys, **arguments), wanted, pixels, threads)


def test_one_thread_joins_what_touches():
    result = plan([0, 100, 200], [99, 150, 250], threads=1)
    assert result.stretches == [(0, 150), (200, 250)]
    assert (result.workers, result.decoder_threads) == (1, 1)


def test_little_work_is_not_shared():
    assert plan([0, 10], [5, 15], threads=8, pixels=1000).workers == 1
    spare = range(300)  # nothing but the wanted frames is decoded
    assert plan([0, 150], [100, 250], threads=2, spare=spare).workers == 1


def test_decoders_side_by_side_where_they_balance():
    result = plan([0, 150], [100, 280], threads=2)
    assert result.stretches == [(150, 280), (0, 100)]  # the longest first
    assert (result.workers, result.decoder_threads) == (2, 1)
    result = plan(range(0, 300, 12), range(5, 300, 24), threads=4)
    assert (result.workers, result.decoder_threads) == (4, 1)


def test_threads_inside_where_one_stretch_is_most_of_the_work():
    result = plan([0], [280], threads=2)
    assert (result.workers, result.decoder_threads) == (1, 3)
    result = plan([0, 270], [269, 280], threads=2)
    assert (result.workers, result.decoder_threads) == (2, 2)
    result = plan([0, 150], [140, 290], threads=16)
    assert (result.workers, result.decoder_threads) == (2, 9)
    assert plan([0], [280], threads=64).decoder_threads == 16


def test_still_pictures_keep_no_threads_busy():
    result = plan([0], [280], threads=2, sizes=100)
    assert (result.workers, result.decoder_threads) == (1, 1)


def test_the_work_is_that_of_the_bytes_and_pixels_that_are_decoded():
    spare = range(1, 100)
    assert plan([0, 100], [99, 199], threads=2).decoder_threads == 1
    assert plan([0, 100], [99, 199], threads=2, spare=spare).decoder_threads == 2
    sizes = np.where(np.arange(300) < 100, 100_000, 1000)
    assert plan([0, 100], [99, 199], threads=2, sizes=sizes).decoder_threads == 2


H264_SLICE, H264_SPARE_SLICE, H264_IDR = 0x41, 0x01, 0x65
HEVC_REFERENCE, HEVC_SPARE, HEVC_KEY = 1 << 1, 0 << 1, 19 << 1


def join(units, length_size=4):
    return b"".join(len(unit).to_bytes(length_size, "big") + unit for unit in units)


def unit(header, is_hevc, is_first):
    """Return a NAL unit; the first bit after its header marks the first slice of a picture."""
    return bytes([header, *([1] if is_hevc else []), 0x80 if is_first else 0x40, 2, 3])


@pytest.mark.parametrize(
    ("headers", "is_hevc", "spare"),
    [
        ([H264_SPARE_SLICE], False, True),
        ([9, H264_SPARE_SLICE, H264_SPARE_SLICE], False, True),
        ([H264_SLICE], False, False),
        ([9, H264_SLICE], False, False),
        ([H264_IDR], False, False),
        ([6, H264_SPARE_SLICE], False, False),  # a message that later frames might need
        ([8, H264_SPARE_SLICE], False, False),  # parameters that they need
        ([9], False, False),
        ([], False, False),
        ([H264_SPARE_SLICE, H264_SLICE], False, False),
        ([H264_SPARE_SLICE, 8], False, False),
        ([H264_SPARE_SLICE, 7, 8], False, False),
        ([H264_SPARE_SLICE, 9, H264_SPARE_SLICE], False, False),
        ([H264_SPARE_SLICE, 6], False, False),
        ([0x80 | H264_SPARE_SLICE], False, False),  # the forbidden bit
        ([0x80 | 9, H264_SPARE_SLICE], False, False),
        ([H264_SPARE_SLICE] * 64, False, True),
        ([H264_SPARE_SLICE] * 65, False, False),
        ([9] * 63 + [H264_SPARE_SLICE], False, True),
        ([9] * 64 + [H264_SPARE_SLICE], False, False),
        ([HEVC_SPARE], True, True),
        ([HEVC_SPARE, HEVC_SPARE], True, True),
        ([HEVC_SPARE, HEVC_REFERENCE], True, False),
        ([HEVC_SPARE, 34 << 1], True, False),
        ([HEVC_SPARE, 40 << 1], True, False),
        ([0x80 | HEVC_SPARE], True, False),
        ([35 << 1, HEVC_SPARE], True, True),
        ([8 << 1], True, True),  # RASL_N
        ([HEVC_REFERENCE], True, False),
        ([HEVC_KEY], True, False),
        ([32 << 1, HEVC_SPARE], True, False),
        ([16 << 1], True, False),
    ],
)
@pytest.mark.parametrize("length_size", [1, 2, 4])
def test_spare_packets(headers, is_hevc, spare, length_size):
    delimiter = 35 << 1 if is_hevc else 9
    units, is_first = [], True
    for header in headers:
        units.append(unit(header, is_hevc, is_first))
        is_first = is_first and header == delimiter
    packet = join(units, length_size)
    assert is_spare(memoryview(packet), is_hevc, length_size) is spare


@pytest.mark.parametrize("is_hevc", [False, True])
def test_a_packet_of_two_frames_is_not_spare(is_hevc):
    header = HEVC_SPARE if is_hevc else H264_SPARE_SLICE
    for firsts, spare in (([1, 0, 0], True), ([1, 0, 1], False), ([0, 0], False)):
        packet = join([unit(header, is_hevc, is_first) for is_first in firsts])
        assert is_spare(memoryview(packet), is_hevc, 4) is spare


@pytest.mark.parametrize("is_hevc", [False, True])
def test_a_broken_packet_is_not_spare(is_hevc):
    delimiter = bytes([35 << 1 if is_hevc else 9])
    packets = [b"", b"\0\0\0", b"\xff\xff\xff\xff" + delimiter, (b"\0\0\0\0" + delimiter) * 50]
    good = join([unit(HEVC_SPARE if is_hevc else H264_SPARE_SLICE, is_hevc, True)])
    assert is_spare(memoryview(good), is_hevc, 4)
    packets += [good[:length] for length in range(len(good))]
    packets += [good + b"\0", good + bytes(4), bytes(4) + good, good + good[:-1]]
    packets += [join([good[4 : 4 + length]]) for length in range(2 if is_hevc else 1)]
    for packet in packets:
        assert not is_spare(memoryview(packet), is_hevc, 4)

"""Find the packets of a video that must be decoded for chosen frames, and share them out.

Between a video file and its frames (`video`): times, key packets and sizes in, stretches of
packet numbers and a number of threads out. Integers and arrays only; opens and decodes
nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

Stretch = tuple[int, int]  # the first packet, a key packet, and the last

# Decoding a byte of H.264 takes as long as decoding this many pixels that cost none.
_PIXELS_PER_BYTE = 16
# In such pixels, about 10 ms. For less, another decoder costs what it saves.
_LEAST_WORK = 2_000_000
# One decoder thread more than cores, because one waits for the frame before its own. It gains
# 1.0 to 1.4x on two cores, and side by side with other decoders no less than without them.
_WAITING_THREADS = 1
# Pictures of fewer bytes a pixel hardly change. They are decoded so fast that threads mostly
# wait: on two cores 0.87x (HEVC) and 0.82x (AV1).
_LEAST_BYTES = 1 / 800
# Each holds a frame; libav starts no more by itself.
_MOST_DECODER_THREADS = 16
# Decoders side by side can keep this share of the cores busy: more threads gain nothing.
_BALANCED = 0.75


class SurpriseError(Exception):
    """The file is not what its packets promise; only decoding all of it can tell."""


@dataclass(frozen=True)
class PacketIndex:
    """What one pass over the packets tells, without decoding. P packets in file order.

    Attributes:
        pts: (P,) presentation times.
        sizes: (P,) bytes.
        is_spare: (P,) bool; whether no other frame refers to this one, as far as known.
        by_pts: (P,) packet numbers sorted by pts.
        keys: ascending numbers of the key packets.
        shown: packet number of each position; an edit list hides the other packets.
        is_sound: whether each pts names one frame and the first packet starts the video.
    """

    pts: np.ndarray
    sizes: np.ndarray
    is_spare: np.ndarray
    by_pts: np.ndarray
    keys: np.ndarray
    shown: np.ndarray
    is_sound: bool

    def packet_at(self, pts: int | None) -> int:
        """Return the number of the packet with this time."""
        if pts is None:
            raise SurpriseError
        rank = int(np.searchsorted(self.pts, pts, sorter=self.by_pts))
        if rank == len(self.pts) or self.pts[self.by_pts[rank]] != pts:
            raise SurpriseError
        return int(self.by_pts[rank])

    def start_for(self, packet: int) -> int:
        """Return the key packet from which this one can be decoded."""
        key = int(np.searchsorted(self.keys, packet, side="right")) - 1
        # A frame shown before its key frame (open GOP) also needs the GOP before.
        while key > 0 and self.pts[packet] < self.pts[self.keys[key]]:
            key -= 1
        return int(self.keys[key])

    def reorder_depth(self) -> int:
        """Return how many frames a decoder must hold back to give them in order of pts."""
        return int((self.by_pts - np.arange(len(self.by_pts))).max())

    def stretches(self, packets: Iterable[int]) -> list[Stretch]:
        """Return the stretches to decode for these packets, without overlap, in file order."""
        stretches: list[Stretch] = []
        for first, last in sorted((self.start_for(packet), packet) for packet in packets):
            if stretches and first <= stretches[-1][1]:
                stretches[-1] = (stretches[-1][0], max(last, stretches[-1][1]))
            else:
                stretches.append((first, last))
        return stretches


@dataclass(frozen=True)
class Plan:
    """How to decode.

    Attributes:
        stretches: in the order in which they are begun.
        workers: how many decoders take stretches from the list.
        decoder_threads: threads of each of these decoders.
    """

    stretches: list[Stretch]
    workers: int = 1
    decoder_threads: int = 1


def make_plan(index: PacketIndex, packets: Iterable[int], pixels: int, threads: int) -> Plan:
    """Choose between decoders side by side, threads inside of them, both and neither.

    Stretches need nothing from each other, so decoders side by side lose no time waiting;
    but one long stretch may hold most of the work. Threads inside of a decoder share any
    stretch, but wait for each other.

    Args:
        index: the packets of the video.
        packets: numbers of the packets whose frames are wanted.
        pixels: width x height of a frame.
        threads: how many cores decoding may keep busy.
    """
    stretches = index.stretches(packets)
    cost = np.where(index.is_spare, 0, pixels + _PIXELS_PER_BYTE * index.sizes)
    work = {(first, last): int(cost[first : last + 1].sum()) for first, last in stretches}
    total, longest = sum(work.values()), max(work.values())
    if threads == 1 or total < _LEAST_WORK:
        return Plan(_joined(stretches))
    workers = min(threads, len(stretches))
    decoder_threads = 1
    is_still = index.sizes.mean() < _LEAST_BYTES * pixels
    if total < _BALANCED * threads * longest and not is_still:
        decoder_threads = min(threads // workers + _WAITING_THREADS, _MOST_DECODER_THREADS)
    # The longest first, so that what is left at the end is short.
    return Plan(sorted(stretches, key=lambda s: -work[s]), workers, decoder_threads)


def _joined(stretches: list[Stretch]) -> list[Stretch]:
    """Join stretches that touch, so that a single decoder need not stop between them."""
    joined: list[Stretch] = []
    for first, last in stretches:
        if joined and first == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return joined


def is_spare(packet: memoryview, is_hevc: bool, length_size: int) -> bool:
    """Tell whether a packet of H.264 or HEVC is a frame to which no other refers.

    A packet with anything besides the slices of one frame and a delimiter before them is not
    spare: others might need it.

    Args:
        packet: NAL units, each after its length.
        is_hevc: HEVC, in one temporal layer, rather than H.264.
        length_size: bytes of each length.

    Source: ITU-T H.264, 7.3.1, 7.3.3 and table 7-1; ITU-T H.265, 7.3.1.2, 7.3.6.1 and table 7-1.
    """
    header_size, delimiter = (2, _HEVC_DELIMITER) if is_hevc else (1, _H264_DELIMITER)
    end, has_slice = 0, False
    for _ in range(_MOST_UNITS):
        header = end + length_size
        end = header + int.from_bytes(packet[end:header], "big")
        content = header + header_size
        if not content < end <= len(packet):
            return False
        # Whole, so that the forbidden bit or a reference makes it another kind.
        kind = packet[header] >> 1 if is_hevc else packet[header]
        if has_slice or kind != delimiter:
            is_spare_slice = kind < 16 and kind % 2 == 0 if is_hevc else kind == _H264_SPARE
            # The first bit of a slice tells the first of a picture from its others.
            is_first = packet[content] >= 128
            if not is_spare_slice or is_first is has_slice:
                return False
            has_slice = True
        if end == len(packet):
            return has_slice
    return False


_H264_DELIMITER, _HEVC_DELIMITER = 9, 35
_H264_SPARE = 1  # nal_ref_idc 0 and a slice of a picture that is not IDR
_MOST_UNITS = 64  # ours; encoders cut a frame into about as many slices as they have threads

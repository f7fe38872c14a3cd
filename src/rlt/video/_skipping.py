"""Packets of a video that nobody needs decoded: no frame refers to them, no moment asked for is nearest to them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import av
    from av.video.stream import VideoStream

SKIPPABLE = frozenset({"h264", "hevc"})
"""Codecs whose packets say whether other frames refer to theirs."""

_LOOK_AHEAD = 4  # packets: what shows that a frame is not the nearest one mostly came before it

_KNOWN = 64
"""Packets whose times are remembered; H.264 and HEVC reorder 16 frames at most."""
_MOMENTS = 1024
_MOST_AT_ONCE = 1 << 16  # moments between two packets: a broken time may lie years ahead


class Unwanted:
    """Times of packets in the order of decoding -> whether the frame of one can be left out.

    A frame is left out where each moment asked for is nearer to another frame that a packet was seen of. So what
    `nearest_in_time` takes stays, whatever the rate, and the last frame of the video stays, too, which says where it
    ends.
    """

    def __init__(self, moments: Iterable[Fraction]) -> None:
        self._coming = iter(moments)
        self._moments: list[Fraction] = []
        self._are_forgotten = self._is_lost = False
        self._known: list[int] = []

    def see(self, ticks: int) -> None:
        """A packet with a frame of that time is about to be decoded, now or soon."""
        insort(self._known, ticks)
        if len(self._known) > _KNOWN:
            del self._known[0]

    def __call__(self, ticks: int) -> bool:
        """Whether no moment asked for is nearest to this time."""
        if not self._draw(ticks):
            return False
        at = bisect_left(self._moments, ticks)
        if at == 0 and self._are_forgotten:
            return False
        place = bisect_left(self._known, ticks)
        later = next((other for other in self._known[place:] if other > ticks), None)
        if later is None:
            return False
        if at < len(self._moments) and later - self._moments[at] >= self._moments[at] - ticks:
            return False
        if at == 0:
            return True
        return place > 0 and self._moments[at - 1] - self._known[place - 1] <= ticks - self._moments[at - 1]

    def _draw(self, ticks: int) -> bool:
        """Take moments until one lies behind `ticks`, and say whether that came to an end: else nothing is left out."""
        num_drawn = 0
        while not self._is_lost and (not self._moments or self._moments[-1] < ticks):
            moment = next(self._coming, None)
            if moment is None:
                break
            self._moments.append(moment)
            if len(self._moments) > 2 * _MOMENTS:
                del self._moments[:_MOMENTS]
                self._are_forgotten = True
            num_drawn += 1
            self._is_lost = num_drawn == _MOST_AT_ONCE
        return not self._is_lost


class References:
    """Whether other frames may refer to the frame of a packet, as its own units (NAL) say it: H.264 and HEVC.

    H.264 writes it into every slice. In HEVC a picture that nothing of its own temporal layer refers to may serve a
    higher one, so only those of the highest layer count. What cannot be read counts as referred to.
    """

    def __init__(self, codec: str, extradata: bytes | None) -> None:
        self._codec = codec
        self._length_size = 0  # units stand behind start codes
        self._num_layers = 0  # not known
        header = extradata or b""
        if codec == "h264" and len(header) > 6 and header[0] == 1:  # avcC: units stand behind their lengths
            self._length_size = (header[4] & 3) + 1
        elif codec == "hevc" and len(header) > 22 and (header[0] or header[1] or header[2] > 1):  # hvcC
            self._length_size, self._num_layers = (header[21] & 3) + 1, header[21] >> 3 & 7
        else:
            for unit in _after_start_codes(header):
                self._look_at_layers(unit)

    def __call__(self, packet: av.Packet[VideoStream]) -> bool:
        """Whether the frame of this packet may be needed for others."""
        data = bytes(packet)
        units = _after_lengths(data, self._length_size) if self._length_size else _after_start_codes(data)
        slices = [refers for unit in units if (refers := self._refers(unit)) is not None]
        return not slices or any(slices)

    def _refers(self, unit: bytes) -> bool | None:
        """Whether a unit belongs to a picture that others may refer to; None for one without a picture."""
        if len(unit) < 3:
            return True
        if self._codec == "h264":
            return bool(unit[0] & 0x60) if 1 <= unit[0] & 31 <= 5 else None
        self._look_at_layers(unit)
        kind = unit[0] >> 1 & 63
        if kind > 31:
            return None
        is_highest = (unit[1] & 7) == self._num_layers
        return not (kind < 15 and kind % 2 == 0 and is_highest)

    def _look_at_layers(self, unit: bytes) -> None:
        """Raise the number of temporal layers to what sequence parameters of HEVC promise, or a unit belongs to."""
        if self._codec == "hevc" and len(unit) > 2:
            promised = (unit[2] >> 1 & 7) + 1 if unit[0] >> 1 & 63 == 33 else 0
            self._num_layers = max(self._num_layers, unit[1] & 7, promised)


def _after_lengths(data: bytes, size: int) -> Iterator[bytes]:
    """First bytes of the units of a packet; an empty one where a length does not fit."""
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + size], "big")
        position += size
        yield data[position : position + 3] if 0 < length <= len(data) - position else b""
        position += length


def _after_start_codes(data: bytes) -> Iterator[bytes]:
    position = data.find(b"\0\0\1")
    while position >= 0:
        yield data[position + 3 : position + 6]
        position = data.find(b"\0\0\1", position + 3)


class Judged(NamedTuple):
    """A packet on its way to the decoder."""

    packet: av.Packet[VideoStream] | None
    """None tells the decoder to give what it still holds."""
    ticks: int | None
    """When its frame is shown; None if it does not say."""
    is_unwanted: bool = False
    """Whether its frame can be left out."""


def judge(
    packets: Iterable[av.Packet[VideoStream]], origin: int, unwanted: Unwanted, is_referred_to: References
) -> Iterator[Judged]:
    """Say of each packet whether its frame can be left out; reads a few packets ahead."""
    waiting: deque[tuple[av.Packet[VideoStream], int | None, bool]] = deque()

    def look(packet: av.Packet[VideoStream], ticks: int | None, shows: bool) -> Judged:
        can_go = not is_referred_to(packet) and shows
        return Judged(packet, ticks, can_go and ticks is not None and unwanted(ticks))

    for packet in packets:
        ticks = ticks_of(packet, origin)
        shows = ticks is not None and ticks >= 0 and not packet.is_discard and not packet.is_corrupt
        if ticks is not None and shows:
            unwanted.see(ticks)
        waiting.append((packet, ticks, shows))
        if len(waiting) > _LOOK_AHEAD:
            yield look(*waiting.popleft())
    yield from (look(*one) for one in waiting)


def ticks_of(packet: av.Packet[VideoStream], origin: int) -> int | None:
    """When the frame of a packet is shown, from the first one on."""
    return None if packet.pts is None else packet.pts - origin

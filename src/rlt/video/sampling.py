"""Which frames of a video make a clip: exact arithmetic on frame numbers, deterministic, no video library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError


@dataclass(frozen=True, order=True)
class Timed:
    """When something is shown, in a unit of time of the caller's choice."""

    ticks: int
    """From the first frame of the video on."""
    duration: int
    """For how long; 0 = not known."""


TimedT = TypeVar("TimedT", bound=Timed)


def clip_starts(num_video_frames: int, num_clips: int, span: int) -> list[int]:
    """First frames of clips that are spread evenly over a video.

    One clip is centred. Several reach from the first frame to the last one: the first starts at 0, the last ends with
    the video, and starts in between are rounded down. They overlap if the video is short; in a video shorter than
    `span` (the frames that one clip covers, `ClipSpec.span`) all of them start at 0.
    """
    at_least(1, num_video_frames=num_video_frames, num_clips=num_clips, span=span)
    room = max(num_video_frames - span, 0)
    if num_clips == 1:
        return [room // 2]
    return [position * room // (num_clips - 1) for position in range(num_clips)]


def segment_indices(num_video_frames: int, offsets: Sequence[float]) -> list[int]:
    """One frame from each of `len(offsets)` equal segments of a video, in ascending order.

    `offsets` say where in its segment each frame lies, from 0 (its first frame) to below 1: uniform random numbers
    make the choice uniform over the segment. In a video with fewer frames than segments some are taken more than once.
    """
    at_least(1, num_video_frames=num_video_frames, num_segments=len(offsets))
    if not all(0 <= offset < 1 for offset in offsets):
        raise InvalidArgumentError(f"offsets are {list(offsets)}; fractions of a segment from 0 to below 1 are needed")
    return [
        min(int((segment + offset) * num_video_frames / len(offsets)), num_video_frames - 1)
        for segment, offset in enumerate(offsets)
    ]


def nearest_in_time(stream: Iterable[TimedT], targets: Iterable[Fraction], frame_ticks: Fraction) -> Iterator[TimedT]:
    """For each moment the frame whose time is nearest, read from a stream in one pass.

    Reads one frame past a moment at most, none if the frame stands exactly there. Ties go to the earlier frame. Ends
    with the last frame of the stream, which is shown for `frame_ticks` where it does not say so itself.

    Frames and `targets` (in ticks, endless if need be) ascend in time.
    """
    frames = iter(stream)
    previous: TimedT | None = None
    current = next(frames, None)
    for target in targets:
        # Containers round times to their ticks: half a tick short of the moment still is the moment.
        while current is not None and current.ticks < target - Fraction(1, 2):
            previous, current = current, next(frames, None)
        around = (frame for frame in (previous, current) if frame is not None)
        nearest = min(around, key=lambda frame: abs(frame.ticks - target), default=None)
        if nearest is None:
            return
        if current is None and target >= nearest.ticks + max(Fraction(nearest.duration), frame_ticks) - frame_ticks / 2:
            return
        yield nearest

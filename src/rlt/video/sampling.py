"""Which frames of a video make a clip: exact arithmetic on frame numbers, deterministic, no video library."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Protocol, TypeVar

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError


class Timed(Protocol):
    """Anything that is shown from a moment on."""

    @property
    def ticks(self) -> int:
        """When, in a unit of time of the caller's choice."""

    @property
    def duration(self) -> int:
        """For how long, in the same unit; 0 = not known."""


TimedT = TypeVar("TimedT", bound=Timed)


def clip_starts(num_video_frames: int, num_clips: int, span: int) -> list[int]:
    """First frames of clips that are spread evenly over a video.

    One clip is centred. Several reach from the first frame to the last one: the first starts at 0, the last ends with
    the video, and starts in between are rounded down. They overlap if the video is short; in a video shorter than
    `span` all of them start at 0.

    Args:
        num_video_frames: frames of the video, at least 1.
        num_clips: how many clips to take, at least 1.
        span: frames of the video that one clip covers (`ClipSpec.span`), at least 1.

    Returns:
        `num_clips` frame numbers in ascending order, each from 0 to max(num_video_frames - span, 0).

    Raises:
        InvalidArgumentError: if an argument is below 1.
    """
    at_least(1, num_video_frames=num_video_frames, num_clips=num_clips, span=span)
    room = max(num_video_frames - span, 0)
    if num_clips == 1:
        return [room // 2]
    return [position * room // (num_clips - 1) for position in range(num_clips)]


def segment_indices(num_video_frames: int, offsets: Sequence[float]) -> list[int]:
    """One frame from each of `len(offsets)` equal segments of a video.

    Args:
        num_video_frames: frames of the video, at least 1. In a video with fewer frames than segments some frames are
            taken more than once.
        offsets: where in its segment each frame lies, from 0 (its first frame) to below 1. Uniform random numbers
            make the choice uniform over the segment; 0.5 everywhere takes the middles.

    Returns:
        Frame numbers in ascending order.

    Raises:
        InvalidArgumentError: if num_video_frames is below 1, or an offset is out of range.
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

    Reads one frame past a moment at most, none if the frame stands exactly there.

    Args:
        stream: frames in ascending order of `ticks`.
        targets: moments in ticks, ascending, endless if need be.
        frame_ticks: how long a frame is shown where it does not say so itself.

    Returns:
        One frame per moment (ties go to the earlier one), until the last frame of the stream has ended.
    """
    frames = iter(stream)
    previous: TimedT | None = None
    current = next(frames, None)
    for target in targets:
        # Containers round times to their ticks: half a tick short of the moment still is the moment.
        while current is not None and current.ticks < target - Fraction(1, 2):
            previous, current = current, next(frames, None)
        if current is not None and (previous is None or current.ticks - target < target - previous.ticks):
            yield current
        elif previous is not None:
            if (
                current is None
                and target >= previous.ticks + max(Fraction(previous.duration), frame_ticks) - frame_ticks / 2
            ):
                return
            yield previous
        else:
            return

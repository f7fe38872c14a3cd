"""Which frames make a clip, and how large they are: one value for everything that reads video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import Any

from rlt.checks import at_least, exclusive, one_of
from rlt.errors import InvalidArgumentError
from rlt.video._limits import Limits
from rlt.video.geometry import check_size
from rlt.video.sampling import clip_starts, segment_indices

Place = Fraction | int
"""A moment of a video, counted in its frames from the first one; halves lie between two frames."""


@dataclass(frozen=True)
class ClipSpec:
    """Frames and size of a clip."""

    num_frames: int = 16
    """Frames in a clip, at least 1; a multiple of the model's tubelet size."""
    frame_stride: int | None = None
    """For "dense": distance of two sampled frames in frames of the video, at least 1; 4 if neither it nor fps is
    given, None beside fps."""
    fps: float | None = None
    """For "dense", instead of frame_stride: sampled frames per second of the video's time, above 0; above the video's
    own rate frames are taken several times."""
    size: Any = 224
    """Height and width in pixels, or a pair [height, width]; each at least 1 and a multiple of the model's patch size.
    Without a model also None: as large as the video has them."""
    sampling: str = "dense"
    """"dense" takes frames `frame_stride` apart from one part of the video (Kinetics), "uniform" takes one frame of
    each of `num_frames` equal segments of the whole video (Something-Something)."""

    def __post_init__(self) -> None:
        at_least(1, num_frames=self.num_frames, frame_stride=self.frame_stride)
        exclusive(frame_stride=self.frame_stride, fps=self.fps)
        if self.frame_stride is None and self.fps is None:
            object.__setattr__(self, "frame_stride", 4)
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        limits, (height, width) = Limits.current(), check_size(self.size) or (1, 1)
        limits.check_asked(num_frames=self.num_frames)
        if problem := limits.bytes_problem(self.num_frames * height * width):
            raise InvalidArgumentError(f"num_frames is {self.num_frames} and size is {self.size}, which {problem}")
        one_of(("dense", "uniform"), sampling=self.sampling)
        if self.fps is None:
            return
        if not 0 < self.fps < float("inf"):
            raise InvalidArgumentError(f"fps is {self.fps}; sampled frames per second, more than 0, are needed")
        if self.sampling == "uniform":
            raise InvalidArgumentError(f"fps is {self.fps} and sampling is 'uniform', which has no rate; give one")

    def changed(
        self,
        *,
        num_frames: int | None = None,
        frame_stride: int | None = None,
        fps: float | None = None,
        size: Any = None,
    ) -> ClipSpec:
        """A copy with other values where they are given. Of frame_stride and fps either takes the other's place, and
        that of uniform sampling.

        Raises:
            InvalidArgumentError: for both of them, or a value out of range.
        """
        exclusive(frame_stride=frame_stride, fps=fps)
        given = {"num_frames": num_frames, "size": size}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if frame_stride is not None or fps is not None:
            changes |= {"frame_stride": frame_stride, "fps": fps, "sampling": "dense"}
        return replace(self, **changes)

    @property
    def frame_size(self) -> tuple[int, int]:
        """(height, width) of the frames in pixels.

        Raises:
            InvalidArgumentError: if `size` is None, which each video answers for itself.
        """
        sides = check_size(self.size)
        if sides is None:
            raise InvalidArgumentError("size is None; a number of pixels or a pair (height, width) is needed here")
        return sides

    def step(self, rate: Fraction) -> Place:
        """Distance of two sampled frames in frames of a video that has `rate` of them a second."""
        return rate / Fraction(str(self.fps)) if self.frame_stride is None else self.frame_stride

    def span(self, rate: Fraction) -> int:
        """Frames of the video from the first to the last frame of a dense clip, both counted, to the nearest one."""
        return floor((self.num_frames - 1) * self.step(rate) + Fraction(3, 2))

    def places(self, start: Place, rate: Fraction) -> list[Place]:
        """Where the frames of a dense clip lie that begins at `start`, past the end of the video or not."""
        return [start + index * self.step(rate) for index in range(self.num_frames)]

    def spread(self, num_clips: int, num_video_frames: int, rate: Fraction) -> list[list[Place]]:
        """Where the frames of `num_clips` clips lie, always the same ones.

        Dense clips are spread evenly from the beginning to the end of the video, a single one lies in its middle.
        Uniform clip j of n takes from each segment the frame at j / n of its length, as VideoMAE does for two; a
        single one takes the middle frames.

        Raises:
            InvalidArgumentError: if `num_clips` or `num_video_frames` is below 1.
        """
        if self.sampling == "uniform":
            at_least(1, num_clips=num_clips)
            offsets = [clip / num_clips for clip in range(num_clips)] if num_clips > 1 else [0.5]
            return [[*segment_indices(num_video_frames, [offset] * self.num_frames)] for offset in offsets]
        return [self.places(start, rate) for start in clip_starts(num_video_frames, num_clips, self.span(rate))]

"""Decoders by name: a table that a program may add its own to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Protocol

from rlt.video import _pyav
from rlt.video._pyav import TimedFrame, VideoFile


class Decoder(Protocol):
    """What a decoder does: frames of a video at given moments."""

    def __call__(self, file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
        """For each moment the frame whose time is nearest (`rlt.video.sampling.nearest_in_time`), until the video ends.

        Args:
            file: the open video: its source, stream, times of its packets (`scan`), and PyAV's decoding (`decode`).
            moments: in units of `file.tick` from the first frame, at least one, ascending, maybe equal, maybe endless.

        Returns:
            One frame per moment; those of the same time must be the same picture.
        """


def _torchcodec(file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
    from rlt.video._torchcodec import frames_at  # optional package

    return frames_at(file, moments)


DECODERS: dict[str, Decoder] = {
    "pyav": _pyav.frames_at,
    "pyav_whole": _pyav.whole_frames_at,
    "torchcodec": _torchcodec,
}
"""Values of `decoder`. "pyav_whole" gives the frames of "pyav", but decodes those that nobody asks for, too, and so
sees damage in them. The default does not depend on what happens to be installed, so that masks do not either."""

"""The overlay: video in which dropped patches are dimmed, as H.264 that plays everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from rlt.errors import MissingDependencyError
from rlt.inspection.views import ClipView
from rlt.video.libav import av

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

_ENCODER = "libx264"
# A third of the default distance of key frames, so that people can jump about in a clip of seconds.
_ENCODER_OPTIONS = {"crf": "21", "preset": "medium", "g": "24"}


@dataclass(frozen=True)
class OverlayInfo:
    """What the overlay covers."""

    start: float
    """Time of its first frame in the video, in seconds."""
    seconds: float
    """How long it plays."""
    num_frames: int
    """Frames in it."""
    fps: float
    """Frames a second: the sampled ones, so that time runs as it did."""


def write_overlay(views: Iterable[ClipView], path: Path, *, fps: float, max_seconds: float) -> OverlayInfo:
    """Encode clips on end, of one size with even sides, but no frame later than `max_seconds` after the first."""
    rate = Fraction(fps).limit_denominator(60_000) or Fraction(1, 60_000)  # a file may claim a frame a year
    start, num_frames = 0.0, 0
    with av.open(str(path), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = _add_stream(container, rate)
        for view in views:
            if num_frames == 0:
                start = float(view.times[0])
                stream.height, stream.width = view.frames.shape[1:3]
            for number in range(int((view.times < start + max_seconds).sum())):
                frame = av.VideoFrame.from_ndarray(view.dimmed(number).numpy(), format="rgb24")
                frame.pts, frame.time_base = num_frames, 1 / rate
                container.mux(stream.encode(frame))
                num_frames += 1
        container.mux(stream.encode())
    return OverlayInfo(start, num_frames / float(rate), num_frames, float(rate))


def _add_stream(container: OutputContainer, rate: Fraction) -> VideoStream:
    try:
        stream = container.add_stream(_ENCODER, rate=rate, options=_ENCODER_OPTIONS)
    except av.codec.codec.UnknownCodecError:
        raise MissingDependencyError(
            f"the installed PyAV has no {_ENCODER}, which the overlay needs; install its wheel with: pip install av"
        ) from None
    assert isinstance(stream, av.video.stream.VideoStream)  # add_stream knows the kind only when it runs
    stream.pix_fmt = "yuv420p"
    return stream

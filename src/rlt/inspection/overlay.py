"""The overlay: video in which dropped patches are dimmed, as H.264 that plays everywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import inf
from pathlib import Path

import av
import torch
from av.container import OutputContainer
from av.video.stream import VideoStream
from torch import Tensor

from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.inspection.views import ClipView

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


def write_overlay(views: Iterable[ClipView], path: Path, *, fps: float, max_seconds: float = inf) -> OverlayInfo:
    """Encode clips on end, with the memory of one clip.

    Args:
        views: clips of the same size.
        path: the MP4 file to write.
        fps: sampled frames a second.
        max_seconds: frames that come later after the first one are left out.

    Raises:
        MissingDependencyError: if the installed PyAV has no H.264 encoder.
        InvalidArgumentError: if there is nothing to encode.
    """
    rate = Fraction(fps).limit_denominator(60_000)
    start, num_frames = 0.0, 0
    with av.open(str(path), mode="w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = _add_stream(container, rate)
        for view in views:
            if num_frames == 0:
                start = float(view.times[0])
                stream.height, stream.width = (side + side % 2 for side in view.frames.shape[1:3])
            for number in range(int((view.times < start + max_seconds).sum())):
                frame = av.VideoFrame.from_ndarray(_even(view.dimmed(number)).numpy(), format="rgb24")
                frame.pts, frame.time_base = num_frames, 1 / rate
                container.mux(stream.encode(frame))
                num_frames += 1
        if num_frames == 0:
            raise InvalidArgumentError("no frames to encode; give at least one clip")
        container.mux(stream.encode())
    return OverlayInfo(start, num_frames / float(rate), num_frames, float(rate))


def _add_stream(container: OutputContainer, rate: Fraction) -> VideoStream:
    try:
        stream = container.add_stream(_ENCODER, rate=rate, options=_ENCODER_OPTIONS)
    except av.codec.codec.UnknownCodecError:
        raise MissingDependencyError(
            f"the installed PyAV has no {_ENCODER}, which the overlay needs; install its wheel with: pip install av"
        ) from None
    assert isinstance(stream, VideoStream)  # add_stream knows the kind only when it runs
    stream.pix_fmt = "yuv420p"
    return stream


def _even(pixels: Tensor) -> Tensor:
    """Repeat the last row and column of uint8 [H, W, 3] where a side is odd: 4:2:0 video has even sides."""
    height, width, _ = pixels.shape
    rows, columns = (torch.arange(side + side % 2).clamp(max=side - 1) for side in (height, width))
    return pixels[rows][:, columns].contiguous() if height % 2 or width % 2 else pixels.contiguous()

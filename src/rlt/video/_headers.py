"""What the headers of an open container say: which stream is the video, its rate, and its length."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING

from rlt.errors import VideoError
from rlt.video.libav import av

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_DURATION = re.compile(r"(\d{1,6}):(\d{1,2}):(\d{1,2}(?:\.\d{1,9})?)")  # Matroska, per stream: 00:00:05.000000000


def best_stream(container: InputContainer, name: str) -> VideoStream:
    """libav's choice among the video streams (default, then largest), without cover art."""
    disposition = av.stream.Disposition
    cover = disposition.attached_pic
    pictures = [stream for stream in container.streams.video if cover in disposition(stream.disposition)]
    moving = [stream for stream in container.streams.video if stream not in pictures]
    best = container.streams.best("video")
    stream = best if best in moving else next(iter(moving), None)
    if stream is None or not isinstance(stream, av.video.stream.VideoStream):
        held = sorted({stream.type for stream in container.streams})
        kinds = "only cover art and audio" if pictures else f"only {' and '.join(held)}" if held else "nothing"
        raise VideoError(f"{name}: no video stream, the file holds {kinds}; give a file with a picture track")
    if stream.codec_context is None:
        raise VideoError(
            f"{name}: FFmpeg has no decoder for its video; convert it with `ffmpeg -i IN -c:v libx264 OUT.mp4`"
        )
    return stream


def frame_rate(stream: VideoStream) -> Fraction:
    """Frames a second: the exact rate of a constant-rate stream, the average one otherwise."""
    average, base = stream.average_rate, stream.base_rate
    # The average of a constant-rate file is a little off where the last frame has an odd duration.
    if average and base and abs(base / average - 1) < Fraction(1, 50):
        return Fraction(base)
    return Fraction(average or stream.guessed_rate or base or 25)


def declared_seconds(stream: VideoStream, container: InputContainer) -> Fraction | None:
    """Length of the stream in seconds as the headers have it."""
    if stream.duration and stream.time_base:
        return stream.duration * stream.time_base
    if tag := _DURATION.fullmatch(stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = tag.groups()
        length = int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
        start = (stream.start_time or 0) * (stream.time_base or Fraction(0))
        if length > start:
            return Fraction(length - start)
    return Fraction(container.duration, 1_000_000) if container.duration and container.duration > 0 else None

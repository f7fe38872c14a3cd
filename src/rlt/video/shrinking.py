"""Small copies of videos that are read in a fraction of the time, for training without a GPU."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from rlt.checks import at_least
from rlt.files import replacing
from rlt.video._sources import Source
from rlt.video.clips import iter_clips, probe
from rlt.video.libav import av

_FRAMES_AT_ONCE = 32
_TICK = Fraction(1, 1000)
"""Matroska keeps times to the millisecond."""


def shrink_video(source: Source, target: str | Path, *, short_side: int) -> tuple[int, int]:
    """Write a copy of a video whose shorter side is `short_side`, with the same frames at the same times, no sound.

    Of a variable rate these are the frames that its average rate meets. The pixels lie in the file as they are (YUV
    4:2:0 in Matroska), which is large and asks for no decoding: two seconds of 160x120 pixels at 25 frames a second are
    1.4 MB, and a training clip is read in a tenth to four tenths of the time. Sides are rounded to even numbers, a
    video that is smaller already keeps its size, and rotation is applied.

    Args:
        source: as for `rlt.read_clip`.
        target: file to write, ending in .mkv; it appears when it is whole.
        short_side: in pixels, at least 2.

    Returns:
        Width and height of the copy in pixels.

    Raises:
        VideoError: as `rlt.iter_clips`; nothing is written then.
        InvalidArgumentError: if `short_side` is below 2, or `target` cannot be written.
    """
    at_least(2, short_side=short_side)
    info = probe(source)
    scale = min(short_side / min(info.width, info.height), 1)
    width, height = (max(round(side * scale / 2), 1) * 2 for side in (info.width, info.height))
    with replacing(target) as temporary, av.open(str(temporary), "w", format="matroska") as container:
        stream = container.add_stream("rawvideo", rate=Fraction(info.fps).limit_denominator(60_000))
        assert isinstance(stream, av.video.stream.VideoStream)  # add_stream knows the kind only when it runs
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = _TICK
        last = -1
        for clip in iter_clips(source, num_frames=_FRAMES_AT_ONCE, frame_stride=1, size=(height, width), num_threads=1):
            for pixels, seconds in zip(clip.frames, clip.times.tolist(), strict=True):
                ticks = round(seconds / _TICK)
                if ticks > last:  # a frame that stands long, or is repeated at the end, is written once
                    frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
                    frame.pts, frame.time_base, last = ticks, _TICK, ticks
                    container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return width, height

"""The only module that imports torchcodec: the second decoder, asked for by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from importlib import import_module
from itertools import islice
from typing import Any

from rlt.errors import MissingDependencyError, VideoError
from rlt.video._pyav import TimedFrame, VideoFile
from rlt.video._sources import library_input
from rlt.video.libav import av
from rlt.video.sampling import nearest_in_time

try:
    VideoDecoder: Any = import_module("torchcodec.decoders").VideoDecoder
except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: no FFmpeg library that it can load
    reason = str(error).strip().splitlines()[0]
    raise MissingDependencyError(
        f'torchcodec cannot be imported ({reason}); run `pip install "rlt[torchcodec]"` and install the FFmpeg '
        'libraries, or leave decoder="pyav"'
    ) from None

_FRAMES_AT_ONCE = 4  # full-size RGB frames in memory; between two such calls the clock is looked at


def frames_at(file: VideoFile, moments: Iterable[Fraction], /) -> Iterator[TimedFrame]:
    """Frames shown at `moments`, as `rlt.video.Decoder` says, as full-size RGB, turned upright.

    torchcodec's own conversion to RGB rounds otherwise (about one grey level darker), it conceals damage within a
    file, and it does not undo mirrored display matrices.
    """
    chosen = nearest_in_time(file.scan(), moments, file.frame_ticks)
    source = file.source
    try:
        decoder = VideoDecoder(
            os.fspath(source) if isinstance(source, str | os.PathLike) else library_input(source),
            stream_index=file.stream.index,
            dimension_order="NHWC",
            num_ffmpeg_threads=file.num_threads,
        )
        while ticks := [packet.ticks for packet in islice(chosen, _FRAMES_AT_ONCE)]:
            file.check_clock()
            # Half a tick late, so that rounding to seconds never falls back to the frame before.
            seconds = [float((file.origin + moment + Fraction(1, 2)) * file.tick) for moment in ticks]
            for moment, rgb in zip(ticks, decoder.get_frames_played_at(seconds).data, strict=True):
                yield TimedFrame(moment, 0, av.VideoFrame.from_ndarray(rgb.numpy(), format="rgb24"))
    except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VideoError(f"{file.name}: torchcodec cannot decode it ({reason}); try decoder='pyav'") from None

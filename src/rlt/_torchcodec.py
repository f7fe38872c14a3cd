"""The only module that imports torchcodec: the second decoder, asked for by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import av

from rlt._pyav import TimedFrame, VideoFile
from rlt._sources import Source
from rlt.errors import MissingDependencyError, VideoError

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: no FFmpeg library that it can load
    reason = str(error).strip().splitlines()[0]
    raise MissingDependencyError(
        f'torchcodec cannot be imported ({reason}); run `pip install "rlt[torchcodec]"` and install the FFmpeg '
        'libraries, or leave decoder="pyav"'
    ) from None

_FRAMES_AT_ONCE = 4  # full-size RGB frames in memory


def decode_at(file: VideoFile, ticks: Sequence[int]) -> Iterator[TimedFrame]:
    """Frames shown at `ticks` of the stream that `file` has open, as full-size RGB, upright.

    Raises:
        VideoError: if torchcodec cannot decode one of them.
    """
    try:
        decoder = VideoDecoder(
            _decoder_input(file.source),
            stream_index=file.stream.index,
            dimension_order="NHWC",
            num_ffmpeg_threads=file.num_threads,
        )
        for begin in range(0, len(ticks), _FRAMES_AT_ONCE):
            chosen = ticks[begin : begin + _FRAMES_AT_ONCE]
            # Half a tick late, so that rounding to seconds never falls back to the frame before.
            seconds = [float((file.origin + moment + file.tick_fraction) * file.tick) for moment in chosen]
            for moment, rgb in zip(chosen, decoder.get_frames_played_at(seconds).data, strict=True):
                yield TimedFrame(moment, 0, av.VideoFrame.from_ndarray(rgb.numpy(), format="rgb24"))
    except (RuntimeError, IndexError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise VideoError(f"{file.name}: torchcodec cannot decode it ({reason}); try decoder='pyav'") from None

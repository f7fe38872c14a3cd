"""From anything that holds a video to the windows that a network looks at, in one pass and in constant memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import torch

from rlt.checks import at_least
from rlt.errors import InvalidArgumentError, TruncatedVideoWarning, VideoError
from rlt.structures import Clip
from rlt.video import ClipSpec, Source, VideoFile, fit_frames, iter_views, read_spread
from rlt.video.geometry import View

Video = Source | Clip | torch.Tensor | np.ndarray[Any, Any] | Any
"""A path, the bytes of a file, a binary file object, a torchcodec `VideoDecoder`, or frames: a `Clip` or
uint8 [T, H, W, 3]."""
ShareRead = Callable[[float], None]
"""Called with the share of a video that was read, 0 to 1."""


@dataclass(frozen=True)
class WindowSpec:
    """Which windows of a video a network looks at: over the whole video, one after the other."""

    clip: ClipSpec
    """Frames of a window and their size. With `sampling="uniform"` one window is spread over the whole video."""
    overlap: int = 0
    """Frames that a window shares with the one before, 0 or more and below those of a window."""
    every: float | None = None
    """Seconds from the beginning of one window to that of the next, instead of `overlap`; above 0."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""
    num_threads: int = 0
    """Threads of the decoder; 0 = libav decides."""

    def __post_init__(self) -> None:
        at_least(0, overlap=self.overlap)
        if self.overlap >= self.clip.num_frames:
            raise InvalidArgumentError(
                f"overlap is {self.overlap}; below the {self.clip.num_frames} of a window is needed"
            )
        if self.overlap and self.every is not None:
            raise InvalidArgumentError(f"overlap is {self.overlap} and every is {self.every}; give one of them")
        if self.every is not None and not 0 < self.every < float("inf"):
            raise InvalidArgumentError(f"every is {self.every}; seconds above 0 are needed")
        if self.clip.sampling == "uniform" and (self.overlap or self.every is not None):
            raise InvalidArgumentError(
                "the model takes its frames from the whole video, so there are no further windows; give a frame stride "
                "or fps beside overlap or every"
            )

    @property
    def follow(self) -> bool:
        """Whether each window begins where the one before ended, with the next frame that is sampled."""
        return not self.overlap and self.every is None


def windows_of(video: Video, spec: WindowSpec, on_read: ShareRead | None = None) -> Iterator[Clip]:
    """Windows of a video in order. The last one repeats its last frame where the video ends within it.

    Times are seconds from the first frame; of bare frames, which have none, they are the numbers of the frames. Bare
    frames are taken as they are, already sampled and of their own size.

    Raises:
        VideoError: where something cannot be read, after the windows before it; for a file that is cut off at its end.
        InvalidArgumentError: for something that is no video.
    """
    if isinstance(video, Clip | torch.Tensor | np.ndarray):
        return _of_frames(video if isinstance(video, Clip) else _as_clip(video), spec)
    if type(video).__module__.partition(".")[0] == "torchcodec":
        return _of_torchcodec(video, spec)
    return _of_file(video, spec, on_read or (lambda _: None))


def _of_file(source: Source, spec: WindowSpec, on_read: ShareRead) -> Iterator[Clip]:
    seconds: list[float] = []

    def on_open(file: VideoFile) -> None:
        seconds.append(float(file.num_frames / file.rate))

    if spec.clip.sampling == "uniform":
        found = iter(read_spread(source, spec.clip, decoder=spec.decoder, num_threads=spec.num_threads))
    else:
        every = {"overlap": spec.overlap, "every": spec.every, "on_open": on_open}
        how = {"decoder": spec.decoder, "num_threads": spec.num_threads}
        views = iter_views(source, spec.clip, [View(spec.clip.size)], **every, **how)  # type: ignore[arg-type]
        found = (clip for [clip] in views)
    first, cut_off = _first_of(found)
    while first is not None:
        yield first
        if seconds:
            on_read(min(float(first.times[-1]) / max(seconds[0], 1e-9), 1.0))
        first = next(found, None)
    if cut_off:
        raise VideoError(cut_off)


def _first_of(clips: Iterator[Clip]) -> tuple[Clip | None, str]:
    """The first clip, and what is said of a file that is cut off, which is an error of its rows and no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = next(clips, None)
    for warning in caught:
        if not issubclass(warning.category, TruncatedVideoWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return first, next((str(w.message) for w in caught if issubclass(w.category, TruncatedVideoWarning)), "")


def _as_clip(frames: Any) -> Clip:
    tensor = torch.as_tensor(frames)
    return Clip(tensor, torch.arange(len(tensor), dtype=torch.float64) if tensor.ndim else torch.zeros(0), "<frames>")


def _of_frames(clip: Clip, spec: WindowSpec) -> Iterator[Clip]:
    total, size = len(clip.frames), spec.clip.num_frames
    rate = (total - 1) / float(clip.times[-1] - clip.times[0]) if total > 1 else 1.0
    hop = size - spec.overlap if spec.every is None else max(round(spec.every * rate), 1)
    for start in range(0, total, hop):
        if start and start - hop + size >= total:  # the window before had the last frame
            return
        places = torch.arange(start, start + size).clamp(max=total - 1)
        yield Clip(clip.frames[places], clip.times[places], clip.source, max(start + size - total, 0))


def _of_torchcodec(decoder: Any, spec: WindowSpec) -> Iterator[Clip]:
    """Windows of a torchcodec `VideoDecoder`, by the numbers of its frames; it is the caller's, and made before."""
    size, total = spec.clip.num_frames, int(decoder.metadata.num_frames)
    channels_first = decoder.get_frames_at([0]).data.shape[1] == 3
    for places in _places(spec, total, Fraction(decoder.metadata.average_fps).limit_denominator(10**6)):
        inside = [place for place in places if place < total]
        batch = decoder.get_frames_at(inside + inside[-1:] * (size - len(inside)))  # as of a file that ends within it
        frames = fit_frames(batch.data.permute(0, 2, 3, 1) if channels_first else batch.data, spec.clip.size)
        yield Clip(frames, batch.pts_seconds.to(torch.float64), "<VideoDecoder>", size - len(inside))


def _places(spec: WindowSpec, total: int, rate: Fraction) -> Iterator[list[int]]:
    """Numbers of the frames of each window of a video of so many frames, those past its end too."""
    clip = spec.clip
    if clip.sampling == "uniform":
        yield list(map(round, clip.spread(1, total, rate)[0]))
        return
    hop = (clip.num_frames - spec.overlap) * clip.step(rate) if spec.every is None else Fraction(str(spec.every)) * rate
    seen = -1
    for number in count():
        places = list(map(round, clip.places(number * hop, rate)))
        if not any(seen < place < total for place in places):
            return
        seen = places[-1]
        yield places

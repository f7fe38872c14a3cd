"""Between the public functions of `video` and the decoders: plan a clip, decode it, and refuse what is not whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError, TruncatedVideoWarning, VideoError, VideoWarning
from rlt.structures import Clip
from rlt.video._filters import FrameConverter, ViewsConverter
from rlt.video._pyav import TimedFrame, VideoFile
from rlt.video._sources import Source, check_source
from rlt.video.geometry import Size, View, check_size
from rlt.video.sampling import clip_span, clip_starts, frame_indices, nearest_in_time

DECODERS = ("pyav", "torchcodec")
"""Values of `decoder`."""

_REPAIR = "download it again or try `ffmpeg -err_detect ignore_err -i IN -c copy OUT`"

# Trailing packets of MPEG-4 ASP and VP8 may show nothing: so many frames fewer than packets are no sign of damage.
_SILENT_PACKETS = 4


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is sampled and decoded; see `rlt.read_clip`."""

    num_frames: int
    """Frames in a clip."""
    stride: int
    """Distance of two sampled frames, in frames of the video."""
    size: Size
    """Output size in pixels."""
    decoder: str
    """One of `DECODERS`."""
    num_threads: int
    """Threads of the decoder; 0 = libav decides."""

    def __post_init__(self) -> None:
        """Check all fields.

        Raises:
            InvalidArgumentError: naming the first field that is out of range.
        """
        clip_span(self.num_frames, self.stride)
        check_size(self.size)
        if self.decoder not in DECODERS:
            allowed = " or ".join(repr(name) for name in DECODERS)
            raise InvalidArgumentError(f"decoder is {self.decoder!r}; {allowed} is needed")
        if self.num_threads < 0:
            raise InvalidArgumentError(f"num_threads is {self.num_threads}; 0 (libav decides) or more is needed")

    @property
    def span(self) -> int:
        """Frames of the video from the first to the last frame of a clip."""
        return clip_span(self.num_frames, self.stride)


class _Pixels(NamedTuple):
    """A sampled frame."""

    ticks: int
    """Presentation time from the first frame of the stream, in ticks."""
    rgb: Tensor
    """uint8 [H, W, 3]."""


def read_planned(
    source: Source, settings: ClipSettings, *, num_clips: int = 1, start: float | None = None
) -> list[Clip]:
    """`num_clips` clips spread over the video, or the one at `start` seconds. Errors are those of `rlt.read_clip`."""
    if start is not None and not 0 <= start < float("inf"):
        raise InvalidArgumentError(f"start is {start} s; seconds from the first frame, 0 or more, are needed")
    check_source(source)
    with VideoFile(source, num_threads=settings.num_threads) as file:
        clips = [_read_one(file, settings, start, num_clips, position) for position in range(num_clips)]
        for warning in file_warnings(file):
            warnings.warn(warning, stacklevel=3)  # points at the caller of the public function
        return clips


def stream_clips(source: Source, settings: ClipSettings, views: Sequence[View]) -> Iterator[list[Clip]]:
    """Consecutive clips in one pass, one per view. Errors are those of `rlt.video.iter_clips`."""
    with VideoFile(source, num_threads=settings.num_threads) as file:
        for warning in file_warnings(file):
            warnings.warn(warning, stacklevel=2)
        targets = (index * settings.stride * file.frame_ticks for index in count())
        sampled = nearest_in_time(file.decode(), targets, file.frame_ticks)
        shown = _pictures(sampled, ViewsConverter(views, num_threads=settings.num_threads), views)
        num_sampled = 0
        while chunk := list(islice(shown, settings.num_frames)):
            num_sampled += len(chunk)
            ticks = [moment for moment, _ in chunk]
            if not file.missing:
                last_target = (num_sampled - 1) * settings.stride * file.frame_ticks
                require_whole(file, max(ticks[-1], ceil(last_target)))
            yield [make_clip(file, [seen[view] for _, seen in chunk], ticks, settings.num_frames) for view in views]
        if num_sampled == 0:
            raise nothing_decodes(file)
        if not file.missing:  # where it is, the end of the file is damaged and the warning has said so
            require_whole(file, None)


def _pictures(
    frames: Iterable[TimedFrame], convert: ViewsConverter, views: Sequence[View]
) -> Iterator[tuple[int, dict[View, Tensor]]]:
    last = -1
    pictures: dict[View, Tensor] = {}
    for timed in frames:
        if timed.ticks != last:  # a frame that stands long is sampled several times
            last, pictures = timed.ticks, convert(timed.frame, views)
        yield last, pictures


def _read_one(file: VideoFile, settings: ClipSettings, start: float | None, num_clips: int, position: int) -> Clip:
    for measured in ("headers", "packets"):
        if start is None:
            first = Fraction(clip_starts(file.num_frames, num_clips, settings.span)[position])
        else:
            first = _first_place(file, start)
        places = [first + index for index in frame_indices(0, settings.num_frames, settings.stride)]
        targets = moments(file, places)
        chunk = _decode(file, settings, targets)
        ticks = [pixels.ticks for pixels in chunk]
        if reaches_plan(file, targets, ticks, measured_headers_only=measured == "headers"):
            break
    require_whole(file, reach(ticks, targets))
    return make_clip(file, [pixels.rgb for pixels in chunk], ticks, settings.num_frames)


def reaches_plan(file: VideoFile, targets: list[Fraction], ticks: list[int], *, measured_headers_only: bool) -> bool:
    """Whether the frames that came (shown at `ticks`) are what was asked for; False = plan again and decode again.

    Raises:
        VideoError: if frames are missing, and it is not that the headers promised too much.
    """
    if len(ticks) == len(targets):
        return True
    # The stream ended before the plan did: it was cut, or it is damaged, or its headers promise too much.
    if file.missing:
        raise _cut_off(file, targets[-1])
    require_whole(file, None)
    if not ticks:
        raise nothing_decodes(file)
    if measured_headers_only:
        file.rescan()
        return False
    if targets[-1] - ticks[-1] > _SILENT_PACKETS * file.frame_ticks:
        raise _cut_off(file, targets[-1])
    return True


def _first_place(file: VideoFile, start: float) -> Fraction:
    """`start` in frames of the video."""
    first = Fraction(start) * file.rate
    if first >= file.num_frames:
        length = float(file.num_frames / file.rate)
        raise InvalidArgumentError(
            f"{file.name}: start is {start:g} s, behind the end of the video; 0 to below {length:.3f} s is allowed"
        )
    return first


def moments(file: VideoFile, places: Sequence[Fraction | int]) -> list[Fraction]:
    """Moments in ticks of places in frames of the video, ascending, as far as the video reaches."""
    # Half a frame of tolerance: a start in seconds hardly ever meets a frame exactly.
    inside = [place for place in places if place < file.num_frames - Fraction(1, 2)] or places[:1]
    return [place * file.frame_ticks for place in inside]


def _decode(file: VideoFile, settings: ClipSettings, targets: list[Fraction]) -> list[_Pixels]:
    convert = FrameConverter(View(settings.size), num_threads=settings.num_threads)
    stream: Iterable[TimedFrame]
    if settings.decoder == "torchcodec":
        from rlt.video._torchcodec import decode_at  # optional package

        chosen = list(nearest_in_time(file.scan(), targets, file.frame_ticks))
        stream = decode_at(file, [packet.ticks for packet in chosen])
        return list(_convert(stream, convert))
    stream = file.decode(ceil(targets[0] - Fraction(1, 2)))  # the tick that a container rounds the moment to
    return list(_convert(nearest_in_time(stream, targets, file.frame_ticks), convert))


def _convert(frames: Iterable[TimedFrame], convert: FrameConverter) -> Iterator[_Pixels]:
    last: _Pixels | None = None
    for timed in frames:
        if last is None or timed.ticks != last.ticks:  # a frame that stands long is sampled several times
            last = _Pixels(timed.ticks, convert(timed.frame))
        yield last


def reach(ticks: list[int], targets: list[Fraction]) -> int:
    """Up to where damage can touch a clip: a lost frame between its last frame and its last moment does."""
    return max(ticks[-1], ceil(targets[len(ticks) - 1]))


def make_clip(file: VideoFile, pictures: list[Tensor], ticks: list[int], num_frames: int) -> Clip:
    """A clip of `num_frames` from the pictures that there are; the last one is repeated."""
    num_repeated = num_frames - len(pictures)
    padded = ticks + ticks[-1:] * num_repeated
    return Clip(
        frames=torch.stack(pictures + pictures[-1:] * num_repeated),
        times=torch.tensor([float(moment * file.tick) for moment in padded], dtype=torch.float64),
        source=file.name,
        num_repeated=num_repeated,
    )


def require_whole(file: VideoFile, ticks: int | None) -> None:
    """Raise if damage was seen up to `ticks` (None: anywhere) in what was decoded last."""
    flaw = file.damage_until(ticks)
    if flaw is not None:
        seconds = float(flaw * file.tick)
        if file.missing:
            raise _cut_off(file, Fraction(flaw if ticks is None else ticks))
        needed = "" if ticks is None else f", the clip needs what lies before {float(ticks * file.tick):.2f} s"
        raise VideoError(f"{file.name}: the video is damaged at about {seconds:.2f} s{needed}; {_REPAIR}")


def _cut_off(file: VideoFile, needed: Fraction) -> VideoError:
    last = round(needed / file.frame_ticks) + 1
    return VideoError(
        f"{file.name}: the file is cut off, {len(file.scan())} of {file.num_frames} frames can be decoded and the clip "
        f"needs frames up to {last}; {_REPAIR}"
    )


def nothing_decodes(file: VideoFile) -> VideoError:
    """The error for a video without a single frame."""
    return VideoError(f"{file.name}: 0 of {file.num_frames} frames can be decoded; {_REPAIR}")


def file_warnings(file: VideoFile) -> Iterator[VideoWarning]:
    """What deserves a look though the clips are whole."""
    if file.missing:
        size, promised = file.missing
        yield TruncatedVideoWarning(
            f"{file.name}: the file is cut off ({size:,} of {promised:,} bytes are there); the frames read are whole, "
            "but download it again"
        )
    if file.num_frames == 1:
        yield VideoWarning(f"{file.name}: the video has 1 frame, so nothing moves in it; its clips repeat that frame")

"""From an open video to clips: plan, decode in one pass, and refuse what is not whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, tee
from math import ceil, prod
from typing import NamedTuple

import torch
from torch import Tensor

from rlt.checks import at_least, exclusive, named_options, one_of
from rlt.errors import InvalidArgumentError, TruncatedVideoWarning, VideoError, VideoWarning, warn_caller
from rlt.structures import Clip
from rlt.video._filters import ViewsConverter
from rlt.video._limits import foreign_errors
from rlt.video._pyav import VideoFile
from rlt.video._sources import Source, check_source, source_name
from rlt.video.decoders import DECODERS
from rlt.video.geometry import View, check_size
from rlt.video.spec import ClipSpec, Place

_REPAIR = "download it again or try `ffmpeg -err_detect ignore_err -i IN -c copy OUT`"

# Trailing packets of MPEG-4 ASP and VP8 may show nothing: so many frames fewer than packets are no sign of damage.
_SILENT_PACKETS = 4

_SEEK_BEYOND = 64
"""Frames between two clips from which on a seek is tried instead of decoding what lies between."""


@dataclass(frozen=True)
class ClipPlan:
    """One sampling of a video in time, and what is seen of its frames."""

    places: Sequence[Place]
    """Frame numbers, whole or not, in ascending order; they may repeat. Those past the end repeat the last frame."""
    views: tuple[View, ...] = (View(),)
    """Each gives one clip of these frames."""

    def __post_init__(self) -> None:
        if not self.places or not self.views:
            raise InvalidArgumentError(f"{len(self.places)} frames and {len(self.views)} views; 1 of each is needed")
        if self.places[0] < 0 or any(late < early for early, late in pairwise(self.places)):
            raise InvalidArgumentError(f"frame numbers are {list(self.places)}; ascending ones from 0 on are needed")


Planner = Callable[[VideoFile], Sequence[ClipPlan]]
"""From a video, of which it looks at `num_frames` and `rate`, to what is wanted of it. It is called again if the
headers were wrong about the number, so it must give the same plans for the same video."""


class _HeaderError(Exception):
    """The video has another number of frames than its headers say."""


def _check(source: Source, decoder: str, num_threads: int) -> None:
    """Raise for what cannot be read before any library looks at it."""
    one_of(DECODERS, decoder=decoder)
    at_least(0, num_threads=num_threads)
    check_source(source)


@named_options()
def read_views(source: Source, planner: Planner, *, decoder: str = "pyav", num_threads: int = 1) -> list[list[Clip]]:
    """Read clips of one video: for each plan one clip per view.

    The file is opened once, and a frame that several plans or views ask for is decoded once. Which frame is taken for
    a number, errors and warnings are those of `rlt.read_clip`.

    Args:
        source: path, bytes of a whole file, or a binary file object that can seek.
        planner: gives the plans, see `Planner`.
        decoder: one of `DECODERS`.
        num_threads: threads of the decoder; 0 = libav decides. Use 1 in data loader workers.

    Returns:
        Clips by plan, then by view.

    Raises:
        VideoError: if the file cannot be opened, holds no video, or any frame asked for is damaged or cut off.
        InvalidArgumentError: for a plan or a crop that does not fit.
    """
    _check(source, decoder, num_threads)
    with foreign_errors(source_name(source)), VideoFile(source, num_threads=num_threads) as file:
        try:
            clips = _read_plans(file, planner(file), decoder, measured=False)
        except _HeaderError:
            file.rescan()
            clips = _read_plans(file, planner(file), decoder, measured=True)
        _warn(file)
        return clips


@named_options()
def iter_views(
    source: Source,
    spec: ClipSpec,
    views: Sequence[View],
    *,
    overlap: int = 0,
    every: float | None = None,
    decoder: str = "pyav",
    num_threads: int = 0,
    on_open: Callable[[VideoFile], None] | None = None,
) -> Iterator[list[Clip]]:
    """As `iter_clips`, but one clip per view: a frame is decoded once for all of them. The size is that of the view.

    Args:
        source: as `read_views`, as decoder and num_threads.
        spec: frames of a clip.
        views: what is seen of them.
        overlap: sampled frames that a clip shares with the one before, below `spec.num_frames`. A clip that would show
            nothing new is left out at the end.
        every: seconds from the beginning of one clip to that of the next instead, above 0; what lies between two clips
            is passed over.
        on_open: called with the open video, before its first clip.
    """
    _check(source, decoder, num_threads)
    at_least(0, overlap=overlap)
    if overlap >= spec.num_frames:
        raise InvalidArgumentError(f"overlap is {overlap}; below the {spec.num_frames} frames of a clip is needed")
    if every is not None:
        exclusive(overlap=overlap or None, every=every)
        if not 0 < every < float("inf"):
            raise InvalidArgumentError(f"every is {every}; seconds above 0 are needed")
    return _stream(source, spec, views, overlap, every, decoder, num_threads, on_open)


def _stream(
    source: Source,
    spec: ClipSpec,
    views: Sequence[View],
    overlap: int,
    every: float | None,
    decoder: str,
    num_threads: int,
    on_open: Callable[[VideoFile], None] | None,
) -> Iterator[list[Clip]]:
    with foreign_errors(source_name(source)), VideoFile(source, num_threads=num_threads) as file:
        _check_bytes(file, [(spec.num_frames, view) for view in views])
        _warn(file)
        if on_open is not None:
            on_open(file)
        step = spec.step(file.rate)
        hop = (spec.num_frames - overlap) * step if every is None else Fraction(str(every)) * file.rate
        convert = ViewsConverter(num_threads=num_threads)

        def ticks(clip: _OpenClip) -> int:
            return max(clip.frames[-1][0], ceil(clip.moment * file.frame_ticks))

        num_given, num_sampled, seen = 0, 0, Fraction(-1)  # seen: up to where clips have shown the video
        suspected = True
        while suspected:
            suspected = False
            planned, ahead = tee(_schedule(spec.num_frames, step, hop, num_given))
            wanted = ((moment * file.frame_ticks, views) for moment, _ in ahead)
            for clip in _clips_of(planned, _show(file, wanted, convert, decoder), spec.num_frames):
                num_sampled = int(clip.moment / step) + 1
                file.limits.check_sampled(file.name, num_sampled)
                if file.skipped and file.damage_until(ticks(clip)) is not None:
                    suspected = True  # what seems damaged with frames left out is decoded whole
                    break
                if clip.moment <= seen:  # of clips that the video ends in, those that begin later show no more
                    continue
                if not file.missing:
                    _require_whole(file, ticks(clip))
                num_given, seen = num_given + 1, Fraction(clip.moment)
                yield [_make_clip(file, clip.frames, view, spec.num_frames) for view in views]
                file.restart_clock()  # what is done with a clip is not reading
            suspected = suspected or (file.skipped and file.damage_until(None) is not None)
            file.skips = file.skips and not suspected
        if num_sampled == 0:
            raise nothing_decodes(file)
        if not file.missing:  # where it is, the end of the file is damaged and the warning has said so
            _require_whole(file, None)


class _OpenClip(NamedTuple):
    """A clip as far as it was shown."""

    frames: list[_Shown]
    moment: Place
    """That of its last frame, in frames of the video."""


def _clips_of(
    planned: Iterable[tuple[Place, list[int]]], shown: Iterable[_Shown], num_frames: int
) -> Iterator[_OpenClip]:
    """Clips of frames that are shown at planned moments, each when it is whole, and the oldest that the end cuts."""
    opened: dict[int, _OpenClip] = {}
    for (moment, numbers), frame in zip(planned, shown, strict=False):
        for number in numbers:
            before = opened.get(number)
            opened[number] = _OpenClip([*(before.frames if before else []), frame], moment)
            if len(opened[number].frames) == num_frames:
                yield opened.pop(number)
    if opened:
        yield opened[min(opened)]


def _schedule(num_frames: int, step: Place, hop: Place, first: int = 0) -> Iterator[tuple[Place, list[int]]]:
    """Moments of clips of frames `step` apart that begin every `hop`, ascending, and the clips that each belongs to.

    Clips have numbers; those before `first` are left out.
    """
    following: dict[int, int] = {}  # clip -> its next frame
    opened = first
    while True:
        moments = {number: number * hop + frame * step for number, frame in following.items()}
        moment = min(moments.values(), default=opened * hop)
        if opened * hop <= moment:
            moment = moments[opened] = opened * hop
            following[opened] = 0
            opened += 1
        numbers = [number for number, its in moments.items() if its == moment]
        yield moment, numbers
        for number in numbers:
            following[number] += 1
            if following[number] == num_frames:
                del following[number]


def _read_plans(file: VideoFile, plans: Sequence[ClipPlan], decoder: str, *, measured: bool) -> list[list[Clip]]:
    """All clips; `measured`: the number of frames was counted and not taken from the headers."""
    _check_bytes(file, [(len(plan.places), view) for plan in plans for view in plan.views])
    targets = [_moments(file, plan.places) for plan in plans]
    convert = ViewsConverter(num_threads=file.num_threads)
    clips: dict[int, list[Clip]] = {}

    def read(group: list[int]) -> None:
        wanted: dict[Fraction, set[View]] = {}
        for number in group:
            for target in targets[number]:
                wanted.setdefault(target, set()).update(plans[number].views)
        order = sorted(wanted)
        came = _show(file, ((target, wanted[target]) for target in order), convert, decoder)
        shown = dict(zip(order, came, strict=False))
        for number in group:
            frames = [shown[target] for target in targets[number] if target in shown]
            _require_plan(file, targets[number], [ticks for ticks, _ in frames], measured=measured)
            places, views = plans[number].places, plans[number].views
            clips[number] = [_make_clip(file, frames, view, len(places)) for view in views]

    def read_again(group: list[int]) -> None:
        """Read them; what seems damaged with frames left out is decoded whole, so that skipping refuses nothing."""
        try:
            read(group)
        except (VideoError, _HeaderError):
            if not file.skipped:
                raise
            file.skips = False
            read(group)

    for group in _groups(targets, file.frame_ticks):
        try:
            read_again(group)
        except VideoError:
            if len(group) == 1:
                raise
            for number in group:  # what is damaged may lie between clips: one alone begins at the key frame before it
                read([number])
    return [clips[number] for number in range(len(plans))]


def _check_bytes(file: VideoFile, clips: Sequence[tuple[int, View]]) -> None:
    """Hold that clips of (number of frames, view) are within the limits, before the first frame is decoded."""
    own = file.stream.height, file.stream.width
    pixels = sum(num_frames * prod(check_size(view.size) or own) for num_frames, view in clips)
    if problem := file.limits.bytes_problem(pixels):
        kind = VideoError if any(view.size is None for _, view in clips) else InvalidArgumentError
        raise kind(f"{file.name}: {len(clips)} clips of {clips[0][0]} frames {problem}")


def _moments(file: VideoFile, places: Sequence[Place]) -> list[Fraction]:
    """Moments in ticks of places in frames of the video, ascending, as far as the video reaches."""
    # Half a frame of tolerance: a start in seconds hardly ever meets a frame exactly.
    inside = [place for place in places if place < file.num_frames - Fraction(1, 2)] or places[:1]
    return [place * file.frame_ticks for place in inside]


def _groups(targets: Iterable[list[Fraction]], frame_ticks: Fraction) -> Iterator[list[int]]:
    """Plans (by number) that are decoded in one pass: those that overlap, or follow each other closely."""
    spans = sorted((moments[0], moments[-1], number) for number, moments in enumerate(targets))
    group: list[int] = []
    end = Fraction(0)
    for first, last, number in spans:
        if group and first > end + _SEEK_BEYOND * frame_ticks:
            yield group
            group = []
        group.append(number)
        end = max(end, last)
    if group:
        yield group


_Shown = tuple[int, dict[View, Tensor]]
"""Presentation time of a frame in ticks, and its pictures."""


def _show(
    file: VideoFile, wanted: Iterable[tuple[Fraction, Collection[View]]], convert: ViewsConverter, decoder: str
) -> Iterator[_Shown]:
    """For each moment the frame shown then with the pictures asked for, until the video ends."""
    asked, ahead = tee(wanted)
    frames = DECODERS[decoder](file, (moment for moment, _ in ahead))
    last, pictures = -1, dict[View, Tensor]()
    for (_, views), timed in zip(asked, frames, strict=False):
        if timed.ticks != last:  # a frame that stands long is taken for several moments
            last, pictures = timed.ticks, {}
        pictures.update(convert(timed.frame, [view for view in views if view not in pictures]))
        yield last, pictures


def _make_clip(file: VideoFile, frames: list[_Shown], view: View, num_frames: int) -> Clip:
    """A clip of `num_frames` from the frames that there are; the last one is repeated."""
    num_repeated = num_frames - len(frames)
    padded = frames + frames[-1:] * num_repeated
    return Clip(
        frames=torch.stack([pictures[view] for _, pictures in padded]),
        times=torch.tensor([float(ticks * file.tick) for ticks, _ in padded], dtype=torch.float64),
        source=file.name,
        num_repeated=num_repeated,
    )


def _require_plan(file: VideoFile, targets: list[Fraction], ticks: list[int], *, measured: bool) -> None:
    """Raise unless the frames that came (shown at `ticks`) are whole, and those that were asked for."""
    if len(ticks) < len(targets):
        # The stream ended before the plan did: it was cut, or it is damaged, or its headers promise too much.
        if file.missing:
            raise _cut_off(file, targets[-1])
        _require_whole(file, None)
        if not measured:
            raise _HeaderError
        if not ticks:
            raise nothing_decodes(file)
        if targets[-1] - ticks[-1] > _SILENT_PACKETS * file.frame_ticks:
            raise _cut_off(file, targets[-1])
    # A frame that is lost between the last frame of a clip and its last moment belongs to it.
    _require_whole(file, max(ticks[-1], ceil(targets[len(ticks) - 1])))


def _require_whole(file: VideoFile, ticks: int | None) -> None:
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


def _warn(file: VideoFile) -> None:
    """Say what deserves a look though the clips are whole."""
    if file.missing:
        size, promised = file.missing
        warn_caller(
            f"{file.name}: the file is cut off ({size:,} of {promised:,} bytes are there); the frames read are whole, "
            "but download it again",
            TruncatedVideoWarning,
        )
    if file.num_frames == 1:
        message = f"{file.name}: the video has 1 frame, so nothing moves in it; its clips repeat that frame"
        warn_caller(message, VideoWarning)

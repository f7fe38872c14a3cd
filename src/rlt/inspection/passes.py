"""Which clips of a video are looked at, and how often it is decoded: once, or twice where it is long."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction

from rlt.errors import VideoWarning
from rlt.inspection.scan import ScanResult
from rlt.inspection.views import ClipSettings, ClipView, display_size
from rlt.structures import Clip
from rlt.video import ClipPlan, Source, VideoFile, VideoInfo, iter_views, read_views
from rlt.video.geometry import View, check_size
from rlt.video.sampling import clip_starts
from rlt.video.spec import Place

OVERLAY_SECONDS = 20.0
"""Longest overlay: it keeps the page, which holds the video, at a few megabytes."""

_MAX_SAMPLED_CLIPS = 300
_FRAMES_AT_ONCE = 32  # decoded together: every read begins at the key frame before it
_MAX_HELD_BYTES = 200_000_000  # frames of a short video, which wait for the choice of the representative clip


def sampled_starts(info: VideoInfo, settings: ClipSettings, max_seconds: float | None) -> list[float] | None:
    """Seconds at which the clips of a long video begin, spread evenly; None if the whole video is to be read."""
    seconds_per_clip = float(settings.length(info)) / info.fps
    if max_seconds is None or info.duration <= max_seconds or info.truncated:
        return None
    num_clips = min(max(int(max_seconds / seconds_per_clip), 1), _MAX_SAMPLED_CLIPS)
    if num_clips * seconds_per_clip >= info.duration:
        return None
    span = settings.span(Fraction(info.fps))
    return [start / info.fps for start in clip_starts(info.num_frames, num_clips, span)]


def look(
    source: Source,
    info: VideoInfo,
    settings: ClipSettings,
    starts: list[float] | None,
    counted: Callable[[float], None],
) -> tuple[ScanResult, Iterable[ClipView], range]:
    """Count what all clips keep, and give the clips to be shown, numbered as by `window`.

    Where the frames of the whole video may be held, they come from the pass that counts, otherwise from a second one,
    a few at a time. `counted` is called with the share of the clips that are counted, 0 to 1.
    """
    scan = ScanResult(settings, info)
    views = clip_views(info, settings)
    expected = info.num_frames / float(settings.length(info)) if starts is None else len(starts)
    height, width = check_size(views[-1].size) or (info.height, info.width)
    most_held = _MAX_HELD_BYTES // (settings.num_frames * height * width * 3)
    hold = starts is None and info.duration <= OVERLAY_SECONDS and expected <= most_held
    seen = views if hold else views[:1]
    places = [round(start * info.fps) for start in starts or ()]
    clips = (
        iter_views(source, settings, seen, decoder=settings.decoder)
        if starts is None
        else read_at(source, settings, seen, places)
    )
    held: list[ClipView] = []
    counted(0.0)
    for number, clip in enumerate(clips, start=1):
        scan.add(clip[0])
        counted(min(number / expected, 1.0))
        if hold:
            held.append(ClipView.of(clip, settings))
            hold = len(held) <= most_held  # headers may promise too little
    chosen, shown = scan.representative(), window(info, settings, scan, OVERLAY_SECONDS)
    if hold:
        return scan, held[chosen + shown.start : chosen + shown.stop], shown
    length = settings.length(info)
    first = chosen * length if starts is None else places[chosen]
    around = [max(first + number * length, 0) for number in shown]
    second = read_at(source, settings, views, around, quiet=True)
    return scan, (ClipView.of(clip, settings) for clip in second), shown


def clip_views(info: VideoInfo, settings: ClipSettings) -> tuple[View, ...]:
    """What is seen of a frame: at the size of the tokens, for the mask, and larger, for the eye, if that is another."""
    sides = check_size(settings.size) or (info.height, info.width)
    grid = settings.patches.grid((settings.num_frames, *sides, 3))
    shown = display_size(grid, settings.patch_size, info)
    return (View(settings.size),) if shown == sides else (View(settings.size), View(shown))


def read_at(
    source: Source, settings: ClipSettings, views: tuple[View, ...], places: Sequence[Place], *, quiet: bool = False
) -> Iterator[list[Clip]]:
    """The clips that begin at these frames of the video, one per view.

    A few clips are decoded together, in one pass. What there is to say about the file is said with the first of them,
    or not at all (`quiet`).
    """
    at_once = max(_FRAMES_AT_ONCE // settings.num_frames, 1)
    for begin in range(0, len(places), at_once):

        def plan(file: VideoFile, together: Sequence[Place] = places[begin : begin + at_once]) -> list[ClipPlan]:
            return [ClipPlan(settings.places(place, file.rate), views) for place in together]

        with warnings.catch_warnings():
            if begin or quiet:
                warnings.simplefilter("ignore", VideoWarning)
            clips = read_views(source, plan, decoder=settings.decoder, num_threads=0)
        while clips:  # and none of them is held while the next ones are read
            yield clips.pop(0)


def window(info: VideoInfo, settings: ClipSettings, scan: ScanResult, max_seconds: float) -> range:
    """Clips on end, at most `max_seconds` of them, as numbers counted from the representative clip, which is 0."""
    seconds_per_clip = float(settings.length(info)) / info.fps
    begin, end = scan.clips[scan.representative()].start, max(clip.end for clip in scan.clips)
    num_clips = max(_whole(max_seconds / seconds_per_clip), 1)
    num_after = _whole((end - begin) / seconds_per_clip)
    before = min(max(num_clips - num_after - 1, 0), _whole(begin / seconds_per_clip))
    # A file that is cut off has no frames to repeat at its end: only clips that lie before the cut can be read.
    needed = (settings.num_frames - 1) * float(settings.pace(info)) / info.fps if info.truncated else 0.0
    last = max(_whole((end - needed - begin) / seconds_per_clip), 0)
    return range(-before, min(num_clips - before, last + 1))


def _whole(number: float) -> int:
    """The whole part of a number that may fall short of it by its rounding."""
    return int(number + 1e-6)

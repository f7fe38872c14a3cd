"""Several clips and crops of one video at once: the file is opened once, a frame decoded once for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.structures import Clip
from rlt.video._filters import ViewsConverter
from rlt.video._pyav import VideoFile
from rlt.video._reading import file_warnings, make_clip, moments, reach, reaches_plan, require_whole
from rlt.video._sources import Source, check_source
from rlt.video.geometry import View
from rlt.video.sampling import nearest_in_time

_SEEK_BEYOND = 64
"""Frames between two clips from which on a seek is tried instead of decoding what lies between."""


@dataclass(frozen=True)
class ClipPlan:
    """One sampling of a video in time, and what is seen of its frames."""

    places: tuple[int, ...]
    """Frame numbers in ascending order; they may repeat, and those past the end repeat the last frame."""
    views: tuple[View, ...] = (View(),)
    """Each gives one clip of these frames."""

    def __post_init__(self) -> None:
        """Hold order and counts.

        Raises:
            InvalidArgumentError: for no frames, no views, or frame numbers that are negative or descend.
        """
        if not self.places or not self.views:
            raise InvalidArgumentError(f"{len(self.places)} frames and {len(self.views)} views; 1 of each is needed")
        if self.places[0] < 0 or any(late < early for early, late in zip(self.places, self.places[1:], strict=False)):
            raise InvalidArgumentError(f"frame numbers are {list(self.places)}; ascending ones from 0 on are needed")


Planner = Callable[[int], Sequence[ClipPlan]]
"""From the number of frames of a video to what is wanted of it. It is called again if the headers were wrong about
that number, so it must give the same plans for the same number."""


def read_views(source: Source, planner: Planner, *, num_threads: int = 1) -> list[list[Clip]]:
    """Read clips of one video: for each plan one clip per view.

    Decoding is PyAV's. Which frame is taken for a number, errors and warnings are those of `rlt.read_clip`; a frame
    that several plans or views ask for is decoded once.

    Args:
        source: path, bytes of a whole file, or a binary file object that can seek.
        planner: gives the plans from the number of frames.
        num_threads: threads of the decoder; 0 = libav decides. Use 1 in data loader workers.

    Returns:
        [plan][view] clips.

    Raises:
        VideoError: if the file cannot be opened, holds no video, or any frame asked for is damaged or cut off.
        InvalidArgumentError: for a plan or a crop that does not fit.
    """
    check_source(source)
    with VideoFile(source, num_threads=num_threads) as file:
        clips = _read_plans(file, planner, num_threads, measured_headers_only=True)
        if clips is None:
            clips = _read_plans(file, planner, num_threads, measured_headers_only=False)
        for warning in file_warnings(file):
            warnings.warn(warning, stacklevel=2)
        return clips or []


def _read_plans(
    file: VideoFile, planner: Planner, num_threads: int, *, measured_headers_only: bool
) -> list[list[Clip]] | None:
    """All clips, or None if the video was found to have another number of frames than the headers say."""
    plans = list(planner(file.num_frames))
    targets = [moments(file, plan.places) for plan in plans]
    convert = ViewsConverter((view for plan in plans for view in plan.views), num_threads=num_threads)
    clips: dict[int, list[Clip]] = {}
    for group in _groups(targets, file.frame_ticks):
        wanted: dict[Fraction, set[View]] = {}
        for plan in group:
            for target in targets[plan]:
                wanted.setdefault(target, set()).update(plans[plan].views)
        shown = _decode_pass(file, wanted, convert)
        for plan in group:
            came = [shown[target] for target in targets[plan] if target in shown]
            ticks = [moment for moment, _ in came]
            if not reaches_plan(file, targets[plan], ticks, measured_headers_only=measured_headers_only):
                return None
            require_whole(file, reach(ticks, targets[plan]))
            num_frames = len(plans[plan].places)
            clips[plan] = [
                make_clip(file, [pictures[view] for _, pictures in came], ticks, num_frames)
                for view in plans[plan].views
            ]
    return [clips[plan] for plan in range(len(plans))]


def _decode_pass(
    file: VideoFile, wanted: dict[Fraction, set[View]], convert: ViewsConverter
) -> dict[Fraction, tuple[int, dict[View, Tensor]]]:
    """For each moment the time in ticks of the frame shown then, and its pictures; as far as the stream reaches."""
    order = sorted(wanted)
    frames = nearest_in_time(file.decode(ceil(order[0] - Fraction(1, 2))), order, file.frame_ticks)
    shown: dict[Fraction, tuple[int, dict[View, Tensor]]] = {}
    pictures: dict[View, Tensor] = {}
    last = -1
    for target, timed in zip(order, frames, strict=False):
        if timed.ticks != last:  # a frame that stands long is taken for several moments
            last, pictures = timed.ticks, {}
        pictures.update(convert(timed.frame, wanted[target] - pictures.keys()))
        shown[target] = timed.ticks, pictures
    return shown


def _groups(targets: Iterable[list[Fraction]], frame_ticks: Fraction) -> Iterator[list[int]]:
    """Plans (by number) that are decoded in one pass: those that overlap, or follow each other closely."""
    spans = sorted((moments_of_plan[0], moments_of_plan[-1], plan) for plan, moments_of_plan in enumerate(targets))
    group: list[int] = []
    end = Fraction(0)
    for first, last, plan in spans:
        if group and first > end + _SEEK_BEYOND * frame_ticks:
            yield group
            group = []
        group.append(plan)
        end = max(end, last)
    if group:
        yield group

"""`inspect_video`: from a video file to a folder of pictures, numbers and a page."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlt.errors import InvalidArgumentError, VideoWarning
from rlt.inspection.charts import draw_run_lengths, draw_tokens_against_threshold, draw_tokens_over_time
from rlt.inspection.contact_sheet import write_contact_sheet
from rlt.inspection.overlay import write_overlay
from rlt.inspection.page import write_page
from rlt.inspection.report import (
    AGAINST_THRESHOLD,
    CONTACT_SHEET,
    OVER_TIME,
    OVERLAY,
    PAGE,
    RUN_LENGTHS,
    InspectReport,
)
from rlt.inspection.scan import ClipScanner, ScanResult, curve_thresholds
from rlt.inspection.staging import REPORT_NAME, staged_folder
from rlt.inspection.views import ClipSettings, ClipView, view_clips, view_window
from rlt.plots import require_viz, save_figure
from rlt.structures import Clip
from rlt.video import Source, VideoInfo, iter_clips, probe, read_clip, require_motion
from rlt.video.geometry import Size
from rlt.video.sampling import clip_starts

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of all work that is done, 0 to 1, never falling."""

FILES = (REPORT_NAME, CONTACT_SHEET, RUN_LENGTHS, OVER_TIME, AGAINST_THRESHOLD, OVERLAY, PAGE)
"""Names of the files that an inspection writes."""

_OVERLAY_SECONDS = 20.0  # keeps the page, which holds the video, at a few megabytes
_MAX_SAMPLED_CLIPS = 300
_SCAN_SHARE, _PICTURES_SHARE, _OVERLAY_SHARE = 0.75, 0.85, 0.99  # of the work, at the end of each part


def inspect_video(
    source: Source,
    output: str | Path,
    *,
    threshold: float = 0.1,
    num_frames: int = 16,
    frame_stride: int = 4,
    size: Size = 224,
    tubelet_size: int = 2,
    patch_size: int = 16,
    decoder: str = "pyav",
    max_seconds: float | None = 600.0,
    progress: Progress | None = None,
) -> InspectReport:
    """Show what run-length tokenization keeps of a video: pictures, an overlay, one page that holds them, JSON.

    Writes contact_sheet.png, run_lengths.png, tokens_over_time.png, tokens_against_threshold.png, overlay.mp4,
    index.html and report.json, all at the end and together. One clip is in memory at a time.

    Args:
        source: path, bytes or file object of the video.
        output: folder to write into; made if missing. Files of an earlier inspection are replaced, others left alone.
        threshold: see `rlt.keep_mask`.
        num_frames: frames in a clip, a multiple of `tubelet_size`.
        frame_stride: distance of two sampled frames, in frames of the video.
        size: size of the frames in pixels, see `rlt.read_clip`; a multiple of `patch_size`.
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.
        decoder: see `rlt.read_clip`.
        max_seconds: a longer video is sampled: clips spread evenly over it that cover this many seconds (300 clips at
            most). None = always the whole video. A file that is cut off is always read to the cut.
        progress: called as work goes on, see `Progress`.

    Raises:
        VideoError: if the video cannot be opened or is damaged.
        InvalidArgumentError: for an argument out of range, or an output folder that cannot be written.
        MissingDependencyError: if matplotlib or Pillow is not installed.
    """
    require_viz()
    settings = ClipSettings(
        num_frames,
        frame_stride,
        size=size,
        tubelet_size=tubelet_size,
        patch_size=patch_size,
        threshold=threshold,
        decoder=decoder,
    )
    _check_arguments(settings, max_seconds)
    tell = progress or (lambda _stage, _share: None)
    with staged_folder(output, FILES, source=source) as folder:
        info = require_motion(probe(source))
        starts = sampled_starts(info, settings, max_seconds)
        scan = _scan(source, info, settings, starts, tell)
        view = view_clips(source, info, settings, scan.clips[scan.representative()].start)[0]
        _write_pictures(view, scan, threshold, folder, tell)
        overlay = write_overlay(
            _told(view_window(source, info, settings, scan, _OVERLAY_SECONDS), info, settings, tell),
            folder / OVERLAY,
            fps=info.fps / frame_stride,
        )
        paths = {name: Path(output) / name for name in FILES}
        report = InspectReport(info, settings, scan, starts is None, overlay, paths)
        tell("writing the page", _OVERLAY_SHARE)
        write_page(report, folder, folder / PAGE)
        text = json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    tell("done", 1.0)
    return report


def sampled_starts(info: VideoInfo, settings: ClipSettings, max_seconds: float | None) -> list[float] | None:
    """Seconds at which the clips of a long video begin, spread evenly; None if the whole video is to be read."""
    seconds_per_clip = settings.num_frames * settings.frame_stride / info.fps
    if max_seconds is None or info.duration <= max_seconds or info.truncated:
        return None
    num_clips = min(max(int(max_seconds / seconds_per_clip), 1), _MAX_SAMPLED_CLIPS)
    if num_clips * seconds_per_clip >= info.duration:
        return None
    span = settings.span(Fraction(info.fps))
    return [start / info.fps for start in clip_starts(info.num_frames, num_clips, span)]


def _check_arguments(settings: ClipSettings, max_seconds: float | None) -> None:
    curve_thresholds(settings.threshold)
    if max_seconds is not None and not max_seconds > 0:
        raise InvalidArgumentError(f"max_seconds is {max_seconds}; more than 0 is needed, or None for the whole video")


def _scan(
    source: Source, info: VideoInfo, settings: ClipSettings, starts: list[float] | None, tell: Progress
) -> ScanResult:
    scanner = ClipScanner(
        settings.threshold,
        tubelet_size=settings.tubelet_size,
        patch_size=settings.patch_size,
        seconds_per_step=settings.tubelet_size * settings.frame_stride / info.fps,
    )
    expected = info.num_frames / (settings.num_frames * settings.frame_stride) if starts is None else len(starts)
    tell("counting tokens", 0.0)
    for number, clip in enumerate(_clips(source, settings, starts), start=1):
        scanner.add(clip)
        tell("counting tokens", _SCAN_SHARE * min(number / expected, 1.0))
    return scanner.result()


def _clips(source: Source, settings: ClipSettings, starts: list[float] | None) -> Iterator[Clip]:
    sampling: dict[str, Any] = {
        "num_frames": settings.num_frames,
        "frame_stride": settings.frame_stride,
        "size": settings.size,
        "decoder": settings.decoder,
    }
    if starts is None:
        yield from iter_clips(source, **sampling)
        return
    for number, start in enumerate(starts):
        with warnings.catch_warnings():
            if number:  # what there is to say about the file was said with the first clip
                warnings.simplefilter("ignore", VideoWarning)
            clip = read_clip(source, start=start, **sampling)
        yield clip


def _write_pictures(view: ClipView, scan: ScanResult, threshold: float, folder: Path, tell: Progress) -> None:
    tell("drawing pictures", _SCAN_SHARE)
    write_contact_sheet(view, folder / CONTACT_SHEET)
    save_figure(draw_run_lengths(view, scan), folder / RUN_LENGTHS)
    save_figure(draw_tokens_over_time(scan), folder / OVER_TIME)
    save_figure(draw_tokens_against_threshold(scan, threshold), folder / AGAINST_THRESHOLD)


def _told(views: Iterator[ClipView], info: VideoInfo, settings: ClipSettings, tell: Progress) -> Iterator[ClipView]:
    seconds = min(info.duration, _OVERLAY_SECONDS)
    expected = max(seconds * info.fps / (settings.num_frames * settings.frame_stride), 1.0)
    tell("encoding the overlay", _PICTURES_SHARE)
    for number, view in enumerate(views, start=1):
        yield view
        done = min(number / expected, 1.0)
        tell("encoding the overlay", _PICTURES_SHARE + (_OVERLAY_SHARE - _PICTURES_SHARE) * done)

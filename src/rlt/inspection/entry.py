"""`inspect_video`, `inspect_videos`: from video files to folders of pictures, numbers and a page."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlt.checks import named_options
from rlt.errors import InvalidArgumentError, RltError, TruncatedVideoWarning, VideoError, VideoWarning
from rlt.files import not_writable, refuse_inputs, replacing_all, write_json
from rlt.inspection.charts import draw_pictures
from rlt.inspection.index import Inspections, write_index
from rlt.inspection.overlay import OverlayInfo, write_overlay
from rlt.inspection.page import write_page
from rlt.inspection.passes import OVERLAY_SECONDS, look, sampled_starts
from rlt.inspection.report import FILES, INDEX_FILES, MAKER, OVERLAY, PAGE, REPORT, InspectReport
from rlt.inspection.scan import curve_thresholds
from rlt.inspection.views import ClipSettings, ClipView
from rlt.plots import require_viz, save_figure
from rlt.tokens import Rule, choose_rule
from rlt.video import Source, list_videos, probe, require_motion
from rlt.video.geometry import Size

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is being done); the share that is done never falls."""

_COUNTED, _ENCODED, _DRAWN, _DONE = 75, 92, 99, 100  # steps at the end of each part of the work


@named_options(progress="write on_progress=f, called as f(steps done, steps in all, what is being done)")
def inspect_video(
    source: Source,
    output: str | Path,
    *,
    threshold: float | None = None,
    keep_ratio: float | None = None,
    max_tokens: int | None = None,
    reference: str | None = None,
    exposure: str | None = None,
    motion: str | None = None,
    rule: Rule | str | None = None,
    num_frames: int = 16,
    frame_stride: int | None = None,
    fps: float | None = None,
    size: Size = 224,
    tubelet_size: int = 2,
    patch_size: int = 16,
    decoder: str = "pyav",
    max_seconds: float | None = 600.0,
    on_progress: Progress | None = None,
) -> InspectReport:
    """Show what run-length tokenization keeps of a video: pictures, an overlay, one page that holds them, JSON.

    Writes contact_sheet.png, run_lengths.png, tokens_over_time.png, tokens_against_threshold.png, overlay.mp4,
    index.html and report.json, all at the end and together. A video of up to 20 s is decoded once; of a longer one the
    20 s that the overlay shows are decoded again, so that a few clips are in memory at a time.

    Args:
        source: path, bytes or file object of the video.
        output: folder to write into; made if missing. Files of an earlier inspection are replaced, others left alone.
        threshold: see `rlt.tokenize`, as the next six.
        keep_ratio: share of each clip's tokens to keep instead.
        max_tokens: number of each clip's tokens to keep at most instead.
        reference: "previous" or "anchor".
        exposure: "none" or "gain".
        motion: "none" or "global".
        rule: any rule, or the name of one.
        num_frames: frames in a clip, a multiple of `tubelet_size`.
        frame_stride: distance of two sampled frames, in frames of the video; 4 if fps is not given either.
        fps: sampled frames per second of the video's time, instead of frame_stride.
        size: size of the frames in pixels, see `rlt.read_clip`; a multiple of `patch_size`.
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.
        decoder: see `rlt.read_clip`.
        max_seconds: a longer video is sampled: clips spread evenly over it that cover this many seconds (300 clips at
            most). None = always the whole video. A file that is cut off is always read to the cut.
        on_progress: called as work goes on, see `Progress`.

    Raises:
        VideoError: if the video cannot be opened or is damaged.
        InvalidArgumentError: for an argument out of range, or an output folder that cannot be written.
        MissingDependencyError: if matplotlib is not installed.
    """
    require_viz()
    settings = ClipSettings(
        num_frames,
        frame_stride,
        fps,
        size,
        tubelet_size=tubelet_size,
        patch_size=patch_size,
        rule=choose_rule(
            rule,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            reference=reference,
            exposure=exposure,
            motion=motion,
        ),
        decoder=decoder,
    )
    curve_thresholds(settings.threshold)
    if max_seconds is not None and not max_seconds > 0:
        raise InvalidArgumentError(f"max_seconds is {max_seconds}; more than 0 is needed, or None for the whole video")
    tell = on_progress or (lambda *_: None)
    try:
        _check_output(Path(output), source)
        refuse_inputs((Path(output) / name for name in FILES), [source] if isinstance(source, str | Path) else [])
        with replacing_all(output, FILES) as folder:
            info = require_motion(probe(source))
            starts = sampled_starts(info, settings, max_seconds)
            count = partial(_tell_part, tell, 0, _COUNTED, "counting tokens")
            scan, views, numbers = look(source, info, settings, starts, count)
            encode = partial(_tell_part, tell, _COUNTED, _ENCODED, "encoding the overlay")
            fps = info.fps / float(settings.pace(info))
            overlay, view = _write_overlay(views, numbers, folder / OVERLAY, fps, encode)
            tell(_ENCODED, _DONE, "drawing pictures")
            for name, figure in draw_pictures(view, scan, settings.rule):
                save_figure(figure, folder / name)
            paths = {name: Path(output) / name for name in FILES}
            report = InspectReport(info, settings, scan, starts is None, overlay, paths)
            tell(_DRAWN, _DONE, "writing the page")
            write_page(report, folder, folder / PAGE)
            write_json(folder / REPORT, report.to_json())
    except OSError as error:
        if isinstance(error, RltError):  # a video that cannot be read is an OSError too
            raise
        raise not_writable(output, error) from error
    tell(_DONE, _DONE, "done")
    return report


def inspect_videos(
    videos: Sequence[str | Path], output: str | Path, *, on_progress: Progress | None = None, **options: Any
) -> Inspections:
    """Inspect video files and folders of them; what one bad file says does not stop the others.

    Args:
        videos: see `rlt.video.list_videos`.
        output: folder of a single video; one folder inside it per video if there are several, beside an index.html that
            sets them side by side and a report.json.
        on_progress: see `Progress`.
        options: those of `inspect_video`.

    Raises:
        VideoError: if there are no videos, or the only one cannot be inspected.
        InvalidArgumentError: see `inspect_video`.
        MissingDependencyError: if matplotlib is not installed.
    """
    found = list_videos(videos)
    if len(found) > 1:
        _check_output(Path(output), None, INDEX_FILES)
        refuse_inputs((Path(output) / name for name in INDEX_FILES), found)
    root = Path(os.path.commonpath([path.absolute().parent for path in found]))
    reports: list[InspectReport] = []
    failed: list[tuple[str, str]] = []
    for number, path in enumerate(found):
        target = Path(output) if len(found) == 1 else Path(output) / path.absolute().relative_to(root)
        tell = None if on_progress is None else partial(_tell_of_one, on_progress, number, len(found), path.name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", VideoWarning)
            try:
                reports.append(inspect_video(path, target, on_progress=tell, **options))
            except VideoError as error:
                if len(found) == 1:
                    raise
                failed.append((str(path), str(error)))
                continue
        cut_off = {str(warning.message) for warning in caught if issubclass(warning.category, TruncatedVideoWarning)}
        failed += [(str(path), message) for message in cut_off]
        for warning in caught:
            if str(warning.message) not in cut_off:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    result = Inspections(tuple(reports), tuple(failed))
    if len(found) > 1 and reports:
        try:
            write_index(result, Path(output))
        except OSError as error:
            raise not_writable(output, error) from error
    return result


def _tell_part(tell: Progress, begin: int, end: int, what: str, share: float) -> None:
    tell(begin + int((end - begin) * share), _DONE, what)


def _tell_of_one(tell: Progress, number: int, num_videos: int, name: str, done: int, total: int, what: str) -> None:
    tell(number * total + done, num_videos * total, f"{name}: {what}")


def _check_output(folder: Path, source: Source | None, names: Sequence[str] = FILES) -> None:
    """Refuse a folder that holds something of ours to be, but not by us, or the video itself."""
    if folder.exists() and not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is a file; give the name of a folder to write into")
    taken = [folder / name for name in names if (folder / name).exists()]
    if isinstance(source, str | Path) and any(path.samefile(source) for path in taken if Path(source).exists()):
        raise InvalidArgumentError(f"{source} would be overwritten by its own inspection; choose another output folder")
    if taken and not _is_ours(folder):
        raise InvalidArgumentError(f"{taken[0]} exists and was not made by {MAKER}; choose another output folder")


def _is_ours(folder: Path) -> bool:
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("made_by") == MAKER


def _write_overlay(
    views: Iterable[ClipView], numbers: range, path: Path, fps: float, encoded: Callable[[float], None]
) -> tuple[OverlayInfo, ClipView]:
    """Write the overlay of clips with these numbers; also gives back the clip that is number 0."""
    found: list[ClipView] = []

    def passing() -> Iterator[ClipView]:
        for number, view in zip(numbers, views, strict=False):
            encoded((number - numbers.start) / len(numbers))
            if number == 0:
                found.append(view)
            yield view

    return write_overlay(passing(), path, fps=fps, max_seconds=OVERLAY_SECONDS), found[0]

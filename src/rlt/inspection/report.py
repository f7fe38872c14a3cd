"""The result of an inspection as a value, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlt.inspection.overlay import OverlayInfo
from rlt.inspection.scan import ClipCount, ScanResult, bend_of_curve
from rlt.inspection.views import ClipSettings
from rlt.structures import TokenGrid
from rlt.tokens import rule_options
from rlt.video import VideoInfo
from rlt.video.geometry import cut_away

MAKER = "rlt inspect"
"""Value of "made_by" in the report: the mark of a folder whose files may be replaced."""
REPORT = "report.json"
CONTACT_SHEET, RUN_LENGTHS = "contact_sheet.png", "run_lengths.png"
OVER_TIME, AGAINST_THRESHOLD = "tokens_over_time.png", "tokens_against_threshold.png"
OVERLAY, PAGE = "overlay.mp4", "index.html"
FILES = (REPORT, CONTACT_SHEET, RUN_LENGTHS, OVER_TIME, AGAINST_THRESHOLD, OVERLAY, PAGE)
"""Names of the files that an inspection writes, in this order: a folder left half replaced is known as one of ours."""
INDEX_FILES = (REPORT, PAGE)
"""Names of what several inspections write beside their folders."""

_VIDEO = ("codec", "width", "height", "fps", "duration", "num_frames")
_SETTINGS = ("num_frames", "frame_stride", "fps", "size", "tubelet_size", "patch_size")


@dataclass(frozen=True, eq=False)
class InspectReport:
    """What run-length tokenization keeps of one video, and the pictures that show it."""

    video: VideoInfo
    """The file."""
    settings: ClipSettings
    """How it was sampled and cut into tokens."""
    scan: ScanResult
    """The numbers of all clips."""
    whole_video: bool
    """True if every part of the video was looked at, False if clips were spread over it."""
    overlay: OverlayInfo
    """The part of the video that the overlay shows."""
    paths: Mapping[str, Path]
    """Files written, by name such as "index.html"."""

    @property
    def tokens_kept(self) -> float:
        """Share of all tokens that is kept, above 0 and up to 1."""
        return self.scan.tokens_kept

    @property
    def grid(self) -> TokenGrid:
        """(T', H', W') of one clip."""
        return self.scan.grid

    @property
    def clips(self) -> tuple[ClipCount, ...]:
        """Numbers per clip, in the order of the video."""
        return tuple(self.scan.clips)

    @property
    def threshold_curve(self) -> tuple[tuple[float, float], ...]:
        """(threshold, share of tokens kept) in ascending order of the threshold."""
        return tuple(zip(self.scan.thresholds, self.scan.curve, strict=True))

    @property
    def representative(self) -> ClipCount:
        """The clip on the contact sheet: the share that it keeps is nearest to that of the whole video."""
        return self.scan.clips[self.scan.representative()]

    @property
    def seconds_seen(self) -> float:
        """Seconds of video that the clips cover."""
        return sum(len(clip.times) for clip in self.clips) * self.scan.seconds_per_step

    @property
    def cut_away(self) -> tuple[float, float]:
        """Shares of the height and of the width of the video's picture that no token shows, 0 or more, below 1."""
        return cut_away(self.video.width, self.video.height, self.settings.size)

    @property
    def suggested_threshold(self) -> float | None:
        """Where the curve of the threshold bends, see `bend_of_curve`; None if it does not."""
        return bend_of_curve(self.scan.thresholds, self.scan.curve)

    def to_json(self) -> dict[str, Any]:
        """The numbers as plain values for `json.dump`: shares 0 to 1, times in seconds, sizes in pixels."""
        settings, video = self.settings, self.video
        return {
            "made_by": MAKER,
            "source": video.source,
            "tokens_kept": self.tokens_kept,
            "num_kept": self.scan.num_kept,
            "num_tokens": self.scan.num_tokens,
            "threshold": settings.threshold,
            "rule": rule_options(settings.rule),
            "grid": list(self.grid),
            "num_clips": len(self.clips),
            "whole_video": self.whole_video,
            "seconds_seen": self.seconds_seen,
            "cut_away": dict(zip(("height", "width"), self.cut_away, strict=True)),
            "num_repeated": self.scan.num_repeated,
            "suggested_threshold": self.suggested_threshold,
            "video": {name: getattr(video, name) for name in _VIDEO},
            "settings": {name: getattr(settings, name) for name in _SETTINGS},
            "threshold_curve": [{"threshold": at, "tokens_kept": share} for at, share in self.threshold_curve],
            "run_lengths": {
                "unit": "time steps",
                "seconds_per_step": self.scan.seconds_per_step,
                "mean_at_place": self.scan.run_lengths.tolist(),
            },
            "clips": [
                {"start": at.start, "end": at.end, "tokens_kept": at.tokens_kept, "kept_per_step": list(at.kept)}
                for at in self.clips
            ],
            "representative_clip": self.scan.representative(),
            "overlay": asdict(self.overlay),
        }

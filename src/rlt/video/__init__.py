"""From a video file to `Clip`s."""

from rlt.video._reading import DECODERS
from rlt.video._sources import Source
from rlt.video._views import ClipPlan, Planner, read_views
from rlt.video.clips import (
    VIDEO_EXTENSIONS,
    VideoInfo,
    iter_clips,
    iter_views,
    list_videos,
    probe,
    read_clip,
    read_clips,
    require_motion,
)

__all__ = [
    "DECODERS",
    "VIDEO_EXTENSIONS",
    "ClipPlan",
    "Planner",
    "Source",
    "VideoInfo",
    "iter_clips",
    "iter_views",
    "list_videos",
    "probe",
    "read_clip",
    "read_clips",
    "read_views",
    "require_motion",
]

"""From a video file to `Clip`s."""

from rlt.video._filters import fit_frames
from rlt.video._pyav import TimedFrame, VideoFile
from rlt.video._reading import ClipPlan, Planner, iter_views, read_views
from rlt.video._sources import Source, source_name
from rlt.video.clips import (
    VIDEO_EXTENSIONS,
    VideoInfo,
    iter_clips,
    list_videos,
    probe,
    read_clip,
    read_clips,
    read_spread,
    require_motion,
    videos_below,
)
from rlt.video.decoders import DECODERS, Decoder
from rlt.video.shrinking import shrink_video
from rlt.video.spec import ClipSpec

__all__ = [
    "DECODERS",
    "VIDEO_EXTENSIONS",
    "ClipPlan",
    "ClipSpec",
    "Decoder",
    "Planner",
    "Source",
    "TimedFrame",
    "VideoFile",
    "VideoInfo",
    "fit_frames",
    "iter_clips",
    "iter_views",
    "list_videos",
    "probe",
    "read_clip",
    "read_clips",
    "read_spread",
    "read_views",
    "require_motion",
    "shrink_video",
    "source_name",
    "videos_below",
]

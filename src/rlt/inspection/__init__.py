"""Looking at a video with the eyes of run-length tokenization: pictures, an overlay, one page, numbers.

report = inspect_video("video.mp4", "inspection")  # writes inspection/index.html and what it shows
report.tokens_kept                                 # 0.26
"""

from rlt.inspection.entry import Progress, inspect_video, inspect_videos
from rlt.inspection.index import Inspections
from rlt.inspection.passes import sampled_starts
from rlt.inspection.report import FILES, InspectReport

__all__ = ["FILES", "InspectReport", "Inspections", "Progress", "inspect_video", "inspect_videos", "sampled_starts"]

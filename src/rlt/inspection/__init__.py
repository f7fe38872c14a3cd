"""Looking at a video with the eyes of run-length tokenization: pictures, an overlay, one page, numbers.

report = inspect_video("video.mp4", "inspection")  # writes inspection/index.html and what it shows
report.tokens_kept                                 # 0.26
"""

from rlt.inspection.entry import FILES, Progress, inspect_video, sampled_starts
from rlt.inspection.progress import progress_bar
from rlt.inspection.report import InspectReport

__all__ = ["FILES", "InspectReport", "Progress", "inspect_video", "progress_bar", "sampled_starts"]

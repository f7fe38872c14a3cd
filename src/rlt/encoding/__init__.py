"""A trained network over everything: classes, features or tokens of each window of many, long or endless videos."""

from rlt.encoding.cutting import Cutter
from rlt.encoding.encoder import Encoder
from rlt.encoding.run import ENGINES, Encoding, encode_videos
from rlt.encoding.sources import labels_of, list_sources
from rlt.encoding.windows import WindowSpec, windows_of

__all__ = [
    "ENGINES",
    "Cutter",
    "Encoder",
    "Encoding",
    "WindowSpec",
    "encode_videos",
    "labels_of",
    "list_sources",
    "windows_of",
]

"""Bring decoded frames to the size of a clip: scale, convert to RGB, rotate and crop in one libav filter graph."""

from __future__ import annotations

import struct
from typing import Any

import av
import torch
from torch import Tensor

from rlt.transforms import CoverCrop, Size, check_size

# Bilinear is what VideoMAE and RLT were evaluated with; swscale widens its kernels when it shrinks, so it is
# antialiased. The other flags keep full chroma resolution and exact rounding, the same on every CPU.
SCALE_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"


class FrameConverter:
    """Scale, convert to RGB, rotate and crop frames in one libav filter graph."""

    def __init__(self, size: Size, *, position: tuple[float, float] = (0.5, 0.5), num_threads: int = 0) -> None:
        """Args are those of `CoverCrop.fit`; the graph is built for the first frame and again when frames change."""
        self._size = check_size(size)
        self._position = position
        self._num_threads = num_threads
        self._key: tuple[Any, ...] | None = None
        self._graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        """uint8 [H, W, 3] RGB of one frame."""
        matrix = display_matrix(frame)
        key = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), matrix)
        if self._graph is None or key != self._key:
            self._graph, self._key = self._build(frame, matrix), key
        self._graph.vpush(frame)
        return torch.from_numpy(self._graph.vpull().to_ndarray())

    def _build(self, frame: av.VideoFrame, matrix: tuple[int, ...] | None) -> av.filter.Graph:
        turns = orientation_filters(matrix)
        swapped = any(name == "transpose" for name, _ in turns)
        width, height = (frame.height, frame.width) if swapped else (frame.width, frame.height)
        geometry = CoverCrop.fit(width, height, self._size, position=self._position)
        if self._size is None:  # a stream that changes its resolution keeps the size of its first frame
            self._size = (geometry.height, geometry.width)
        scaled = (geometry.scaled_width, geometry.scaled_height)
        scaled_width, scaled_height = reversed(scaled) if swapped else scaled
        unknown_matrix = int(frame.colorspace) in (2, 3)
        scale = f"w={scaled_width}:h={scaled_height}:flags={SCALE_FLAGS}:threads={self._num_threads}"
        graph = av.filter.Graph()
        filters = [
            (
                "buffer",
                f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000:"
                f"pixel_aspect=1/1:colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
            ),
            # Files that do not name their matrix are read as BT.601, as the ffmpeg program and OpenCV do.
            ("scale", scale + (":in_color_matrix=bt601" if unknown_matrix else "")),
            ("format", "rgb24"),
            *turns,  # after scaling, where frames are small; scaling is separable, so the order does not matter
            ("crop", f"{geometry.width}:{geometry.height}:{geometry.left}:{geometry.top}"),
            ("buffersink", ""),
        ]
        graph.link_nodes(*(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine fixed-point numbers that turn and mirror the frame for display, if it has them."""
    side_data: Any = frame.side_data  # iterates over entries, declared as a mapping
    for data in side_data:
        if data.type.name == "DISPLAYMATRIX":
            return struct.unpack("=9i", bytes(data))
    return None


def rotation_degrees(matrix: tuple[int, ...] | None) -> int:
    """Clockwise turn of a display matrix in degrees: 0, 90, 180 or 270, without regard to mirrors."""
    turns = {"clock": 90, "clock_flip": 90, "cclock": 270, "cclock_flip": 270}
    filters = orientation_filters(matrix)
    if filters and filters[0][0] == "transpose":
        return turns[filters[0][1].removeprefix("dir=")]
    return 180 if len(filters) == 2 else 0


def orientation_filters(matrix: tuple[int, ...] | None) -> list[tuple[str, str]]:
    """Filters (name, arguments) that bring a frame upright, for turns by multiples of 90 degrees and mirrors.

    The matrix maps (x, y) to (a x + c y, b x + d y) with y pointing down.
    """
    if matrix is None:
        return []
    a, b, _, c, d = matrix[:5]
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return [("hflip", "")] * (a < 0) + [("vflip", "")] * (d < 0)
    direction = {(True, True): "cclock_flip", (True, False): "clock", (False, True): "cclock"}
    return [("transpose", f"dir={direction.get((b > 0, c > 0), 'clock_flip')}")]

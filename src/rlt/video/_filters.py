"""Bring decoded frames to the size of a clip: crop, scale, convert to RGB and rotate in one libav filter graph."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import av
import torch
from torch import Tensor

from rlt.video.geometry import CropBox, Size, View, check_size, cover, crop_offsets

# Bilinear is what VideoMAE and RLT were evaluated with; swscale widens its kernels when it shrinks, so it is
# antialiased. The other flags keep full chroma resolution and exact rounding, the same on every CPU.
SCALE_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"

_Filters = list[tuple[str, str]]
_Scaling = tuple[Size, CropBox | Callable[[int, int], CropBox] | None]


class ViewsConverter:
    """Pictures of frames for several views; those that differ only in place and mirroring share crop and scaling.

    Graphs are kept for all frames to come: building one takes longer than scaling a frame. They scale with
    `num_threads`; 0 = libav decides.
    """

    def __init__(self, *, num_threads: int = 0) -> None:
        self._num_threads = num_threads
        self._graphs: dict[_Scaling, tuple[object, av.filter.Graph]] = {}
        self._own_size = (0, 0)  # that of the first frame: a change of resolution does not change the clip's size

    def __call__(self, frame: av.VideoFrame, views: Iterable[View]) -> dict[View, Tensor]:
        """uint8 [H, W, 3] RGB of one frame for each of `views`."""
        pictures: dict[View, Tensor] = {}
        scaled: dict[_Scaling, Tensor] = {}
        for view in views:
            scaling = view.size, view.crop
            if scaling not in scaled:
                scaled[scaling] = self._scale(frame, view)
            whole, (height, width) = scaled[scaling], check_size(view.size) or self._own_size
            top, left = crop_offsets(whole.shape[0] - height, whole.shape[1] - width, view.position)
            picture = whole[top : top + height, left : left + width]
            pictures[view] = picture.flip(1) if view.hflip else picture
        return pictures

    def _scale(self, frame: av.VideoFrame, view: View) -> Tensor:
        """uint8 [H, W, 3] RGB of one frame; without a crop one side is the view's and the other one covers it."""
        matrix = display_matrix(frame)
        kind = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), matrix)
        known, graph = self._graphs.get((view.size, view.crop), (None, None))
        if graph is None or kind != known:
            graph = self._build(frame, orientation_filters(matrix), view)
            self._graphs[view.size, view.crop] = kind, graph
        graph.vpush(frame)
        return torch.from_numpy(graph.vpull().to_ndarray())

    def _build(self, frame: av.VideoFrame, turns: _Filters, view: View) -> av.filter.Graph:
        """Crop, scale, convert to RGB and rotate."""
        swapped = any(name == "transpose" for name, _ in turns)
        width, height = (frame.height, frame.width) if swapped else (frame.width, frame.height)
        if self._own_size == (0, 0):
            self._own_size = height, width
        size = check_size(view.size) or self._own_size
        box = view.box(width, height)
        scaled_height, scaled_width = size if box else cover(width, height, size)
        before: _Filters = []
        if box:
            box = _as_stored(box, width, height, turns)
            before = [("crop", f"{box.width}:{box.height}:{box.left}:{box.top}:exact=1")]
        if swapped:
            scaled_height, scaled_width = scaled_width, scaled_height
        unknown_matrix = int(frame.colorspace) in (2, 3)
        scale = f"w={scaled_width}:h={scaled_height}:flags={SCALE_FLAGS}:threads={self._num_threads}"
        graph = av.filter.Graph()
        filters = [
            (
                "buffer",
                f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000:"
                f"pixel_aspect=1/1:colorspace={int(frame.colorspace)}:range={int(frame.color_range)}",
            ),
            *before,
            # Files that do not name their matrix are read as BT.601, as the ffmpeg program and OpenCV do.
            ("scale", scale + (":in_color_matrix=bt601" if unknown_matrix else "")),
            ("format", "rgb24"),
            *turns,  # after scaling, where frames are small; scaling is separable, so the order does not matter
            ("buffersink", ""),
        ]
        graph.link_nodes(*(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph


def _as_stored(box: CropBox, width: int, height: int, turns: _Filters) -> CropBox:
    """Where a box of the displayed frame (of `width` x `height`) lies in the frame as it is stored."""
    top, left, bottom, right = box.top, box.left, height - box.top - box.height, width - box.left - box.width
    for name, arguments in reversed(turns):
        if name == "hflip":
            left, right = right, left
        elif name == "vflip":
            top, bottom = bottom, top
        else:
            top, left, bottom, right = {
                "dir=clock": (right, top, left, bottom),
                "dir=cclock": (left, bottom, right, top),
                "dir=cclock_flip": (left, top, right, bottom),
                "dir=clock_flip": (right, bottom, left, top),
            }[arguments]
            width, height = height, width
    return CropBox(top, left, height - top - bottom, width - left - right)


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...] | None:
    """The nine fixed-point numbers that turn and mirror the frame for display, if it has them."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else struct.unpack("=9i", bytes(matrix))


def rotation_degrees(matrix: tuple[int, ...] | None) -> int:
    """Clockwise turn of a display matrix in degrees: 0, 90, 180 or 270, without regard to mirrors."""
    turns = {"dir=clock": 90, "dir=clock_flip": 90, "dir=cclock": 270, "dir=cclock_flip": 270}
    filters = orientation_filters(matrix)
    return 180 if len(filters) == 2 else sum(turns.get(arguments, 0) for _, arguments in filters)


def orientation_filters(matrix: tuple[int, ...] | None) -> _Filters:
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

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
_Crop = CropBox | Callable[[int, int], CropBox] | None


class ViewsConverter:
    """Pictures of frames for several views; those that differ only in place and mirroring share crop and scaling.

    Graphs are kept for all frames to come: building one takes longer than scaling a frame. They scale with
    `num_threads`; 0 = libav decides.
    """

    def __init__(self, *, num_threads: int = 0) -> None:
        self._num_threads = num_threads
        self._converters: dict[tuple[Size, _Crop], _FrameConverter] = {}

    def __call__(self, frame: av.VideoFrame, views: Iterable[View]) -> dict[View, Tensor]:
        """uint8 [H, W, 3] RGB of one frame for each of `views`."""
        pictures: dict[View, Tensor] = {}
        scaled: dict[tuple[Size, _Crop], Tensor] = {}
        for view in views:
            key = view.size, view.crop
            if key not in self._converters:
                self._converters[key] = _FrameConverter(view, self._num_threads)
            if key not in scaled:
                scaled[key] = self._converters[key](frame)
            whole, (height, width) = scaled[key], self._converters[key].size
            top, left = crop_offsets(whole.shape[0] - height, whole.shape[1] - width, view.position)
            picture = whole[top : top + height, left : left + width]
            pictures[view] = picture.flip(1) if view.hflip else picture
        return pictures


class _FrameConverter:
    """Scale, convert to RGB and rotate frames in one libav filter graph, and cut out a view's `crop` before that."""

    def __init__(self, view: View, num_threads: int) -> None:
        self._view = view
        self.size = check_size(view.size) or (0, 0)  # known with the first frame where the view has none
        self._num_threads = num_threads
        self._key: tuple[Any, ...] | None = None
        self._graph: av.filter.Graph | None = None

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        """uint8 [H, W, 3] RGB of one frame; without a crop one side is the view's and the other one covers it."""
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
        if self._view.size is None and self._graph is None:  # a change of resolution does not change the clip's size
            self.size = (height, width)
        box = self._view.box(width, height)
        before: _Filters = []
        scaled_height, scaled_width = self.size if box else cover(width, height, self.size)
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
    turns = {"clock": 90, "clock_flip": 90, "cclock": 270, "cclock_flip": 270}
    filters = orientation_filters(matrix)
    if filters and filters[0][0] == "transpose":
        return turns[filters[0][1].removeprefix("dir=")]
    return 180 if len(filters) == 2 else 0


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

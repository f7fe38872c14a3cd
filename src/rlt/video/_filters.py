"""Bring decoded frames to the size of a clip: crop, scale, convert to RGB and rotate in one libav filter graph."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import av
import torch
from torch import Tensor

from rlt.video.geometry import CoverCrop, CropBox, View, check_size, crop_offsets

# Bilinear is what VideoMAE and RLT were evaluated with; swscale widens its kernels when it shrinks, so it is
# antialiased. The other flags keep full chroma resolution and exact rounding, the same on every CPU.
SCALE_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"


_Filters = list[tuple[str, str]]


class FrameConverter:
    """Crop, scale, convert to RGB, rotate and mirror frames in one libav filter graph."""

    def __init__(self, view: View, *, num_threads: int = 0, uncut: bool = False) -> None:
        """The graph is built for the first frame, and again when frames change.

        Args:
            view: what is seen of a frame.
            num_threads: threads for scaling; 0 = libav decides.
            uncut: leave out the last step, the crop to the view's size at its position.
        """
        self._view = view
        self._uncut = uncut
        self._size = check_size(view.size)
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
        before, scaled_height, scaled_width, after = self._geometry(width, height, turns)
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
            *after,
            *([("hflip", "")] if self._view.hflip else []),
            ("buffersink", ""),
        ]
        graph.link_nodes(*(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph

    def _geometry(self, width: int, height: int, turns: _Filters) -> tuple[_Filters, int, int, _Filters]:
        """Filters before scaling, height and width to scale to (as displayed), filters after the frame is upright."""
        box = self._view.box(width, height)
        if box is not None and self._size is not None:
            box = _as_stored(box, width, height, turns)
            return [("crop", f"{box.width}:{box.height}:{box.left}:{box.top}:exact=1")], *self._size, []
        geometry = CoverCrop.fit(width, height, self._size, position=self._view.position)
        if self._size is None:  # a stream that changes its resolution keeps the size of its first frame
            self._size = (geometry.height, geometry.width)
        crop = ("crop", f"{geometry.width}:{geometry.height}:{geometry.left}:{geometry.top}")
        return [], geometry.scaled_height, geometry.scaled_width, [] if self._uncut else [crop]


class ViewsConverter:
    """Pictures of frames for several views; views of one size that differ only in their place share the scaling."""

    def __init__(self, views: Iterable[View], *, num_threads: int = 0) -> None:
        """Graphs are kept for all frames to come: building one takes longer than scaling a frame."""
        self._converters: dict[View, FrameConverter] = {}
        self._shared: dict[tuple[int, int], FrameConverter] = {}
        sizes: dict[tuple[int, int], list[View]] = {}
        for view in dict.fromkeys(views):
            self._converters[view] = FrameConverter(view, num_threads=num_threads)
            size = check_size(view.size)
            if size is not None and view.crop is None:
                sizes.setdefault(size, []).append(view)
        for size, alike in sizes.items():
            if len(alike) > 1:
                self._shared[size] = FrameConverter(View(size), num_threads=num_threads, uncut=True)

    def __call__(self, frame: av.VideoFrame, views: Iterable[View]) -> dict[View, Tensor]:
        """uint8 [H, W, 3] RGB of one frame for each of `views`."""
        pictures: dict[View, Tensor] = {}
        scaled: dict[tuple[int, int], Tensor] = {}
        for view in views:
            size = check_size(view.size)
            if view.crop is not None or size not in self._shared:
                pictures[view] = self._converters[view](frame)
                continue
            if size not in scaled:
                scaled[size] = self._shared[size](frame)
            height, width = size
            whole = scaled[size]
            top, left = crop_offsets(whole.shape[0] - height, whole.shape[1] - width, view.position)
            picture = whole[top : top + height, left : left + width]
            pictures[view] = picture.flip(1) if view.hflip else picture
        return pictures


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

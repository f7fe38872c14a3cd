"""Bring decoded frames to the size of a clip: crop, scale, convert to RGB and rotate in one libav filter graph."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlt.errors import VideoError
from rlt.video._limits import Limits
from rlt.video.geometry import CropBox, Size, View, check_size, cover, crop_offsets
from rlt.video.libav import av

# Bilinear is what VideoMAE and RLT were evaluated with; swscale widens its kernels when it shrinks, so it is
# antialiased. The other flags keep full chroma resolution and exact rounding, the same on every CPU.
SCALE_FLAGS = "bilinear+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"

_Filters = list[tuple[str, str]]
_Scaling = tuple[Size, CropBox | Callable[[int, int], CropBox] | None]


class Turn(NamedTuple):
    """How a frame as it is stored becomes what is displayed, by quarter turns and mirrors."""

    swapped: bool = False
    """Whether rows become columns."""
    x: bool = False
    """Whether the stored frame is seen from its right to its left."""
    y: bool = False
    """Whether the stored frame is seen from its bottom to its top."""

    @classmethod
    def of(cls, frame: av.VideoFrame) -> Turn:
        """From the frame's display matrix, which maps (x, y) to (a x + c y, b x + d y) with y pointing down."""
        try:
            matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # a kind of side data that PyAV does not know yet hides all others, such as EXIF in FFmpeg 8
            return cls._of_angle(frame.rotation)
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
        return cls(False, a < 0, d < 0) if abs(a) + abs(d) >= abs(b) + abs(c) else cls(True, b <= 0, c <= 0)

    @classmethod
    def _of_angle(cls, counter_clockwise: int) -> Turn:
        """Without mirrors, of which PyAV does not tell otherwise."""
        quarters = round(counter_clockwise / 90) % 4
        return cls(swapped=quarters % 2 == 1, x=quarters in (1, 2), y=quarters in (2, 3))

    @property
    def degrees(self) -> int:
        """Clockwise turn: 0, 90, 180 or 270, without regard to mirrors."""
        return (90 if self.y else 270) if self.swapped else 180 * (self.x and self.y)

    @property
    def filters(self) -> _Filters:
        """Filters (name, arguments) that bring a frame upright."""
        if not self.swapped:
            return [("hflip", "")] * self.x + [("vflip", "")] * self.y
        return [("transpose", f"dir={'clock' if self.y else 'cclock'}{'_flip' if self.x == self.y else ''}")]

    def stored(self, box: CropBox, width: int, height: int) -> CropBox:
        """Where a box of the displayed frame (of `width` x `height`) lies in the frame as it is stored."""
        top, left, rows, columns = box.top, box.left, box.height, box.width
        if self.swapped:
            top, left, rows, columns, width, height = left, top, columns, rows, height, width
        left = width - left - columns if self.x else left
        top = height - top - rows if self.y else top
        return CropBox(top, left, rows, columns)


def fit_frames(frames: Tensor, size: Any) -> Tensor:
    """Scale and crop RGB frames, uint8 [T, H, W, 3], as `rlt.read_clip` does those of a file."""
    convert, view = ViewsConverter(num_threads=1), View(size)
    pictures = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames.cpu().contiguous().numpy())
    return torch.stack([convert(picture, [view])[view] for picture in pictures])


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
        turn = Turn.of(frame)
        kind = (frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), turn)
        known, graph = self._graphs.get((view.size, view.crop), (None, None))
        if graph is None or kind != known:
            graph = self._build(frame, turn, view)
            self._graphs[view.size, view.crop] = kind, graph
        graph.vpush(frame)
        return torch.from_numpy(graph.vpull().to_ndarray())

    def _build(self, frame: av.VideoFrame, turn: Turn, view: View) -> av.filter.Graph:
        """Crop, scale, convert to RGB and rotate."""
        width, height = (frame.height, frame.width) if turn.swapped else (frame.width, frame.height)
        if self._own_size == (0, 0):
            self._own_size = height, width
        size = check_size(view.size) or self._own_size
        box = view.box(width, height)
        scaled_height, scaled_width = size if box else cover(width, height, size)
        if problem := Limits.current().bytes_problem(scaled_height * scaled_width):
            raise VideoError(f"frames of {width}x{height} pixels that cover {size[0]}x{size[1]} ones {problem}")
        before: _Filters = []
        if box:
            box = turn.stored(box, width, height)
            before = [("crop", f"{box.width}:{box.height}:{box.left}:{box.top}:exact=1")]
        if turn.swapped:
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
            *turn.filters,  # after scaling, where frames are small; scaling is separable, so the order does not matter
            ("buffersink", ""),
        ]
        graph.link_nodes(*(graph.add(name, arguments) for name, arguments in filters)).configure()
        return graph

"""Geometry of the step from a video frame to a network's input: which part of it, at which size.

Only integers are computed here; who moves the pixels (a decoder's filter graph, a tensor) is up to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch

from rlt.errors import InvalidArgumentError

Size = int | tuple[int, int] | None
"""Output size in pixels: a number = square, (height, width), or None = as the video has it."""


@dataclass(frozen=True)
class CoverCrop:
    """Scale a frame to `scaled_height` x `scaled_width`, then cut `height` x `width` out of it at (`top`, `left`)."""

    scaled_height: int
    """Height in pixels after scaling."""
    scaled_width: int
    """Width in pixels after scaling."""
    top: int
    """Rows cut off above the crop."""
    left: int
    """Columns cut off left of the crop."""
    height: int
    """Rows of the result."""
    width: int
    """Columns of the result."""

    @classmethod
    def fit(
        cls,
        source_width: int,
        source_height: int,
        size: Size,
        *,
        position: tuple[float, float] = (0.5, 0.5),
    ) -> CoverCrop:
        """Geometry for one frame size.

        The frame keeps its aspect ratio: it is scaled until one side meets the target and the other one covers it,
        the longer side rounded down, as VideoMAE's and torchvision's resizing do. The crop's offset is rounded to the
        nearest integer, halves to the even one, as their centre crop does.

        Args:
            source_width: width of the frame as displayed, in pixels.
            source_height: height of the frame as displayed, in pixels.
            size: int: the short side becomes `size`, then a square is cut. (height, width): both are covered, then
                cut. None: nothing is scaled or cut.
            position: (vertical, horizontal) place of the crop, each from 0 (top, left) to 1 (bottom, right); the
                default is the centre. (0.5, 0), (0.5, 0.5), (0.5, 1) are the three crops of wide video.

        Raises:
            InvalidArgumentError: for a size below 1 or a position outside 0..1.
        """
        if source_width < 1 or source_height < 1:
            raise InvalidArgumentError(f"the frame is {source_width}x{source_height} pixels; at least 1x1 is needed")
        height, width = check_size(size) or (source_height, source_width)
        if not all(0 <= fraction <= 1 for fraction in position):
            raise InvalidArgumentError(f"crop position is {position}; fractions (vertical, horizontal) from 0 to 1 fit")
        if height * source_width >= width * source_height:
            scaled_height, scaled_width = height, source_width * height // source_height
        else:
            scaled_height, scaled_width = source_height * width // source_width, width
        top, left = crop_offsets(scaled_height - height, scaled_width - width, position)
        return cls(scaled_height, scaled_width, top, left, height, width)


def crop_offsets(spare_height: int, spare_width: int, position: tuple[float, float]) -> tuple[int, int]:
    """(top, left) of a crop at `position` (see `CoverCrop.fit`) in a frame that is so many pixels larger than it."""
    return round(spare_height * Fraction(position[0])), round(spare_width * Fraction(position[1]))


@dataclass(frozen=True)
class CropBox:
    """A part of a frame, in pixels of the video as displayed."""

    top: int
    """Rows above it."""
    left: int
    """Columns left of it."""
    height: int
    """Its rows, at least 1."""
    width: int
    """Its columns, at least 1."""

    def check_inside(self, source_width: int, source_height: int) -> CropBox:
        """Return self if a frame of that size holds it.

        Raises:
            InvalidArgumentError: if it does not.
        """
        inside = 0 <= self.left < self.left + self.width <= source_width
        if not (inside and 0 <= self.top < self.top + self.height <= source_height):
            raise InvalidArgumentError(
                f"crop of {self.width}x{self.height} pixels at ({self.left}, {self.top}) does not lie inside a frame "
                f"of {source_width}x{source_height} pixels"
            )
        return self


@dataclass(frozen=True)
class View:
    """How a frame becomes a picture of a clip: what of it is seen, at which size, mirrored or not."""

    size: Size = 224
    """Output size in pixels: see `Size`. With `crop` a number or a pair is needed."""
    position: tuple[float, float] = (0.5, 0.5)
    """(vertical, horizontal) place of the crop that `CoverCrop.fit` cuts; not used with `crop`."""
    crop: CropBox | Callable[[int, int], CropBox] | None = None
    """A part of the frame to cut out before it is scaled to `size` (its aspect ratio is not kept), or a function that
    gives it from (width, height) of the frame. None scales the whole frame and cuts afterwards."""
    hflip: bool = False
    """Whether the picture is mirrored left to right."""

    def __post_init__(self) -> None:
        """Hold that a crop has a size to be scaled to.

        Raises:
            InvalidArgumentError: for a size that is not allowed.
        """
        if check_size(self.size) is None and self.crop is not None:
            raise InvalidArgumentError("size is None; a crop needs the size in pixels that it is scaled to")

    def box(self, source_width: int, source_height: int) -> CropBox | None:
        """The part of a frame of that size that `crop` means, None without one.

        Raises:
            InvalidArgumentError: if it does not lie inside the frame.
        """
        if self.crop is None:
            return None
        box = self.crop if isinstance(self.crop, CropBox) else self.crop(source_width, source_height)
        return box.check_inside(source_width, source_height)


def random_resized_box(
    source_width: int,
    source_height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> CropBox:
    """Draw the box of a random resized crop, as image and video training has it since Inception.

    Its area is uniform in `scale`, its aspect ratio log-uniform in `ratio`, its place uniform. Ten draws that do not
    fit into the frame give the largest centred box whose aspect ratio is allowed. Sides and offsets are even, since
    most video stores colour for pairs of pixels.

    Args:
        source_width: width of the frame as displayed, in pixels.
        source_height: height of the frame as displayed, in pixels.
        scale: smallest and largest share of the frame's area, above 0 and up to 1.
        ratio: smallest and largest width / height, above 0.
        generator: where all draws come from.
    """

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))

    for _ in range(10):
        area = source_width * source_height * uniform(*scale)
        aspect = math.exp(uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = _even(math.sqrt(area * aspect)), _even(math.sqrt(area / aspect))
        if 0 < width <= source_width and 0 < height <= source_height:
            top = int(uniform(0, (source_height - height) // 2 + 1)) * 2
            left = int(uniform(0, (source_width - width) // 2 + 1)) * 2
            return CropBox(top, left, height, width)
    aspect = min(max(source_width / source_height, ratio[0]), ratio[1])
    width = min(max(_even(source_height * aspect), 1), source_width)
    height = min(max(_even(source_width / aspect), 1), source_height)
    return CropBox((source_height - height) // 4 * 2, (source_width - width) // 4 * 2, height, width)


def _even(length: float) -> int:
    return 2 * round(length / 2)


def check_size(size: Size) -> tuple[int, int] | None:
    """(height, width) of `size` in pixels, or None for the video's own.

    Raises:
        InvalidArgumentError: if a side is below 1 or `size` is neither a number, a pair nor None.
    """
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InvalidArgumentError(f"size is {size}; a number of pixels >= 1, a pair (height, width) or None is needed")
    return sides[0], sides[1]

"""Geometry of the step from a video frame to a network's input: scale until it covers the target, then crop.

Only integers are computed here; who moves the pixels (a decoder's filter graph, a tensor) is up to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

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
        return cls(
            scaled_height,
            scaled_width,
            round((scaled_height - height) * Fraction(position[0])),
            round((scaled_width - width) * Fraction(position[1])),
            height,
            width,
        )


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

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
"""Output size in pixels: a number = the short side is scaled to it and a square cut out; (height, width) = both are
covered, then cut; None = as the video has it."""


def cover(source_width: int, source_height: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that a frame is scaled to in order to cover `size`, a (height, width), all in pixels.

    The frame keeps its aspect ratio: one side meets the target and the other one covers it, the longer side rounded
    down, as VideoMAE's and torchvision's resizing do.
    """
    height, width = size
    if height * source_width >= width * source_height:
        return height, source_width * height // source_height
    return source_height * width // source_width, width


def cut_away(source_width: int, source_height: int, size: Size) -> tuple[float, float]:
    """Shares (of the height, of the width) of a frame that no picture of this size shows, each 0 or more, below 1."""
    sides = check_size(size)
    if sides is None:
        return 0.0, 0.0
    height, width = cover(source_width, source_height, sides)
    return 1 - sides[0] / height, 1 - sides[1] / width


def crop_offsets(spare_height: int, spare_width: int, position: tuple[float, float]) -> tuple[int, int]:
    """(top, left) of a crop in a frame that is so many pixels larger than it, halves to the even one as in torchvision.

    `position` is (vertical, horizontal), each from 0 (top, left) to 1 (bottom, right).
    """
    return round(spare_height * Fraction(position[0])), round(spare_width * Fraction(position[1]))


@dataclass(frozen=True)
class CropBox:
    """A part of a frame, in pixels of the video as displayed, at least 1x1."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class View:
    """How a frame becomes a picture of a clip: what of it is seen, at which size, mirrored or not."""

    size: Size = 224
    """Output size in pixels: see `Size`. With `crop` a number or a pair is needed."""
    position: tuple[float, float] = (0.5, 0.5)
    """(vertical, horizontal) place of the part that is cut out of the frame after it was scaled to cover `size`, each
    from 0 to 1, see `crop_offsets`; not used with `crop`."""
    crop: CropBox | Callable[[int, int], CropBox] | None = None
    """A part of the frame to cut out before it is scaled to `size` (its aspect ratio is not kept), or a function that
    gives it from (width, height) of the frame. None scales the whole frame and cuts afterwards."""
    hflip: bool = False
    """Whether the picture is mirrored left to right."""

    def __post_init__(self) -> None:
        if not all(0 <= fraction <= 1 for fraction in self.position):
            raise InvalidArgumentError(
                f"crop position is {self.position}; (vertical, horizontal) from 0 to 1 are needed"
            )
        if check_size(self.size) is None and self.crop is not None:
            raise InvalidArgumentError("size is None; a crop needs the size in pixels that it is scaled to")

    def box(self, source_width: int, source_height: int) -> CropBox | None:
        """The part of a frame of that size that `crop` means, which must lie inside it; None without one."""
        if self.crop is None:
            return None
        box = self.crop if isinstance(self.crop, CropBox) else self.crop(source_width, source_height)
        inside = 0 <= box.left < box.left + box.width <= source_width
        if not (inside and 0 <= box.top < box.top + box.height <= source_height):
            raise InvalidArgumentError(
                f"crop of {box.width}x{box.height} pixels at ({box.left}, {box.top}) does not lie inside a frame "
                f"of {source_width}x{source_height} pixels"
            )
        return box


def random_resized_box(
    source_width: int,
    source_height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator,
) -> CropBox:
    """Draw the box of a random resized crop, as image and video training has it since Inception.

    Its share of the frame's area is uniform in `scale`, its width / height log-uniform in `ratio`, its place uniform.
    Ten draws that do not fit into the frame give the largest centred box whose aspect ratio is allowed. Sides and
    offsets are even, since most video stores colour for pairs of pixels.
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
    """(height, width) of `size` in pixels, each at least 1, or None for the video's own."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise InvalidArgumentError(f"size is {size}; a number of pixels >= 1, a pair (height, width) or None is needed")
    return sides[0], sides[1]

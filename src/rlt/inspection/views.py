"""Frames for people to look at: a readable size, dropped patches dimmed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from rlt.structures import Clip, PatchSpec, TokenGrid
from rlt.tokens import PatchView, Rule, Threshold
from rlt.tokens.rules import apply_rule
from rlt.video import ClipSpec, VideoInfo
from rlt.video.spec import Place

_SHORT_SIDE = 336  # pixels of a frame in the pictures: four of them side by side fit on a page
_LUMA = (0.299, 0.587, 0.114)  # BT.601 weights of red, green and blue
_DIMMED = 0.36  # brightness of a dropped patch: it stands back, but what was dropped can still be seen
_DIMMED_TINT = (14.0, 18.0, 30.0)  # added to it, a trace of blue that tells it from dark things that are kept


@dataclass(frozen=True)
class ClipSettings(ClipSpec):
    """How a video is sampled, decoded and cut into tokens."""

    tubelet_size: int = 2
    """Frames per token."""
    patch_size: int = 16
    """Height and width of a token in pixels."""
    rule: Rule = Threshold()
    """Which tokens are kept."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""

    @property
    def threshold(self) -> float | None:
        """That of the rule, if it is one."""
        return self.rule.threshold if isinstance(self.rule, Threshold) else None

    def pace(self, info: VideoInfo) -> Place:
        """Frames of the video from one sampled frame to the next."""
        return self.step(Fraction(info.fps))

    def length(self, info: VideoInfo) -> Place:
        """Frames of the video from the beginning of one clip to that of the next."""
        return self.num_frames * self.pace(info)

    @property
    def patches(self) -> PatchSpec:
        """How clips are cut into tokens."""
        return PatchSpec(self.tubelet_size, self.patch_size)

    def patch_view(self, clip: Clip) -> PatchView:
        """The clip as rules see it; what it computes serves every rule."""
        return PatchView(clip.frames[None], self.patches)

    def keep_mask(self, seen: PatchView) -> Tensor:
        """bool [T', H', W'], True where a token of the clip is kept."""
        return apply_rule(self.rule, seen)[0]


@dataclass(frozen=True, eq=False)
class ClipView:
    """One clip as it is shown."""

    frames: Tensor
    """uint8 [T, H, W, 3], larger than what tokens are made of, if the video allows; the padding at its end is left
    out, so T can be less than the number of sampled frames."""
    times: Tensor
    """float64 [T], seconds."""
    mask: Tensor
    """bool [T', H', W'], True where a token is kept."""
    tubelet_size: int
    """Frames per token."""

    @classmethod
    def of(cls, clips: Sequence[Clip], settings: ClipSettings, seen: PatchView | None = None) -> ClipView:
        """From a clip as it was seen for the mask and, if there are two, for the eye. `seen`: the first."""
        shown = clips[-1]
        num_real = len(shown.frames) - shown.num_repeated
        mask = settings.keep_mask(settings.patch_view(clips[0]) if seen is None else seen)
        return cls(shown.frames[:num_real], shown.times[:num_real], mask, settings.tubelet_size)

    @property
    def num_steps(self) -> int:
        """Time steps that hold at least one frame."""
        return min(-(-len(self.frames) // self.tubelet_size), len(self.mask))

    def dimmed(self, number: int) -> Tensor:
        """uint8 [H, W, 3], frame `number`: kept patches as they are, dropped ones grey and dark."""
        return dim_dropped(self.frames[number], self.mask[min(number // self.tubelet_size, len(self.mask) - 1)])


def dim_dropped(frame: Tensor, mask: Tensor) -> Tensor:
    """Take the colour and most of the light from patches of uint8 [H, W, 3] that bool [H', W'] does not keep."""
    kept = per_pixel(mask, frame)
    luma = (frame.float() @ torch.tensor(_LUMA))[..., None]
    dark = luma * _DIMMED + torch.tensor(_DIMMED_TINT)
    return torch.where(kept[..., None], frame, dark.to(torch.uint8))


def per_pixel(values: Tensor, frame: Tensor) -> Tensor:
    """[H', W'] -> [H, W] of a frame: the value of each place on all of its pixels. H' divides H, and W' divides W."""
    (rows, columns), (height, width, _) = values.shape, frame.shape
    return values.repeat_interleave(height // rows, 0).repeat_interleave(width // columns, 1)


def display_size(grid: TokenGrid, patch_size: int, info: VideoInfo) -> tuple[int, int]:
    """(height, width) in pixels at which to show frames: the same cut, an even number of pixels per patch.

    About 336 pixels on the short side, but not more than the video has, unless the tokens are made of more.
    """
    cells = min(grid.height, grid.width)
    finest = max(min(info.width, info.height) // cells, patch_size)
    cell = max(min(_SHORT_SIDE // cells, finest), 1)
    cell += cell % 2  # H.264 in its common form wants even sides
    return grid.height * cell, grid.width * cell

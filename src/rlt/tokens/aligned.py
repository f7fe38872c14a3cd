"""How much tokens differ once what the camera did to the whole picture is undone: its exposure, and its motion.

Frames are floats in units of the ImageNet-normalised picture. A token may look like what stands for it as it is, with
the exposure undone (`rlt.tokens.exposure`), or where the motion of the camera has brought it from
(`rlt.tokens.motion`): the smallest difference counts, so that what does not follow the camera, such as subtitles, is
compared as it is.

Shape legend: B clips, T' H' W' tokens along time, height and width, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.structures import PatchSpec
from rlt.tokens.exposure import Exposure, fit_exposure, noise_floor
from rlt.tokens.motion import global_shifts, shifted

ExposureName = Literal["none", "gain"]
"""Whether exposure and noise of the camera are undone before the comparison, see `rlt.tokens.exposure`."""
MotionName = Literal["none", "global"]
"""Whether a shift of the whole picture is undone before the comparison, see `rlt.tokens.motion`."""


@dataclass(frozen=True)
class Camera:
    """What of a camera is undone."""

    exposure: ExposureName = "none"
    motion: MotionName = "none"

    @property
    def is_ignored(self) -> bool:
        """Whether frames are compared as they are (paper)."""
        return self.exposure == "none" and self.motion == "none"


class AlignedFrames:
    """First and last frames of the tubelets of B clips, and what the camera did between them.

    Args:
        first: float32 [B, T', 3, H, W], the first frame of every tubelet.
        last: the last frames, likewise.
        spec: how they are cut into tokens.
        camera: what is undone.
        group_size: a token is a square of so many patches a side, and differs as much as that which differs most.
        noise_B: float32 [B], what noise makes of a difference, if it is known; else it is measured.
    """

    def __init__(
        self,
        first: Tensor,
        last: Tensor,
        spec: PatchSpec,
        camera: Camera,
        *,
        group_size: int = 1,
        noise_B: Tensor | None = None,
    ) -> None:
        self.first, self.last, self.spec, self.group_size = first, last, spec, group_size
        self.side = spec.patch_size * group_size
        self.follows_exposure, self.follows_motion = camera.exposure == "gain", camera.motion == "global"
        self.floor_B = None
        if self.follows_exposure:
            measured = noise_floor(first, spec.patch_size) if noise_B is None else noise_B
            self.floor_B = measured.nan_to_num(0.0)

    def differences(self) -> Tensor:
        """Each token against the step before it: float32 [B, T' - 1, H', W'].

        Infinite in steps whose exposure changed so much that they are another scene.
        """
        pictures = [self.first[:, :-1]]
        later = self.last[:, 1:]
        if self.follows_motion:
            pictures.append(shifted(pictures[0], self._shifts[1][:, 1:]))
        if not self.follows_exposure:
            return self._smallest(later, pictures)
        found = self._fit(pictures[-1], later)
        gain, offset = (x[..., None, None] for x in (found.gain, found.offset))
        pictures += [picture * gain + offset for picture in pictures]
        return torch.where(found.is_cut[..., None, None], torch.inf, self._smallest(later, pictures))

    def pair_differences(self) -> Tensor:
        """Each token against every earlier one at its place, no motion undone: float32 [B, T', T', H', W'].

        Entry [:, t, a] is that of t against a. Only a < t is filled, the rest is 0.
        """
        batch, time = self.first.shape[:2]
        height, width = (side // self.side for side in self.first.shape[-2:])
        found = self.first.new_zeros(batch, time, time, height, width)
        for t in range(1, time):
            for a in range(t):
                origin = torch.full_like(self.first[:, a, 0], a, dtype=torch.int64)
                found[:, t, a] = self._differ_from(self.first[:, a], origin, t)
        return found

    def differ_from_anchor(self, threshold: float) -> Tensor:
        """Which tokens differ by more than `threshold` from what stands for them: bool [B, T', H', W'].

        What stands is a picture that is made of kept tokens alone. It moves as the camera does, and a token that
        differs from it is kept and painted over it.
        """
        stands = self.first[:, 0]
        origin = torch.zeros_like(stands[:, 0], dtype=torch.int64)  # the step that each pixel is from
        kept = [torch.ones_like(mean_over_cells(origin.float(), self.side), dtype=torch.bool)]
        for t in range(1, self.first.shape[1]):
            differences = self._differ_from(stands, origin, t)
            if self.follows_motion:
                to_first, to_last = (shifts[:, t] for shifts in self._shifts)
                moved = self._differ_from(*_move(stands, origin, to_last), t)
                has_moved = to_pixels(moved < differences, self.side)
                differences = torch.minimum(moved, differences)
                new_stands, new_origin = _move(stands, origin, to_first)
                stands = torch.where(has_moved[:, None], new_stands, stands)
                origin = torch.where(has_moved, new_origin, origin)
            kept.append(differences > threshold)
            is_kept = to_pixels(kept[-1], self.side)
            stands = torch.where(is_kept[:, None], self.first[:, t], stands)
            origin = torch.where(is_kept, t, origin)
        return torch.stack(kept, 1)

    def _differ_from(self, picture: Tensor, origin_BHW: Tensor, t: int) -> Tensor:
        """Step t against a picture [B, 3, H, W] whose pixels are from other steps: [B, H', W']."""
        if not self.follows_exposure:
            return self._smallest(self.last[:, t], [picture])
        clip = torch.arange(len(picture), device=picture.device)[:, None, None]
        gain, offset = (x[clip, t, origin_BHW].movedim(-1, 1) for x in self._pair_exposures[:2])
        picture = torch.where(self._pair_exposures.is_cut[clip, t, origin_BHW][:, None], torch.inf, picture)
        return self._smallest(self.last[:, t], [picture, picture * gain + offset])

    def _smallest(self, later: Tensor, pictures: list[Tensor]) -> Tensor:
        """The smallest difference of each token of [..., 3, H, W] from pictures, less what noise makes: [..., H', W'].

        As one standard deviation is taken from another. What is no number counts as large.
        """
        patch = self.spec.patch_size
        parts = [mean_over_cells((later - picture).abs(), patch).mean(-3) for picture in pictures]
        found = torch.stack([part.nan_to_num(nan=torch.inf, posinf=torch.inf) for part in parts]).amin(0)
        found = largest_in_groups(found, self.group_size)
        if self.floor_B is None:
            return found
        floor = self.floor_B.view(-1, *[1] * (found.ndim - 1))
        return (found.square() - floor.square()).clamp(min=0).sqrt()

    @cached_property
    def _shifts(self) -> tuple[Tensor, Tensor]:
        """From the first frame of step t - 1 to the first and to the last frame of step t: two int64 [B, T', 2].

        0 at the first step, and everywhere if motion is not followed.
        """
        batch, time = self.first.shape[:2]
        if not self.follows_motion or time == 1:
            none = torch.zeros(batch, time, 2, dtype=torch.int64, device=self.first.device)
            return none, none
        before = self.first[:, :-1]
        to_last = F.pad(global_shifts(before, self.last[:, 1:]), (0, 0, 1, 0))
        if self.spec.tubelet_size == 1:
            return to_last, to_last
        return F.pad(global_shifts(before, self.first[:, 1:]), (0, 0, 1, 0)), to_last

    @cached_property
    def _pair_exposures(self) -> Exposure:
        """Exposure of every step t against the first frame of every step a < t, moved there: fields [B, t, a, ...]."""
        firsts, lasts = (cell_means(frames, self.spec) for frames in (self.first, self.last))
        time = firsts.shape[1]
        pairs = firsts[:, None].expand(-1, time, -1, -1, -1)
        if self.follows_motion:
            to_first, to_last = self._shifts
            whole = to_first.cumsum(1)
            pairs = pairs.clone()
            for t in range(1, time):
                shifts = whole[:, t - 1 : t] - whole[:, :t] + to_last[:, t : t + 1]
                moved = _filled(shifted(self.first[:, :t], shifts), self.last[:, t : t + 1])
                pairs[:, t, :t] = cell_means(moved, self.spec)
        return fit_exposure(pairs, lasts[:, :, None].expand(-1, -1, time, -1, -1))

    def _fit(self, earlier: Tensor, later: Tensor) -> Exposure:
        filled = _filled(earlier, later)
        return fit_exposure(cell_means(filled, self.spec), cell_means(later, self.spec))


def _filled(moved: Tensor, later: Tensor) -> Tensor:
    """What came from outside of a picture counts as unchanged, so that it says nothing about the exposure."""
    return torch.where(moved.isfinite(), moved, later)


def _move(stands: Tensor, origin_BHW: Tensor, shifts_B2: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] and where they are from; what comes from outside is infinitely different from everything."""
    origin = shifted(origin_BHW[:, None].float(), shifts_B2, outside=0.0)[:, 0].long()
    return shifted(stands, shifts_B2), origin


def mean_over_cells(images: Tensor, side: int) -> Tensor:
    """[..., H, W] -> [..., H / side, W / side]."""
    return images.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).mean((-3, -1))


def largest_in_groups(places: Tensor, group_size: int) -> Tensor:
    """[..., H', W'] -> [..., H' / group_size, W' / group_size], the largest of each square."""
    if group_size == 1:
        return places
    return places.unflatten(-1, (-1, group_size)).unflatten(-3, (-1, group_size)).amax((-3, -1))


def cell_means(frames: Tensor, spec: PatchSpec) -> Tensor:
    """[B, T', 3, H, W] -> [B, T', cells, 3]: means of cells of half a patch, or of one where it has no half."""
    side = spec.patch_size // 2 if spec.patch_size % 2 == 0 else spec.patch_size
    return mean_over_cells(frames, side).flatten(3).transpose(2, 3)


def to_pixels(places: Tensor, patch_size: int) -> Tensor:
    """[..., H', W'] -> [..., H, W], each place written over its patch."""
    return places.repeat_interleave(patch_size, -1).repeat_interleave(patch_size, -2)

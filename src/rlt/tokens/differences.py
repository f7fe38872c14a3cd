"""How much each token differs from an earlier one at the same place: what every rule goes by (paper, section 3.1).

Pure functions of tensors; nothing here knows a model. Shape legend: B clips, T frames, H and W pixels, T' H' W' tokens
along time, height and width (T' = T / tubelet_size, H' = H / patch_size, W' = W / patch_size).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from rlt.checks import named_options
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_STD, PatchSpec, TokenGrid, check_frames
from rlt.tokens.exposure import Exposure, fit_exposure, noise_floor

ReferenceName = Literal["previous", "anchor"]
"""What a token is compared with: the token before it (the paper), or the one that stands for its place."""
ExposureName = Literal["none", "gain"]
"""Whether exposure and noise of the camera are undone before the comparison, see `rlt.tokens.exposure`."""

_EVEN_BYTES = 0x00FF00FF00FF00FF
_BYTES_PER_WORD = 8
_MAX_ROWS_PER_LANE = 65535 // 255  # a 16-bit lane holds the sum of this many bytes
UNITS = "a threshold is in units of the ImageNet-normalised picture whatever a model divides by: leave it out"


class PatchView:
    """Frames of B clips as rules see them, whatever the frames are made of. Computes nothing before it is asked.

    Args:
        frames: uint8 [B, T, H, W, 3] with any strides, or floats [B, T, 3, H, W] that were normalised by the mean and
            the standard deviation of `spec`.
        spec: how they are cut into tokens.
        noise: where it is known already, see `noise`.

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, or sizes that do not divide.
    """

    def __init__(self, frames: Tensor, spec: PatchSpec, *, noise: Tensor | None = None) -> None:
        if frames.is_floating_point():
            if frames.ndim != 5 or frames.shape[2] != 3:
                raise InvalidArgumentError(f"frames are {list(frames.shape)}; floats of [B, T, 3, H, W] are needed")
            batch, num_frames, channels, height, width = frames.shape
            self.grid: TokenGrid = spec.grid((batch, num_frames, height, width, channels))
        else:
            check_frames(frames, dims=(5,))
            self.grid = spec.grid(frames.shape)
        self.frames = frames
        self.spec = spec
        self._noise = noise
        self._differences: Tensor | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.frames)

    def clips(self) -> list[PatchView]:
        """Each clip for itself."""
        noise = [None] * len(self) if self._noise is None else self._noise.split(1)
        rows = zip(self.frames.split(1), noise, strict=True)
        return [PatchView(frames, self.spec, noise=floor) for frames, floor in rows]

    @property
    def device(self) -> torch.device:
        """Where the frames lie."""
        return self.frames.device

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, T', H', W') of the mask that a rule gives."""
        return len(self), *self.grid

    @property
    def differences(self) -> Tensor:
        """Each token against the one before it: float [B, T' - 1, H', W'], see `token_differences`.

        What is no number counts as large: broken frames show in the outputs, as without a rule.
        """
        if self._differences is None:  # no cached_property, whose lock torch.export cannot trace before Python 3.12
            self._differences = self._compute_differences()
        return self._differences

    def _compute_differences(self) -> Tensor:
        if not self.frames.is_floating_point():
            return token_differences(self.frames, spec=self.spec)
        found = float_token_differences(self.frames, self.spec)
        return found.nan_to_num(nan=torch.finfo(found.dtype).max)

    def differ(
        self, threshold: float, *, reference: ReferenceName = "previous", exposure: ExposureName = "none"
    ) -> Tensor:
        """Which tokens differ by more than `threshold` from what they are compared with: bool [B, T', H', W'].

        The first time step has nothing before it, and differs. With `reference="anchor"` a token is compared with the
        one that stands for its place, which is the last that differed.
        """
        if reference == "anchor":
            return self._differ_from_anchor(threshold, exposure)
        if exposure == "gain":
            differs = self.exposed_differences > threshold
        elif not self.frames.is_floating_point() and (kernels := cuda_kernels(self.device)):
            mask: Tensor = kernels.mark(self.frames, threshold, self.spec)
            return mask
        else:
            differs = self.differences > threshold
        return torch.cat([differs.new_ones(len(self), 1, *self.grid[1:]), differs], dim=1)

    @property
    def detail(self) -> Tensor:
        """What the first token of each place shows beyond its mean colour: float32 [B, H', W'].

        Mean absolute difference of its first frame from that colour, in the units of `differences`.
        """
        patch, image = self.spec.patch_size, self._edges()[0][:, 0]
        return _mean_over_cells((image - _to_pixels(_mean_over_cells(image, patch), patch)).abs(), patch).mean(1)

    @property
    def exposed_differences(self) -> Tensor:
        """`differences`, or those after gain and offset of each step were undone where they are smaller.

        float32 [B, T' - 1, H', W']. What does not follow the exposure, such as white skies and subtitles, is compared
        as it is. What noise alone makes is taken off, as one standard deviation from another. Infinite in steps whose
        exposure changed so much that they are another scene, see `rlt.tokens.exposure`.
        """
        first, last = self._edges()
        floor_B = self._floor(first)
        first, last = first[:, :-1], last[:, 1:]
        found = fit_exposure(_cell_means(first, self.spec), _cell_means(last, self.spec))
        gain, offset = (x[:, :, :, None, None] for x in (found.gain, found.offset))
        return self._smaller(last, (first, first * gain + offset), found.is_cut[..., None, None], floor_B)

    def pair_differences(self, exposure: ExposureName = "none") -> Tensor:
        """Each token against every earlier one at its place: float [B, T', T', H', W'], entry [:, t, a] of t against a.

        Only a < t is filled, the rest is 0. It holds what `differ` with `reference="anchor"` goes by at any threshold:
        the last frame of tubelet t against the first frame of tubelet a.
        """
        time = self.grid.time
        if exposure == "none" and not self.frames.is_floating_point():
            return torch.stack([_clip_pair_differences(clip, self.spec) for clip in self.frames])
        first, last = self._edges()
        gains = _pair_exposures(first, last, self.spec) if exposure == "gain" else None
        floor_B = self._floor(first)
        found = first.new_zeros(len(self), time, time, *self.grid[1:])
        for t in range(1, time):
            for a in range(t):
                if gains is None:
                    found[:, t, a] = _mean_over_cells((last[:, t] - first[:, a]).abs(), self.spec.patch_size).mean(1)
                    continue
                gain, offset = (x[:, t, a, :, None, None] for x in gains[:2])
                is_cut = gains.is_cut[:, t, a, None, None]
                found[:, t, a] = self._smaller(last[:, t], (first[:, a], first[:, a] * gain + offset), is_cut, floor_B)
        return found

    def _smaller(self, last: Tensor, pictures: tuple[Tensor, Tensor], is_cut: Tensor, floor_B: Tensor) -> Tensor:
        """The smaller difference of each token from two pictures [B, ..., 3, H, W] above a floor; infinite at cuts."""
        parts = [_mean_over_cells((last - picture).abs(), self.spec.patch_size).mean(-3) for picture in pictures]
        found = torch.minimum(*parts)
        floor = floor_B.view(-1, *[1] * (found.ndim - 1))
        return torch.where(is_cut, torch.inf, (found.square() - floor.square()).clamp(min=0).sqrt())

    @property
    def noise(self) -> Tensor:
        """What noise of the sensor alone makes of `differences`: float32 [B], see `noise_floor`."""
        return self._floor(self._edges()[0])

    def _floor(self, first: Tensor) -> Tensor:
        return noise_floor(first, self.spec.patch_size) if self._noise is None else self._noise

    def _edges(self) -> tuple[Tensor, Tensor]:
        """First and last frame of every tubelet, normalised as ImageNet's: two float32 [B, T', 3, H, W]."""
        tubelet = self.spec.tubelet_size
        edges = self.frames[:, ::tubelet], self.frames[:, tubelet - 1 :: tubelet]
        scale = [1 / (255 * std) for std in IMAGENET_STD]
        if self.frames.is_floating_point():
            scale = [ours / imagenet for ours, imagenet in zip(self.spec.std, IMAGENET_STD, strict=True)]
        else:
            edges = edges[0].permute(0, 1, 4, 2, 3), edges[1].permute(0, 1, 4, 2, 3)
        scale_C11 = torch.tensor(scale, device=self.device).view(3, 1, 1)
        return edges[0].float() * scale_C11, edges[1].float() * scale_C11

    def _differ_from_anchor(self, threshold: float, exposure: ExposureName) -> Tensor:
        if exposure == "none" and not self.frames.is_floating_point():
            return torch.stack([anchored_mask(clip, threshold, self.spec) for clip in self.frames])
        first, last = self._edges()
        gains = _pair_exposures(first, last, self.spec) if exposure == "gain" else None
        floor_B = self._floor(first)
        patch = self.spec.patch_size
        mask = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        anchor, step = first[:, 0], torch.zeros_like(mask[:, 0], dtype=torch.int64)
        for t in range(1, self.grid.time):
            if gains is None:
                differences = _mean_over_cells((last[:, t] - anchor).abs(), patch).mean(1)
            else:
                clip = torch.arange(len(self), device=self.device)[:, None, None]
                gain, offset = (_to_pixels(x[clip, t, step].movedim(-1, 1), patch) for x in gains[:2])
                is_cut = gains.is_cut[clip, t, step]
                differences = self._smaller(last[:, t], (anchor, anchor * gain + offset), is_cut, floor_B)
            mask[:, t] = differences > threshold
            anchor = torch.where(_to_pixels(mask[:, t, None], patch), first[:, t], anchor)
            step = torch.where(mask[:, t], t, step)
        return mask


@torch.no_grad()
def _clip_pair_differences(clip: Tensor, spec: PatchSpec) -> Tensor:
    """`PatchView.pair_differences` of uint8 [T, H, W, 3], exactly as `anchored_mask` has them: float64."""
    time, height, width = spec.grid(clip.shape)
    scale = torch.tensor([255.0 * channel for channel in IMAGENET_STD], dtype=torch.float64, device=clip.device)
    first, last = clip[:: spec.tubelet_size], clip[spec.tubelet_size - 1 :: spec.tubelet_size]
    found = torch.zeros(time, time, height, width, dtype=torch.float64, device=clip.device)
    for a in range(time - 1):
        sums = difference_sums(last[a + 1 :], first[a : a + 1], spec.patch_size)
        found[a + 1 :, a] = (sums / scale).sum(-1) / (3 * spec.patch_size**2)
    return found


def _mean_over_cells(images: Tensor, side: int) -> Tensor:
    """[..., H, W] -> [..., H / side, W / side]."""
    return images.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).mean((-3, -1))


def _cell_means(frames: Tensor, spec: PatchSpec) -> Tensor:
    """[B, T', 3, H, W] -> [B, T', cells, 3]: means of cells of half a patch, or of one where it has no half."""
    side = spec.patch_size // 2 if spec.patch_size % 2 == 0 else spec.patch_size
    return _mean_over_cells(frames, side).flatten(3).transpose(2, 3)


def _to_pixels(places: Tensor, patch_size: int) -> Tensor:
    """[..., H', W'] -> [..., H, W], each place written over its patch."""
    return places.repeat_interleave(patch_size, -1).repeat_interleave(patch_size, -2)


def _pair_exposures(first: Tensor, last: Tensor, spec: PatchSpec) -> Exposure:
    """The exposure of every step t against the first frame of every step a: fields [B, t, a, ...]."""
    firsts, lasts = (_cell_means(frames, spec) for frames in (first, last))
    time = firsts.shape[1]
    return fit_exposure(firsts[:, None].expand(-1, time, -1, -1, -1), lasts[:, :, None].expand(-1, -1, time, -1, -1))


@torch.no_grad()
def anchored_mask(clip: Tensor, threshold: float, spec: PatchSpec) -> Tensor:
    """Tokens that differ by more than `threshold` from the token that stands for their place, computed exactly.

    The last frame of tubelet t is compared with the first frame of the tubelet that was kept last at each place. So
    every dropped token differs by at most `threshold` from what stands for it, however slowly the picture drifts.

    Args:
        clip: uint8 [T, H, W, 3].
        threshold: as in `keep_mask`.
        spec: how it is cut into tokens.

    Returns:
        bool [T', H', W'].
    """
    time, height, width = spec.grid(clip.shape)
    tubelet, patch = spec.tubelet_size, spec.patch_size
    scale = torch.tensor([255.0 * channel for channel in IMAGENET_STD], dtype=torch.float64, device=clip.device)
    mask = torch.ones(time, height, width, dtype=torch.bool, device=clip.device)
    rows = widest(clip.reshape(len(clip), height, patch, width, patch * 3))  # patches are replaced row by row
    anchor = rows[0]
    for t in range(1, time):
        last, first = clip[(t + 1) * tubelet - 1][None], anchor.view(torch.uint8).view(1, *clip.shape[1:])
        sums = difference_sums(last, first, patch)[0]
        mask[t] = (sums / scale).sum(-1) / (3 * patch**2) > threshold
        anchor = torch.where(mask[t][:, None, :, None], rows[t * tubelet], anchor)
    return mask


@named_options(std=UNITS)
@torch.no_grad()
def token_differences(
    frames: Tensor, *, spec: PatchSpec | None = None, tubelet_size: int | None = None, patch_size: int | None = None
) -> Tensor:
    """How much each token differs from the one before it at the same place: what `keep_mask` holds its threshold to.

    Mean absolute difference over the pixels and channels of a token, between the last frame of tubelet t and the first
    frame of tubelet t - 1, in units of the ImageNet-normalised clip (the mean cancels), computed exactly from the
    integers. One call serves any number of thresholds: `token_differences(frames) > threshold` is
    `keep_mask(frames, threshold=threshold)[:, 1:]` on every entry.

    Args:
        frames: uint8 [B, T, H, W, 3].
        spec: how they are cut into tokens; or
        tubelet_size: frames per token, 2 if not given; divides T.
        patch_size: height and width of a token in pixels, 16 if not given; divides H and W.

    Returns:
        float64 [B, T' - 1, H', W'], 0 or more. The first time step has no token before it and is not in it.

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, or sizes that do not divide.
    """
    check_frames(frames, dims=(5,))
    spec = PatchSpec.of(spec, tubelet_size=tubelet_size, patch_size=patch_size)
    time, height, width = spec.grid(frames.shape)
    differences = torch.empty(len(frames), time - 1, height, width, dtype=torch.float64, device=frames.device)
    if time == 1:
        return differences
    scale = torch.tensor([255.0 * channel for channel in IMAGENET_STD], dtype=torch.float64, device=frames.device)
    values_per_token = 3 * spec.patch_size**2
    # One clip at a time: its differences fit into the cache, which is worth a factor of six.
    for clip, differences_clip in zip(frames, differences, strict=True):
        last, first = (
            clip[2 * spec.tubelet_size - 1 :: spec.tubelet_size],
            clip[: -spec.tubelet_size : spec.tubelet_size],
        )
        sums = difference_sums(last, first, spec.patch_size)
        torch.div((sums / scale).sum(-1), values_per_token, out=differences_clip)
    return differences


@torch.no_grad()
def float_token_differences(frames_BTCHW: Tensor, spec: PatchSpec) -> Tensor:
    """`token_differences` for frames that are normalised already by `spec`: the same up to float rounding.

    Args:
        frames_BTCHW: float [B, T, 3, H, W]; a pixel of 0..1 is in it as (pixel - spec.mean) / spec.std.
        spec: its mean cancels, its std is taken back, so that the unit is that of the ImageNet-normalised clip.

    Returns:
        float32 [B, T' - 1, H', W'].
    """
    last = frames_BTCHW[:, 2 * spec.tubelet_size - 1 :: spec.tubelet_size].float()
    first = frames_BTCHW[:, : -spec.tubelet_size : spec.tubelet_size].float()
    differences = (last - first).abs()
    if spec.std != IMAGENET_STD:
        scale = [ours / imagenet for ours, imagenet in zip(spec.std, IMAGENET_STD, strict=True)]
        differences *= torch.tensor(scale, device=differences.device).view(3, 1, 1)
    return _mean_over_cells(differences, spec.patch_size).mean(2)


@cache
def cuda_kernels(device: torch.device) -> ModuleType | None:
    """The fused kernels, `rlt.tokens._cuda`, where frames on this device can use them; None elsewhere."""
    if device.type != "cuda":
        return None
    try:
        from rlt.tokens import _cuda
    except ImportError:
        return None
    return _cuda if _cuda.can_run(device) else None


def difference_sums(last: Tensor, first: Tensor, patch_size: int) -> Tensor:
    """Sum of absolute differences per patch and channel: two uint8 [N, H, W, 3] -> int64 [N, H', W', 3]."""
    difference = torch.maximum(last, first)  # uint8 has no absolute difference; this one cannot wrap around
    difference -= torch.minimum(last, first)
    difference = difference.contiguous()  # elementwise results keep the layout of channels-first views
    steps, height, width, channels = difference.shape
    rows = difference.view(steps, height // patch_size, patch_size, width * channels)
    columns = _sum_rows(rows)
    return columns.view(steps, height // patch_size, width // patch_size, patch_size, channels).sum(3)


def widest(rows: Tensor) -> Tensor:
    """uint8 [..., bytes] as the widest integers that divide its rows: fewer values to copy."""
    for wide in (torch.int64, torch.int32, torch.int16):
        if rows.shape[-1] % wide.itemsize == 0 and rows.storage_offset() % wide.itemsize == 0:
            return rows.view(wide)
    return rows


def _sum_rows(rows: Tensor) -> Tensor:
    """Sum uint8 [..., R, bytes] over R into int32 [..., bytes].

    Eight bytes at a time in the 16-bit lanes of one int64: torch has no fast widening sum of bytes. Falls back to the
    plain sum where a row is no whole number of words, or a lane could overflow.
    """
    *_, num_rows, num_bytes = rows.shape
    if num_bytes % _BYTES_PER_WORD or num_rows > _MAX_ROWS_PER_LANE:
        return rows.sum(-2, dtype=torch.int32)
    words = rows.view(torch.int64)
    even = (words & _EVEN_BYTES).sum(-2)
    odd = ((words >> 8) & _EVEN_BYTES).sum(-2)
    lanes = torch.stack([even.view(torch.int16), odd.view(torch.int16)], dim=-1).flatten(-2)
    return lanes.to(torch.int32) & 0xFFFF

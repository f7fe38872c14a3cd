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
from rlt.tokens.aligned import AlignedFrames, Camera, largest_in_groups, mean_over_cells, to_pixels
from rlt.tokens.exposure import noise_floor

ReferenceName = Literal["previous", "anchor"]
"""What a token is compared with: the token before it (the paper), or the one that stands for its place."""

LARGEST_DIFFERENCE = 1 / min(IMAGENET_STD)
"""Of black and white, in units of the ImageNet-normalised picture."""

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

    group_size = 1
    """Patches along a side of a token; more than one in models that drop groups of them."""

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
        self._found: dict[Camera, AlignedFrames] = {}

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
        return largest_in_groups(found.nan_to_num(nan=torch.finfo(found.dtype).max), self.group_size)

    def differ(self, threshold: float, *, reference: ReferenceName = "previous", camera: Camera = Camera()) -> Tensor:
        """Which tokens differ by more than `threshold` from what they are compared with: bool [B, T', H', W'].

        The first time step has nothing before it, and differs. With `reference="anchor"` a token is compared with the
        one that stands for its place, which is the last that differed. `camera` says what is undone before.
        """
        are_bytes = not self.frames.is_floating_point()
        if reference == "anchor":
            if camera.is_ignored and are_bytes:
                return torch.stack([anchored_mask(clip, threshold, self.spec) for clip in self.frames])
            return self._aligned(camera).differ_from_anchor(threshold)
        if camera.is_ignored and are_bytes and (kernels := cuda_kernels(self.device)):
            mask: Tensor = kernels.mark(self.frames, threshold, self.spec)
            return mask
        differs = self.differences_under(camera) > threshold
        return torch.cat([differs.new_ones(len(self), 1, *self.grid[1:]), differs], dim=1)

    @property
    def detail(self) -> Tensor:
        """What the first token of each place shows beyond its mean colour: float32 [B, H', W'].

        Mean absolute difference of its first frame from that colour, in the units of `differences`.
        """
        patch, image = self.spec.patch_size, self._edges()[0][:, 0]
        found = mean_over_cells((image - to_pixels(mean_over_cells(image, patch), patch)).abs(), patch).mean(1)
        return largest_in_groups(found, self.group_size)

    def differences_under(self, camera: Camera) -> Tensor:
        """`differences`, or those after what a camera did was undone where they are smaller: float [B, T' - 1, H', W'].

        What does not follow the camera, such as white skies and subtitles, is compared as it is. See
        `rlt.tokens.aligned`.
        """
        return self.differences if camera.is_ignored else self._aligned(camera).differences()

    def pair_differences(self, camera: Camera = Camera()) -> Tensor:
        """Each token against every earlier one at its place: float [B, T', T', H', W'], entry [:, t, a] of t against a.

        Only a < t is filled, the rest is 0. It holds what `differ` with `reference="anchor"` goes by at any threshold:
        the last frame of tubelet t against the first frame of tubelet a. Not with motion, under which what stands for a
        place depends on the threshold.
        """
        if camera.is_ignored and not self.frames.is_floating_point():
            return torch.stack([_clip_pair_differences(clip, self.spec) for clip in self.frames])
        return self._aligned(camera).pair_differences()

    def _aligned(self, camera: Camera) -> AlignedFrames:
        if camera not in self._found:  # a budget asks for many thresholds of the same clip
            self._found[camera] = AlignedFrames(
                *self._edges(), self.spec, camera, group_size=self.group_size, noise_B=self._noise
            )
        return self._found[camera]

    @property
    def noise(self) -> Tensor:
        """What noise of the sensor alone makes of `differences`: float32 [B], see `noise_floor`."""
        return noise_floor(self._edges()[0], self.spec.patch_size) if self._noise is None else self._noise

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
    return mean_over_cells(differences, spec.patch_size).mean(2)


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

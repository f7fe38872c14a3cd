"""How much each token differs from an earlier one at the same place: what every rule goes by (paper, section 3.1).

Pure functions of tensors; nothing here knows a model. Shape legend: B clips, T frames, H and W pixels, T' H' W' tokens
along time, height and width (T' = T / tubelet_size, H' = H / patch_size, W' = W / patch_size).
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from rlt.checks import named_options
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_STD, PatchSpec, TokenGrid, check_frames

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

    Raises:
        InvalidArgumentError: for frames of another dtype or shape, or sizes that do not divide.
    """

    def __init__(self, frames: Tensor, spec: PatchSpec) -> None:
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
        self._differences: Tensor | None = None

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.frames)

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

    def differ(self, threshold: float) -> Tensor:
        """Which tokens differ from the one before them by more than `threshold`: bool [B, T', H', W'].

        The first time step has no token before it, and differs.
        """
        if not self.frames.is_floating_point() and (kernels := cuda_kernels(self.device)):
            mask: Tensor = kernels.mark(self.frames, threshold, self.spec)
            return mask
        mask = torch.ones(self.shape, dtype=torch.bool, device=self.device)
        mask[:, 1:] = self.differences > threshold
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
        sums = difference_sums(clip, spec.tubelet_size, spec.patch_size)
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
    return differences.unflatten(4, (-1, spec.patch_size)).unflatten(3, (-1, spec.patch_size)).mean((2, 4, 6))


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


def difference_sums(clip: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """Sum of absolute differences per patch and channel: uint8 [T, H, W, 3] -> int64 [T' - 1, H', W', 3]."""
    last = clip[2 * tubelet_size - 1 :: tubelet_size]
    first = clip[:-tubelet_size:tubelet_size]
    difference = torch.maximum(last, first)  # uint8 has no absolute difference; this one cannot wrap around
    difference -= torch.minimum(last, first)
    difference = difference.contiguous()  # elementwise results keep the layout of channels-first views
    steps, height, width, channels = difference.shape
    rows = difference.view(steps, height // patch_size, patch_size, width * channels)
    columns = _sum_rows(rows)
    return columns.view(steps, height // patch_size, width // patch_size, patch_size, channels).sum(3)


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

"""What a camera does to a picture that stands still: exposure that drifts, flickers or fades, and noise of its sensor.

A camera that adapts its exposure changes every patch, though nothing has moved. One gain and one offset per channel
between two frames undo it. They are fitted to the means of patches, robustly: those patches count that follow the same
line, so that what moves does not pull it. Noise makes two pictures of the same thing differ by a floor, which is
measured within single frames, so that motion plays no part. Nothing of it is in the paper.

Shape legend: B clips, ... pairs of frames, P patches of a frame, C channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_GAIN = 1.5
"""A channel that became so many times brighter or darker is no exposure any more but another scene."""
_SHARES = (0.25, 0.5, 0.75)
"""How much of the picture is taken to stand still, each tried."""
_TOLERANCE = 0.05
"""Half of the paper's threshold: a cell that a line meets so well stands still."""
_ROUNDS = 6
_PRIOR = 1e-3
"""Pull of the gain towards 1, as a variance of cells: without contrast among them no gain can be seen."""

_NOISE_SHARE = 0.25
"""Noise is that of the quarter of the patches that show the least beside it."""
_NOISE_MARGIN = 1.1
_LAPLACIAN = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
_LAPLACIAN_GAIN = 6.0
"""Root of the sum of its squares: how much it amplifies white noise."""


class Exposure(NamedTuple):
    """What `first * gain + offset` needs to look like `last`, per channel."""

    gain: Tensor
    """float [..., C], within 1 / MAX_GAIN and MAX_GAIN; 1 where nothing was found."""
    offset: Tensor
    """float [..., C], in the units of the frames; 0 where nothing was found."""
    is_cut: Tensor
    """bool [...]: half of the cells lie on a line that is out of bounds, and half of those on no other: the frames show
    different scenes."""


def fit_exposure(first_PC: Tensor, last_PC: Tensor) -> Exposure:
    """The line per channel that meets the most cells of two pictures, if it meets more of them than no line does.

    Candidates are lines by least squares through the better 25, 50 and 75 % of the cells (least trimmed squares, some
    rounds long, from a gain of 1 and the median offset).

    Args:
        first_PC: float [..., P, C], means of small cells of one frame, in units of the ImageNet-normalised picture.
        last_PC: the same of the other.
    """
    lines = [_trimmed_line(first_PC, last_PC, share) for share in _SHARES]
    gains = torch.stack([torch.ones_like(lines[0][0]), *(gain for gain, _ in lines)])
    offsets = torch.stack([torch.zeros_like(lines[0][1]), *(offset for _, offset in lines)])
    residuals = (last_PC - gains * first_PC - offsets).abs().mean(-1)
    met = (residuals <= _TOLERANCE).sum(-1)
    inside = ((gains <= MAX_GAIN) & (gains >= 1 / MAX_GAIN)).flatten(-2).all(-1)
    # A few cells lie on some line by chance, and all that look alike on any: no cut is seen in what stands still.
    met = met * (inside | ((met * 2 >= first_PC.shape[-2]) & (met >= 2 * met[0])))
    best = met.argmax(0)[None, ..., None, None].expand(1, *gains.shape[1:])  # of equal ones the first: no line
    gain, offset = (x.gather(0, best)[0].squeeze(-2) for x in (gains, offsets))
    inside = ((gain <= MAX_GAIN) & (gain >= 1 / MAX_GAIN)).all(-1, keepdim=True)
    return Exposure(torch.where(inside, gain, 1.0), torch.where(inside, offset, 0.0), ~inside.squeeze(-1))


def _trimmed_line(first_PC: Tensor, last_PC: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Gain and offset [..., 1, C] through the given share of cells that they meet best."""
    gain = torch.ones_like(first_PC[..., :1, :])
    offset = (last_PC - first_PC).median(-2, keepdim=True).values
    rank = max(round(share * first_PC.shape[-2]), 1)
    for _ in range(_ROUNDS):
        residual = (last_PC - gain * first_PC - offset).abs()
        weight = (residual <= residual.kthvalue(rank, -2, keepdim=True).values).to(first_PC.dtype)
        total = weight.sum(-2, keepdim=True)
        mean_first, mean_last = ((weight * x).sum(-2, keepdim=True) / total for x in (first_PC, last_PC))
        centred = weight * (first_PC - mean_first)
        covariance, variance = ((centred * x).sum(-2, keepdim=True) / total for x in (last_PC, first_PC))
        gain = (covariance + _PRIOR) / (variance + _PRIOR)
        offset = mean_last - gain * mean_first
    return gain, offset


def noise_floor(frames: Tensor, patch_size: int) -> Tensor:
    """How much two pictures of the same thing differ by noise alone: float32 [B], a mean absolute difference.

    The standard deviation of the noise of a patch follows from its mean absolute response to a Laplacian that planes
    and straight edges do not excite (Immerkaer, "Fast Noise Variance Estimation", CVIU 64, 1996).

    Args:
        frames: float32 [B, N, 3, H, W] in units of the ImageNet-normalised picture; the first and the middle one count.
        patch_size: side of the patches.
    """
    chosen = frames[:, [0, frames.shape[1] // 2]]
    kernel = torch.tensor(_LAPLACIAN, device=frames.device)[None, None]
    response = F.conv2d(chosen.flatten(0, 2)[:, None], kernel, padding=1).abs()
    response = response.view_as(chosen).unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size)).mean((-3, -1))
    deviation = math.sqrt(math.pi / 2) / _LAPLACIAN_GAIN * response.flatten(3).quantile(_NOISE_SHARE, -1).mean((1, 2))
    return _NOISE_MARGIN * 2 / math.sqrt(math.pi) * deviation

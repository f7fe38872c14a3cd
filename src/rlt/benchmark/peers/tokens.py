"""Other ways from frames to kept patches, and to the differences behind the mask. The only importer of numba."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.structures import IMAGENET_MEAN, IMAGENET_STD
from rlt.tokens.differences import difference_sums

PATCH = 16
DifferenceSums = Callable[[Tensor], Tensor]
"""Frames -> sums of absolute differences per patch and channel, int64 [B, T' - 1, H', W', 3], for tubelets of 2 frames
and patches of 16 pixels; the same integers in every way."""


def reference_tokenize(
    frames: Tensor, *, threshold: float = 0.1, tubelet_size: int = 2, patch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """uint8 frames [B, T, H, W, 3] -> kept patches the plain float32 way, as the paper describes it: the yardstick.

    Everything is normalised first, the mask comes from pooled differences of the normalised clip, all patches are cut
    and the kept ones selected. Written from the description; slow on purpose only where the description is.

    Gives float32 [N, 3, tubelet_size, patch_size, patch_size] normalised patches in (b, t, h, w) order, and the mask,
    bool [B, T', H', W'].
    """
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    clips_BCTHW = (frames.permute(0, 4, 1, 2, 3).float() / 255 - mean) / std
    last = clips_BCTHW[:, :, 2 * tubelet_size - 1 :: tubelet_size]
    first = clips_BCTHW[:, :, :-tubelet_size:tubelet_size]
    difference = F.avg_pool3d((last - first).abs(), (1, patch_size, patch_size)).mean(1)
    mask = torch.cat([torch.ones_like(difference[:, :1], dtype=torch.bool), difference > threshold], dim=1)
    patches = clips_BCTHW.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    patches = patches.unflatten(2, (-1, tubelet_size)).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return patches.contiguous()[mask], mask


def difference_ways() -> dict[str, DifferenceSums]:
    """Every way that can run here, by name: ours, plain 16-bit torch, the same compiled, and numba if installed."""
    ways: dict[str, DifferenceSums] = {"rlt": _ours, "int16": _int16}
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        ways["compiled"] = torch.compile(_int16, dynamic=False)
    if find_spec("numba") is not None:
        ways["numba"] = _numba_way()
    return ways


def _ours(frames: Tensor) -> Tensor:
    return torch.stack([difference_sums(clip[3::2], clip[:-2:2], PATCH) for clip in frames])


def _int16(frames: Tensor) -> Tensor:
    """The obvious way: widen, subtract, sum."""
    difference = (frames[:, 3::2].to(torch.int16) - frames[:, :-2:2].to(torch.int16)).abs()
    batch, steps, height, width, channels = difference.shape
    patches = difference.view(batch, steps, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.sum((3, 5), dtype=torch.int64)


def _numba_way() -> DifferenceSums:
    import numba

    @numba.njit(parallel=True)  # type: ignore[untyped-decorator,unused-ignore]
    def fill(frames: Any, sums: Any) -> None:
        batch, steps, rows, columns, channels = sums.shape
        for b in numba.prange(batch):
            for t in range(steps):
                for y in range(rows * PATCH):
                    for x in range(columns * PATCH):
                        for c in range(channels):
                            late, early = frames[b, 2 * t + 3, y, x, c], frames[b, 2 * t, y, x, c]
                            sums[b, t, y // PATCH, x // PATCH, c] += late - early if late > early else early - late

    def difference_sums_by_numba(frames: Tensor) -> Tensor:
        batch, time, height, width, channels = frames.shape
        sums = np.zeros((batch, time // 2 - 1, height // PATCH, width // PATCH, channels), np.int64)
        fill(frames.numpy(), sums)
        return torch.from_numpy(sums)

    return difference_sums_by_numba

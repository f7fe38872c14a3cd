"""Other ways to the sums of differences behind the keep mask, for `rlt benchmark tokenize`. The only importer of numba.

All return the same integers as ours: sums of absolute differences per patch and channel, int64 [B, T' - 1, H', W', 3],
for tubelets of 2 frames and patches of 16 pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlt.tokens.differences import difference_sums

PATCH = 16
DifferenceSums = Callable[[Tensor], Tensor]


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

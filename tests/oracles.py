"""Slow and plain twins of the fast paths, written from the definitions alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def keep_mask(clip: np.ndarray, threshold: float, tubelet_size: int, patch_size: int) -> np.ndarray:
    """bool [T', H', W'] of uint8 [T, H, W, 3], token by token in Python floats."""
    time, height, width = (
        clip.shape[0] // tubelet_size,
        clip.shape[1] // patch_size,
        clip.shape[2] // patch_size,
    )
    mask = np.ones((time, height, width), dtype=bool)
    for t in range(1, time):
        last = clip[(t + 1) * tubelet_size - 1].astype(int)
        first = clip[(t - 1) * tubelet_size].astype(int)
        for h in range(height):
            for w in range(width):
                place = np.s_[h * patch_size : (h + 1) * patch_size, w * patch_size : (w + 1) * patch_size]
                total = math.fsum(
                    abs(last[place][..., c] - first[place][..., c]).sum() / (255 * STD[c]) for c in range(3)
                )
                mask[t, h, w] = total / (3 * patch_size**2) > threshold
    return mask


def run_lengths(mask: np.ndarray) -> list[int]:
    """Run length of every kept token in (t, h, w) order of bool [T', H', W'], by walking each column."""
    time, height, width = mask.shape
    lengths = []
    for t in range(time):
        for h in range(height):
            for w in range(width):
                if mask[t, h, w]:
                    following = [later for later in range(t + 1, time) if mask[later, h, w]]
                    lengths.append((following[0] if following else time) - t)
    return lengths


def patch_at(clip: np.ndarray, coord: Sequence[int], tubelet_size: int, patch_size: int) -> np.ndarray:
    """Pixels of one token, flat in (frame, row, column, channel) order."""
    t, h, w = coord
    return clip[
        t * tubelet_size : (t + 1) * tubelet_size,
        h * patch_size : (h + 1) * patch_size,
        w * patch_size : (w + 1) * patch_size,
    ].reshape(-1)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed attention as one big softmax with a block-diagonal mask, from the formula."""
    clip = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(clip[:, None] != clip[None, :], -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)

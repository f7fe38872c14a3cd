"""Run-length tokenization the plain float32 way, as the paper describes it: the yardstick of the benchmarks.

Everything is normalised first, the mask comes from pooled differences of the normalised clip, all patches are cut and
the kept ones selected. Written from the description; slow on purpose only where the description is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlt.structures import IMAGENET_MEAN, IMAGENET_STD


def reference_tokenize(
    frames: Tensor, *, threshold: float = 0.1, tubelet_size: int = 2, patch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """uint8 frames [B, T, H, W, 3] -> kept patches through a normalised float32 copy of everything.

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

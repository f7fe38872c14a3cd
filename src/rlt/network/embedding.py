"""Patch embedding of kept patches as one linear layer, with the pixel normalisation folded in.

Shape legend: T tokens of all clips, P values of a patch, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.structures import PatchSpec

_PIXEL_CENTER = 116
"""Subtracted from pixels before they are multiplied. Exact in every float type, it keeps the sums small, which
matters in half precision; the folded bias puts it right."""


class PatchEmbedding(nn.Module):
    """[tokens, values] -> [tokens, width]: the tubelet convolution of VideoMAE, on kept patches only.

    The values of a patch are in (frame, row, column, channel) order. Normalising pixels is affine, and so is the
    embedding: W((x / 255 - mean) / std) + b = W'x + b'. The folded form reads uint8 patches directly, without a float
    copy of the clip.
    """

    def __init__(self, width: int, spec: PatchSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, spec.values_per_token))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.mean, self.std = spec.mean, spec.std

    def forward(self, patches_TP: Tensor) -> Tensor:
        """Embed uint8 pixels, or float patches that are normalised already: [tokens, values] -> [tokens, width]."""
        values_TP = patches_TP.to(self.weight.dtype)
        if patches_TP.dtype != torch.uint8:
            return F.linear(values_TP, self.weight, self.bias)
        # normalised = (pixel - center) * scale + offset, in each channel and in float32
        channels = self.weight.float().unflatten(1, (-1, 3)).unbind(2)
        scaled_DP = _times(channels, [1 / (255 * std) for std in self.std])
        offsets = [(_PIXEL_CENTER / 255 - mean) / std for mean, std in zip(self.mean, self.std, strict=True)]
        bias_D = self.bias.float() + _times(channels, offsets).sum(1)
        return F.linear(values_TP.sub_(_PIXEL_CENTER), scaled_DP.to(self.weight.dtype), bias_D.to(self.bias.dtype))


def _times(channels: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """Each channel of the weights, [width, pixels], times its factor: [width, values]."""
    return torch.stack([x * factor for x, factor in zip(channels, factors, strict=True)], dim=2).flatten(1)

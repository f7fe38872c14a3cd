"""Patch embedding of kept patches as one linear layer, with the pixel normalisation folded in.

Shape legend: T tokens of all clips, P values of a patch, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable

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
        weight_DP3 = self.weight.float().unflatten(1, (-1, 3))
        scaled_DP = (weight_DP3 * self._per_channel(1 / (255 * std) for std in self.std)).flatten(1)
        offsets = ((_PIXEL_CENTER / 255 - mean) / std for mean, std in zip(self.mean, self.std, strict=True))
        bias_D = self.bias.float() + (weight_DP3 * self._per_channel(offsets)).flatten(1).sum(1)
        return F.linear(values_TP.sub_(_PIXEL_CENTER), scaled_DP.to(self.weight.dtype), bias_D.to(self.bias.dtype))

    def _per_channel(self, values: Iterable[float]) -> Tensor:
        """float32 [3] beside the weights. Filled there, since a copy from the host would wait for the device."""
        return torch.stack([self.weight.new_full((), value, dtype=torch.float32) for value in values])

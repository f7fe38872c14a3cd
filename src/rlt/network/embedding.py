"""Patch embedding of kept patches as one linear layer, with the pixel normalisation folded in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PIXEL_CENTER = 116
"""Subtracted from pixels before they are multiplied. Exact in every float type, it keeps the sums small, which
matters in half precision; the folded bias puts it right."""


class PatchEmbedding(nn.Module):
    """[tokens, values] -> [tokens, width]: the tubelet convolution of VideoMAE, on kept patches only.

    Normalising pixels is affine, and so is the embedding: W((x / 255 - mean) / std) + b = W'x + b'. The folded form
    reads uint8 patches directly, without a float copy of the clip.
    """

    def __init__(
        self,
        width: int,
        *,
        tubelet_size: int,
        patch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        """Make weights for patches of tubelet_size * patch_size**2 * 3 values in (frame, row, column, channel) order.

        Args:
            width: values per token after the embedding.
            tubelet_size: frames per token.
            patch_size: height and width of a token in pixels.
            mean: of each channel on the scale 0..1.
            std: of each channel on the scale 0..1.
        """
        super().__init__()
        pixels = tubelet_size * patch_size**2
        self.weight = nn.Parameter(torch.empty(width, pixels * 3))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.trunc_normal_(self.weight, std=0.02)
        self.mean, self.std, self.pixels = mean, std, pixels
        self._folding: tuple[Tensor, Tensor] | None = None

    def forward(self, patches: Tensor) -> Tensor:
        """Embed uint8 pixels, or float patches that are normalised already: [tokens, values] -> [tokens, width]."""
        if patches.dtype != torch.uint8:
            return F.linear(patches.to(self.weight.dtype), self.weight, self.bias)
        scale, offset = self.folding()
        weight = self.weight.float()
        folded_weight = (weight * scale).to(self.weight.dtype)
        folded_bias = (self.bias.float() + (weight * offset).sum(1)).to(self.bias.dtype)
        return F.linear(patches.to(self.weight.dtype).sub_(_PIXEL_CENTER), folded_weight, folded_bias)

    def folding(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of each value of a patch: normalised = (pixel - center) * scale + offset.

        float32 [values] each, on the device of the weights. Made once and kept apart from the module's buffers,
        because `model.bfloat16()` would round them.
        """
        if self._folding is None or self._folding[0].device != self.weight.device:
            with torch.inference_mode(mode=False):  # the first caller may be in inference mode, a later one may train
                std_3 = torch.tensor(self.std, dtype=torch.float64)
                scale_3 = 1 / (255 * std_3)
                offset_3 = (_PIXEL_CENTER / 255 - torch.tensor(self.mean, dtype=torch.float64)) / std_3
                scale, offset = (x_3.repeat(self.pixels).float().to(self.weight.device) for x_3 in (scale_3, offset_3))
            self._folding = (scale, offset)
        return self._folding

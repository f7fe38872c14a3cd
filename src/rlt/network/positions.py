"""Positions of kept tokens, taken by coordinates: dropping tokens must not move the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoid_table(num_positions: int, width: int) -> Tensor:
    """The fixed sine-cosine table of VideoMAE ("Attention is all you need", section 3.5), float32 [positions, width].

    Row p is for place p = t * H' * W' + h * W' + w. Even columns hold sin(p / 10000^(j / width)), the odd column after
    it the cosine of the same angle.
    """
    column = torch.arange(width, dtype=torch.float64)
    frequency = torch.pow(10000.0, -(column - column % 2) / width)
    angle = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).to(torch.float32)


class SinusoidPositions(nn.Module):
    """Rows of `sinusoid_table` for kept tokens. `grow` extends it for clips of more places than any before."""

    table: Tensor

    def __init__(self, width: int, num_positions: int) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("table", sinusoid_table(num_positions, width), persistent=False)

    def forward(self, place_T: Tensor) -> Tensor:
        """Positions, float [tokens, width], of tokens by their int64 [tokens] places in their own clips' grids."""
        return self.table.index_select(0, place_T)

    def grow(self, num_positions: int) -> None:
        """Extend the table to at least `num_positions` rows."""
        if num_positions > len(self.table):
            with torch.inference_mode(mode=False):
                self.table = sinusoid_table(num_positions, self.width).to(self.table)

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


def mean_over_runs(table_LD: Tensor, place_T: Tensor, lengths_T: Tensor, step: Tensor | int, longest: int) -> Tensor:
    """Mean of a table's rows over the runs of tokens: float [tokens, width]; a row of the table where a run is one.

    Args:
        table_LD: float [places, width].
        place_T: int64 [tokens], the place of each token.
        lengths_T: int64 [tokens], how many time steps each stands for, 1 to `longest`.
        step: int64 [tokens], or one number for all: places from one time step to the next.
        longest: a bound that does not depend on the lengths, so that a graph can hold it.
    """
    sum_TD = table_LD.index_select(0, place_T)
    for later in range(1, longest):
        inside_T = lengths_T > later
        row_TD = table_LD.index_select(0, place_T + inside_T * later * step)
        sum_TD = sum_TD + row_TD * inside_T[:, None]
    return sum_TD / lengths_T[:, None].to(sum_TD.dtype)


class SinusoidPositions(nn.Module):
    """Rows of `sinusoid_table` for kept tokens. `grow` extends it for clips of more places than any before."""

    table: Tensor

    def __init__(self, width: int, num_positions: int, longest: int = 1) -> None:
        super().__init__()
        self.width, self.longest = width, longest
        self.register_buffer("table", sinusoid_table(num_positions, width), persistent=False)

    def forward(self, place_T: Tensor) -> Tensor:
        """Positions, float [tokens, width], of tokens by their int64 [tokens] places in their own clips' grids."""
        return self.table.index_select(0, place_T)

    def over_runs(self, place_T: Tensor, lengths_T: Tensor, step_T: Tensor) -> Tensor:
        """`mean_over_runs` in this table: float [tokens, width]."""
        return mean_over_runs(self.table, place_T, lengths_T, step_T, self.longest)

    def grow(self, num_positions: int, longest: int = 1) -> None:
        """Extend the table to at least `num_positions` rows, and take runs of up to `longest` time steps."""
        self.longest = max(self.longest, longest)
        if num_positions > len(self.table):
            with torch.inference_mode(mode=False):
                self.table = sinusoid_table(num_positions, self.width).to(self.table)

"""The keep rule for normalised float frames, as processors of other libraries give them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt.adapters.options import PatchOptions
from rlt.baselines import random_mask
from rlt.errors import InvalidArgumentError


def float_token_differences(frames_BTCHW: Tensor, *, tubelet_size: int, patch_size: int) -> Tensor:
    """`rlt.tokens.token_differences` for frames that are normalised already; the same up to float rounding.

    Args:
        frames_BTCHW: float [B, T, C, H, W].
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.

    Returns:
        float32 [B, T' - 1, H', W']: mean absolute difference over pixels and channels between the last frame of a
        tubelet and the first frame of the one before.
    """
    last = frames_BTCHW[:, 2 * tubelet_size - 1 :: tubelet_size].float()
    first = frames_BTCHW[:, :-tubelet_size:tubelet_size].float()
    patches = (last - first).abs().unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    differences: Tensor = patches.mean((2, 4, 6))
    return differences


@torch.no_grad()
def choose_tokens(frames_BTCHW: Tensor, options: PatchOptions, *, tubelet_size: int, patch_size: int) -> Tensor:
    """Which tokens to keep: bool [B, T', H', W'] for normalised float [B, T, C, H, W].

    Raises:
        InvalidArgumentError: if max_tokens or keep_ratio does not hold the first time step.
    """
    batch, time, _, height, width = frames_BTCHW.shape
    grid = (time // tubelet_size, height // patch_size, width // patch_size)
    if options.policy == "none":
        return torch.ones(batch, *grid, dtype=torch.bool, device=frames_BTCHW.device)
    differences = float_token_differences(frames_BTCHW, tubelet_size=tubelet_size, patch_size=patch_size)
    first = differences.new_full((batch, 1, *grid[1:]), torch.inf)
    differences = torch.cat([first, differences], dim=1)
    budget = _budget(options, grid)
    mask = differences > options.threshold if budget is None else _largest(differences, budget)
    if options.policy == "random":
        counts = mask.flatten(1).sum(1).tolist()
        tokens = grid[0] * grid[1] * grid[2]
        drawn = [random_mask(tokens, count, options.seed + number) for number, count in enumerate(counts)]
        mask = torch.stack(drawn).view(batch, *grid).to(mask.device)
    return mask


def _budget(options: PatchOptions, grid: tuple[int, int, int]) -> int | None:
    time, height, width = grid
    if options.max_tokens is not None:
        name, count = f"max_tokens is {options.max_tokens}", min(options.max_tokens, time * height * width)
    elif options.keep_ratio is not None:
        name, count = f"keep_ratio is {options.keep_ratio}", round(options.keep_ratio * time * height * width)
    else:
        return None
    if count < height * width:
        raise InvalidArgumentError(f"{name}; the first time step is always kept and has {height * width} tokens")
    return count


def _largest(differences: Tensor, count: int) -> Tensor:
    """The `count` largest of each clip; of equal ones the earlier."""
    order = differences.flatten(1).argsort(dim=1, descending=True, stable=True)[:, :count]
    mask = torch.zeros_like(differences, dtype=torch.bool).flatten(1).scatter_(1, order, True)
    return mask.view(differences.shape)

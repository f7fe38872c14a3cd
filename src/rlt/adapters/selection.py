"""The keep rule for frames as models of other libraries take them."""

from __future__ import annotations

import torch
from torch import Tensor

from rlt.adapters.options import PatchOptions
from rlt.errors import InvalidArgumentError
from rlt.tokens import IMAGENET_STD, token_differences
from rlt.tokens.rules import even_steps, random_mask


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
def choose_tokens(
    frames_BTCHW: Tensor,
    options: PatchOptions,
    *,
    tubelet_size: int,
    patch_size: int,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Tensor:
    """Which tokens to keep: bool [B, T', H', W'].

    Args:
        frames_BTCHW: normalised float [B, T, C, H, W]; or uint8, for which the mask is that of `rlt.keep_mask` exactly.
        options: the rule.
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.
        std: by which uint8 frames on the scale 0..1 are divided later.

    Raises:
        InvalidArgumentError: if max_tokens or keep_ratio does not hold the first time step.
    """
    if options.policy == "none":
        batch, time, _, height, width = frames_BTCHW.shape
        grid = (time // tubelet_size, height // patch_size, width // patch_size)
        return torch.ones(batch, *grid, dtype=torch.bool, device=frames_BTCHW.device)
    if frames_BTCHW.dtype == torch.uint8:
        frames_BTHWC = frames_BTCHW.permute(0, 1, 3, 4, 2)
        differences = token_differences(frames_BTHWC, tubelet_size=tubelet_size, patch_size=patch_size, std=std)
    else:
        differences = float_token_differences(frames_BTCHW, tubelet_size=tubelet_size, patch_size=patch_size)
    return mask_from_differences(differences, options)


@torch.no_grad()
def mask_from_differences(differences: Tensor, options: PatchOptions) -> Tensor:
    """The rule: which tokens to keep, given how much each differs from the time step before.

    Args:
        differences: float [B, T' - 1, H', W'], 0 or more. What is no number counts as large: broken frames show in the
            outputs, as without the patch.
        options: the rule. Clip i of "random" is drawn with seed + i.

    Returns:
        bool [B, T', H', W'].

    Raises:
        InvalidArgumentError: if max_tokens or keep_ratio does not hold the first time step.
    """
    batch, pairs, height, width = differences.shape
    grid = (pairs + 1, height, width)
    if options.policy == "none":
        return torch.ones(batch, *grid, dtype=torch.bool, device=differences.device)
    first = differences.new_full((batch, 1, height, width), torch.inf)
    differences = torch.cat([first, differences.nan_to_num(nan=torch.finfo(differences.dtype).max)], dim=1)
    budget = _budget(options, grid)
    mask = differences > options.threshold if budget is None else _largest(differences, budget)
    if options.policy == "rlt":
        return mask
    counts = mask.flatten(1).sum(1).tolist()
    if options.policy == "random":
        tokens = grid[0] * height * width
        drawn = [random_mask(tokens, count, options.seed + number) for number, count in enumerate(counts)]
        return torch.stack(drawn).view(batch, *grid).to(mask.device)
    mask = torch.zeros_like(mask)
    for clip, count in zip(mask, counts, strict=True):
        clip[even_steps(grid[0], max(round(count / (height * width)), 1))] = True
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

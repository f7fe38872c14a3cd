"""Which tokens a network gets: run-length tokenization, and the rules that it is measured against.

Every rule has the same signature, so that an experiment changes one word. A claim about quality needs "random" at the
same token count and "uniform_frames" beside "rlt".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError
from rlt.structures import RunLengthTokens
from rlt.tokens import check_threshold, keep_mask, select_tokens, token_grid

POLICIES = ("none", "rlt", "random", "uniform_frames", "tome")
"""Values of `TokenizerConfig.policy`."""


@dataclass
class TokenizerConfig:
    """How clips become tokens."""

    policy: str = "rlt"
    """One of `POLICIES`: "none" keeps all tokens, "rlt" drops repeats, "random" keeps a random subset,
    "uniform_frames" keeps all tokens of evenly spread time steps, "tome" keeps all and merges them in the network."""
    threshold: float = 0.1
    """For "rlt", and for the count that "random" and "uniform_frames" match: see `rlt.keep_mask`; 0 or more."""
    keep_ratio: float | None = None
    """For "random" and "uniform_frames": share of the tokens to keep, above 0 and up to 1. None keeps as many as "rlt"
    would keep of the same clip at `threshold`."""
    merge_per_block: int = 0
    """For "tome": tokens that each block merges away, 0 or more."""

    def __post_init__(self) -> None:
        """Hold values.

        Raises:
            InvalidArgumentError: naming the field.
        """
        if self.policy not in POLICIES:
            raise InvalidArgumentError(f"tokenizer is {self.policy!r}; allowed are {', '.join(POLICIES)}")
        check_threshold(self.threshold)
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise InvalidArgumentError(f"keep_ratio is {self.keep_ratio}; above 0 and up to 1 is needed")
        if self.keep_ratio is not None and self.policy not in ("random", "uniform_frames"):
            raise InvalidArgumentError(
                f"keep_ratio is {self.keep_ratio}, but tokenizer {self.policy!r} does not use it; leave it out"
            )
        if self.merge_per_block < 0:
            raise InvalidArgumentError(f"merge_per_block is {self.merge_per_block}; 0 or more is needed")


def select(
    frames: Tensor,
    config: TokenizerConfig,
    *,
    tubelet_size: int = 2,
    patch_size: int = 16,
    seeds: Sequence[int] | None = None,
) -> list[RunLengthTokens]:
    """Cut clips into tokens by the configured rule.

    Args:
        frames: uint8 [B, T, H, W, 3].
        config: the rule.
        tubelet_size: frames per token.
        patch_size: height and width of a token in pixels.
        seeds: one integer per clip for "random"; the choice is a function of it alone. None means 0, 1, 2, ...

    Returns:
        One `RunLengthTokens` per clip. Under "random" every run length is 1, since a token stands for itself only.
    """
    grid = token_grid(frames.shape, tubelet_size=tubelet_size, patch_size=patch_size)
    cut = partial(select_tokens, tubelet_size=tubelet_size, patch_size=patch_size)
    if config.policy in ("none", "tome"):
        mask = torch.ones(len(frames), *grid, dtype=torch.bool, device=frames.device)
        return cut(frames, mask)
    if config.policy == "rlt" or config.keep_ratio is None:
        mask = keep_mask(frames, threshold=config.threshold, tubelet_size=tubelet_size, patch_size=patch_size)
        if config.policy == "rlt":
            return cut(frames, mask)
        counts = mask.flatten(1).sum(1).tolist()
    else:
        counts = [max(round(config.keep_ratio * grid.num_tokens), 1)] * len(frames)
    if config.policy == "random":
        chosen = range(len(frames)) if seeds is None else seeds
        mask = torch.stack(
            [random_mask(grid.num_tokens, count, seed) for count, seed in zip(counts, chosen, strict=True)]
        ).view(-1, *grid)
        mask = mask.to(frames.device)
        lengths = torch.ones(int(mask.sum()), dtype=torch.int64, device=frames.device)
        return cut(frames, mask, lengths=lengths)
    mask = torch.zeros(len(frames), *grid, dtype=torch.bool, device=frames.device)
    for clip, count in zip(mask, counts, strict=True):
        clip[even_steps(grid.time, max(round(count / (grid.height * grid.width)), 1))] = True
    return cut(frames, mask)


def random_mask(num_tokens: int, count: int, seed: int) -> Tensor:
    """bool [num_tokens] with `count` places drawn at random, a function of `seed` alone."""
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(num_tokens, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def even_steps(time: int, count: int) -> list[int]:
    """`count` of the steps 0..time-1, evenly spread, the first among them."""
    return [step * time // count for step in range(count)]

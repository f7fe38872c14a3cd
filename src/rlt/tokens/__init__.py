"""Frames -> run-length tokens: which patches repeat, for how long, and the rules that choose (paper, section 3.1)."""

from rlt.tokens.tokenize import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Policy,
    check_threshold,
    difference_sums,
    keep_mask,
    run_lengths,
    select_tokens,
    token_differences,
    token_grid,
    tokenize,
    tokenize_batch,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Policy",
    "check_threshold",
    "difference_sums",
    "keep_mask",
    "run_lengths",
    "select_tokens",
    "token_differences",
    "token_grid",
    "tokenize",
    "tokenize_batch",
]

"""FLOPs of the packed network, 2 per multiply-add: in closed form, counted, and met by merging."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from rlt.errors import InvalidArgumentError
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.structures import PackedTokens


def forward_flops(config: ViTConfig, length: int, merge_per_block: int = 0) -> int:
    """FLOPs of one forward pass over a clip of `length` tokens.

    FLOPs of packed clips add up, since tokens of different clips meet in no product. In token merging the search for
    similar tokens is a matrix product and is counted; sorting and adding up are not.
    """
    width = config.width
    flops = 2 * length * config.patches.values_per_token * width  # embedding
    for _ in range(config.depth):
        flops += 8 * length * width**2 + 4 * length**2 * width  # four projections; attention
        merges = min(merge_per_block, length // 2)
        if merges:
            flops += 2 * (length // 2) * ((length + 1) // 2) * (width // config.num_heads)  # similarity
        length -= merges
        flops += 4 * length * width * config.mlp_width
    return flops + 2 * width * config.num_classes


def count_forward_flops(config: ViTConfig, packed: PackedTokens, merge_per_block: int = 0) -> int:
    """FLOPs of one forward pass over these tokens, counted by `torch.utils.flop_counter`.

    The model is built without memory on the meta device, where no kernel runs and attention is counted exactly.
    """
    with torch.device("meta"):
        model = VisionTransformer(config)
    model.merge_per_block = merge_per_block
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(packed.to("meta"))
    return int(counter.get_total_flops())


def merge_for_flops(config: ViTConfig, lengths: Sequence[int], target_flops: float) -> int:
    """How many tokens to merge per block, so that the clips together cost as near as possible to `target_flops`.

    For comparisons at equal FLOPs. `lengths` are the tokens of each clip that enters the network, usually all of its
    grid. Of two `merge_per_block` that are equally near it is the smaller.
    """
    if not lengths:
        raise InvalidArgumentError("no clips to match FLOPs for; give at least one length")
    counts = Counter(lengths)

    def total(merges: int) -> int:
        return sum(forward_flops(config, length, merges) * count for length, count in counts.items())

    most = max(lengths) // 2
    if target_flops < total(most):
        raise InvalidArgumentError(
            f"target of {target_flops:.4g} FLOPs is below the {total(most):.4g} that remain when every block merges "
            "half of its tokens; give a larger target"
        )
    return min(range(most + 1), key=lambda merges: abs(total(merges) - target_flops))

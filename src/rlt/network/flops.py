"""FLOPs of the packed network in closed form."""

from __future__ import annotations

from rlt.network.vit import ViTConfig


def forward_flops(config: ViTConfig, length: int, merge_per_block: int = 0) -> int:
    """FLOPs (2 per multiply-add) of one forward pass over a clip of `length` tokens.

    FLOPs of packed clips add up, since tokens of different clips meet in no product.
    """
    width = config.width
    flops = 2 * length * config.tubelet_size * config.patch_size**2 * 3 * width  # embedding
    for _ in range(config.depth):
        flops += 8 * length * width**2 + 4 * length**2 * width  # four projections; attention
        merges = min(merge_per_block, length // 2)
        if merges:
            flops += 2 * (length // 2) * ((length + 1) // 2) * (width // config.num_heads)  # similarity
        length -= merges
        flops += 4 * length * width * config.mlp_width
    return flops + 2 * width * config.num_classes

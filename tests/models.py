"""Small networks with random weights, and the clips and tokens that they are tested on."""

from __future__ import annotations

import torch
from torch import Tensor

import rlt
from rlt.structures import PackedTokens, RunLengthTokens, TokenGrid

TINY = rlt.ViTConfig(
    width=32, depth=3, num_heads=4, mlp_width=64, num_classes=7, num_frames=4, image_size=32, patch_size=8
)


def tiny_model(**changes: object) -> rlt.VisionTransformer:
    """Patches of 8 pixels, as in `video`; biases and LayerNorms are away from their neutral start."""
    torch.manual_seed(0)
    model = rlt.VisionTransformer(TINY.replace(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def video(seed: int, frames: int = 4, height: int = 32, width: int = 32) -> Tensor:
    """uint8 [T, H, W, 3] of noise whose upper half repeats."""
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)
    clip[1:, : height // 2] = clip[0, : height // 2]
    return clip


GRID = TokenGrid(4, 4, 4)


def tiny(**changes: object) -> rlt.VisionTransformer:
    """Patches of 16 pixels, as in `random_pack`; weights as they are drawn for training."""
    config = rlt.ViTConfig(width=24, depth=2, num_heads=2, mlp_width=48, num_classes=5, num_frames=8, image_size=64)
    torch.manual_seed(0)
    return rlt.VisionTransformer(config.replace(**changes)).eval()


def random_pack(seed: int, num_clips: int, most: int = 64) -> PackedTokens:
    """Clips of random token counts, now and then of one token."""
    generator = torch.Generator().manual_seed(seed)
    clips = []
    for _ in range(num_clips):
        count = int(torch.randint(1, most, (1,), generator=generator))
        place = torch.randperm(GRID.num_tokens, generator=generator)[:count].sort().values
        coords = torch.stack([place // 16, place // 4 % 4, place % 4], dim=1)
        patches = torch.randint(0, 256, (count, 1536), generator=generator, dtype=torch.uint8)
        lengths = torch.minimum(torch.randint(1, 5, (count,), generator=generator), GRID.time - coords[:, 0])
        clips.append(RunLengthTokens(patches, coords, lengths, GRID))
    return rlt.pack(clips)

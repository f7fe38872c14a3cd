"""Small models of transformers with random weights, and the clips that they are tested on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlt.adapters import tiny

PATCH, TUBELET, GRID = 8, 2, (4, 4, 4)
SIZE = tiny.Size(
    width=32, depth=2, heads=4, mlp_width=48, num_frames=8, image_size=32, patch_size=PATCH, tubelet_size=TUBELET
)


def videomae(kind: str = "VideoMAEForVideoClassification", size: tiny.Size = SIZE, **more: Any) -> nn.Module:
    return spread(tiny.build("videomae", size, kind=kind, num_labels=5, **more))


def vivit(kind: str = "VivitForVideoClassification", size: tiny.Size = SIZE, **more: Any) -> nn.Module:
    return spread(tiny.build("vivit", size, kind=kind, num_labels=5, **more))


def vjepa2(kind: str = "VJEPA2ForVideoClassification", size: tiny.Size = SIZE, **more: Any) -> nn.Module:
    fields = {"hidden_size": 48, "pred_hidden_size": 24, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}
    return spread(tiny.build("vjepa2", size, kind=kind, num_labels=5, **{**fields, **more}))


def build(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return spread(kind(config).eval())


def spread(model: nn.Module) -> nn.Module:
    """Fresh heads and biases are zeros, which would hide mistakes."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


CLASSIFIERS: list[Callable[[], nn.Module]] = [
    videomae,
    lambda: videomae(use_mean_pooling=False),
    vivit,
    vjepa2,
]
ENCODERS: list[Callable[[], nn.Module]] = [
    lambda: videomae("VideoMAEModel"),
    lambda: videomae("VideoMAEModel", use_mean_pooling=False),
    lambda: vivit("VivitModel"),
    lambda: vjepa2("VJEPA2Model"),
]
IDS = ["videomae", "videomae first token", "vivit", "vjepa2"]


def clips(num_clips: int = 3) -> Tensor:
    """Normalised floats [B, T, C, H, W]: noise that stands still in ever more of the picture from clip to clip."""
    generator = torch.Generator().manual_seed(7)
    frames = torch.randn(num_clips, 8, 3, 32, 32, generator=generator)
    for number in range(num_clips):
        still = 8 * (number + 1)
        frames[number, :, :, :, :still] = frames[number, :1, :, :, :still]
    return frames


def output_of(model: nn.Module, frames: Tensor, **kwargs: Any) -> Tensor:
    out = model(frames, **kwargs)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found

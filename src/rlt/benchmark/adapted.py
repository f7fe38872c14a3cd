"""Suite of the models that `rlt.patch` knows: the unpatched model beside the patched one, on the same real clips."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rlt.adapters import patch
from rlt.adapters.base import import_transformers
from rlt.benchmark.harness import BenchmarkResult, BenchmarkSettings, Rounds, Work, read_frames
from rlt.tokens import IMAGENET_MEAN, IMAGENET_STD

WIDTH, DEPTH, HEADS = 384, 12, 6
"""Of all models, that of ViT-S; weights are random."""


def adapters_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Clips -> logits: "dense" the model as it comes, "rlt" patched, for each classifier that can be patched.

    Beside the times, the largest difference of logits where nothing is dropped ("identity"), and between clips that go
    through the patched model together and one by one ("one_by_one").
    """
    frames = read_frames(settings)
    works: list[Work] = []
    differences: dict[str, dict[str, float]] = {}
    for name, model in _models(settings).items():
        model = model.to(settings.device, settings.dtype).eval()
        mean, std = _statistics(name)
        pixels = ((frames.permute(0, 1, 4, 2, 3) / 255 - mean) / std).to(settings.device, settings.dtype)
        patched: Any = patch(copy.deepcopy(model), threshold=settings.threshold)
        differences[name] = _differences(model, patched, pixels)
        kept = patched.rlt.last.share_kept
        for arm, network, share in (("dense", model, 1.0), ("rlt", patched, kept)):
            run = partial(network, pixels)
            flops = _count_flops(patched, pixels, "none" if arm == "dense" else "rlt")
            works.append(Work(arm, run, share, flops, {"model": name}))
    arms = rounds.measure(works, settings.rounds or 3, settings.device)
    return BenchmarkResult("adapters", settings, arms, "dense", {"largest_differences": differences})


def _models(settings: BenchmarkSettings) -> dict[str, nn.Module]:
    """Small random networks of each family, by name."""
    transformers = import_transformers()
    shape = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    clip = {"num_frames": settings.num_frames, "image_size": settings.size}
    mlp = {"intermediate_size": 4 * WIDTH}
    small = {"pred_hidden_size": 192, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 6}
    vjepa2 = {"frames_per_clip": settings.num_frames, "crop_size": settings.size, "num_pooler_layers": 1, **small}
    torch.manual_seed(0)
    return {
        "VideoMAE": transformers.VideoMAEForVideoClassification(transformers.VideoMAEConfig(**shape, **clip, **mlp)),
        "ViViT": transformers.VivitForVideoClassification(transformers.VivitConfig(**shape, **clip, **mlp)),
        "V-JEPA 2": transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**shape, **vjepa2)),
    }


def _statistics(name: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that the family's processor takes, [3, 1, 1] each."""
    values = ((0.5,) * 3, (0.5,) * 3) if name == "ViViT" else (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in values)
    return mean, std


@torch.no_grad()
def _differences(model: Any, patched: Any, pixels: Tensor) -> dict[str, float]:
    with patched.rlt.override(policy="none"):
        identity = (patched(pixels).logits - model(pixels).logits).abs().max()
    alone = torch.cat([patched(clip[None]).logits for clip in pixels])
    together = patched(pixels).logits  # the last call, whose record is kept
    return {"identity": float(identity), "one_by_one": float((together - alone).abs().max())}


def _count_flops(patched: Any, pixels: Tensor, policy: str) -> int:
    """Of the patched model, whose attention is counted on every device; torch counts that of others on some only."""
    with patched.rlt.override(policy=policy), FlopCounterMode(display=False) as counter, torch.no_grad():
        patched(pixels)
    return int(counter.get_total_flops())

"""AdamW with layer-wise learning rates, and the schedule by step."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from rlt.conf.schema import OptimizerConfig
from rlt.errors import InvalidArgumentError


def layer_of(name: str, depth: int) -> int:
    """Depth of a parameter of `VisionTransformer`: 0 for the embeddings, i + 1 for block i, depth + 1 for the head.

    Raises:
        InvalidArgumentError: for a name that is no part of the network.
    """
    if name.startswith(("patch_embed.", "length_embed")):
        return 0
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    if name.startswith(("fc_norm.", "head.")):
        return depth + 1
    raise InvalidArgumentError(f"parameter {name!r} belongs to no layer of a VisionTransformer")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], depth: int, config: OptimizerConfig, peak_lr: float
) -> list[dict[str, object]]:
    """One AdamW group per layer and kind of trainable parameters, with the layer's own learning rate.

    It is peak * decay ** (depth + 1 - layer), `peak_lr` being that of the head at the top of the schedule.
    """
    members: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[layer_of(name, depth), parameter.ndim > 1 and name != "length_embed"].append(parameter)
    return [
        {
            "params": members[layer, decayed],
            "lr": peak_lr * config.layer_decay ** (depth + 1 - layer),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "name": f"layer{layer}{'' if decayed else '_no_decay'}",
        }
        for layer, decayed in sorted(members)
    ]


def lr_factor(total_steps: int, config: OptimizerConfig) -> Callable[[int], float]:
    """Learning rate over its peak as a function of the step: linear warm-up, then half a cosine.

    Step 0 has 1 / warmup of the peak, the last warm-up step the peak, step `total_steps` min_lr / lr.
    """
    warmup = config.warmup_steps or round(config.warmup_fraction * total_steps)
    floor = config.min_lr / config.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def make_optimizer(
    model: nn.Module, depth: int, config: OptimizerConfig, *, clips_per_step: float, total_steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW and its schedule, to be stepped once per optimizer step.

    Args:
        model: the network.
        depth: number of its blocks.
        config: see `OptimizerConfig`.
        clips_per_step: clips of one optimizer step over all devices, for the linear scaling.
        total_steps: optimizer steps of the whole run.
    """
    peak_lr = config.lr * clips_per_step / 256
    groups = parameter_groups(model.named_parameters(), depth, config, peak_lr)
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=(config.betas[0], config.betas[1]))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(total_steps, config))

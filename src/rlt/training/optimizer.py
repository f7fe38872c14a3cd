"""AdamW with layer-wise learning rates, and the schedule by step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from rlt.errors import InvalidArgumentError


@dataclass
class OptimizerConfig:
    """AdamW, layer-wise decay of the learning rate, warm-up and cosine."""

    lr: float = 1.5e-3
    """Peak learning rate for 256 clips per step; scaled linearly with the clips that a step really holds."""
    weight_decay: float = 0.05
    """Decoupled weight decay, 0 or more; not applied to biases, norms and the length encoding."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates of its moments."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each block to the one before it, above 0 and up to 1; 1 = none."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_fraction: float = 0.05
    """Share of all steps that is warm-up where warmup_steps is 0."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, for 256 clips per step like `lr`."""

    def __post_init__(self) -> None:
        """Hold ranges.

        Raises:
            InvalidArgumentError: naming the field.
        """
        for name, low, high in (("lr", 0, math.inf), ("layer_decay", 0, 1)):
            value = getattr(self, name)
            if not low < value <= high:
                raise InvalidArgumentError(f"optimizer.{name} is {value}; above {low} and up to {high:g} is needed")
        for name, low, high in (("weight_decay", 0, math.inf), ("warmup_steps", 0, math.inf), ("min_lr", 0, self.lr)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"optimizer.{name} is {value}; {low} to {high:g} is needed")
        if not 0 <= self.warmup_fraction < 1:
            raise InvalidArgumentError(
                f"optimizer.warmup_fraction is {self.warmup_fraction}; 0 or more and below 1 is needed"
            )
        if len(self.betas) != 2:
            raise InvalidArgumentError(f"optimizer.betas is {self.betas}; two numbers are needed")


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
    """One AdamW group per layer and kind, with the layer's own learning rate: peak * decay ** (depth + 1 - layer).

    Args:
        named_parameters: of the model, trainable ones are taken.
        depth: number of blocks.
        config: see `OptimizerConfig`.
        peak_lr: learning rate of the head at the top of the schedule.
    """
    groups: dict[tuple[int, bool], dict[str, object]] = {}
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, depth)
        decayed = parameter.ndim > 1 and name != "length_embed"
        key = (layer, decayed)
        if key not in groups:
            members[key] = []
            groups[key] = {
                "params": members[key],
                "lr": peak_lr * config.layer_decay ** (depth + 1 - layer),
                "weight_decay": config.weight_decay if decayed else 0.0,
                "name": f"layer{layer}{'' if decayed else '_no_decay'}",
            }
        members[key].append(parameter)
    return [groups[key] for key in sorted(groups)]


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

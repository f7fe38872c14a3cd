"""Networks under an arm: ours, whose cost has a closed form, and patched models of transformers, whose cost is counted.

Shape legend: V views of a video, C classes, D features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlt.frontier.arms import FrontierArm
from rlt.network.flops import forward_flops, merge_for_flops
from rlt.network.run_lengths import AWARE, IGNORED, RunLengthParts
from rlt.network.vit import VisionTransformer
from rlt.pretrained import PatchedNetwork
from rlt.structures import PackedTokens, RunLengthTokens, pack
from rlt.tokens import Everything

Network = VisionTransformer | PatchedNetwork
Answers = tuple[Tensor, Tensor, list[int]]
"""Logits [V, C], features before the head [V, D], and FLOPs of each view."""


def _count_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}
"""Attention of models on the CPU, which torch's counter does not know."""


def can_run(network: Network, arm: FrontierArm) -> bool:
    """Whether a network has what an arm is about: token merging, or the parts in which run lengths count."""
    if isinstance(network, VisionTransformer):
        return True
    counted = network.model.rlt.counted
    if arm.merges or arm.run_lengths == AWARE:
        return not arm.merges and any(counted)
    return set(RunLengthParts.of(arm.run_lengths).names) <= set(counted.names)


def describe(network: Network) -> str:
    """What decides its answers beside its weights, as text that is the same on every machine."""
    if isinstance(network, VisionTransformer):
        config = network.config.to_dict()
        return json.dumps({**config, "run_lengths": None}, sort_keys=True, default=str)
    theirs = {name: value for name, value in network.model.config.to_dict().items() if not name.startswith("_")}
    return json.dumps([asdict(network.config), theirs], sort_keys=True, default=str)


def answers(network: Network, arm: FrontierArm, clips: Sequence[RunLengthTokens], *, dense: bool) -> Answers:
    """What a network says of the views that an arm cut into tokens; `dense` is a patched model without its patch."""
    if isinstance(network, PatchedNetwork):
        return _patched(network, arm, clips, dense=dense)
    network.merge_per_block, network.run_lengths = 0, arm.run_lengths
    return *_forward(network, pack(clips)), [forward_flops(network.config, len(clip)) for clip in clips]


def merged_answers(network: VisionTransformer, clips: Sequence[RunLengthTokens], flops: Sequence[int]) -> Answers:
    """Token merging at these FLOPs, or at the least that it can; views that merge alike go through together."""
    config = network.config
    least = [forward_flops(config, len(clip), len(clip) // 2) for clip in clips]
    wanted = [max(pair) for pair in zip(flops, least, strict=True)]
    merges = [merge_for_flops(config, [len(clip)], most) for clip, most in zip(clips, wanted, strict=True)]
    logits = torch.empty(len(clips), config.num_classes, dtype=torch.float64)
    features = torch.empty(len(clips), config.width, dtype=torch.float64)
    network.run_lengths = IGNORED
    for count in set(merges):
        views = [view for view, of_view in enumerate(merges) if of_view == count]
        network.merge_per_block = count
        logits[views], features[views] = _forward(network, pack([clips[view] for view in views]))
    spent = [forward_flops(config, len(clip), count) for clip, count in zip(clips, merges, strict=True)]
    return logits, features, spent


def _patched(network: PatchedNetwork, arm: FrontierArm, clips: Sequence[RunLengthTokens], *, dense: bool) -> Answers:
    network.use(Everything() if dense else arm.rule)
    network.run_lengths = arm.run_lengths
    found, flops = [], []
    for clip in clips:  # one at a time, so that each has its own count
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            found.append(_forward(network, pack([clip]), unpatched=dense))
        flops.append(int(counter.get_total_flops()))
    logits, features = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(features), flops


def _forward(network: Network, packed: PackedTokens, *, unpatched: bool = False) -> tuple[Tensor, Tensor]:
    run = network.forward_features
    if unpatched and isinstance(network, PatchedNetwork):
        run = network.forward_unpatched
    moved = packed.to(next(network.parameters()).device)
    features = run(moved)
    return network.head(features).double().cpu(), features.double().cpu()

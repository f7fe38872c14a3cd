"""Suites of the whole network: forward pass, training step, and how cost grows with the number of frames."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters import tiny
from rlt.benchmark.harness import (
    Arm,
    BenchmarkResult,
    BenchmarkSettings,
    Rounds,
    Work,
    normalised_pixels,
    packed_by,
    read_frames,
    run_each,
)
from rlt.benchmark.peers.padded import padded_logits
from rlt.checkpoints import create_model
from rlt.errors import InvalidArgumentError
from rlt.measure import Timing
from rlt.network.flops import count_forward_flops, forward_flops, merge_for_flops
from rlt.network.vit import VisionTransformer
from rlt.structures import PackedTokens, pack
from rlt.tokens import Everything, Random

Forward = Callable[[PackedTokens], Tensor]
FEWEST_FRAMES, USUAL_FRAMES = 16, 64


def forward_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Tokens -> logits with the weights in the precision of the settings; see `_variants` for the arms."""
    model = create_model(settings.model).to(settings.device, settings.dtype).eval()
    variants = _variants(model, settings)
    if settings.compiled and torch.device(settings.device).type == "cuda":
        packed = {arm.name: (arm, packs[0]) for arm, _, packs in variants}
        for arm, pack_ in (packed["dense_packed"], packed["rlt"]):
            variants.append((replace(arm, name=f"{arm.name}_cuda_graph"), _captured(model, pack_), [pack_]))
    if settings.transformers:
        other, forward = _of_transformers(model, settings)
        other.eval()
        variants.append((Arm("transformers", flops=variants[0][0].flops), forward, variants[0][2]))
    works: list[Work] = [(arm, partial(run_each, forward, packs)) for arm, forward, packs in variants]
    return _with_ratios("forward", settings, rounds.measure(works, settings.rounds or 5, settings.device))


def train_step_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Forward, backward and AdamW's update, weights in float32, half precision by autocast.

    All arms update the same weights, whose values do not matter to the time.
    """
    model = create_model(settings.model).to(settings.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    variants = [(*variant, optimizer) for variant in _variants(model, settings)]
    smallest = pack(variants[0][2][0].unpack()[0])
    train_step(model, [smallest], optimizer, settings)  # makes the optimizer's state, which all arms share
    if settings.transformers:
        other, forward = _of_transformers(model, settings, dtype=torch.float32)
        own_optimizer = torch.optim.AdamW(other.train().parameters(), lr=1e-5)
        variant = Arm("transformers", flops=variants[0][0].flops), forward, variants[0][2], own_optimizer
        train_step(*variant[1:], settings)
        variants.append(variant)
    works: list[Work] = []
    for arm, forward, packs, its_optimizer in variants:
        # Each matrix product of the forward pass has two in the backward pass; the input needs no gradient.
        counted = replace(arm, flops=3 * (arm.flops or 0))
        works.append((counted, partial(train_step, forward, packs, its_optimizer, settings)))
    arms = rounds.measure(works, settings.rounds or 3, settings.device, gradients=True)
    return _with_ratios("train-step", settings, arms)


def frames_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Forward pass over 16, 32, 64, ... frames, up to `num_frames` or 64: "dense" and "rlt" for each video alone.

    "padded" and "packed" run one clip of every video together, with and without padding, where there are several.
    """
    most = max(settings.clip.num_frames, USUAL_FRAMES)
    counts = [FEWEST_FRAMES * 2**power for power in range(10) if FEWEST_FRAMES * 2**power <= most]
    model = create_model(settings.model).to(settings.device, settings.dtype).eval()
    works: list[Work] = []
    for count in counts:
        clips = []
        for path in settings.videos:
            one = replace(settings, videos=(path,), clips=1, clip=replace(settings.clip, num_frames=count))
            frames = read_frames(one)
            for name, rule in (("dense", Everything()), ("rlt", settings.rule)):
                packed = packed_by(rule, frames, one, model.config.patches)
                details: dict[str, object] = {"video": path.name, "frames": count}
                flops = count_forward_flops(model.config, packed)
                works.append((Arm(name, packed.share_kept, flops, details), partial(model, packed)))
            clips += packed.unpack()
        if len(clips) > 1:
            together = pack(clips)
            details = {"video": "all", "frames": count}
            kept, flops = together.share_kept, count_forward_flops(model.config, together)
            works.append((Arm("packed", kept, flops, details), partial(model, together)))
            works.append((Arm("padded", kept, None, details), partial(padded_logits, model, together)))
    settings = replace(settings, clips=1, clip=replace(settings.clip, num_frames=most))
    return BenchmarkResult("frames", settings, rounds.measure(works, settings.rounds or 3, settings.device))


def _variants(model: VisionTransformer, settings: BenchmarkSettings) -> list[tuple[Arm, Forward, list[PackedTokens]]]:
    """(arm with the FLOPs of a forward pass, network, packs to run one after the other).

    Dense runs in both ways, all clips in one pack and clip by clip; the faster one is called "dense" in the end, so
    that no speed-up comes from a batch that is larger than the cache. ToMe is left out where it cannot get as cheap.
    Compiled arms share one network, so that RLT's token counts have to do with the graph that dense left behind.
    """
    frames = read_frames(settings)
    config = model.config
    rules = (Everything(), settings.rule, Random(like=settings.rule))
    dense, rlt, random = (packed_by(rule, frames, settings, config.patches) for rule in rules)
    flops = {name: count_forward_flops(config, packed) for name, packed in (("dense", dense), ("rlt", rlt))}
    padded_flops = forward_flops(config, rlt.segments.max_length) * len(rlt)
    variants: list[tuple[Arm, Forward, list[PackedTokens]]] = [
        (Arm("dense_packed", flops=flops["dense"]), model, [dense]),
        (Arm("dense_clip_by_clip", flops=flops["dense"]), model, [pack(clip) for clip in dense]),
        (Arm("rlt", rlt.share_kept, flops["rlt"]), model, [rlt]),
        (Arm("random", random.share_kept, flops["rlt"]), model, [random]),
        (Arm("padded", rlt.share_kept, padded_flops), partial(padded_logits, model), [rlt]),
    ]
    if settings.compiled:
        compiled = copy(model)  # shares the weights, so that one optimizer serves all arms
        compiled.compile_network()
        variants += [(replace(arm, name=f"{arm.name}_compiled"), compiled, packs) for arm, _, packs in variants[:3]]
    try:
        merges = merge_for_flops(config, dense.segments.lengths, flops["rlt"])
    except InvalidArgumentError:  # RLT keeps so few tokens that no amount of merging gets there
        return variants
    merging = copy(model)
    merging.merge_per_block = merges
    return [*variants, (Arm("tome", flops=count_forward_flops(config, dense, merges)), merging, [dense])]


def _of_transformers(
    model: VisionTransformer, settings: BenchmarkSettings, *, dtype: torch.dtype | None = None
) -> tuple[nn.Module, Forward]:
    """VideoMAE of transformers, as large as `model`, and its logits for the clips that are measured, whole.

    Pixels lie normalised on the device, in the precision of the weights; the pack that it is given is not looked at.
    """
    config, frames = model.config, read_frames(settings)
    layers = config.width, config.depth, config.num_heads, config.mlp_width
    size = tiny.Size(*layers, frames.shape[1], frames.shape[2], config.patch_size, config.tubelet_size)
    other = tiny.build("videomae", size, num_labels=config.num_classes)
    other.to(settings.device, dtype or settings.dtype)
    pixels = normalised_pixels(frames, config.patches).to(settings.device, dtype or settings.dtype)
    return other, lambda _packed: other(pixel_values=pixels).logits


def _captured(model: VisionTransformer, packed: PackedTokens) -> Forward:
    """The forward pass over this one pack as a CUDA graph: what is left where the host has nothing to start."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are chosen and memory is taken before the capture
                model(packed)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(packed)

    def replay(_packed: PackedTokens) -> Tensor:
        graph.replay()
        return logits

    return replay


def train_step(
    forward: Forward, packs: list[PackedTokens], optimizer: torch.optim.Optimizer, settings: BenchmarkSettings
) -> None:
    """One update; several packs add up their gradients, as gradient accumulation does.

    Gradients go at the end: those of the step before would count as memory that was taken already.
    """
    for packed in packs:
        kind = torch.device(settings.device).type
        with torch.autocast(kind, settings.dtype, enabled=settings.dtype != torch.float32):
            logits = forward(packed)
            loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _with_ratios(suite: str, settings: BenchmarkSettings, arms: list[Arm]) -> BenchmarkResult:
    """Name the faster dense arm "dense", add the ideal arm, and hold times to FLOPs."""
    dense = min(arms[:2], key=lambda arm: arm.timing.median)
    ordered = [replace(dense, name="dense", details={"runs": dense.name}), *(arm for arm in arms if arm is not dense)]
    rlt = next(arm for arm in arms if arm.name == "rlt")
    assert dense.flops
    assert rlt.flops
    flop_ratio = rlt.flops / dense.flops
    ideal = Timing(tuple(flop_ratio * seconds for seconds in dense.timing.seconds))
    ordered.append(Arm("ideal", rlt.tokens_kept, rlt.flops, timing=ideal))
    time_ratio = rlt.timing.over(dense.timing)
    ratios = {"flop_ratio": flop_ratio, "time_ratio": time_ratio, "time_ratio_over_flop_ratio": time_ratio / flop_ratio}
    compared = ("tome", "padded", "rlt_compiled", "rlt_cuda_graph", "transformers")
    others = [arm for arm in arms if arm.name in compared]
    extra = ratios | {f"{arm.name}_over_rlt": arm.timing.over(rlt.timing) for arm in others}
    return BenchmarkResult(suite, settings, ordered, "dense", extra)

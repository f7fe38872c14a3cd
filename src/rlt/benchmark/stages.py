"""Suites of single stages: tokenize, feed, embed, attention.

Shape legend: T tokens of all clips, H heads, K width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlt.benchmark.harness import (
    Arm,
    BenchmarkResult,
    BenchmarkSettings,
    Rounds,
    Work,
    packed_by,
    read_frames,
    threshold_of,
)
from rlt.benchmark.peers.padded import block_mask_attention, padded_attention
from rlt.benchmark.peers.tokens import difference_ways, reference_tokenize
from rlt.checkpoints import create_model
from rlt.network.attention import choose_backend, packed_attention
from rlt.network.backends import available_backends
from rlt.network.embedding import PatchEmbedding
from rlt.structures import PackedTokens, PatchSpec, Segments, pack
from rlt.tokens import Everything, Threshold, tokenize_batch

SPEC = PatchSpec()
_COMPARED: dict[str, dict[str, Any]] = {
    "anchor": {"reference": "anchor"},
    "gain": {"exposure": "gain"},
    "motion": {"motion": "global"},
    "anchor+gain+motion": {"reference": "anchor", "exposure": "gain", "motion": "global"},
}
"""Name of an arm -> what `Threshold` compares otherwise."""


def tokenize_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Frames -> kept patches: "reference" in float32, "rlt" ours, "copy" only copies the bytes that must be read.

    "anchor", "gain", "motion" and "anchor+gain+motion" are ours with these options, at the same threshold.
    On the CPU also the sums of differences alone ("differences_..."), in every way of `difference_ways`.
    """
    threshold = threshold_of(settings.rule)
    frames = read_frames(settings).to(settings.device)
    _, mask = reference_tokenize(frames, threshold=threshold)
    tokens = tokenize_batch(frames, settings.rule, SPEC)
    differing = sum(int((clip.mask() != mask_clip).sum()) for clip, mask_clip in zip(tokens, mask, strict=True))
    packed = pack(tokens)
    kept = packed.share_kept
    last, first = frames[:, 3::2], frames[:, :-2:2]  # of each tubelet of two frames, compared with the one before
    works: list[Work] = [
        (Arm("reference", kept), lambda: reference_tokenize(frames, threshold=threshold)),
        (Arm("rlt", kept), lambda: tokenize_batch(frames, settings.rule, SPEC)),
        (Arm("copy", kept), lambda: (last.clone(), first.clone(), packed.patches.clone())),
    ]
    for name, options in _COMPARED.items():
        rule = Threshold(threshold, **options)
        share_kept = pack(tokenize_batch(frames, rule, SPEC)).share_kept
        works.append((Arm(name, share_kept), partial(tokenize_batch, frames, rule, SPEC)))
    if settings.device == "cpu":
        works += [(Arm(f"differences_{name}"), partial(sums, frames)) for name, sums in difference_ways().items()]
    arms = rounds.measure(works, settings.rounds or 15, settings.device)
    extra = {"mask_entries_that_differ": differing, "rlt_over_copy": arms[1].timing.over(arms[2].timing)}
    return BenchmarkResult("tokenize", settings, arms, "reference", extra)


def feed_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Frames in pinned host memory -> packed tokens on the device, copies included: where to choose tokens.

    "host" chooses on the CPU and copies kept patches, "device" copies all frames and chooses there, "on_device" finds
    the frames there already, as where a GPU decodes. "copy" only copies all frames.
    """
    frames = read_frames(settings)
    cuda = torch.device(settings.device).type == "cuda"
    frames = frames.pin_memory() if cuda else frames
    there = frames.to(settings.device)

    def host() -> PackedTokens:
        packed = pack(tokenize_batch(frames, settings.rule, SPEC))
        return (packed.changed(Tensor.pin_memory) if cuda else packed).to(settings.device, non_blocking=True)

    def device() -> PackedTokens:
        return pack(tokenize_batch(frames.to(settings.device, non_blocking=True), settings.rule, SPEC))

    kept, other = host(), device()
    names = ("patches", "coords", "lengths")
    differing = sum(int((getattr(kept, name) != getattr(other, name)).sum()) for name in names)
    works: list[Work] = [
        (Arm("host", kept.share_kept), host),
        (Arm("device", kept.share_kept), device),
        (Arm("on_device", kept.share_kept), lambda: pack(tokenize_batch(there, settings.rule, SPEC))),
        (Arm("copy"), lambda: frames.to(settings.device, non_blocking=True, copy=True)),
    ]
    arms = rounds.measure(works, settings.rounds or 15, settings.device)
    return BenchmarkResult("feed", settings, arms, "host", {"values_that_differ": differing})


def embed_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Kept patches -> [tokens, width]: `Conv3d` on normalised patches ("reference") beside `PatchEmbedding` ("rlt")."""
    frames = read_frames(settings).to(settings.device)
    patches_float, _ = reference_tokenize(frames, threshold=threshold_of(settings.rule))
    patches_float = patches_float.to(settings.dtype)
    packed = packed_by(settings.rule, frames, settings)
    width = create_model(settings.model).config.width
    embedding = PatchEmbedding(width, SPEC)
    convolution = nn.Conv3d(3, width, (2, 16, 16), (2, 16, 16))
    with torch.no_grad():
        convolution.weight.copy_(embedding.weight.unflatten(1, (2, 16, 16, 3)).permute(0, 4, 1, 2, 3))
        convolution.bias.copy_(embedding.bias)  # type: ignore[union-attr]
    embedding.to(settings.device, settings.dtype)
    convolution.to(settings.device, settings.dtype)
    with torch.no_grad():
        error = (convolution(patches_float).flatten(1) - embedding(packed.patches)).abs().max()
    flops = 2 * packed.num_tokens * packed.patches.shape[1] * width
    works: list[Work] = [
        (Arm("reference", packed.share_kept, flops), lambda: convolution(patches_float).flatten(1)),
        (Arm("rlt", packed.share_kept, flops), lambda: embedding(packed.patches)),
    ]
    arms = rounds.measure(works, settings.rounds or 9, settings.device)
    return BenchmarkResult("embed", settings, arms, "reference", {"largest_difference": float(error)})


def attention_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Queries, keys, values -> mixed values at the token counts of real clips, forward, and forward with backward.

    "dense" and "rlt" run our packed attention with the back end that is chosen, "rlt_NAME" with the others that can run
    here; "padded" pads to the longest clip, "block_mask" runs one softmax over all tokens with a block-diagonal mask.
    The values are random: only counts matter to the time.
    """
    frames = read_frames(settings)
    config = create_model(settings.model).config
    shape = (config.num_heads, config.width // config.num_heads)
    dense, rlt = packed_by(Everything(), frames, settings), packed_by(settings.rule, frames, settings)
    ways: dict[str, tuple[Callable[..., Tensor], PackedTokens]] = {
        "dense": (packed_attention, dense),
        "rlt": (packed_attention, rlt),
        "padded": (padded_attention, rlt),
        "block_mask": (block_mask_attention, rlt),
    }
    chosen = choose_backend(settings.device, settings.dtype)
    for backend in available_backends(settings.device, settings.dtype):
        if backend != chosen:
            ways[f"rlt_{backend}"] = (partial(packed_attention, backend=backend), rlt)
    arms: list[Arm] = []
    for gradients in (False, True):
        works: list[Work] = []
        for name, (attend, packed) in ways.items():
            qkv = _random_qkv(packed.num_tokens, shape, settings, gradients=gradients)
            flops = sum(4 * length**2 * config.width for length in packed.segments.lengths)
            details: dict[str, object] = {"pass": "forward and backward" if gradients else "forward"}
            # The backward pass is five matrix products of this size beside the two of the forward pass.
            arm = Arm(name, packed.share_kept, flops * 7 // 2 if gradients else flops, details)
            works.append((arm, partial(_attend, attend, qkv, packed.segments, gradients=gradients)))
        arms += rounds.measure(works, settings.rounds or 5, settings.device, gradients=gradients)
    return BenchmarkResult("attention", settings, arms, extra={"backend": chosen})


def _random_qkv(
    num_tokens: int, shape: tuple[int, int], settings: BenchmarkSettings, *, gradients: bool
) -> tuple[Tensor, ...]:
    qkv = torch.randn(num_tokens, 3, *shape, generator=torch.Generator().manual_seed(0))
    return tuple(x.to(settings.device, settings.dtype).requires_grad_(gradients) for x in qkv.unbind(1))


def _attend(attend: Callable[..., Tensor], qkv: tuple[Tensor, ...], segments: Segments, *, gradients: bool) -> None:
    output = attend(*qkv, segments)
    if gradients:
        torch.autograd.grad(output, qkv, torch.ones_like(output))

"""Suite of the models that `rlt.patch` knows: the unpatched model beside the patched one, on the same real clips.

Shape legend: B clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlt.adapters import patch, tiny
from rlt.benchmark.harness import Arm, BenchmarkResult, BenchmarkSettings, Rounds, Work, normalised_pixels, read_frames
from rlt.benchmark.peers.padded import naive_attention
from rlt.errors import MissingDependencyError
from rlt.tokens import Everything

WIDTH, DEPTH, HEADS = 384, 12, 6
"""Of all models, that of ViT-S, and of the language model behind a tower too; weights are random."""
CASES = {
    "VideoMAE": "videomae",
    "ViViT": "vivit",
    "V-JEPA 2": "vjepa2",
    "TimeSformer": "timesformer",
    "Qwen2.5-VL": "qwen2.5",
    "Qwen3-VL": "qwen3",
    "SigLIP, per frame": "siglip",
    "SigLIP 2, per frame": "siglip2",
    "CLIP, per frame": "clip",
    "DINOv2, per frame": "dinov2",
    "DINOv2 with registers, per frame": "dinov2 registers",
    "DINOv3, per frame": "dinov3",
    "InternVL's tower, per frame": "internvl",
    "SmolVLM's tower, per frame": "smolvlm",
    "timm ViT, per frame": "timm",
}
"""Families of `rlt.adapters.tiny`, by the name that tables show."""


def adapters_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Clips -> outputs: "dense" the model as it comes, "rlt" patched, for each model that can be patched.

    Outputs are logits, or the features of image encoders. Beside the times, the largest difference of them where
    nothing is dropped ("identity"), from the same packed tokens with attention written out by its formula
    ("naive_twin"), and between clips that go through the patched model together and one by one ("one_by_one"). Models
    that the installed libraries do not have, or have too old for the adapter, are named in "left_out".
    """
    frames = read_frames(settings)
    works: list[Work] = []
    differences: dict[str, dict[str, float]] = {}
    left_out: list[str] = []
    for name, family in CASES.items():
        try:
            model, patched = (_build(family, settings) for _ in range(2))
            per_clip = settings.clip.num_frames if family in ("timm", *tiny.ENCODERS) else None
            patch(patched, rule=settings.rule, frames_per_clip=per_clip)
        except (AttributeError, MissingDependencyError):
            left_out.append(name)
            continue
        pixels = normalised_pixels(frames, patched.rlt.spec).to(settings.device, settings.dtype)
        differences[name] = _differences(model, patched, pixels)
        given, kept = tiny.inputs(model, pixels), patched.rlt.last.share_kept
        for arm, network, share in (("dense", model, 1.0), ("rlt", patched, kept)):
            with patched.rlt.override(rule=Everything() if arm == "dense" else settings.rule):
                flops = count_flops(partial(patched, **given))
            works.append((Arm(arm, share, flops, {"model": name}), partial(network, **given)))
    arms = rounds.measure(works, settings.rounds or 3, settings.device)
    extra = {"largest_differences": differences, "left_out": left_out}
    return BenchmarkResult("adapters", settings, arms, "dense", extra)


def _build(family: str, settings: BenchmarkSettings) -> Any:
    """The same weights every time."""
    size = tiny.Size(WIDTH, DEPTH, HEADS, 4 * WIDTH, settings.clip.num_frames, settings.clip.size)
    return tiny.build(family, size).to(settings.device, settings.dtype)


@torch.no_grad()
def _differences(model: Any, patched: Any, pixels: Tensor) -> dict[str, float]:
    given, batch = tiny.inputs(model, pixels), len(pixels)
    with patched.rlt.override(rule=Everything()):
        whole = _outputs(patched(**given), batch)
    with _naive_attention(patched):
        naive = _outputs(patched(**given), batch)
    alone = [_outputs(patched(**tiny.inputs(model, clip[None])), 1)[0] for clip in pixels]
    together = _outputs(patched(**given), batch)  # the last call, whose record is kept

    def largest(others: Tensor | list[Tensor]) -> float:
        # Language models pad rows in which more was dropped, on the left; what stands there means nothing.
        rows = zip(together, others, alone, strict=True)
        return max(float((row[-len(one) :] - other[-len(one) :]).abs().max()) for row, other, one in rows)

    identity = float((whole - _outputs(model(**given), batch)).abs().max())
    return {"identity": identity, "naive_twin": largest(naive), "one_by_one": largest(alone)}


@contextmanager
def _naive_attention(patched: Any) -> Iterator[None]:
    """Attention by its formula: ours, or for models whose own attention runs that of transformers' plainest kind."""
    adapter = patched.rlt
    if hasattr(adapter, "attention"):
        adapter.attention = naive_attention
        try:
            yield
        finally:
            del adapter.attention
    else:
        before = patched.config._attn_implementation
        patched.set_attn_implementation("eager")
        try:
            yield
        finally:
            patched.set_attn_implementation(before)


def _outputs(output: Any, batch: int) -> Tensor:
    """Logits [B, ..., classes], or features [B, frames, tokens, width]; image models give rows of all frames."""
    if isinstance(output, Tensor):
        return output.unflatten(0, (batch, -1))
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state.unflatten(0, (batch, -1))
    return found


@torch.no_grad()
def count_flops(run: Callable[[], object]) -> int:
    """FLOPs of a patched model, whose attention is counted everywhere; that of others torch counts on some devices."""
    operators: Any = torch.ops
    mapping: dict[Any, Any] = {
        operators.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
            query, key, value
        )
    }
    if torch.cuda.is_available():
        import_module("torch.nn.attention.varlen")  # defines the operator, which older torch does not count
        mapping[operators.torch_attn._varlen_attn] = varlen_flops
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        run()
    return int(counter.get_total_flops())


def varlen_flops(q_THK: Tensor, _k: Tensor, _v: Tensor, cu_q: Tensor, cu_k: Tensor, *_: object, **__: object) -> int:
    """FLOPs of torch's variable-length kernel: two matrix products for each clip."""
    pairs = int((cu_q.diff().long() * cu_k.diff().long()).sum())
    return 4 * pairs * q_THK.shape[1] * q_THK.shape[2]


varlen_flops._get_raw = True  # type: ignore[attr-defined] # torch's counter gives it tensors, not shapes

"""Count, before any GPU is there, what each arm of `make figures-gpu` computes and how much memory it takes.

    python scripts/gpu_counted.py [--clips FILE] [--json FILE]

FLOPs are those of the closed form. Memory is counted on tensors without contents (`scripts/count_memory.py`), with the
weights of all that is loaded beside an arm, gradients and the optimizer's states. Attention is that of the CPU, which
needs about as much as a flash kernel; padding has the mask written out, as torch's kernel does where it is not aligned.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from count_memory import count_peak
from gpu_clips import CLIPS, STATIC, clip_files
from markdown_tables import RESULTS
from torch import Tensor

from rlt.benchmark.harness import BenchmarkSettings, packed_by, read_frames
from rlt.benchmark.peers.padded import padded_logits
from rlt.benchmark.towers import TOWERS, build_tower
from rlt.checkpoints import model_config
from rlt.errors import InvalidArgumentError
from rlt.files import write_json
from rlt.network.flops import forward_flops, merge_for_flops
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.structures import PackedTokens
from rlt.tokens import Everything, Threshold
from rlt.video import ClipSpec

HALF, FULL = 2, 4
"""Bytes of a value."""
COUNTED = RESULTS / "gpu-counted.json"


class Case(NamedTuple):
    """A piece whose arms are counted."""

    piece: str
    model: str
    clips: int
    training: bool = False
    clip: ClipSpec = ClipSpec()
    static: bool = False


CASES = (
    *(Case(f"forward-{size}-{clips}", f"vit_{size}", clips) for size in ("base", "large", "huge") for clips in (8, 64)),
    *(Case(f"train-step-{size}-8", f"vit_{size}", 8, training=True) for size in ("base", "large")),
    Case("train-step-frames-64", "vit_base", 4, training=True, clip=ClipSpec(64, 1)),
    Case("forward-frames-64", "vit_base", 8, clip=ClipSpec(64, 1)),
    Case("static-128", "vit_base", 1, clip=ClipSpec(128, 1), static=True),
)


def main() -> None:
    """Count every arm, and leave JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, default=CLIPS)
    parser.add_argument("--json", type=Path, default=COUNTED)
    options = parser.parse_args()
    files = clip_files(options.clips)
    arms = []
    for case in CASES:
        print(case.piece, flush=True)
        arms += list(count_case(case, files))
    for name in TOWERS:
        if not name.endswith("_tiny"):
            arms.append({"piece": f"towers-{name}", "name": "weights", **_weights(name)})
    write_json(options.json, {"suite": "gpu-counted", "arms": arms, "torch": torch.__version__})


def count_case(case: Case, files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """One entry for each arm."""
    videos = [path for name, path in files.items() if not name.startswith("surveillance")]
    settings = BenchmarkSettings(
        model=case.model,
        clip=case.clip,
        videos=(files[STATIC],) if case.static else tuple(videos),
        clips=case.clips,
        dtype=torch.bfloat16,
    )
    frames, config = read_frames(settings), model_config(case.model)
    dense, rlt = (packed_by(rule, frames, settings, config.patches) for rule in (Everything(), Threshold()))
    arms = [(name, packed, _flops(config, packed), _packed(0)) for name, packed in (("dense", dense), ("rlt", rlt))]
    if not case.static:
        longest = rlt.segments.max_length
        arms.append(("padded", rlt, forward_flops(config, longest) * len(rlt), padded_logits))
        try:
            merges = merge_for_flops(config, dense.segments.lengths, _flops(config, rlt))
            arms.append(("tome", dense, _flops(config, dense, merges), _packed(merges)))
        except InvalidArgumentError:
            print("  no amount of merging gets as cheap")
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in VisionTransformer(config).parameters())
    # Ours and that of transformers lie there; in training each with two moments, gradients are in the peak.
    held = 2 * parameters * (3 * FULL if case.training else HALF)
    for name, packed, operations, forward in arms:
        peak = count_peak(case.model, packed, training=case.training, dtype=torch.bfloat16, forward=forward)
        mask = len(packed) * config.num_heads * packed.segments.max_length**2 * HALF if name == "padded" else 0
        yield {
            "piece": case.piece,
            "name": name,
            "tokens_kept": packed.share_kept,
            "flops": operations * (3 if case.training else 1),
            "memory_bytes": peak + held + mask + packed.patches.numel(),
        }


def _flops(config: ViTConfig, packed: PackedTokens, merges: int = 0) -> int:
    return sum(forward_flops(config, length, merges) for length in packed.segments.lengths)


def _packed(merges: int) -> Any:
    """The packed network, in one piece on any device."""
    return partial(_features, merges)


def _features(merges: int, model: VisionTransformer, packed: PackedTokens) -> Tensor:
    model.merge_per_block = merges
    return model.head(model._run_network(packed))


def _weights(name: str) -> dict[str, Any]:
    """Those of a large model in half precision, and its dense FLOPs where no text is in it."""
    model = build_tower(BenchmarkSettings(model=name, clip=ClipSpec(64, 1), device="meta", dtype=torch.bfloat16))
    values = sum(tensor.numel() for tensor in model.parameters())
    return {"tokens_kept": 1.0, "flops": None, "memory_bytes": values * HALF}


if __name__ == "__main__":
    main()

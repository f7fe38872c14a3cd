"""Write where the time of a forward pass goes, dense, with RLT and with ToMe: docs/results/profile-forward.txt.

    python scripts/profile_forward.py [VIDEO...] [--device cuda --dtype bfloat16 --output FILE --json FILE]

Two clips of the bundled videos through ViT-B on the CPU if nothing else is said, each arm after passes that are not
counted. With --json the operators that take most of the time also stand there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from markdown_tables import RESULTS
from torch.profiler import ProfilerActivity, profile

import rlt
from rlt import assets
from rlt.benchmark import BenchmarkSettings
from rlt.benchmark.harness import packed_by, read_frames
from rlt.files import replacing, write_json
from rlt.measure import check_device, machine_info, stopwatch
from rlt.network.flops import count_forward_flops, merge_for_flops
from rlt.tokens import Everything
from rlt.video import ClipSpec

MOST = 10
"""Operators of an arm that are shown."""


def main() -> None:
    """Profile each arm and write one table of operators for it."""
    options = _arguments()
    check_device(options.device)
    settings = BenchmarkSettings(
        model=options.model,
        clip=ClipSpec(options.frames, size=options.size),
        videos=tuple(options.videos) or tuple(assets.path(name) for name in assets.names()),
        clips=options.clips,
        device=options.device,
        dtype=getattr(torch, options.dtype),
    )
    text, found = f"{machine_info(settings.device)}\n", []
    for name, run in _arms(settings).items():
        with torch.inference_mode():
            for _ in range(1 if settings.device == "cpu" else 3):
                run()
            seconds = stopwatch(run, settings.device)
            with profile(activities=_activities(settings.device)) as profiler:
                stopwatch(run, settings.device)
        averages: Any = profiler.key_averages()
        by = "self_cpu_time_total" if settings.device == "cpu" else "self_device_time_total"
        text += f"\n{name}\n{averages.table(sort_by=by, row_limit=MOST, max_name_column_width=40)}\n"
        largest = sorted(averages, key=lambda event: getattr(event, by), reverse=True)[:MOST]
        operators = [{"name": event.key, "seconds": getattr(event, by) / 1e6} for event in largest]
        found.append({"name": name, "seconds": seconds, "operators": operators})
    with replacing(options.output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if options.json is not None:
        content = {"suite": "profile", "arms": found, "settings": settings.to_json()}
        write_json(options.json, {**content, "machine": machine_info(settings.device)})


def _arms(settings: BenchmarkSettings) -> dict[str, Callable[[], object]]:
    """What is profiled, by its name."""
    frames = read_frames(settings)
    model = rlt.create_model(settings.model).to(settings.device, settings.dtype).eval()
    dense, kept = packed_by(Everything(), frames, settings), packed_by(settings.rule, frames, settings)
    merges = merge_for_flops(model.config, dense.segments.lengths, count_forward_flops(model.config, kept))
    merging = copy(model)
    merging.merge_per_block = merges
    return {
        f"dense, {dense.num_tokens} tokens": partial(model, dense),
        f"RLT, {kept.num_tokens} tokens": partial(model, kept),
        f"ToMe at RLT's FLOPs, {merges} merges per block": partial(merging, dense),
    }


def _activities(device: str) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU] if device == "cpu" else [ProfilerActivity.CPU, ProfilerActivity.CUDA]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", type=Path, help="videos or files of frames; the bundled clips if none")
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--clips", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--output", type=Path, default=RESULTS / "profile-forward.txt")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

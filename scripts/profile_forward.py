"""Write docs/results/profile-forward.txt: where the time of a forward pass goes, dense, with RLT and with ToMe.

Two clips of the bundled videos through ViT-B on the CPU, each arm after a pass that is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial

import torch
from markdown_tables import RESULTS
from torch.profiler import ProfilerActivity, profile

import rlt
from rlt import assets
from rlt.benchmark import BenchmarkSettings
from rlt.benchmark.harness import packed_by, read_frames
from rlt.measure import machine_info
from rlt.network.flops import count_forward_flops, merge_for_flops
from rlt.tokens import Everything


def main() -> None:
    """Profile each arm and write one table of operators for it."""
    settings = BenchmarkSettings(videos=tuple(assets.path(name) for name in assets.names()), clips=2)
    frames, model = read_frames(settings), rlt.create_model("vit_base").eval()
    dense, kept = packed_by(Everything(), frames, settings), packed_by(settings.rule, frames, settings)
    merges = merge_for_flops(model.config, dense.segments.lengths, count_forward_flops(model.config, kept))
    merging = copy(model)
    merging.merge_per_block = merges
    arms: dict[str, Callable[[], object]] = {
        f"dense, {dense.num_tokens} tokens": partial(model, dense),
        f"RLT, {kept.num_tokens} tokens": partial(model, kept),
        f"ToMe at RLT's FLOPs, {merges} merges per block": partial(merging, dense),
    }
    text = f"{machine_info()}\n"
    for name, run in arms.items():
        with torch.inference_mode():
            run()
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                run()
        operators = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=10, max_name_column_width=40)
        text += f"\n{name}\n{operators}\n"
    (RESULTS / "profile-forward.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

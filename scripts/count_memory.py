"""Peak memory at sizes that no machine at hand could hold or finish, counted on tensors without contents.

    python scripts/count_memory.py VIDEO... --json FILE

torch's fake tensors have shapes and no bytes: a pass runs through the same operators, and torch's memory tracker adds
up what would be alive at once. As in `rlt benchmark`, weights, buffers and the optimizer's state are not in it, and a
training step takes the clips of all videos in one pack. What operators take for themselves while they run is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from rlt.benchmark.harness import BenchmarkSettings, packed_by, read_frames
from rlt.checkpoints import model_config
from rlt.export import network_inputs
from rlt.files import write_json
from rlt.measure import machine_info
from rlt.network.vit import VisionTransformer, trace_features
from rlt.structures import PackedTokens, pack
from rlt.tokens import Everything, Threshold
from rlt.video import ClipSpec

MODELS = ("vit_base", "vit_large")
FRAMES = (16, 32, 64, 128)
Forward = Callable[[VisionTransformer, PackedTokens], Tensor]


def main() -> None:
    """Count dense and RLT, forward and in training, and leave JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    arms = []
    for model in MODELS:
        for frames in FRAMES:
            print(f"{model}, {frames} frames")
            arms += list(count_arms(model, frames, tuple(options.videos)))
    write_json(options.json, {"suite": "memory-counted", "arms": arms, "machine": machine_info("cpu")})


def count_arms(name: str, num_frames: int, videos: tuple[Path, ...]) -> Iterator[dict[str, object]]:
    """One entry for each way, clip and pass."""
    settings = BenchmarkSettings(model=name, clip=ClipSpec(num_frames, 1), videos=videos, clips=len(videos))
    frames = read_frames(settings)
    for way, rule in (("dense", Everything()), ("rlt", Threshold())):
        packed = packed_by(rule, frames, settings)
        places = [(path.name, pack(clip), False) for path, clip in zip(videos, packed, strict=True)]
        for video, tokens, training in (*places, ("all", packed, True)):
            total = sum(grid.num_tokens for grid in tokens.grids)
            yield {
                "name": way,
                "model": name,
                "video": video,
                "pass": "training step" if training else "forward",
                "frames": num_frames,
                "tokens_kept": tokens.num_tokens / total,
                "peak_memory_bytes": count_peak(name, tokens, training=training),
            }


def whole_network(model: VisionTransformer, packed: PackedTokens) -> Tensor:
    """Logits of the packed network, in one piece on any device."""
    return model.head(trace_features(model, *network_inputs(packed)))


def count_peak(
    name: str,
    packed: PackedTokens,
    *,
    training: bool,
    dtype: torch.dtype = torch.float32,
    forward: Forward = whole_network,
) -> int:
    """Bytes alive at once beyond weights, buffers and the optimizer's state; in training half precision is autocast."""
    with torch.device("meta"):
        model = VisionTransformer(model_config(name)).train(training)
    model.prepare(packed)
    model.to(torch.float32 if training else dtype)
    assert packed.has_runs is not None  # asked of the values, which are about to go
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        _without_contents(model)
        inputs = packed.changed(mode.from_tensor)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        tracker = MemTracker()
        if training:
            _train_step(model, inputs, optimizer, dtype, forward)  # makes the optimizer's state
        tracker.track_external(model, optimizer)
        with tracker, torch.set_grad_enabled(training):
            if training:
                _train_step(model, inputs, optimizer, dtype, forward)
            else:
                forward(model, inputs)
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    counted = {str(kind).rpartition(".")[2]: count for kind, count in peak.items()}
    return int(counted["Total"] - sum(counted[kind] for kind in ("PARAM", "BUFFER", "OPT")))


def _without_contents(model: nn.Module) -> None:
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _train_step(
    model: VisionTransformer,
    inputs: PackedTokens,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    forward: Forward,
) -> None:
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = forward(model, inputs)
    F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)).backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()

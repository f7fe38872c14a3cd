"""Suites that begin with a file: decode, and end-to-end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch
from torch import Tensor

from rlt.benchmark.harness import (
    Arm,
    BenchmarkResult,
    BenchmarkSettings,
    Rounds,
    Work,
    packed_by,
    run_each,
    threshold_of,
)
from rlt.benchmark.peers.decoders import decoders
from rlt.benchmark.peers.tokens import reference_tokenize
from rlt.checkpoints import create_model
from rlt.errors import VideoError
from rlt.network.flops import count_forward_flops
from rlt.network.vit import VisionTransformer
from rlt.structures import PackedTokens, PatchSpec, pack
from rlt.tokens import Everything, Rule, select_tokens
from rlt.video import read_spread


def decode_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """File -> the frames of its middle clip, file by file, with every decoder that is installed."""
    works: list[Work] = []
    cannot_read: list[dict[str, str]] = []
    for path in settings.videos:
        for name, decode in decoders(settings).items():
            try:
                decode(path)
            except VideoError:
                if name == "pyav":  # what the others are compared with
                    raise
                cannot_read.append({"name": name, "video": path.name})
            else:
                works.append((Arm(name, details={"video": path.name}), partial(decode, path)))
    arms = rounds.measure(works, settings.rounds or 7, "cpu")
    per_core = {str(arm.details["video"]): 1 / arm.timing.median for arm in arms if arm.name == "pyav"}
    extra: dict[str, object] = {"clips_per_second_per_core": per_core, "cannot_read": cannot_read}
    return BenchmarkResult("decode", settings, arms, "pyav", extra)


def end_to_end_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """File -> logits, one clip of each video in turn: dense, RLT, and RLT the plain float32 way ("reference").

    The forward passes alone are timed in the same rounds ("forward_dense", "forward_rlt"), so that the speed-up from
    end to end can be held to that of the forward pass.
    """
    model = create_model(settings.model).to(settings.device, settings.dtype).eval()
    frames = torch.stack(list(_read_each(settings)))
    rules: dict[str, Rule] = {"dense": Everything(), "rlt": settings.rule}
    packs = {name: packed_by(rule, frames, settings, model.config.patches) for name, rule in rules.items()}
    flops = {name: count_forward_flops(model.config, packed) for name, packed in packs.items()}
    stages: dict[str, Callable[[Tensor], PackedTokens]] = {
        **{name: partial(model.tokenize, rule=rule) for name, rule in rules.items()},
        "reference": partial(_reference_tokens, threshold_of(settings.rule), model.config.patches),
    }
    works: list[Work] = []
    for name, cut in stages.items():
        like = "dense" if name == "dense" else "rlt"
        arm = Arm(name, packs[like].share_kept, flops[like])
        works.append((arm, partial(_all_videos, settings, model, cut)))
    for name, packed in packs.items():
        clips = [pack(clip) for clip in packed]
        works.append((Arm(f"forward_{name}", packed.share_kept, flops[name]), partial(run_each, model, clips)))
    arms = rounds.measure(works, settings.rounds or 5, settings.device)
    timings = {arm.name: arm.timing for arm in arms}
    speedup = timings["dense"].over(timings["rlt"])
    forward = timings["forward_dense"].over(timings["forward_rlt"])
    extra = {"speedup_end_to_end": speedup, "speedup_forward": forward, "end_to_end_over_forward": speedup / forward}
    return BenchmarkResult("end-to-end", settings, arms, "dense", extra)


def _read_each(settings: BenchmarkSettings) -> Iterator[Tensor]:
    """The frames of as many clips as are asked for, each from the next video in turn."""
    for path in islice(cycle(settings.videos), settings.clips):
        yield read_spread(path, settings.clip)[0].frames


def _reference_tokens(threshold: float, spec: PatchSpec, frames: Tensor) -> PackedTokens:
    """Normalised float32 patches of the kept tokens, by way of a float32 copy of the clip."""
    patches, mask = reference_tokenize(frames[None], threshold=threshold, patch_size=spec.patch_size)
    uint8_tokens = select_tokens(frames[None], mask, spec=spec)[0]
    floats = patches.permute(0, 2, 3, 4, 1).flatten(1)
    return pack([replace(uint8_tokens, patches=floats)])


def _all_videos(settings: BenchmarkSettings, model: VisionTransformer, cut: Callable[[Tensor], PackedTokens]) -> None:
    run_each(model, (cut(frames).to(settings.device, non_blocking=True) for frames in _read_each(settings)))

"""How cost grows with the number of frames, on each video by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rlt.benchmark.harness import Arm, BenchmarkResult, BenchmarkSettings, Rounds, Work, packed_by, read_frames
from rlt.benchmark.peers.padded import padded_logits
from rlt.checkpoints import create_model
from rlt.network.flops import count_forward_flops
from rlt.structures import pack
from rlt.tokens import Everything

FEWEST_FRAMES, USUAL_FRAMES = 16, 64


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

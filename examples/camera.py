"""Look through a camera with an image encoder: all patches of every frame, and beside it those that change.

    python examples/camera.py [--model HUB_ID] [--video FILE] [--frames N] [--threshold X]

A video stands for the camera: its frames come one by one, each in a call of its own, and what the encoder computed for
patches that stand is kept from call to call. Without --model the network has random weights: what it sees means
nothing, how fast it sees does.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import rlt
from rlt import assets
from rlt.adapters import tiny


def main(arguments: list[str] | None = None) -> None:
    """Print now and then how many patches were computed, and the frames a second of both ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder of a SigLIP; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--threshold", type=float, default=0.1)
    options = parser.parse_args(arguments)

    kind = transformers.SiglipVisionModel
    small = tiny.Size(width=384, depth=4, heads=6, mlp_width=1536)
    model = kind.from_pretrained(options.model).eval() if options.model else tiny.build("siglip", small)
    patched = rlt.patch(copy.deepcopy(model), threshold=options.threshold)
    patched.rlt.check()
    mean, std = (torch.tensor(channel).view(3, 1, 1) for channel in (patched.rlt.spec.mean, patched.rlt.spec.std))

    clip = rlt.read_clip(options.video, num_frames=options.frames, frame_stride=1, size=model.config.image_size)
    camera = (clip.frames.permute(0, 3, 1, 2)[:, None] / 255 - mean) / std  # one frame a call, as the processor does
    seconds, kept, seen = [0.0, 0.0], 0, 0
    with torch.inference_mode(), patched.rlt.stream():
        for number, frame in enumerate(camera, 1):
            features, dense_seconds = look(model, frame)
            fewer, patched_seconds = look(patched, frame)
            if number > 1:  # the first frame of a video is computed whole
                seconds = [seconds[0] + dense_seconds, seconds[1] + patched_seconds]
                kept, seen = kept + sum(patched.rlt.last.num_kept), seen + patched.rlt.last.num_dense
            if seen and (number % 8 == 0 or number == len(camera)):
                alike = torch.cosine_similarity(features, fewer).item()
                dense_rate, patched_rate = ((number - 1) / spent for spent in seconds)
                print(
                    f"frame {number}: {kept} of {seen} tokens ({kept / seen:.1%}); all tokens: {dense_rate:.1f} "
                    f"frames/s; tokens that change: {patched_rate:.1f} frames/s; cosine {alike:.4f}"
                )


def look(model: Any, frame: Tensor) -> tuple[Tensor, float]:
    """The features of one frame, and the seconds that they took."""
    began = time.perf_counter()
    features: Tensor = model(frame).pooler_output
    return features, time.perf_counter() - began


if __name__ == "__main__":
    main()

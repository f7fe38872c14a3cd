"""Classify the frames of a video with a vision transformer of timm, on all tokens and on those that change.

    python examples/timm_vit.py [--model NAME] [--video FILE]

Needs `pip install "rlt[timm]"`. Without --model the network is small and its weights are random: the class means
nothing, the tokens do. With it, weights are downloaded: --model vit_small_patch16_224.augreg_in21k_ft_in1k
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import rlt
from rlt import assets
from rlt.adapters import tiny


def main(arguments: list[str] | None = None) -> None:
    """Print what a patched model keeps, and its class beside that from all tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of timm; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    options = parser.parse_args(arguments)

    model = timm.create_model(options.model, pretrained=True).eval() if options.model else tiny.build("timm")
    clip = rlt.read_clip(options.video, num_frames=16, frame_stride=2, size=model.patch_embed.img_size[0])
    frames = clip.frames.permute(0, 3, 1, 2)  # uint8 [frames, 3, height, width], which a patched model normalises

    with torch.inference_mode():
        rlt.patch(model, threshold=0.1)
        model.rlt.check()
        with model.rlt.override(rule=rlt.Everything()):
            dense = model(frames)  # one row of logits per frame
        fewer = model(frames)
    last = model.rlt.last
    print(f"{type(model).__name__}: {sum(last.num_kept)} of {last.num_dense} tokens ({last.share_kept:.1%})")
    for name, logits in (("all tokens", dense), ("tokens that change", fewer)):
        print(f"{name}: class {int(logits.mean(0).argmax())}")  # of the mean over frames


if __name__ == "__main__":
    main()

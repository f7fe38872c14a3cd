"""Classify a video with ViViT of Hugging Face transformers, on all tokens and on those that change.

    python examples/vivit.py [--model HUB_ID] [--video FILE]

Without --model the network is small and its weights are random: the class means nothing, the tokens do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

import rlt
from rlt import assets
from rlt.adapters import tiny

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)  # of the model's processor


def main(arguments: list[str] | None = None) -> None:
    """Print what a patched model keeps, and its class beside that of the unpatched one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    options = parser.parse_args(arguments)

    kind = transformers.VivitForVideoClassification
    model = kind.from_pretrained(options.model).eval() if options.model else tiny.build("vivit")
    config = model.config
    clip = rlt.read_clip(options.video, num_frames=config.num_frames, frame_stride=2, size=config.image_size)
    pixels = ((clip.frames / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)[None]

    with torch.inference_mode():
        dense = model(pixels).logits
        rlt.patch(model, threshold=0.1)
        model.rlt.check()
        fewer = model(pixels).logits
    last = model.rlt.last
    print(f"{type(model).__name__}: {sum(last.num_kept)} of {last.num_dense} tokens ({last.share_kept:.1%})")
    for name, logits in (("all tokens", dense), ("tokens that change", fewer)):
        print(f"{name}: {config.id2label[int(logits.argmax())]}")


if __name__ == "__main__":
    main()

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


def main(arguments: list[str] | None = None) -> None:
    """Print what a patched model keeps, and its class beside that of the unpatched one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or folder; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    options = parser.parse_args(arguments)

    model = load(options.model).eval()
    config = model.config
    clip = rlt.read_clip(options.video, num_frames=config.num_frames, frame_stride=2, size=config.image_size)
    frames = clip.frames.permute(0, 3, 1, 2)[None]  # uint8 [1, frames, 3, height, width]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))
    pixels = (frames / 255 - mean) / std  # what the model's processor gives

    with torch.inference_mode():
        dense = model(pixels).logits
        rlt.patch(model, threshold=0.1)
        model.rlt.check()
        fewer = model(pixels).logits
    last = model.rlt.last
    print(f"{type(model).__name__}: {sum(last.num_kept)} of {last.num_dense} tokens ({last.share_kept:.1%})")
    for name, logits in (("all tokens", dense), ("tokens that change", fewer)):
        print(f"{name}: {config.id2label[int(logits.argmax())]}")
    rlt.unpatch(model)


def load(hub_id: str | None) -> transformers.PreTrainedModel:
    """The named model, or a small one with random weights."""
    if hub_id is not None:
        return transformers.VivitForVideoClassification.from_pretrained(hub_id)
    torch.manual_seed(0)
    return transformers.VivitForVideoClassification(
        transformers.VivitConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_frames=16
        )
    )


if __name__ == "__main__":
    main()

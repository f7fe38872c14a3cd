"""Ask Qwen2.5-VL of Hugging Face transformers about a video, with all its tokens and with those that change.

    python examples/qwen_vl.py [--model HUB_ID] [--video FILE]

Without --model the network is small and its weights are random: the answer means nothing, the tokens do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

import rlt
from rlt import assets
from rlt.adapters import tiny

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the model's processor
TURNS = "<|im_start|>user\n", "What happens in this video?<|im_end|>\n<|im_start|>assistant\n"


def main(arguments: list[str] | None = None) -> None:
    """Print what a patched model keeps, and its answer beside that of the unpatched one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    options = parser.parse_args(arguments)
    kind = transformers.Qwen2_5_VLForConditionalGeneration
    model = kind.from_pretrained(options.model).eval() if options.model else tiny.build("qwen2.5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model) if options.model else None
    clip = rlt.read_clip(options.video, num_frames=16, frame_stride=8, size=224)
    pixels = ((clip.frames / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)[None]
    before, after = map(tokenizer.encode, TURNS) if tokenizer else ([1, 2], [3, 4, 5])  # random weights have no words
    inputs = tiny.question(model, pixels, before=before, after=after)  # as the processor, which needs torchvision
    length = inputs["input_ids"].shape[1]
    dense = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, length:]
    rlt.patch(model, threshold=0.1)
    model.rlt.check()
    fewer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, length:]
    last = model.rlt.last
    print(f"{type(model).__name__}: {sum(last.num_kept)} of {last.num_dense} tokens ({last.share_kept:.1%})")
    for name, tokens in (("all tokens", dense), ("tokens that change", fewer)):
        print(f"{name}: {tokenizer.decode(tokens) if tokenizer else tokens.tolist()}")


if __name__ == "__main__":
    main()

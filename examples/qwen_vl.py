"""Ask Qwen2.5-VL of Hugging Face transformers about a video, with all its tokens and with those that change.

    python examples/qwen_vl.py [--model HUB_ID] [--video FILE]

Without --model the network is small and its weights are random: the answer means nothing, the tokens do.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers

import rlt
from rlt import assets

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of the model's processor
TURNS = "<|im_start|>user\n", "What happens in this video?<|im_end|>\n<|im_start|>assistant\n"


def main(arguments: list[str] | None = None) -> None:
    """Print what a patched model keeps, and its answer beside that of the unpatched one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="hub id or folder; random weights without it")
    parser.add_argument("--video", type=Path, default=assets.path("traffic.mp4"))
    options = parser.parse_args(arguments)
    model = load(options.model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model) if options.model else None
    clip = rlt.read_clip(options.video, num_frames=16, frame_stride=8, size=224)
    inputs = build_inputs(model.config, clip.frames, tokenizer)
    length = inputs["input_ids"].shape[1]
    dense = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, length:]
    rlt.patch(model, threshold=0.1)
    model.rlt.check()
    fewer = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, length:]
    last = model.rlt.last
    print(f"{type(model).__name__}: {sum(last.num_kept)} of {last.num_dense} tokens ({last.share_kept:.1%})")
    for name, tokens in (("all tokens", dense), ("tokens that change", fewer)):
        print(f"{name}: {tokenizer.decode(tokens) if tokenizer else tokens.tolist()}")


def build_inputs(config: Any, frames: torch.Tensor, tokenizer: Any) -> dict[str, torch.Tensor]:
    """What the model's processor gives, by hand, since processors need torchvision. frames: uint8 [T, H, W, 3]."""
    vision = config.vision_config
    patch, tubelet, merge = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    pixels = ((frames / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    time, height, width = len(frames) // tubelet, pixels.shape[2] // patch, pixels.shape[3] // patch
    cut = pixels.view(time, tubelet, 3, height // merge, merge, patch, width // merge, merge, patch)
    rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * height * width, -1)
    video = [config.video_token_id] * (len(rows) // merge**2)
    before, after = map(tokenizer.encode, TURNS) if tokenizer else ([1, 2], [3, 4, 5])  # random weights have no words
    ids = torch.tensor([[*before, config.vision_start_token_id, *video, config.vision_end_token_id, *after]])
    return {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == config.video_token_id).long(),
        "pixel_values_videos": rows,
        "video_grid_thw": torch.tensor([[time, height, width]]),
    }


def load(hub_id: str | None) -> Any:
    """The named model, or a small one with random weights."""
    if hub_id is not None:
        return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(hub_id)
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    size = {"hidden_size": 64, "intermediate_size": 128}
    text = {**size, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    vision = {**size, "depth": 2, "num_heads": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


if __name__ == "__main__":
    main()

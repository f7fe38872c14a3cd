"""Train small ViViT and V-JEPA 2 models of transformers to judge `rlt.patch` with, where no trained ones are at hand.

Each has the size of a network that was trained with `rlt train`, begins with its blocks, and learns to say what that
network says of random clips, on all tokens. What the families do not share is random at first: the CLS token of ViViT,
the attentive pooler of V-JEPA 2, whose rotary positions are new to the blocks. A folder for `checkpoint=` is written
for each, and one for VideoMAE, which is converted and has the same answers. A training that was cut off goes on.

    python scripts/judge_models.py RUN MANIFEST [--families vivit vjepa2] [--steps 240] [--output output/judges]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters import tiny
from rlt.checkpoints import convert
from rlt.checkpoints.hf_config import config_to_hf, preprocessor_to_hf
from rlt.data.augment import AugmentConfig
from rlt.data.clips import read_training_clip
from rlt.data.manifest import read_manifest
from rlt.data.sampler import derive_seed
from rlt.files import replacing
from rlt.loading import load_model
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.tokens import Everything
from rlt.video import ClipSpec

ROOT = Path(__file__).parents[1]
BATCH, RATE, WARMUP_STEPS, SAVE_EVERY = 8, 5e-4, 20, 20
AUGMENT = AugmentConfig(crop_scale_min=0.5)
"""Crops as large as this leave the teacher sure of most clips."""
RENAMED = {
    "vivit": (
        (r"^fc_norm\.", "vivit.layernorm."),
        (r"^videomae\.encoder\.layer\.", "vivit.layers."),
        (r"^videomae\.", "vivit."),
        (r"attention\.attention\.(q|k|v)\w+\.", r"attention.\1_proj."),
        (r"attention\.output\.dense\.", "attention.o_proj."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"output\.dense\.", "mlp.fc2."),
    ),
    "vjepa2": (
        (r"^fc_norm\.", "vjepa2.encoder.layernorm."),
        (r"^videomae\.encoder\.", "vjepa2.encoder."),
        (r"^videomae\.", "vjepa2.encoder."),
        (r"patch_embeddings\.projection\.", "patch_embeddings.proj."),
        (r"attention\.attention\.", "attention."),
        (r"attention\.output\.dense\.", "attention.proj."),
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"output\.dense\.", "mlp.fc2."),
    ),
}
"""From names of VideoMAE's weights to those of a family, one after the other."""


def main() -> None:
    """Convert the teacher, and train what is missing."""
    arguments = _arguments()
    output: Path = arguments.output
    videomae = output / "videomae"
    if not videomae.exists():
        convert(arguments.run, videomae, to="hf")
    for family in arguments.families:
        if not (output / family / "config.json").exists():
            train(family, arguments, videomae)


def train(family: str, arguments: argparse.Namespace, videomae: Path) -> None:
    """Train one model to say what the teacher says, and write its folder."""
    teacher, output = load_model(arguments.run), arguments.output
    model = student(family, teacher, videomae, arguments.seed).train()
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    first, kept = 0, output / f"{family}.ckpt"
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / WARMUP_STEPS, 1 - step / arguments.steps)
        frames = read_batch(arguments, step, teacher.config)
        with torch.inference_mode():
            answers = teacher(teacher.tokenize(frames, rule=Everything())).softmax(-1)
        logits = model(**tiny.inputs(model, normalised(frames, teacher.config))).logits
        loss = F.kl_div(logits.log_softmax(-1), answers.clone(), reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            with replacing(kept) as temporary:
                torch.save(state, temporary)
            same = (logits.argmax(-1) == answers.argmax(-1)).float().mean()
            print(f"{family}: step {step + 1} of {arguments.steps}, KL {loss:.3f}, same top-1 {same:.0%}", flush=True)
    model.eval().save_pretrained(output / family)
    preprocessor = json.dumps(preprocessor_to_hf(teacher.config), indent=2) + "\n"
    (output / family / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")
    kept.unlink(missing_ok=True)


def student(family: str, teacher: VisionTransformer, videomae: Path, seed: int) -> Any:
    """A model of the teacher's size that begins with what the families share."""
    config = teacher.config
    size = tiny.Size(
        config.width, config.depth, config.num_heads, config.mlp_width, config.num_frames, config.image_size,
        config.patch_size, config.tubelet_size,
    )  # fmt: skip
    described = config_to_hf(config)
    classes = {name: described[name] for name in ("id2label", "label2id", "hidden_act")}
    model = tiny.build(family, size, seed=seed, layer_norm_eps=config.layer_norm_eps, **classes)
    known = tiny.build("videomae", size).from_pretrained(videomae).state_dict()
    with torch.no_grad():
        positions_LD = teacher.positions(torch.arange(config.patches.grid(
            (config.num_frames, config.image_size, config.image_size, 3)).num_tokens))  # fmt: skip
        own = model.state_dict()
        for name, tensor in known.items():
            own[_renamed(name, family)].copy_(tensor)
        if family == "vivit":
            own["vivit.embeddings.position_embeddings"][0, 1:] = positions_LD
        else:
            own["vjepa2.encoder.embeddings.patch_embeddings.proj.bias"] += positions_LD.mean(0)
    return model


def read_batch(arguments: argparse.Namespace, step: int, config: ViTConfig) -> Tensor:
    """uint8 [B, T, H, W, 3]: random clips, the same ones for the same step and seed; each video once an epoch."""
    entries = read_manifest(arguments.manifest).usable
    clip = ClipSpec(num_frames=config.num_frames, frame_stride=None, fps=arguments.fps, size=config.image_size)
    found = []
    for number in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(number, len(entries))
        order = torch.randperm(
            len(entries), generator=torch.Generator().manual_seed(derive_seed(arguments.seed, epoch))
        )
        entry, seed = entries[int(order[place])], derive_seed(arguments.seed, number, 1)
        found.append(read_training_clip(entry.path, clip, AUGMENT, seed=seed).frames)
    return torch.stack(found)


def normalised(frames: Tensor, config: ViTConfig) -> Tensor:
    """uint8 [B, T, H, W, 3] -> float [B, T, 3, H, W]."""
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    return ((frames / 255 - mean) / std).movedim(-1, 2)


def _renamed(name: str, family: str) -> str:
    for old, new in RENAMED[family]:
        name = re.sub(old, new, name)
    return name


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run of the network to learn from")
    parser.add_argument("manifest", type=Path, help="videos to train on, such as fit-ucf6.parquet")
    parser.add_argument("--families", nargs="+", choices=tuple(RENAMED), default=list(RENAMED), help="to train")
    parser.add_argument("--steps", type=int, default=240, help=f"of {BATCH} clips each")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second of a clip")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "judges", help="folder of the models")
    return parser.parse_args()


if __name__ == "__main__":
    main()

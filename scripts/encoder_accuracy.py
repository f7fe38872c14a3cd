"""Write docs/results/encoder-accuracy.json: how far features of a patched image encoder are from those of all patches.

    python scripts/encoder_accuracy.py DATA [--steps 400]

DATA holds folders of videos with train/ and val/, as docs/results.md describes them. A small SigLIP tower is trained on
frames of the training videos to tell frames apart: of two pictures that are cut, mirrored and lit differently it says
which come from the same moment of the same video. Then it sees the validation videos, patched in several ways.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from markdown_tables import RESULTS
from torch import Tensor

import rlt
from rlt import Clip, Threshold, UniformFrames
from rlt.adapters import tiny
from rlt.errors import RltError
from rlt.files import write_json
from rlt.measure import machine_info

SIDE, PATCH = 128, 16
SIZE = tiny.Size(width=128, depth=4, heads=4, mlp_width=512, image_size=SIDE, patch_size=PATCH)
TRAIN_FRAMES, VAL_FRAMES, STRIDE = 8, 48, 2
PAIRS, LEARNING_RATE, TEMPERATURE = 32, 1e-3, 0.1
NEIGHBOURS = 10
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.4)
NO_REFRESH = {"refresh_every": None, "refresh_share": None, "refresh_around": None}
ARMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "anchor": {"reference": "anchor"},
    "every 16 frames anew": {"refresh_every": 16},
    "every 4 frames anew": {"refresh_every": 4},
    "anew above 30% changed": {"refresh_share": 0.3},
    "one patch around": {"refresh_around": 1},
    "whole frames, as many tokens": {},
}


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--videos", type=int, default=24, help="validation videos of each set, spread over their list")
    options = parser.parse_args()

    sets = sorted(folder for folder in options.data.iterdir() if (folder / "train").is_dir())
    train = read(sets, "train", None, TRAIN_FRAMES, stride=6)
    print(f"{len(train)} training videos", flush=True)
    model = tiny.build("siglip", SIZE)
    losses = fit(model, train, options.steps)
    points = []
    for folder in sets:
        clips = read([folder], "val", options.videos, VAL_FRAMES, stride=STRIDE)
        points += measure(model, folder.name, clips)
    write_json(
        RESULTS / "encoder-accuracy.json",
        {
            "encoder": {"family": "siglip", **vars(SIZE), "parameters": sum(x.numel() for x in model.parameters())},
            "training": {"videos": len(train), "steps": options.steps, "pairs": PAIRS, "losses": losses},
            "frames": VAL_FRAMES,
            "frame_stride": STRIDE,
            "machine": machine_info(),
            "points": points,
        },
    )


def read(sets: list[Path], split: str, most: int | None, frames: int, *, stride: int) -> list[Clip]:
    """One clip of each video, or of so many of each set."""
    found = []
    for folder in sets:
        videos = sorted(path for path in (folder / split).rglob("*") if path.is_file())
        step = 1 if most is None else max(len(videos) / most, 1)
        for number in range(int(len(videos) / step)):
            try:
                clip = rlt.read_clip(videos[int(number * step)], num_frames=frames, frame_stride=stride, size=SIDE)
            except RltError as error:
                print(error)
                continue
            found.append(clip)
    return found


def normalise(frames: Tensor) -> Tensor:
    """uint8 [..., h, w, 3] -> float [..., 3, h, w], as SigLIP's processor does."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def fit(model: Any, clips: list[Clip], steps: int) -> list[float]:
    """Train in place; the mean loss of each tenth of the steps."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    warm_up = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    losses: list[float] = []
    for step in range(steps):
        chosen = torch.randint(len(clips), (PAIRS,), generator=generator).tolist()
        moments = torch.randint(TRAIN_FRAMES, (PAIRS,), generator=generator).tolist()
        pictures = [clips[clip].frames[moment] for clip, moment in zip(chosen, moments, strict=True)]
        views = normalise(torch.stack([look(picture, generator) for picture in pictures for _ in range(2)]))
        features = F.normalize(model(views).pooler_output, dim=1)
        logits = (features @ features.T / TEMPERATURE).fill_diagonal_(-math.inf)
        loss = F.cross_entropy(logits, torch.arange(2 * PAIRS) ^ 1)  # the other view of each
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % max(steps // 10, 1) == 0:
            print(f"step {step + 1}: loss {sum(losses[-warm_up:]) / warm_up:.3f}", flush=True)
    model.eval()
    return [sum(losses[at : at + warm_up]) / warm_up for at in range(0, steps, warm_up)]


def look(picture: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [h, w, 3] cut, mirrored and lit at random."""
    side, top, left, mirror, gain = torch.rand(5, generator=generator).tolist()
    side = int(SIDE * (0.5 + 0.5 * side))
    row, column = int(top * (SIDE - side)), int(left * (SIDE - side))
    cut = picture[row : row + side, column : column + side].permute(2, 0, 1).float()[None]
    cut = F.interpolate(cut, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=False)[0]
    cut = cut.flip(2) if mirror < 0.5 else cut
    return (cut * (0.7 + 0.6 * gain)).clamp(0, 255).to(torch.uint8).permute(1, 2, 0)


@torch.inference_mode()
def measure(model: Any, name: str, clips: list[Clip]) -> list[dict[str, Any]]:
    """Every arm at every threshold, on all clips of one set."""
    pixels = [normalise(clip.frames) for clip in clips]
    dense = [model(frames) for frames in pixels]
    gallery = F.normalize(torch.cat([output.pooler_output for output in dense]), dim=1)
    video = torch.arange(len(clips)).repeat_interleave(VAL_FRAMES)
    near = neighbours(gallery, gallery, video)
    points = []
    rlt.patch(model)
    for threshold in THRESHOLDS:
        for arm, options in ARMS.items():
            rule: Any = Threshold(threshold, reference=options.get("reference", "previous"))
            if arm.startswith("whole frames"):
                rule = UniformFrames(like=rule)
            refresh = {key: options.get(key) for key in NO_REFRESH}
            found, kept, patches = [], 0.0, 0.0
            with model.rlt.override(rule=rule, **refresh):
                for frames, output in zip(pixels, dense, strict=True):
                    patched = model(frames)
                    found.append(patched.pooler_output)
                    kept += model.rlt.last.share_kept / len(clips)
                    states = patched.last_hidden_state, output.last_hidden_state
                    patches += F.cosine_similarity(*states, dim=-1).mean().item() / len(clips)
            features = F.normalize(torch.cat(found), dim=1)
            cosine = (features * gallery).sum(1)
            same = neighbours(features, gallery, video)
            own = features @ gallery.T
            rank = (own > own.diagonal()[:, None] + 1e-6).sum(1) + 1
            shared = (same[:, :, None] == near[:, None]).any(2).float().mean().item()
            points.append(
                {
                    "data": name,
                    "videos": len(clips),
                    "arm": arm,
                    "threshold": threshold,
                    "tokens_kept": kept,
                    "cosine": cosine.mean().item(),
                    "cosine_lowest_5_percent": cosine.quantile(0.05).item(),
                    "patch_cosine": patches,
                    "own_frame_first": (rank == 1).float().mean().item(),
                    "own_frame_rank": rank.float().mean().item(),
                    "shared_neighbours": shared,
                }
            )
            print(points[-1], flush=True)
    rlt.unpatch(model)
    others = gallery @ gallery.T
    others.masked_fill_(video[:, None] == video, math.nan)
    points.append({"data": name, "videos": len(clips), "arm": "another video", "cosine": others.nanmean().item()})
    return points


def neighbours(features: Tensor, gallery: Tensor, video: Tensor) -> Tensor:
    """int64 [frames, NEIGHBOURS]: the frames of other videos that are most alike."""
    alike = (features @ gallery.T).masked_fill_(video[:, None] == video, -math.inf)
    return alike.topk(NEIGHBOURS, dim=1).indices


if __name__ == "__main__":
    main()

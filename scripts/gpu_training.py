"""Train a network on labelled clips from a file of frames: dense, RLT and random tokens from the same seed.

    python scripts/gpu_training.py FOLDER --model NAME --seed N --steps N --device cpu|cuda --json FILE

FOLDER has surveillance-{train,val}-<class>.npy, uint8 [clips, T, H, W, 3]. The step, its loss and its optimizer are
those of `rlt train`, and so is what makes a batch of clips; configuration, manifests and decoding are not needed.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset

import rlt
from rlt import Everything, Random, Rule, Threshold
from rlt.benchmark.frame_files import Frames, read_frames
from rlt.checkpoints import model_config
from rlt.conf.schema import OptimizerConfig
from rlt.data.augment import AugmentConfig
from rlt.data.batch import Collate
from rlt.data.dataset import TrainingSample
from rlt.data.sampler import SampleKey, StepSampler, derive_seed
from rlt.files import write_json
from rlt.measure import machine_info
from rlt.structures import pack
from rlt.tokens import tokenize_batch
from rlt.training.module import VideoClassifier

ARMS: dict[str, Rule] = {"dense": Everything(), "rlt": Threshold(), "random": Random(like=Threshold())}
PLAIN = AugmentConfig(
    rand_augment_num_ops=0, erasing_probability=0.0, mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.0
)
OPTIMIZER = OptimizerConfig(lr=8e-3, layer_decay=1.0, warmup_fraction=0.1, min_lr=1e-5)
BATCH = 16


@dataclass
class Clips(Dataset[TrainingSample]):
    """Clips in memory, mirrored at random; everything random is a function of (seed, position)."""

    frames: Frames
    labels: list[int]
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: SampleKey) -> TrainingSample:
        frames = torch.from_numpy(self.frames[key.index])
        mirrored = derive_seed(self.seed, key.position) % 2
        frames = frames.flip(2) if mirrored else frames
        return TrainingSample(frames, self.labels[key.index], f"clip {key.index}", (), key.position)


def main() -> None:
    """Train every arm and leave JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="vit_small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    training, validation = (load(options.folder, split) for split in ("train", "val"))
    arms = []
    for name, rule in ARMS.items():
        print(f"{options.model}, seed {options.seed}: {name}", flush=True)
        arms.append({"name": name, **train_arm(rule, training, validation, options)})
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    machine = machine_info(options.device)
    write_json(options.json, {"suite": "training", "arms": arms, "settings": settings, "machine": machine})


def load(folder: Path, split: str) -> tuple[Frames, list[int]]:
    """Clips of a split and their classes, numbered in the order of their names."""
    files = sorted(folder.glob(f"surveillance-{split}-*.npy"))
    classes = [np.asarray(read_frames(path, axes=5)) for path in files]
    return np.concatenate(classes), [label for label, clips in enumerate(classes) for _ in clips]


def train_arm(
    rule: Rule, training: tuple[Frames, list[int]], validation: tuple[Frames, list[int]], options: argparse.Namespace
) -> dict[str, object]:
    """Train from random weights; accuracy on the validation clips with every token and with the rule's own."""
    torch.manual_seed(options.seed)
    frames, labels = training
    num_classes = max(labels) + 1
    config = model_config(options.model).replace(
        num_classes=num_classes, num_frames=frames.shape[1], image_size=frames.shape[2]
    )
    model = rlt.VisionTransformer(config)
    module = VideoClassifier(model, OPTIMIZER, total_steps=options.steps, clips_per_step=BATCH, seed=options.seed)
    loader = DataLoader(
        Clips(frames, labels, options.seed),
        batch_sampler=StepSampler(len(labels), batch_size=BATCH, seed=options.seed, num_steps=options.steps),
        collate_fn=Collate(rule, PLAIN, num_classes, config.patches, seed=options.seed),
        num_workers=options.workers,
        pin_memory=options.device == "cuda",
    )
    trainer = Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if options.device == "cuda" else "32-true",
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    begin = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - begin
    model.eval().to(options.device)
    return {
        "seconds_training": seconds,
        "steps": trainer.global_step,
        "tokens_kept": module.tokens_seen / module.tokens_possible,
        "top1_dense": accuracy(model, Everything(), *validation),
        "top1": accuracy(model, rule, *validation),
    }


@torch.inference_mode()
def accuracy(model: rlt.VisionTransformer, rule: Rule, frames: Frames, labels: list[int]) -> float:
    """Share of the clips whose class is found, 0 to 1."""
    device, right = model.fc_norm.weight.device, 0
    for begin in range(0, len(frames), BATCH):
        tokens = tokenize_batch(torch.from_numpy(frames[begin : begin + BATCH]), rule, model.config.patches)
        found = model(pack(tokens).to(device)).argmax(1).tolist()
        right += sum(one == other for one, other in zip(found, labels[begin : begin + BATCH], strict=True))
    return right / len(frames)


if __name__ == "__main__":
    main()

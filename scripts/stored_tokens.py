"""What a file of `rlt tokens` takes and gives: bytes beside the videos and raw frames, clips a second beside decoding.

    python scripts/stored_tokens.py DATA [--json FILE]

Needs labelled videos in DATA/surveillance/val/<class>. The loader is that of `rlt train`, in this process and with one
thread, with the same changes of clips on both ways, and both take the same number of clips in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from rlt.data.augment import AugmentConfig
from rlt.data.batch import Collate
from rlt.data.dataset import TrainingDataset
from rlt.data.listings import folder_listing
from rlt.data.loader import training_loader
from rlt.data.prepare import prepare
from rlt.data.sampler import StepSampler
from rlt.data.stored import StoredCollate, StoredTraining
from rlt.data.token_files import TokenFile
from rlt.encoding import Cutter, WindowSpec, encode_videos
from rlt.files import write_json
from rlt.measure import interleave, machine_info
from rlt.structures import PatchSpec
from rlt.tokens import Threshold
from rlt.video import ClipSpec

CLIP, RULE, SPEC = ClipSpec(16, 4), Threshold(0.1), PatchSpec()
AUGMENT = AugmentConfig(False, rand_augment_num_ops=0, erasing_probability=0, mixup_alpha=0, cutmix_alpha=0)
BATCH, BATCHES, ROUNDS = 4, 3, 5


def main() -> None:
    """Write a file of tokens, take batches from it and from the videos, and leave JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path, default=Path("docs/results/stored-tokens.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        manifest = prepare(folder_listing(options.data / "surveillance" / "val"), Path(name) / "val.csv").manifest
        label_ids = {entry.path: entry.label_id for entry in manifest.usable}
        cutter = Cutter(WindowSpec(CLIP), RULE, SPEC, class_names=manifest.class_names, label_ids=label_ids)
        result = encode_videos(cutter, [Path(name) / "val.csv"], output=Path(name) / "tokens.parquet")
        numbers = {
            "videos": result.num_videos,
            "windows": result.num_rows,
            "tokens_kept": result.tokens_kept,
            "bytes_videos": sum(Path(entry.path).stat().st_size for entry in manifest.usable),
            "bytes_frames": int(result.num_dense) * SPEC.values_per_token,
            "bytes_kept": result.num_tokens * SPEC.values_per_token,
            "bytes_file": (Path(name) / "tokens.parquet").stat().st_size,
        }
        file = TokenFile(Path(name) / "tokens.parquet")
        decoded = TrainingDataset(manifest.usable, CLIP, AUGMENT)
        stored = StoredTraining(file, file.manifest().usable, AUGMENT, SPEC)
        num_classes = len(manifest.class_names)
        works = {
            "videos": _walk(decoded, Collate(RULE, AUGMENT, num_classes, SPEC)),
            "tokens": _walk(stored, StoredCollate(AUGMENT, num_classes)),
        }
        timings = interleave(works, rounds=ROUNDS)
    seconds = {way: {"median": timing.median, "spread": list(timing.spread)} for way, timing in timings.items()}
    settings = {"clip": vars(CLIP), "threshold": RULE.threshold, "clips": BATCH * BATCHES, "rounds": ROUNDS}
    write_json(options.json, {"settings": settings, **numbers, "seconds": seconds, "machine": machine_info("cpu")})


def _walk(dataset: TrainingDataset | StoredTraining, collate: Collate | StoredCollate) -> Callable[[], object]:
    """Takes the next batches of one random order each time, as training does."""
    order = iter(StepSampler(len(dataset), batch_size=BATCH))

    def walk() -> None:
        for _ in training_loader(dataset, collate, islice(order, BATCHES), num_workers=0, pin_memory=False):
            pass

    return walk


if __name__ == "__main__":
    main()

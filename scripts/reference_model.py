"""Train the small reference network on real labelled video, and evaluate it on videos that no choice was made on.

Needs the videos in DATA/{ucf6,surveillance}/{train,val}/<class>. Everything goes to OUTPUT: small copies of the videos,
manifests/, and for each network a folder with the runs. A run that was cut off goes on, a finished one is not repeated.
Two networks are trained by the same recipe: NAME-fit without the part of the training videos that settings were chosen
on, and the reference NAME itself with it. The numbers go to docs/results/reference-NAME.json.

    python scripts/reference_model.py DATA [--datasets ucf6 surveillance] [--name joint] [--parts fit train]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rlt.conf import compose
from rlt.data.listings import folder_listing
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.data.prepare import prepare
from rlt.evaluation.run import evaluate_config, evaluation_config
from rlt.files import write_json
from rlt.measure import machine_info
from rlt.training.run import train
from rlt.video import shrink_video

ROOT = Path(__file__).parents[1]
SHORT_SIDE = 144
"""Of the copies that training reads, in pixels."""
PARTS = ("fit", "choice", "test")
"""Videos to train on, to choose settings by, and to report; "train" is the first two together."""


TESTED = {"fit": ("choice", "test"), "train": ("test",)}
"""Part to train on -> parts to evaluate."""


class Stage(NamedTuple):
    """One run of `rlt train`."""

    name: str
    """Of its folder."""
    overrides: tuple[str, ...]
    """On top of the preset."""


STAGES = (
    Stage("mixed", ("tokenizer=random", "tokenizer.keep_ratio=0.25")),
    Stage(
        "few-tokens",
        (
            "tokenizer=random",
            "tokenizer.keep_ratio=0.25",
            "data.augment.mixup_prob=0",
            "trainer.max_steps=600",
            "optimizer.lr=6.4e-3",
        ),
    ),
    Stage(
        "dense",
        (
            "tokenizer=none",
            "data.augment.mixup_prob=0",
            "trainer.max_steps=200",
            "optimizer.lr=3.2e-3",
            "trainer.ema_decay=0.98",
        ),
    ),
)
"""Most steps see a random quarter of the tokens, which costs less than a quarter, and at first mixed clips; the last
ones see all tokens."""


def main() -> None:
    """Run what is missing."""
    arguments = _arguments()
    output: Path = arguments.output
    write_manifests(arguments.data, arguments.datasets, output)
    name = arguments.name or ("joint" if len(arguments.datasets) > 1 else arguments.datasets[0])
    for part in arguments.parts:
        network = name if part == "train" else f"{name}-{part}"
        manifest = output / "manifests" / "small" / f"{part}.parquet"
        tested = [f"{each}-{dataset}" for each in TESTED[part] for dataset in arguments.datasets]
        stages: dict[str, Any] = {}
        for run_dir in train_stages(output / network, manifest, arguments.seed, until=arguments.until):
            accuracy = {
                part_of: count_right(run_dir, output / "manifests" / f"{part_of}.parquet") for part_of in tested
            }
            stages[run_dir.name] = {**_summary(run_dir), "accuracy": accuracy}
            print(f"{run_dir}: {accuracy}", flush=True)
            result = {
                "datasets": arguments.datasets,
                "part": part,
                "seed": arguments.seed,
                "videos": len(read_manifest(manifest)),
                "stages": stages,
                "machine": machine_info(),
            }
            write_json(ROOT / "docs" / "results" / f"reference-{network}.json", result)


def write_manifests(data: Path, datasets: Sequence[str], output: Path) -> None:
    """Manifests of all parts, over all data sets and of each, with the classes of all; and those of the small copies.

    OUTPUT/manifests has the videos themselves, OUTPUT/manifests/small the copies.
    """
    parts: dict[str, list[VideoEntry]] = {part: [] for part in (*PARTS, "train")}
    class_names: list[str] = []
    for dataset in datasets:
        splits = {split: _prepare(data / dataset / split, output) for split in ("train", "val")}
        found = split_parts(splits["train"].usable, splits["val"].usable)
        for part, entries in {**found, "train": found["fit"] + found["choice"]}.items():
            parts[f"{part}-{dataset}"] = [
                replace(entry, label_id=entry.label_id + len(class_names)) for entry in entries
            ]
        for part in PARTS:
            parts[part] += parts[f"{part}-{dataset}"]
        class_names += splits["train"].class_names
    parts["train"] = parts["fit"] + parts["choice"]
    for part in (*PARTS, "train"):
        parts[f"small/{part}"] = [_shrunk(entry, data, output) for entry in parts[part]]
    for name, entries in parts.items():
        write_manifest(Manifest(tuple(entries), tuple(class_names)), output / "manifests" / f"{name}.parquet")


def split_parts(training: Sequence[VideoEntry], test: Sequence[VideoEntry]) -> dict[str, list[VideoEntry]]:
    """The videos of each part; the choice is made of whole groups or ranges, since neighbours share a source."""
    choice = [entry for entry in training if is_for_choice(Path(entry.path).name)]
    return {"fit": [entry for entry in training if entry not in choice], "choice": choice, "test": [*test]}


def is_for_choice(name: str) -> bool:
    """Whether a training video is left for choices: groups 9 and 10 of UCF-101, the last quarter of numbered files."""
    if group := re.search(r"_g(\d+)_c\d+", name):
        return int(group[1]) in (9, 10)
    number = re.search(r"(\d+)\.\w+$", name)
    return number is not None and int(number[1]) > 57


def train_stages(folder: Path, manifest: Path, seed: int, *, until: str) -> Iterator[Path]:
    """Train a network stage by stage, each from the weights of the one before, and give the folder of each run."""
    start: list[str] = []
    for stage in STAGES:
        run_dir = folder / stage.name
        if not (run_dir / "summary.json").exists():
            overrides = ["experiment=reference_small", f"data.train={manifest}", f"seed={seed}", *stage.overrides]
            overrides += [f"run_dir={run_dir}", "resume=auto", *start]
            print(f"training {run_dir}", flush=True)
            train(compose(overrides), overrides=overrides, say=lambda text: print(text, flush=True))
        yield run_dir
        if stage.name == until:
            return
        start = [f"checkpoint={run_dir / 'model'}"]


def count_right(run_dir: Path, manifest: Path) -> dict[str, int]:
    """Right and all videos of a manifest, with every token of one clip in the middle of each video."""
    overrides = [f"checkpoint={run_dir}", f"data.test={manifest}", "tokenizer=none", "device=cpu"]
    result = evaluate_config(evaluation_config(overrides)).result
    return {"right": sum(video.correct for video in result.predictions), "videos": result.num_videos}


def _summary(run_dir: Path) -> dict[str, Any]:
    summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return {name: summary[name] for name in ("steps", "train_seconds", "tokens_kept")}


def _prepare(folder: Path, output: Path) -> Manifest:
    target = output / "manifests" / "listings" / f"{folder.parent.name}-{folder.name}.parquet"
    if not target.exists():
        prepare(folder_listing(folder), target)
    return read_manifest(target)


def _shrunk(entry: VideoEntry, data: Path, output: Path) -> VideoEntry:
    target = output / "videos" / Path(entry.path).relative_to(data.absolute()).with_suffix(".mkv")
    if not target.exists():
        shrink_video(entry.path, target, short_side=SHORT_SIDE)
    return replace(entry, path=str(target.absolute()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the videos")
    parser.add_argument("--datasets", nargs="+", default=["ucf6", "surveillance"], help="folders of DATA to train on")
    parser.add_argument("--name", help='of the network; "joint", or that of the only data set')
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "reference-model", help="folder of all that is made"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_argument("--parts", nargs="+", choices=("fit", "train"), default=["fit", "train"], help="to train on")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--until", choices=names, default=names[-1], help="last stage to train")
    return parser.parse_args()


if __name__ == "__main__":
    main()

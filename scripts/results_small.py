"""Train and evaluate small networks on real labelled video, dense and with every selection rule, from the same seeds.

Leaves one JSON per run in docs/results/small; a run whose JSON is there is not repeated. `scripts/write_tables.py`
makes the tables of docs/results.md from them. Needs the videos in DATA/{surveillance,ucf6}/{train,val}/<class>.

    python scripts/results_small.py DATA [--steps 240] [--seeds 3]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from rlt.checkpoints import load_checkpoint
from rlt.conf import compose
from rlt.data.batch import Batch
from rlt.data.listings import folder_listing
from rlt.data.manifest import read_manifest
from rlt.data.prepare import prepare
from rlt.evaluation import EvaluationSettings, evaluate
from rlt.evaluation.run import evaluate_config
from rlt.files import write_json
from rlt.measure import interleave, machine_info
from rlt.network.flops import merge_for_flops
from rlt.network.vit import VisionTransformer
from rlt.training.loaders import TrainingData
from rlt.training.optimizer import make_optimizer
from rlt.training.run import build_model, train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "small"
DATASETS = {"surveillance": "surveillance_small", "ucf6": "ucf_small"}
ARMS = ("none", "rlt", "random", "uniform_frames")
EVALUATED_WITH = {
    "none": ("none", "rlt", "random", "uniform_frames", "tome"),
    "rlt": ("none", "rlt"),
    "random": ("none", "rlt", "random"),
    "uniform_frames": ("none", "rlt", "uniform_frames"),
}
"""Rules that a network is evaluated with, by the rule that it was trained with."""
CLIP = ["data.clip.num_frames=8", "data.clip.frame_stride=4", "data.num_workers=1", "logger=none"]


def main() -> None:
    """Run what is missing, seed by seed, so that a slow hour of the machine hits all arms alike."""
    arguments = _arguments()
    work = ROOT / "output" / "results-small"
    for dataset in DATASETS:
        target = RESULTS / f"{dataset}-steps.json"
        if not target.exists() and not arguments.skip_timing:
            print(f"timing steps on {dataset}", flush=True)
            videos = _manifest(arguments.data / dataset / "train", work / f"{dataset}-train.parquet")
            validation = _manifest(arguments.data / dataset / "val", work / f"{dataset}-val.parquet")
            write_json(target, {**_time_steps(dataset, videos), "evaluation": _time_evaluation(dataset, validation)})
    todo = [(dataset, seed, arm) for seed in range(arguments.seeds) for dataset in DATASETS for arm in ARMS]
    for number, (dataset, seed, arm) in enumerate(todo, start=1):
        target = RESULTS / f"{dataset}-{arm}-seed{seed}.json"
        if target.exists():
            continue
        print(f"{number} of {len(todo)}: {dataset}, trained with {arm}, seed {seed}", flush=True)
        manifests = {
            split: _manifest(arguments.data / dataset / split, work / f"{dataset}-{split}.parquet")
            for split in ("train", "val")
        }
        write_json(target, _one_run(dataset, seed, arm, manifests, work / target.stem, arguments.steps))


def _time_steps(dataset: str, manifest: Path, rounds: int = 12) -> dict[str, object]:
    """Seconds of whole training steps (decode, tokens, forward, backward, update), all arms in turn, one process."""
    steps: dict[str, Callable[[], object]] = {}
    kept: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        config = compose([f"experiment={DATASETS[dataset]}", *CLIP, "data.num_workers=0", f"tokenizer={arm}"])
        content = read_manifest(manifest)
        model = build_model(config, content).train()
        data = TrainingData(config, content, None, model.config)
        optimizer, _ = make_optimizer(
            model, model.config.depth, config.optimizer, clips_per_step=data.clips_per_step, total_steps=100
        )
        steps[arm] = partial(_step, iter(data.train_dataloader()), model, optimizer, kept[arm])
    timings = interleave(steps, rounds=rounds, warmup=2)
    return {
        "dataset": dataset,
        "arms": {
            arm: {
                "seconds_median": timing.median,
                "seconds_spread": timing.spread,
                "of_dense": timing.over(timings["none"]),
                "tokens_kept": sum(kept[arm]) / len(kept[arm]),
            }
            for arm, timing in timings.items()
        },
        "machine": machine_info(),
    }


def _time_evaluation(dataset: str, manifest: Path, videos: int = 16, rounds: int = 7) -> dict[str, object]:
    """Clips per second from file to class, dense and with RLT in turn, with a network that is not trained."""
    content = read_manifest(manifest)
    model = build_model(compose([f"experiment={DATASETS[dataset]}", *CLIP]), content).eval()
    arms: dict[str, Callable[[], object]] = {}
    for tokenizer in ("none", "rlt"):
        config = compose([f"experiment={DATASETS[dataset]}", *CLIP, f"tokenizer={tokenizer}"])
        arms[tokenizer] = partial(
            evaluate,
            model,
            content,
            EvaluationSettings(config.data.clip, config.data.views, config.tokenizer.build()),
            max_videos=videos,
        )
    timings = interleave(arms, rounds=rounds)
    return {
        tokenizer: {
            "clips_per_second_median": videos / timing.median,
            "clips_per_second_spread": [videos / seconds for seconds in reversed(timing.spread)],
        }
        for tokenizer, timing in timings.items()
    }


def _step(
    batches: Iterator[Batch], model: VisionTransformer, optimizer: torch.optim.Optimizer, kept: list[float]
) -> None:
    batch = next(batches)
    loss = -(batch.targets * F.log_softmax(model(batch.packed), dim=1)).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    kept.append(batch.packed.share_kept)


def _one_run(
    dataset: str, seed: int, arm: str, manifests: dict[str, Path], run_dir: Path, steps: int
) -> dict[str, object]:
    common = [f"experiment={DATASETS[dataset]}", *CLIP, f"seed={seed}", f"data.test={manifests['val']}"]
    overrides = [*common, f"data.train={manifests['train']}", f"tokenizer={arm}", f"trainer.max_steps={steps}"]
    overrides += [f"run_dir={run_dir}", "resume=auto"]
    summary = train(compose(overrides), overrides=overrides, say=lambda text: print(text, flush=True))
    evaluations: dict[str, dict[str, Any]] = {}
    for tokenizer in EVALUATED_WITH[arm]:
        tokens = [f"tokenizer={tokenizer}"]
        if tokenizer == "tome":
            tokens[:] = ["tokenizer=none"]
            tokens.append(f"model.merge_per_block={_merges(run_dir, evaluations['rlt']['flops'])}")
        result = evaluate_config(compose([*common, f"checkpoint={run_dir}", *tokens, "device=cpu"])).result.to_json()
        names = ("top1", "tokens_kept", "num_videos", "failed", "flops")
        evaluations[tokenizer] = {name: result[name] for name in names}
    return {
        "dataset": dataset,
        "arm": arm,
        "seed": seed,
        "steps": steps,
        "settings": CLIP,
        "train_seconds": summary.train_seconds,
        "train_tokens_kept": summary.tokens_kept,
        "evaluation": evaluations,
        "machine": machine_info(),
    }


def _merges(run_dir: Path, flops: Any) -> int:
    """Tokens that ToMe merges per block to cost as much as RLT did."""
    config = load_checkpoint(run_dir / "model").config
    every_token = config.num_frames // config.tubelet_size * (config.image_size // config.patch_size) ** 2
    return merge_for_flops(config, [every_token], flops["per_clip"])


def _manifest(folder: Path, target: Path) -> Path:
    if not target.exists():
        prepare(folder_listing(folder), target)
    return target


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the videos")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each arm")
    parser.add_argument("--skip-timing", action="store_true", help="leave out the timing of single steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()

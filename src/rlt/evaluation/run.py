"""`rlt evaluate` from Python: a checkpoint or a run, a manifest, and what is to be kept of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from rlt.checkpoints import create_model, load_checkpoint
from rlt.conf.schema import Config
from rlt.data.manifest import read_manifest
from rlt.errors import InvalidArgumentError
from rlt.evaluation.comparison import PairedComparison, compare_predictions
from rlt.evaluation.evaluator import evaluate
from rlt.evaluation.pictures import write_pictures
from rlt.evaluation.predictions import write_predictions
from rlt.evaluation.results import EvaluationResult
from rlt.files import write_json
from rlt.network.vit import VisionTransformer

_ONLY_FOR_TRAINING = (
    "run_dir",
    "resume",
    "checkpoint",
    "json",
    "predictions",
    "pictures",
    "compare_with",
    "max_videos",
)


@dataclass(frozen=True)
class EvaluationRun:
    """What `rlt evaluate` shows."""

    result: EvaluationResult
    """The numbers."""
    comparison: PairedComparison | None
    """Against the predictions of another run, if asked for."""


def overrides_of_run(checkpoint: str) -> list[str]:
    """What a run was trained with, as far as it matters to its evaluation: how clips are taken, which tokens.

    Args:
        checkpoint: folder of a run; anything else has no overrides.
    """
    trained_with = Path(checkpoint) / "overrides.json"
    if not trained_with.is_file():
        return []
    overrides: list[str] = json.loads(trained_with.read_text(encoding="utf-8"))
    return [override for override in overrides if override.partition("=")[0] not in _ONLY_FOR_TRAINING]


def evaluate_config(config: Config, *, on_progress: Callable[[int, int, str], None] | None = None) -> EvaluationRun:
    """Evaluate as configured, and write JSON, predictions and pictures where the configuration names files.

    Raises:
        InvalidArgumentError: for settings that do not fit.
        CheckpointError: if the weights cannot be loaded.
        VideoError: if not a single video could be evaluated.
    """
    if config.checkpoint is None:
        raise InvalidArgumentError(
            "checkpoint is not set; give the folder of a run, a file or a hub id: checkpoint=..."
        )
    path = config.data.test or config.data.val
    if path is None:
        raise InvalidArgumentError("data.test is not set; give a manifest that `rlt prepare` wrote: data.test=FILE")
    if config.compare_with is not None and config.predictions is None:
        raise InvalidArgumentError("compare_with needs the predictions of this run too; add predictions=FILE.parquet")
    manifest = read_manifest(path)
    model = _load_model(config)
    model.merge_per_block = config.model.merge_per_block
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    result = evaluate(
        model,
        manifest,
        clip=config.data.clip,
        views=config.data.views,
        rule=config.tokenizer.build(),
        num_workers=config.data.num_workers,
        device=device,
        dtype=getattr(torch, config.trainer.precision),
        seed=config.seed,
        decoder=config.data.decoder,
        max_videos=config.max_videos,
        on_progress=on_progress,
    )
    if config.predictions is not None:
        write_predictions(result.predictions, config.predictions, class_names=manifest.class_names)
    comparison = None
    if config.compare_with is not None and config.predictions is not None:
        comparison = compare_predictions(config.predictions, config.compare_with)
    if config.pictures is not None:
        write_pictures(result, config.pictures)
    if config.json is not None:
        compared = {} if comparison is None else {"comparison": comparison.to_json()}
        write_json(config.json, {**result.to_json(), "checkpoint": config.checkpoint, **compared})
    return EvaluationRun(result, comparison)


def _load_model(config: Config) -> VisionTransformer:
    assert config.checkpoint is not None
    of_run = Path(config.checkpoint) / "model"
    if of_run.is_dir():
        return load_checkpoint(of_run)
    return create_model(config.model.name, checkpoint=config.checkpoint)

"""`rlt evaluate` from Python: a checkpoint or a run, a manifest, and what is to be kept of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlt.conf import compose, typed
from rlt.conf.saved import config_of_run
from rlt.conf.schema import Config
from rlt.data.stored import read_videos
from rlt.errors import InvalidArgumentError
from rlt.evaluation.comparison import PairedComparison, compare_predictions
from rlt.evaluation.evaluator import evaluate
from rlt.evaluation.pictures import write_pictures
from rlt.evaluation.predictions import write_predictions
from rlt.evaluation.results import EvaluationResult, EvaluationSettings
from rlt.files import refuse_inputs, write_json
from rlt.loading import load_model, stored_inputs
from rlt.network.vit import VisionTransformer
from rlt.pretrained import ModelInputs
from rlt.tokens import rule_options

_MANIFESTS = {"data.test", "data.val"}


@dataclass(frozen=True)
class EvaluationRun:
    """What `rlt evaluate` shows: the numbers, and their comparison with another run's predictions if asked for."""

    result: EvaluationResult
    comparison: PairedComparison | None


def evaluation_config(overrides: Sequence[str], *, patched: bool = False) -> Config:
    """What is typed, above what the run at `checkpoint=` was trained with: how clips are taken, which tokens.

    `patched` says that it is loaded by `rlt.loading.load_network(patched=True)`.
    """
    given = typed(overrides)
    checkpoint = given.get("checkpoint")
    run = {} if checkpoint is None else config_of_run(str(checkpoint))
    if checkpoint is not None and not run and (Path(str(checkpoint)).is_dir() or given.keys() & _MANIFESTS):
        run = _inputs_stored(str(checkpoint), patched)
    for key, field in (("model", "name"), ("model.name", "name"), ("model.num_heads", "num_heads")):
        trained = run.get("model", {}).get(field)
        if "model" in run and key in given and given[key] != trained:
            raise InvalidArgumentError(
                f"{key} is {given[key]!r}, but {given['checkpoint']} was trained with {trained!r}; leave it out"
            )
    if "data.val" in given:  # a test manifest comes first, but not the run's before what is typed
        run.get("data", {}).pop("test", None)
    config = compose(overrides, run=run)
    if checkpoint is not None and "model" not in run and not given.keys() & {"model", "model.name"}:
        config.model.name = None
    return config


def _inputs_stored(checkpoint: str, patched: bool) -> dict[str, Any]:
    """What the configuration beside weights says of clips and rule, nested as `Config` is."""
    if Path(checkpoint).is_file():  # bare weights
        return {}
    config = stored_inputs(checkpoint, patched=patched)
    if isinstance(config, ModelInputs):
        return {"data": {"clip": {"num_frames": config.clip_spec.num_frames, "size": config.clip_spec.size}}}
    clip = {} if config.clip is None else {"data": {"clip": asdict(config.clip)}}
    return {**clip, **({} if config.rule is None else {"tokenizer": rule_options(config.rule)})}


def manifest_path(config: Config) -> str:
    """The manifest to evaluate.

    Raises:
        InvalidArgumentError: if there is none, or no checkpoint.
    """
    if config.checkpoint is None:
        raise InvalidArgumentError(
            "checkpoint is not set; give the folder of a run, a file or a hub id: checkpoint=..."
        )
    path = config.data.test or config.data.val
    if path is None:
        raise InvalidArgumentError("data.test is not set; give a manifest that `rlt prepare` wrote: data.test=FILE")
    return path


def evaluation_settings(config: Config) -> EvaluationSettings:
    """How videos are read and run."""
    return EvaluationSettings(
        config.data.clip,
        config.data.views,
        config.tokenizer.build(),
        config.batch_videos,
        config.data.num_workers,
        config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
        config.trainer.precision,
        config.seed,
        config.data.decoder,
    )


def load_evaluated(config: Config) -> VisionTransformer:
    """The network at `checkpoint`, with what the configuration says of it."""
    assert config.checkpoint is not None  # `manifest_path` has looked
    asked = config.model
    model = load_model(config.checkpoint, size=asked.name, num_heads=asked.num_heads, run_lengths=asked.run_lengths)
    model.merge_per_block = asked.merge_per_block
    return model


def evaluate_config(config: Config, *, on_progress: Callable[[int, int, str], None] | None = None) -> EvaluationRun:
    """Evaluate as configured, and write JSON, predictions and pictures where the configuration names files."""
    path, settings = manifest_path(config), evaluation_settings(config)
    if config.compare_with is not None and config.predictions is None:
        raise InvalidArgumentError("compare_with needs the predictions of this run too; add predictions=FILE.parquet")
    read = [path, *(name for name in (config.checkpoint, config.compare_with) if name is not None)]
    refuse_inputs((name for name in (config.json, config.predictions) if name is not None), read)
    manifest, stored = read_videos(path)
    model = load_evaluated(config)
    result = evaluate(model, manifest, settings, stored=stored, max_videos=config.max_videos, on_progress=on_progress)
    comparison = None
    if config.predictions is not None:
        names, how = manifest.class_names, result.settings_json()
        write_predictions(result.predictions, config.predictions, class_names=names, settings=how)
        if config.compare_with is not None:
            comparison = compare_predictions(config.predictions, config.compare_with)
    if config.pictures is not None:
        write_pictures(result, config.pictures)
    if config.json is not None:
        compared = {} if comparison is None else {"comparison": comparison.to_json()}
        write_json(config.json, {**result.to_json(), "checkpoint": config.checkpoint, **compared})
    return EvaluationRun(result, comparison)

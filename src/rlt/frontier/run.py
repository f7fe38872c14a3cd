"""`rlt frontier` from Python: a checkpoint, a manifest, and what is to be kept of the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlt.conf.schema import Config
from rlt.data.manifest import read_manifest
from rlt.errors import InvalidArgumentError
from rlt.evaluation.evaluator import check_classes
from rlt.evaluation.run import evaluation_settings, load_evaluated, manifest_path
from rlt.files import refuse_inputs, write_json
from rlt.frontier.arms import default_arms
from rlt.frontier.measure import measure_frontier
from rlt.frontier.networks import can_run
from rlt.frontier.plot import write_frontier_plot
from rlt.frontier.results import FrontierResult
from rlt.loading import load_network
from rlt.network.vit import VisionTransformer
from rlt.pretrained import PatchedNetwork

CACHE_ENDING = ".cache"
"""Beside the JSON file, where numbers of single videos are kept."""


def cache_folder(config: Config) -> str | None:
    """Where numbers of single videos are kept; None for nowhere."""
    return config.frontier.cache or (None if config.json is None else config.json + CACHE_ENDING)


def frontier_config(config: Config, *, on_progress: Callable[[int, int, str], None] | None = None) -> FrontierResult:
    """Measure as configured, and write JSON and a plot where the configuration names files.

    Raises:
        InvalidArgumentError: if the checkpoint or the manifest is missing, or its classes are not those of the model.
    """
    path, settings = manifest_path(config), evaluation_settings(config)
    asked = config.frontier
    arms = default_arms(asked.thresholds, asked.keep_ratios, asked.seeds)
    refuse_inputs([] if config.json is None else [config.json], [path, str(config.checkpoint)])
    model, manifest = _load(config), read_manifest(path)
    check_classes(model, manifest)
    if isinstance(model, PatchedNetwork):
        model.config.check_clip(settings.clip)
    possible = [arm for arm in arms if can_run(model, arm)]
    result = measure_frontier(
        model,
        manifest,
        settings,
        possible,
        cache=cache_folder(config),
        max_videos=config.max_videos,
        on_progress=on_progress,
    )
    left_out = dict.fromkeys(arm.family for arm in arms if arm not in possible)
    result = replace(result, left_out=tuple(left_out))
    if config.json is not None:
        write_json(config.json, {**result.to_json(), "checkpoint": config.checkpoint, "manifest": str(path)})
    if config.pictures is not None:
        write_frontier_plot(result, Path(config.pictures) / "frontier.png")
    return result


def _load(config: Config) -> VisionTransformer | PatchedNetwork:
    """The network at `checkpoint`; a model of transformers is patched, and has a size of its own."""
    assert config.checkpoint is not None  # `manifest_path` has looked
    model = load_network(config.checkpoint, patched=True)
    if isinstance(model, VisionTransformer):
        return load_evaluated(config)
    for name in ("name", "num_heads"):
        if (value := getattr(config.model, name)) is not None:
            raise InvalidArgumentError(f"model.{name} is {value!r}, but {model.config.kind} has its own; leave it out")
    return model

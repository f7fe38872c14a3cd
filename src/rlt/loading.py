"""The one loader of "a model that someone names": the network, and what is stored of how it wants its clips.

A name is the folder of a run, a checkpoint in any layout of `rlt.checkpoints` (a file, a folder, or the id of one on
the Hugging Face hub where no such path exists), or a size of `rlt models`, which has random weights. What is stored
stands in `model.config`: `clip_spec`, `rule`, `labels`, `patches`.

Where tokens go in and logits or features come out, `load_network` takes models of transformers too, by
`rlt.pretrained`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from rlt import weights
from rlt.checkpoints import MODELS, create_model, load_checkpoint, model_config, read_checkpoint
from rlt.checkpoints.read import check_size
from rlt.checks import exclusive, nearest
from rlt.conf.saved import config_of_run
from rlt.errors import InvalidArgumentError
from rlt.network.vit import MODEL_TYPE, VisionTransformer, ViTConfig
from rlt.pretrained import ModelInputs, PatchedNetwork, is_pretrained, load_pretrained, read_inputs
from rlt.tokens import Everything, Rule, make_rule
from rlt.video import ClipSpec

DEFAULT_SIZE = "vit_base"
"""What random weights are made for where nothing is named."""


def is_size(name: str | Path) -> bool:
    """Whether a name is that of a size, whose weights are random: one of `rlt models`, and no path."""
    return str(name) in MODELS and not Path(name).exists()


def load_model(
    name: str | Path, *, size: str | None = None, num_heads: int | None = None, run_lengths: str | None = None
) -> VisionTransformer:
    """The network that a name stands for, in evaluation mode and float32.

    Args:
        name: see `rlt.loading`.
        size: one of `rlt models` that it must have; None as the checkpoint is.
        num_heads: attention heads, where neither the checkpoint nor its width tells.
        run_lengths: where run lengths count; None as the checkpoint says.

    Raises:
        CheckpointError: if it cannot be read, or has another size.
        InvalidArgumentError: for an unknown size, or the folder of a run whose configuration is cut off.
    """
    if is_size(name):
        exclusive(model=name, size=size)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # random weights are the same ones every time
            model = create_model(str(name), num_heads=num_heads)
    else:
        model = load_checkpoint(name, num_heads=num_heads)
        check_size(model.config, size, num_heads, name)
        model.config = _with_run(model.config, name)
    model.run_lengths = run_lengths or model.run_lengths
    return model


def stored_config(name: str | Path, *, size: str | None = None, num_heads: int | None = None) -> ViTConfig:
    """What `load_model` would give as `model.config`, without the network; of our own folders nothing else is read."""
    if is_size(name):
        exclusive(model=name, size=size)
        return model_config(str(name), num_heads)
    path = weights.find_source(name)
    content = weights.read_config(path) if path.is_dir() else None
    if content is not None and content.get("model_type") == MODEL_TYPE:
        config = ViTConfig.from_dict(content, path)
    else:
        config = read_checkpoint(name, num_heads=num_heads)[0]
    check_size(config, size, num_heads, name)
    return _with_run(config, name)


def load_network(name: str | Path, *, patched: bool = False) -> VisionTransformer | PatchedNetwork:
    """The network that a name stands for, as `load_model`, or a model of transformers that `rlt.patch` knows.

    With `patched`, VideoMAE's classifiers are such models too, though our own network can hold their weights.

    Raises:
        CheckpointError: if it cannot be read.
        MissingDependencyError: if it needs transformers, and that is not installed.
    """
    found = _pretrained(name, patched)
    return load_model(name) if found is None else load_pretrained(*found)


def stored_inputs(name: str | Path, *, patched: bool = False) -> ViTConfig | ModelInputs:
    """What `load_network` would give as `network.config`, without the network."""
    found = _pretrained(name, patched)
    return stored_config(name) if found is None else read_inputs(*found)


def _pretrained(name: str | Path, patched: bool) -> tuple[Path, dict[str, object]] | None:
    """Folder and configuration of a model of transformers; None for all others."""
    if is_size(name) or not (path := weights.find_source(name)).is_dir():
        return None
    content = weights.read_config(path)
    return (path, content) if content is not None and is_pretrained(content, patched=patched) else None


def named(model: str | None, checkpoint: str | None) -> tuple[str, str | None]:
    """Name and size of what the options `--model` and `--checkpoint` say.

    `--model` is a size that the checkpoint must have, a size of random weights, or what `--checkpoint` is.

    Raises:
        InvalidArgumentError: for two checkpoints, or a word that is neither a size nor a path.
    """
    if model is not None and re.fullmatch(r"\w+", model) and not Path(model).exists():
        check_known(model)
    if checkpoint is None:
        return model or DEFAULT_SIZE, None
    if model is not None and not is_size(model):
        exclusive(model=model, checkpoint=checkpoint)
    return checkpoint, model


def check_known(model: str) -> None:
    """Hold that a word that is no path is the name of a size.

    Raises:
        InvalidArgumentError: naming the sizes, and what else a model can be.
    """
    if model not in MODELS:
        raise InvalidArgumentError(
            f"model is {model!r}; allowed are {', '.join(MODELS)}, a run or checkpoint that is there, or a hub id "
            f"(owner/name){nearest(model, MODELS)}"
        )


def state_of_weights(name: str | Path) -> list[list[object]]:
    """Name, size in bytes and time of change in ns of the files of a checkpoint: whether it is still the same one."""
    path = weights.find_source(name)
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in inside if file.suffix in weights.FILE_SUFFIXES or file == path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def dropping_rule(config: ViTConfig) -> Rule | None:
    """The rule that a network was trained with, if it drops any tokens: what is held against all of them."""
    return None if isinstance(config.rule, Everything) else config.rule


def _with_run(config: ViTConfig, name: str | Path) -> ViTConfig:
    """The configuration with what a run says in whose weights it does not stand, as in earlier versions."""
    if config.clip is not None:
        return config
    run = config_of_run(str(name))
    clip, rule = run.get("data", {}).get("clip"), run.get("tokenizer")
    return config.replace(
        clip=None if clip is None else _clip(**clip), rule=None if rule is None else make_rule(rule.pop("rule"), **rule)
    )


def _clip(**fields: Any) -> ClipSpec:
    if fields.get("fps") is not None:  # once written beside a stride
        fields["frame_stride"] = None
    return ClipSpec(**fields)

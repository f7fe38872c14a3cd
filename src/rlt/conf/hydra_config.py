"""The only importer of hydra: registers the groups and composes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlt.checkpoints.models import MODELS
from rlt.conf.schema import Config, DataConfig, LoggerConfig, ModelConfig, TokenizerConfig
from rlt.data.augment import AugmentConfig
from rlt.data.clips import ViewConfig
from rlt.errors import InvalidArgumentError, MissingDependencyError, RltError
from rlt.video import ClipSpec

try:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ImportError as error:
    raise MissingDependencyError(
        'configuration needs hydra, which cannot be imported; install with: pip install "rlt[train]"'
    ) from error

GROUPS = ("data", "model", "tokenizer", "logger", "experiment")
"""Keys that take the name of a preset."""


_DEFAULTS: list[Any] = [
    "_self_",  # first, so that a group's preset wins over the dataclass's own defaults
    {"data": "kinetics400"},
    {"model": "vit_base"},
    {"tokenizer": "rlt"},
    {"logger": "default"},
    {"experiment": None},
]


@dataclass
class _Root(Config):
    """The configuration with Hydra's list of defaults, which Hydra takes out again."""

    defaults: list[Any] = field(default_factory=lambda: list(_DEFAULTS))


def compose(overrides: Sequence[str]) -> Config:
    """See `rlt.conf.compose`."""
    _register()
    try:
        with hydra.initialize_config_dir(str(Path(__file__).parent), version_base="1.3"):
            composed = hydra.compose("config", list(overrides))
        config = OmegaConf.to_object(composed)
    except RltError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, RltError):
            raise cause from error
        raise InvalidArgumentError(_one_line(error, overrides)) from error
    assert isinstance(config, Config)
    return config


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="config", node=_writable(_Root))
    for rule, options in TokenizerConfig.presets().items():
        store.store(group="tokenizer", name=rule, node=options)
    for name in MODELS:
        store.store(group="model", name=name, node=ModelConfig(name=name))
    store.store(group="logger", name="default", node=LoggerConfig())
    store.store(group="logger", name="wandb", node=LoggerConfig(wandb=True))
    store.store(group="logger", name="none", node=LoggerConfig(csv=False, tensorboard=False))
    for name, node in _data_groups().items():
        store.store(group="data", name=name, node=_writable(node))


def _writable(node: Any) -> DictConfig:
    """A node whose frozen dataclasses take overrides; OmegaConf makes them read-only."""
    config = OmegaConf.structured(node)
    below = [config]
    while below:
        section = below.pop()
        OmegaConf.set_readonly(section, None)
        below += [value for value in section.values() if isinstance(value, DictConfig)]
    return config


def _data_groups() -> dict[str, DataConfig]:
    """Data sets with the sampling and views that their papers use."""
    kinetics = DataConfig(views=ViewConfig(num_clips=5, num_crops=3))
    something = DataConfig(
        clip=ClipSpec(sampling="uniform"),
        views=ViewConfig(num_clips=2, num_crops=3),
        augment=AugmentConfig(horizontal_flip=False),  # its labels say left and right
    )
    folder = DataConfig(views=ViewConfig(num_clips=1, num_crops=1))
    return {f"kinetics{classes}": kinetics for classes in (400, 600, 700)} | {"ssv2": something, "folder": folder}


def _one_line(error: Exception, overrides: Sequence[str]) -> str:
    text = " ".join(str(error).split())
    return f"{text}; given: {' '.join(overrides) or 'nothing'}"

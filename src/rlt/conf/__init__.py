"""Configuration by Hydra: groups, presets (`experiment=NAME`) and `key=value` overrides, as in the original project."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlt.conf.schema import Config

__all__ = ["compose", "experiments", "typed"]


def compose(overrides: Sequence[str], *, run: Mapping[str, object] | None = None) -> Config:
    """Build a configuration from `key=value` overrides.

    Args:
        overrides: as they are typed.
        run: configuration of an earlier run, nested as `Config` is; may leave things out. It stands above the
            defaults and below all that is typed: a preset typed anew undoes what the run says about its section, and
            `experiment=` undoes all but the run's tokenizer, seed and manifests.

    Raises:
        InvalidArgumentError: in one line, for an unknown key, group or value.
        MissingDependencyError: if hydra is not installed.
    """
    from rlt.conf import hydra_config

    return hydra_config.compose(overrides, run or {})


def typed(overrides: Sequence[str]) -> dict[str, object]:
    """Keys of `key=value` overrides and their values, the last one where a key comes twice.

    Raises:
        InvalidArgumentError: in one line, for what cannot be read, and for an unknown key or preset.
        MissingDependencyError: if hydra is not installed.
    """
    from rlt.conf import hydra_config

    return hydra_config.typed(overrides)


def experiments() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in (Path(__file__).parent / "experiment").glob("*.yaml"))

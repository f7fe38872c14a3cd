"""Configuration by Hydra: groups, presets (`experiment=NAME`) and `key=value` overrides, as in the original project."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlt.conf.schema import Config

__all__ = ["compose", "experiments", "merge_overrides"]


def compose(overrides: Sequence[str]) -> Config:
    """Build a configuration from `key=value` overrides.

    Raises:
        InvalidArgumentError: in one line, for an unknown key, group or value.
        MissingDependencyError: if hydra is not installed.
    """
    from rlt.conf.hydra_config import compose as compose_with_hydra

    return compose_with_hydra(overrides)


def experiments() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in (Path(__file__).parent / "experiment").glob("*.yaml"))


def merge_overrides(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Overrides of an earlier command under those of a later one: a later `tokenizer=` also undoes `tokenizer.x=`."""
    replaced = {_key(override) for override in later}
    kept = [
        override
        for override in earlier
        if not any(_key(override) == key or _key(override).startswith(f"{key}.") for key in replaced)
    ]
    return [*kept, *later]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")

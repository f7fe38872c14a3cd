"""The configuration that a run keeps in its folder, so that it can be gone on with and evaluated as it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlt.conf import compose, typed
from rlt.conf.schema import Config, is_read_by
from rlt.errors import InvalidArgumentError

_SAME_IN_EVALUATION = ("data", "model", "tokenizer", "trainer", "seed")
"""Parts of a run's configuration that its evaluation takes over; the others name files and devices of one command."""
_OF_ONE_COMMAND = ("resume", "change", "run_dir")
_MAY_CHANGE = (
    *_OF_ONE_COMMAND, "logger", "data.num_workers", "trainer.accelerator", "trainer.strategy", "trainer.validate_every",
    "trainer.save_every", "trainer.keep_checkpoints", "trainer.log_every", "trainer.compile",
    "trainer.activation_checkpointing", "trainer.early_stopping", "trainer.limit_val_batches", "trainer.profiler",
)  # fmt: skip
"""Options and sections of `rlt train` that do not decide which weights a run comes to."""
LENGTH = ("trainer.max_steps", "trainer.max_epochs")
"""What a run that goes on may change without saying that it is meant: it is said."""
_WRITTEN_BEFORE = {
    "tokenizer=tome": "tokenizer=none",
    "tokenizer.policy=": "tokenizer=",
    "tokenizer.merge_per_block=": "model.merge_per_block=",
}
"""Overrides of runs that have no config.json, and what they are today."""


def saved_config(run_dir: str | Path) -> dict[str, Any]:
    """The configuration of a run, nested as `Config` is; empty for a folder that is none of a run.

    Raises:
        InvalidArgumentError: if it is cut off.
    """
    overrides, resolved = Path(run_dir) / "overrides.json", Path(run_dir) / "config.json"
    if not overrides.is_file():  # other folders have a config.json too
        return {}
    try:
        if resolved.is_file():
            content: dict[str, Any] = json.loads(resolved.read_text(encoding="utf-8"))
            return content
        written: list[str] = json.loads(overrides.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{run_dir} has a configuration that is cut off ({error})") from error
    return asdict(compose([_as_written_now(override) for override in written]))


def config_of_run(checkpoint: str) -> dict[str, Any]:
    """The configuration of a run, nested as `Config` is, without what names files; empty for anything but a run.

    `checkpoint` is the run's folder, or its model/ or best/.
    """
    folder = Path(checkpoint)
    content = saved_config(folder.parent if folder.name in ("model", "best") else folder)
    return {name: content[name] for name in _SAME_IN_EVALUATION if name in content}


def training_config(overrides: Sequence[str]) -> Config:
    """What is typed; with `resume`, above what the run so far was trained with, so that nothing need be said again.

    Raises:
        InvalidArgumentError: in one line, as `rlt.conf.compose`.
    """
    given = typed(overrides)
    folder = run_to_go_on(given.get("resume"), str(given.get("run_dir", Config.run_dir)))
    run = {} if folder is None else saved_config(folder)
    return compose(overrides, run={name: value for name, value in run.items() if name not in _OF_ONE_COMMAND})


def run_to_go_on(resume: object, run_dir: str) -> Path | None:
    """Folder of the run that `resume` goes on with: `run_dir` for auto, RUN for RUN/checkpoints/step=N.ckpt."""
    if resume is None or resume == "auto":
        return None if resume is None else Path(run_dir)
    folder = Path(str(resume)).parent
    return folder.parent if folder.name == "checkpoints" else folder


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[object, object]]:
    """Options that decide what a run comes to and that are not as before: key -> (before, now).

    Args:
        before: what `saved_config` gave; what it leaves out, as a run of an earlier version does, is not compared.
        now: a configuration as nested dictionaries.
    """
    was, told = dict(_flat(before)), dict(_flat(now))
    fixed = [key for key in told if is_read_by("train", key) and not _is_among(key, _MAY_CHANGE)]
    return {key: (was[key], told[key]) for key in fixed if key in was and was[key] != told[key]}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", list(value) if isinstance(value, tuple) else value


def _is_among(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _as_written_now(override: str) -> str:
    for before, now in _WRITTEN_BEFORE.items():
        if override.startswith(before):
            return now + override.removeprefix(before)
    return override

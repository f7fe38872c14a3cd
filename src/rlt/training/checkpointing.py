"""Never lose a run: checkpoints that are whole or not there, and the newest one that can be read."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from rlt.errors import TrainingError
from rlt.files import replacing

_STEP = re.compile(r"step=(\d+)\.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it, so that `kill -9` cannot leave half of one."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(run_dir) / "checkpoints"


def step_checkpoints(run_dir: str | Path, every_steps: int, keep: int = 2) -> ModelCheckpoint:
    """Lightning's callback, saving every so many optimizer steps and keeping the newest few."""
    return ModelCheckpoint(
        dirpath=checkpoint_folder(run_dir),
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=keep,
        every_n_train_steps=every_steps,
        save_on_train_epoch_end=False,
    )


class SaveLastStep(Callback):
    """Saves the last step of a run too, so that a longer run can go on from it."""

    def __init__(self, run_dir: str | Path, total_steps: int) -> None:
        self.path = checkpoint_folder(run_dir) / f"step={total_steps}.ckpt"
        self.total_steps = total_steps

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.total_steps and not self.path.exists():
            trainer.save_checkpoint(self.path)


def newest_checkpoint(
    run_dir: str | Path, *, on_broken: Callable[[Path, str], None] | None = None
) -> tuple[Path, int] | None:
    """The newest checkpoint of a run that can be read, and its optimizer step; None if the run has none at all.

    `on_broken` is called with every newer one that cannot be read, and the reason. Where none can be read there is a
    TrainingError.
    """
    folder = checkpoint_folder(run_dir)
    found = sorted(
        ((int(match[1]), path) for path in folder.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))), reverse=True
    )
    for _, path in found:
        try:
            return path, read_step(path)
        except TrainingError as error:
            if on_broken is not None:
                on_broken(path, str(error))
    if found:
        raise TrainingError(
            f"none of the {len(found)} checkpoints in {folder} can be read; start anew with another run_dir"
        )
    return None


def remove_older(newest: Path, keep: int = 2) -> None:
    """Remove older checkpoints of a run than the `keep` newest up to `newest`.

    Lightning removes those that it remembers; each kill between a checkpoint and the next makes it forget one.
    """
    steps = {path: int(match[1]) for path in newest.parent.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))}
    older = sorted(
        (path for path in steps if steps[path] <= steps.get(newest, -1)), key=steps.__getitem__, reverse=True
    )
    for path in older[keep:]:
        path.unlink(missing_ok=True)


def read_step(path: str | Path) -> int:
    """Optimizer step of a checkpoint, after reading all of it; a TrainingError in one line if that is not possible."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return int(content["global_step"])
    except Exception as error:  # torch.load raises many kinds for a broken file, all mean the same here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainingError(f"{path} cannot be read ({reason})") from error

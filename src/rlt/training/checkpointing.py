"""Never lose a run: checkpoints that are whole or not there, and the newest one that can be read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from rlt.errors import TrainingError, VideoError, one_line
from rlt.files import replacing

BEST_BY = "val/top1"
BETWEEN_STEPS = (SIGTERMException, VideoError)
"""What is raised between two steps: the stop that a system asks for, and videos that are no longer there."""
_STEP = re.compile(r"step=(\d+)\.ckpt")
_REQUEUED = re.compile(r"hpc_ckpt_(\d+)\.ckpt")  # in the run's folder, by Lightning when SLURM sends its signal


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it, so that `kill -9` cannot leave half of one.

    Whoever asked for it, Lightning's callback or a stop, no more than `keep` of the steps are left.
    """

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with replacing(path) as temporary:
            try:
                torch.save(checkpoint, temporary)
            except (OSError, RuntimeError) as error:  # torch's own writer does not hand on what the system said
                free = shutil.disk_usage(temporary.parent).free
                raise TrainingError(
                    f"{path} cannot be written, with {free / 2**20:,.0f} MiB free there ({one_line(error)}); "
                    "make room, and go on with resume=auto"
                ) from error
        remove_older(Path(path), self.keep)


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
        enable_version_counter=False,  # a broken one of the same step is replaced
        save_on_train_epoch_end=False,
    )


def best_checkpoint(run_dir: str | Path) -> ModelCheckpoint:
    """Lightning's callback, saving what validates best: best.ckpt.

    Whole ones, not the weights alone, which would not be the averaged ones under `AveragedWeights`.
    """
    return ModelCheckpoint(
        dirpath=checkpoint_folder(run_dir),
        filename="best",
        monitor=BEST_BY,
        mode="max",
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )


class SaveWhenStopped(Checkpoint):
    """Saves the last step of a run, so that a longer one can go on from it, and the step at which it is stopped."""

    def __init__(self, run_dir: str | Path, total_steps: int) -> None:
        self.folder = checkpoint_folder(run_dir)
        self.total_steps = total_steps

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if trainer.global_step == self.total_steps:
            trainer.val_check_batch = 1  # the end is validated, whatever trainer.validate_every is
            self._save(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.should_stop:
            self._save(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, BETWEEN_STEPS):  # others may leave half of one
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


class AveragedWeights(EMAWeightAveraging):
    """Lightning's average, whose weights stand in the network while it validates; a stop in there takes them out."""

    _inside = False

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_start(trainer, pl_module)
        self._inside = True

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        self._inside = False

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._inside:  # before `SaveWhenStopped`, since checkpoints come last
            self.on_validation_epoch_end(trainer, pl_module)


def newest_checkpoint(
    run_dir: str | Path, *, on_broken: Callable[[Path, str], None] | None = None
) -> tuple[Path, int] | None:
    """The newest checkpoint of a run that can be read, and its optimizer step; None if the run has none at all.

    `on_broken` is called with every newer one that cannot be read, and the reason. Where none can be read there is a
    TrainingError.
    """
    folder = checkpoint_folder(run_dir)
    kinds = _numbered(folder, _STEP), _numbered(Path(run_dir), _REQUEUED)
    readable = [found for found in (_first_readable(paths, on_broken) for paths in kinds) if found is not None]
    if readable:
        return max(readable, key=lambda found: found[1])
    if count := sum(map(len, kinds)):
        raise TrainingError(f"none of the {count} checkpoints in {folder} can be read; start anew with another run_dir")
    return None


def is_requeued(run_dir: str | Path) -> bool:
    """Whether this is a job of SLURM that Lightning saved and put into the queue again."""
    return SLURMEnvironment.detect() and bool(_numbered(Path(run_dir), _REQUEUED))


def _numbered(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """Checkpoints by the number in their names, the highest first."""
    found = [(int(match[1]), path) for path in folder.glob("*.ckpt") if (match := name.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _first_readable(paths: Sequence[Path], on_broken: Callable[[Path, str], None] | None) -> tuple[Path, int] | None:
    for path in paths:
        try:
            return path, read_step(path)
        except TrainingError as error:
            if on_broken is not None:
                on_broken(path, str(error))
    return None


def remove_older(newest: Path, keep: int) -> None:
    """Remove older checkpoints of a run than the `keep` newest up to `newest`, if that is one of its steps.

    Lightning removes those that it remembers; each kill between a checkpoint and the next makes it forget one, and what
    a stop saves it never knew.
    """
    if not _STEP.fullmatch(newest.name):
        return
    steps = {path: int(match[1]) for path in newest.parent.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))}
    older = sorted((path for path in steps if steps[path] <= steps[newest]), key=steps.__getitem__, reverse=True)
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

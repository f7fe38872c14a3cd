"""A training run from a configuration: model, data, Lightning's trainer, and what stays behind in the run's folder."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, Timer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from rlt.checkpoints import create_model, model_config
from rlt.conf.schema import PRECISIONS, Config
from rlt.data.manifest import Manifest, read_manifest
from rlt.errors import InvalidArgumentError, TrainingError, one_line
from rlt.files import write_json
from rlt.measure import machine_info
from rlt.network.vit import VisionTransformer
from rlt.training.checkpointing import (
    AtomicCheckpointIO,
    SaveLastStep,
    newest_checkpoint,
    read_step,
    remove_older,
    step_checkpoints,
)
from rlt.training.loaders import TrainingData
from rlt.training.module import VideoClassifier


@dataclass(frozen=True)
class TrainingSummary:
    """What a run came to; also written as summary.json into its folder."""

    run_dir: Path
    """Folder of the run."""
    steps: int
    """Optimizer steps of the whole run."""
    resumed_at: int
    """Optimizer step that this process went on from; 0 for a fresh run."""
    train_seconds: float
    """Wall-clock seconds of training, without validation; parts of a resumed run are added up."""
    tokens_kept: float
    """Share of the tokens that the training batches of this process kept, 0..1."""
    tokens_max_over_mean: float | None
    """Tokens of the busiest device over the mean of all, averaged over the steps; None with one device."""
    val_top1: float | None
    """Top-1 accuracy on the validation manifest at the end, 0..1."""
    failed: dict[str, str]
    """Videos that were replaced: path -> error."""

    def to_json(self) -> dict[str, object]:
        """As JSON values, with the machine."""
        content = asdict(self) | {"run_dir": str(self.run_dir)}
        return {**content, "machine": machine_info("cuda" if torch.cuda.is_available() else "cpu")}


_QUIET = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",  # a run that is continued
    r"The '\w+' does not have many workers",
    r"`torch.jit.script_method` is deprecated",
)
"""Warnings of Lightning that a user of `rlt train` can do nothing about."""


def train(
    config: Config, *, overrides: Sequence[str] = (), say: Callable[[str], None] = print, progress: bool | None = None
) -> TrainingSummary:
    """Train a model, or go on with a run.

    The folder `config.run_dir` holds checkpoints/ (to go on), model/ (weights to use: `rlt evaluate checkpoint=RUN`),
    logs, config.json (resolved), overrides.json (as typed) and summary.json.

    Args:
        config: the experiment, from `rlt.conf.compose`.
        overrides: what it was composed from.
        say: called with one-line messages.
        progress: Lightning's progress bar; None shows it on a terminal.

    Raises:
        InvalidArgumentError: for settings that do not fit each other.
        TrainingError: if the run cannot go on, or the loss is not finite.
        CheckpointError: if the weights to start from cannot be loaded.
    """
    if config.data.train is None:
        raise InvalidArgumentError("data.train is not set; give a manifest that `rlt prepare` wrote: data.train=FILE")
    manifest = read_manifest(config.data.train)
    validation = read_manifest(config.data.val) if config.data.val is not None else None
    run_dir = Path(config.run_dir)
    resume = resume_point(config, say)
    model = build_model(config, manifest)
    data = TrainingData(config, manifest, validation, model.config, start_step=resume[1] if resume else 0)
    total_steps = count_steps(config, data)
    if resume and resume[1] >= total_steps:
        raise TrainingError(
            f"{run_dir} is at step {resume[1]}, and trainer.max_steps is {total_steps}: nothing is left to do; "
            "raise trainer.max_steps, or name another run_dir"
        )
    module = VideoClassifier(
        model, config.optimizer, total_steps=total_steps, clips_per_step=data.clips_per_step, seed=config.seed
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements between our messages
    timer = Timer(verbose=False)
    trainer = make_trainer(config, total_steps, [timer], progress=progress)
    write_json(run_dir / "config.json", asdict(config))  # before the other one, which makes the folder one of a run
    write_json(run_dir / "overrides.json", list(overrides))
    with warnings.catch_warnings():
        for message in _QUIET:
            warnings.filterwarnings("ignore", message)
        trainer.fit(module, datamodule=data, ckpt_path=resume[0] if resume else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return _finish(config, trainer, module, timer, resume[1] if resume else 0)


def build_model(config: Config, manifest: Manifest) -> VisionTransformer:
    """The network of an experiment, with as many classes as the manifest has.

    Raises:
        CheckpointError: if the checkpoint does not fit, or has other classes and `model.new_head` is not set.
    """
    clip, names, network = config.data.clip, manifest.class_names, config.model
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        if config.checkpoint is None:
            sizes = model_config(network.name, network.num_heads)
            sizes = sizes.replace(num_classes=len(names), num_frames=clip.num_frames, image_size=min(clip.frame_size))
            model = VisionTransformer(sizes)
        else:
            model = create_model(
                network.name,
                checkpoint=config.checkpoint,
                num_classes=len(names),
                new_head=network.new_head,
                num_heads=network.num_heads,
            )
    model.config = model.config.replace(labels=names)
    if network.length_encoding == "learned":
        model.add_length_encoding()
    model.set_drop_path(network.drop_path)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    model.merge_per_block = network.merge_per_block
    model.run_lengths = network.run_lengths or model.run_lengths
    if config.trainer.compile:
        model.compile_network()
    return model


def resume_point(config: Config, say: Callable[[str], None]) -> tuple[Path, int] | None:
    """The checkpoint that a run goes on from and its optimizer step, None for a fresh run."""
    if config.resume is None:
        if newest_checkpoint(config.run_dir) is not None:
            raise TrainingError(
                f"{config.run_dir} holds checkpoints of an earlier run; go on with resume=auto, or name another run_dir"
            )
        return None
    if config.resume == "auto":
        found = newest_checkpoint(config.run_dir, on_broken=lambda path, reason: say(f"passed over {path}: {reason}"))
        say(f"going on from {found[0]} (step {found[1]})" if found else f"no checkpoint in {config.run_dir}: starting")
        if found:
            remove_older(found[0])
        return found
    return Path(config.resume), read_step(config.resume)


def count_steps(config: Config, data: TrainingData) -> int:
    """Optimizer steps of the whole run."""
    trainer = config.trainer
    if (trainer.max_steps is None) == (trainer.max_epochs is None):
        raise InvalidArgumentError(
            f"trainer.max_steps is {trainer.max_steps} and trainer.max_epochs is {trainer.max_epochs}; set one of them"
        )
    if trainer.max_steps is not None:
        return trainer.max_steps
    assert trainer.max_epochs is not None
    return max(math.ceil(trainer.max_epochs * data.num_samples / data.clips_per_step), 1)


def make_trainer(
    config: Config, total_steps: int, callbacks: Sequence[Callback] = (), *, progress: bool | None = False
) -> Trainer:
    """Lightning's trainer of an experiment, with its loggers and checkpoints."""
    trainer, loggers = config.trainer, _loggers(config)
    callbacks = [*callbacks, step_checkpoints(config.run_dir, trainer.save_every, trainer.keep_checkpoints)]
    if total_steps % trainer.save_every:
        callbacks.append(SaveLastStep(config.run_dir, total_steps))
    if trainer.ema_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=trainer.ema_decay))
    every = trainer.validate_every or total_steps
    try:
        return Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=trainer.strategy,
            precision=PRECISIONS[trainer.precision],  # type: ignore[arg-type]
            max_steps=total_steps,
            max_epochs=-1,
            accumulate_grad_batches=trainer.accumulate,
            gradient_clip_val=trainer.gradient_clip,
            val_check_interval=every * trainer.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=trainer.log_every,
            logger=loggers or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_progress_bar=sys.stderr.isatty() if progress is None else progress,
            enable_model_summary=False,
            default_root_dir=config.run_dir,
        )
    except (ValueError, MisconfigurationException) as error:
        given = f"trainer.accelerator is {trainer.accelerator!r}, trainer.strategy {trainer.strategy!r}"
        raise InvalidArgumentError(f"{given}: {one_line(error)}") from error


def _loggers(config: Config) -> list[Logger]:
    logger, run_dir = config.logger, config.run_dir
    chosen: list[Logger] = []
    if logger.csv:
        chosen.append(CSVLogger(run_dir, name="logs", version=""))
    if logger.tensorboard:
        chosen.append(TensorBoardLogger(run_dir, name="tensorboard", version=""))
    if logger.wandb:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        chosen.append(
            WandbLogger(project=logger.project, name=Path(run_dir).name, save_dir=run_dir, offline=logger.offline)
        )
    return chosen


def _finish(
    config: Config, trainer: Trainer, module: VideoClassifier, timer: Timer, resumed_at: int
) -> TrainingSummary:
    run_dir = Path(config.run_dir)
    top1 = trainer.callback_metrics.get("val/top1")
    summary = TrainingSummary(
        run_dir=run_dir,
        steps=trainer.global_step,
        resumed_at=resumed_at,
        train_seconds=timer.time_elapsed("train"),
        tokens_kept=module.tokens_seen / max(module.tokens_possible, 1),
        tokens_max_over_mean=statistics.fmean(module.imbalance) if module.imbalance else None,
        val_top1=None if top1 is None else float(top1),
        failed=module.failed,
    )
    if trainer.is_global_zero:
        module.model.save_pretrained(run_dir / "model")
        write_json(run_dir / "summary.json", summary.to_json())
    return summary

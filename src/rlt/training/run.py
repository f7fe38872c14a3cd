"""A training run from a configuration: model, data, Lightning's trainer, and what stays behind in the run's folder."""

from __future__ import annotations

import json
import logging
import math
import shlex
import signal
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, profilers
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from rlt.checkpoints import create_model, model_config
from rlt.conf.schema import NO_CHECKPOINT, PRECISIONS, PROFILERS, Config
from rlt.data.manifest import Manifest
from rlt.data.stored import read_videos
from rlt.data.token_files import TokenFile
from rlt.errors import InvalidArgumentError, TrainingError, one_line
from rlt.files import write_json
from rlt.measure import machine_info
from rlt.network.run_lengths import AWARE, IGNORED
from rlt.network.vit import MODEL_TYPE, VisionTransformer
from rlt.training.checkpointing import (
    BEST_BY,
    BETWEEN_STEPS,
    AtomicCheckpointIO,
    AveragedWeights,
    SaveWhenStopped,
    best_checkpoint,
    is_requeued,
    newest_checkpoint,
    read_step,
    remove_older,
    step_checkpoints,
)
from rlt.training.folder import check_same_run, locked, write_start
from rlt.training.loaders import TrainingData
from rlt.training.loggers import close_loggers, make_loggers
from rlt.training.module import VideoClassifier
from rlt.training.pace import Pace, Progress
from rlt.weights import find_source, read_config


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
    """Share of the tokens that the training batches of the run kept, 0..1."""
    tokens_max_over_mean: float | None
    """Tokens of the busiest device over the mean of all, averaged over the steps; None with one device."""
    val_top1: float | None
    """Top-1 accuracy on the validation manifest at the end, 0..1."""
    best_val_top1: float | None
    """The best of all validations, whose weights lie in best/; None where the only one is that at the end."""
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
    r"torch.distributed.nn.functional.all_gather is deprecated",  # which Lightning calls
    r"Total length of `list` across ranks is zero",  # without a validation manifest
)
"""Warnings of Lightning that a user of `rlt train` can do nothing about."""


def train(
    config: Config,
    *,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = print,
    on_progress: Progress | None = None,
) -> TrainingSummary:
    """Train a model, or go on with a run.

    The folder `config.run_dir` holds checkpoints/ (to go on), model/ (weights to use: `rlt evaluate checkpoint=RUN`),
    logs, config.json (resolved), overrides.json (as typed), history.json (each start, and what it changed) and
    summary.json.

    Args:
        config: the experiment, from `rlt.conf.saved.training_config` or `rlt.conf.compose`.
        overrides: what it was composed from.
        say: called with one-line messages.
        on_progress: called after each step with (steps done, steps in all, the newest numbers).

    Raises:
        InvalidArgumentError: for settings that do not fit each other, or not the run that is gone on with.
        TrainingError: if the run cannot go on, another process trains in its folder, or the loss is not finite.
        CheckpointError: if the weights to start from cannot be loaded.
        SystemExit: with code 143 after SIGTERM, when a checkpoint was saved.
        KeyboardInterrupt: after Ctrl-C.
    """
    if config.data.train is None:
        raise InvalidArgumentError(
            "data.train is not set; give a manifest of `rlt prepare`, or tokens of `rlt tokens`: data.train=FILE"
        )
    if config.model.new_head and config.checkpoint is None:
        raise InvalidArgumentError(
            "checkpoint is not set, but model.new_head is, as in presets for fine-tuning; give the weights to start "
            "from: checkpoint=FILE, or say that random ones are meant: checkpoint=none"
        )
    for name in ("limit_train_batches", "overfit_batches"):
        if config.resume is not None and (value := getattr(config.trainer, name)) is not None:
            raise InvalidArgumentError(
                f"trainer.{name} is {value}, which is for trials that are not gone on with; leave it or resume out"
            )
    videos = {
        f"data.{name}": (None, None) if path is None else read_videos(path)
        for name, path in (("train", config.data.train), ("val", config.data.val))
    }
    with ExitStack() as stack:
        if is_first_process():
            stack.enter_context(locked(config.run_dir))  # for all processes of the run, which Lightning starts
        else:
            say = _say_nothing
        return _train(config, videos, overrides, say, on_progress)


def is_first_process() -> bool:
    """Whether this is the process of a run that writes and speaks; Lightning starts the others with the same line."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]


def _train(
    config: Config,
    videos: Mapping[str, tuple[Manifest | None, TokenFile | None]],
    overrides: Sequence[str],
    say: Callable[[str], None],
    on_progress: Progress | None,
) -> TrainingSummary:
    manifests = {key: manifest for key, (manifest, _) in videos.items()}
    stored = {key: file for key, (_, file) in videos.items() if file is not None}
    run_dir, manifest = Path(config.run_dir), manifests["data.train"]
    assert manifest is not None
    resume = resume_point(config, say)
    start = resume[1] if resume else 0
    changed = check_same_run(config, manifests) if resume else {}
    for key, (was, now) in changed.items():
        say(f"{key} was {was} so far and is {now} from here on")
    model = build_model(config, manifest)
    data = TrainingData(config, manifest, manifests["data.val"], model.config, start_step=start, stored=stored)
    total_steps = count_steps(config, data)
    if start >= total_steps and _is_finished(run_dir, total_steps):
        raise TrainingError(
            f"{run_dir} is at step {start}, and trainer.max_steps is {total_steps}: nothing is left to do; "
            "raise trainer.max_steps, or name another run_dir"
        )
    module = VideoClassifier(
        model, config.optimizer, total_steps=total_steps, clips_per_step=data.clips_per_step, seed=config.seed
    )
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no advertisements between our messages
    timer = Timer(verbose=False)
    trainer = make_trainer(
        config, total_steps, [timer, Pace(total_steps, config.trainer.log_every, on_progress)], start_step=start
    )
    if trainer.is_global_zero:
        write_start(config, overrides, start, changed, manifests)
        for logger in trainer.loggers:
            logger.log_hyperparams(asdict(config))
    with warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(close_loggers, trainer.loggers)
        for message in _QUIET:
            warnings.filterwarnings("ignore", message)
        if resume and start >= total_steps:  # cut off between its last step and its end
            _finish_fit(trainer, module, data, resume[0])
        else:
            _fit(trainer, module, data, resume[0] if resume else None, say)
    return _finish(config, trainer, module, timer, start, max(trainer.global_step, start))


def _fit(
    trainer: Trainer, module: VideoClassifier, data: TrainingData, start: Path | None, say: Callable[[str], None]
) -> None:
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except BETWEEN_STEPS as error:
        stopped = isinstance(error, SIGTERMException)
        if trainer.is_global_zero:
            folder = shlex.quote(f"run_dir={trainer.default_root_dir}")
            why = "SIGTERM" if stopped else "stopped"
            say(f"{why}: saved step {trainer.global_step}; go on with: rlt train {folder} resume=auto")
        if not stopped:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit:  # which is how Lightning ends after Ctrl-C
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None


def _say_nothing(_: str) -> None:
    """In processes but the first, which says it."""


def _is_finished(run_dir: Path, total_steps: int) -> bool:
    """Whether the run came to its end after so many steps, with weights and a summary."""
    path = run_dir / "summary.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("steps", 0) >= total_steps


def _finish_fit(trainer: Trainer, module: VideoClassifier, data: TrainingData, last: Path) -> None:
    """What is left of a run whose last step was saved, and that was then cut off: the weights and the validation."""
    content = torch.load(last, map_location="cpu", weights_only=True)
    module.load_state_dict(content["state_dict"])  # the averaged weights, where they are averaged
    module.on_load_checkpoint(content)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer | ModelCheckpoint) and callback.state_key in content["callbacks"]:
            callback.load_state_dict(content["callbacks"][callback.state_key])
    if data.validation:
        trainer.validate(module, datamodule=data, verbose=False)


def build_model(config: Config, manifest: Manifest) -> VisionTransformer:
    """The network of an experiment, with as many classes as the manifest has.

    In training mode, which Lightning does not set: weights that are loaded come in a network that evaluates.

    Raises:
        CheckpointError: if the checkpoint does not fit, or has other classes and `model.new_head` is not set.
    """
    clip, names, network = config.data.clip, manifest.class_names, config.model
    if network.name is None:
        raise InvalidArgumentError("model.name is null; name a size of `rlt models`")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(config.seed)
        if config.checkpoint is None or config.checkpoint == NO_CHECKPOINT:
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
    model.config = model.config.replace(labels=names, clip=clip, rule=config.tokenizer.build())
    if network.length_encoding == "learned":
        model.add_length_encoding()
    model.set_drop_path(network.drop_path)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    model.merge_per_block = network.merge_per_block
    model.run_lengths = network.run_lengths or _run_lengths_of(config)
    if config.trainer.compile:
        model.compile_network()
    return model.train()


def _run_lengths_of(config: Config) -> str:
    """Training goes by the paper, unless it goes on from weights of ours that were trained another way.

    Where no token stands for others, as in dense training, run lengths play no part; such a network counts them later.
    """
    if not config.tokenizer.build().runs or config.tokenizer.rule == "none":
        return AWARE
    if config.checkpoint is None or not Path(config.checkpoint).is_dir():
        return IGNORED
    stored = read_config(find_source(config.checkpoint)) or {}
    return str(stored.get("run_lengths", IGNORED)) if stored.get("model_type") == MODEL_TYPE else IGNORED


def resume_point(config: Config, say: Callable[[str], None]) -> tuple[Path, int] | None:
    """The checkpoint that a run goes on from and its optimizer step, None for a fresh run."""
    automatic = config.resume == "auto" or (config.resume is None and is_requeued(config.run_dir))
    if config.resume is None and not automatic:
        if newest_checkpoint(config.run_dir) is not None:
            raise TrainingError(
                f"{config.run_dir} holds checkpoints of an earlier run; go on with resume=auto, or name another run_dir"
            )
        return None
    if automatic:
        found = newest_checkpoint(config.run_dir, on_broken=lambda path, reason: say(f"passed over {path}: {reason}"))
        say(f"going on from {found[0]} (step {found[1]})" if found else f"no checkpoint in {config.run_dir}: starting")
        if found:
            remove_older(found[0], config.trainer.keep_checkpoints)
        return found
    assert config.resume is not None
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
    config: Config, total_steps: int, callbacks: Sequence[Callback] = (), *, start_step: int = 0
) -> Trainer:
    """Lightning's trainer of an experiment, with its loggers and checkpoints."""
    trainer, loggers = config.trainer, make_loggers(config, start_step)
    callbacks = [
        *callbacks,
        step_checkpoints(config.run_dir, trainer.save_every, trainer.keep_checkpoints),
        SaveWhenStopped(config.run_dir, total_steps),
    ]
    if config.data.val is not None and trainer.validate_every is not None:
        callbacks.append(best_checkpoint(config.run_dir))
    if trainer.early_stopping is not None:
        for name, value in (("data.val", config.data.val), ("trainer.validate_every", trainer.validate_every)):
            if value is None:
                raise InvalidArgumentError(
                    f"trainer.early_stopping is {trainer.early_stopping}, but {name} is not set; without it nothing is "
                    "validated before the end"
                )
        callbacks.append(
            EarlyStopping(BEST_BY, mode="max", patience=trainer.early_stopping, check_on_train_epoch_end=False)
        )
    if trainer.ema_decay is not None:
        callbacks.append(AveragedWeights(decay=trainer.ema_decay))
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
            limit_train_batches=trainer.limit_train_batches,
            limit_val_batches=trainer.limit_val_batches,
            overfit_batches=trainer.overfit_batches or 0,
            profiler=None if trainer.profiler is None else _profiler(trainer.profiler, config.run_dir),
            logger=loggers or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO(trainer.keep_checkpoints)],
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=config.run_dir,
        )
    except (ValueError, MisconfigurationException) as error:
        given = f"trainer.accelerator is {trainer.accelerator!r}, trainer.strategy {trainer.strategy!r}"
        raise InvalidArgumentError(f"{given}: {one_line(error)}") from error


def _profiler(name: str, run_dir: str) -> Profiler:
    profiler: Profiler = getattr(profilers, PROFILERS[name])(dirpath=run_dir, filename="profile")
    return profiler


def _finish(
    config: Config, trainer: Trainer, module: VideoClassifier, timer: Timer, resumed_at: int, steps: int
) -> TrainingSummary:
    run_dir = Path(config.run_dir)
    top1 = trainer.callback_metrics.get("val/top1")
    best = _best(trainer, module)
    summary = TrainingSummary(
        run_dir=run_dir,
        steps=steps,
        resumed_at=resumed_at,
        train_seconds=timer.time_elapsed("train"),
        tokens_kept=module.tokens_seen / max(module.tokens_possible, 1),
        tokens_max_over_mean=statistics.fmean(module.imbalance) if module.imbalance else None,
        val_top1=None if top1 is None else float(top1),
        best_val_top1=None if best is None else best[0],
        failed=module.failed,
    )
    if trainer.is_global_zero:
        module.model.save_pretrained(run_dir / "model")
        if best is not None:
            module.load_state_dict(best[1])
            module.model.save_pretrained(run_dir / "best")
        write_json(run_dir / "summary.json", summary.to_json())
    return summary


def _best(trainer: Trainer, module: VideoClassifier) -> tuple[float, dict[str, Tensor]] | None:
    """Accuracy and weights of the best validation, the one at the end among them."""
    last = trainer.callback_metrics.get(BEST_BY)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor == BEST_BY:
            score = -1.0 if callback.best_model_score is None else float(callback.best_model_score)
            if last is not None and float(last) > score:  # validated after a stop, which Lightning keeps no best of
                return float(last), module.state_dict()
            if not callback.best_model_path:  # nothing could be validated
                return None
            content = torch.load(callback.best_model_path, map_location=module.device, weights_only=True)
            return score, content["state_dict"]
    return None

"""How fast a run goes: in every log, and for whoever shows progress."""

from __future__ import annotations

import time
from collections.abc import Callable

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rlt.data.batch import Batch
from rlt.data.loader import TimedLoader

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps of the whole run, and the newest numbers."""


class Pace(Callback):
    """Logs clips and tokens a second over all devices, and the share of the time that waits for data, 0..1.

    They are means since the log entry before, and of training alone: validation and checkpoints do not count. The first
    step of a process is logged too, whatever `trainer.log_every` is.
    """

    def __init__(self, total_steps: int, log_every: int, on_progress: Progress | None = None) -> None:
        self.total_steps = total_steps
        self.log_every = log_every
        self.on_progress = on_progress
        self._first = True
        self._step = 0
        self._start_again()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._begin = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        loader = trainer.train_dataloader
        if isinstance(loader, TimedLoader):
            self._waited += loader.take_waited()
        self._worked += time.perf_counter() - self._begin
        self._clips += len(batch)
        self._tokens += batch.packed.num_tokens
        seconds = self._waited + self._worked
        clips_per_second = trainer.world_size * self._clips / seconds
        values = {
            "train/clips_per_second": clips_per_second,
            "train/tokens_per_second": trainer.world_size * self._tokens / seconds,
            "train/waiting_for_data": self._waited / seconds,
        }
        pl_module.log_dict(values, batch_size=len(batch))
        if trainer.global_step == self._step:  # gradients are still added up
            return
        self._step = trainer.global_step
        logged = self._step % self.log_every == 0
        if self._first and not logged:
            numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=self._step - 1)  # Lightning counts from 0
        self._first = False
        if logged:
            self._start_again()
        if self.on_progress is not None and trainer.is_global_zero:
            loss = float(trainer.callback_metrics["train/loss"])
            self.on_progress(self._step, self.total_steps, f"loss {loss:.3f}, {clips_per_second:.1f} clips/s")

    def _start_again(self) -> None:
        self._waited = self._worked = 0.0
        self._clips = self._tokens = 0

"""Where measurements of a run go. What was logged before a run was cut off stays."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from rlt.conf.schema import Config
from rlt.files import replacing

WANDB_ID = "wandb-id"
"""In the run's folder: under which id Weights & Biases knows it."""


def make_loggers(config: Config, start_step: int = 0) -> list[Logger]:
    """The loggers of a run that starts at an optimizer step."""
    logger, run_dir = config.logger, config.run_dir
    chosen: list[Logger] = []
    if logger.csv:
        chosen.append(KeepingCSVLogger(run_dir, start_step))
    if logger.tensorboard:
        chosen.append(
            TensorBoardLogger(
                run_dir, name="tensorboard", version="", default_hp_metric=False, purge_step=start_step or None
            )
        )
    if logger.wandb:
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        chosen.append(
            OneRecordLogger(
                project=logger.project,
                name=logger.name or Path(run_dir).name,
                tags=logger.tags or None,
                group=logger.group,
                save_dir=run_dir,
                offline=logger.offline,
                id=_wandb_id(Path(run_dir), going_on=start_step > 0),
            )
        )
    return chosen


def close_loggers(loggers: Iterable[Logger]) -> None:
    """End what would go on beyond the run: a record of Weights & Biases takes what the next run of a process logs."""
    for logger in loggers:
        if isinstance(logger, OneRecordLogger):
            logger.close()


class OneRecordLogger(WandbLogger):
    """A record of Weights & Biases that a run that goes on adds to."""

    def __init__(self, *, offline: bool, **options: Any) -> None:
        # Records on disk are put together by their id when they are sent, and asking for it warns.
        super().__init__(offline=offline, resume=None if offline else "allow", **options)
        self._wandb_init.pop("anonymous", None)  # Lightning's None, which Weights & Biases warns about

    def close(self) -> None:
        """Write what is left, in the process that writes."""
        if self._experiment is not None:
            self._experiment.finish()


def _wandb_id(run_dir: Path, *, going_on: bool) -> str | None:
    """The id of the run's one record, which a run that goes on adds to; None in processes that write none."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    path = run_dir / WANDB_ID
    if going_on and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    chosen = uuid4().hex[:8]
    with replacing(path) as temporary:
        temporary.write_text(f"{chosen}\n", encoding="utf-8")
    return chosen


class KeepingCSVLogger(CSVLogger):
    """RUN/logs/metrics.csv with one row for each log entry, on disk at once.

    Lightning's own deletes the file of before. Here the rows before `start_step` stay; those after it were of steps
    that are done again.
    """

    def __init__(self, run_dir: str, start_step: int) -> None:
        super().__init__(run_dir, name="logs", version="", flush_logs_every_n_steps=1)
        self._start_step = start_step
        self._writer: ExperimentWriter | None = None

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._writer is None:
            self._experiment = self._writer = _KeepingWriter(self.log_dir, self._start_step)
        return self._writer


class _KeepingWriter(ExperimentWriter):
    def __init__(self, log_dir: str, start_step: int) -> None:
        self._start_step = start_step
        super().__init__(log_dir)
        if os.path.isfile(self.metrics_file_path):  # noqa: PTH113 (Lightning's name for it is a text)
            rows, self.metrics_keys = self._read()
            self._write([row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < start_step])

    @override
    def _check_log_dir_exists(self) -> None:
        """Does not delete the file of before."""

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(self._read()[0])

    def _read(self) -> tuple[list[dict[str, str]], list[str]]:
        with open(self.metrics_file_path, newline="", encoding="utf-8") as stream:  # noqa: PTH123
            reader = csv.DictReader(stream)
            return list(reader), sorted(reader.fieldnames or ())

    def _write(self, rows: list[dict[str, str]]) -> None:
        """The whole file anew, which is there at any moment."""
        with (
            replacing(self.metrics_file_path) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as stream,
        ):
            writer = csv.DictWriter(stream, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

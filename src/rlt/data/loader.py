"""The loader of training batches: everything up to the packed tokens happens in its workers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader
from typing_extensions import override

from rlt.data.batch import Collate
from rlt.data.dataset import TrainingDataset, TrainingSample
from rlt.data.sampler import SampleKey
from rlt.data.stored import StoredCollate, StoredTraining


class TimedLoader(DataLoader[TrainingSample]):
    """A loader that knows how long training waited for its batches."""

    _waited = 0.0

    @override
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises a class of its own
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self._waited += time.perf_counter() - begin
            yield batch

    def take_waited(self) -> float:
        """Seconds since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited


def training_loader(
    dataset: TrainingDataset | StoredTraining,
    collate: Collate | StoredCollate,
    batches: Iterable[list[SampleKey]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> TimedLoader:
    """A loader of `rlt.data.batch.Batch`.

    Args:
        dataset: reads and augments clips, or reads tokens.
        collate: makes tokens of them.
        batches: which clips each batch holds; a `StepSampler`, or some of its batches.
        num_workers: processes that decode; 0 decodes in this one. They stay when `batches` is through.
        pin_memory: whether batches go to another device than the CPU.
    """
    return TimedLoader(
        dataset,  # type: ignore[arg-type]  # its samples go nowhere but into collate
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )

"""Suite of the data loader: how fast batches come, and what limits training: decode, augmentation, tokens or network.

It walks a manifest through the loader that `rlt train` uses, with several numbers of workers, and takes each stage of
the way alone, in one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch.utils.data import Sampler

from rlt.benchmark.harness import Arm, BenchmarkResult, BenchmarkSettings, Rounds
from rlt.benchmark.networks import train_step
from rlt.checkpoints import create_model
from rlt.checks import at_least, some
from rlt.data.augment import AugmentConfig
from rlt.data.batch import Batch, Collate
from rlt.data.dataset import TrainingDataset, TrainingSample
from rlt.data.loader import TimedLoader, training_loader
from rlt.data.manifest import MANIFEST_EXTENSIONS, read_manifest
from rlt.data.sampler import SampleKey, StepSampler
from rlt.errors import InvalidArgumentError
from rlt.measure import Timing, interleave

STAGES = ("decode", "augmentation", "tokens", "network")
"""The way of a batch in one process, in this order. "network" is a training step: forward, backward and update."""
_BATCHES_PER_WORKER = 4  # of a walk at least: the last ones wait for each other


def loader_suite(settings: BenchmarkSettings, rounds: Rounds) -> BenchmarkResult:
    """Manifest -> batches ("loader", for each number of workers), beside the `STAGES` of a batch one by one.

    All times are of one batch, so that the speed-up over "network" is how many times faster than the network batches
    come. Every run takes the next batches of one random order, as training does: nobody reads a file that was read a
    moment before. The counted batches of one number of workers are one pass over the manifest, or `settings.batches` in
    each round.
    """
    if len(settings.videos) != 1 or settings.videos[0].suffix.lower() not in MANIFEST_EXTENSIONS:
        names = some([str(path) for path in settings.videos])
        raise InvalidArgumentError(
            f"the suite loader reads one manifest, not {names}; write it with `rlt prepare` and name it"
        )
    workers = sorted({*settings.workers}) if settings.workers else usual_workers()
    at_least(0, workers=min(workers))
    manifest = read_manifest(settings.videos[0])
    if not manifest.usable:
        raise InvalidArgumentError(f"{settings.videos[0]} has no usable video; see its status column")
    model = create_model(settings.model, num_classes=len(manifest.class_names)).to(settings.device).train()
    augment = AugmentConfig()
    dataset = TrainingDataset(manifest.usable, settings.clip, augment)
    collate = Collate(settings.rule, augment, len(manifest.class_names), model.config.patches)
    order = iter(StepSampler(len(manifest.usable), batch_size=settings.clips))
    num_rounds = settings.rounds or 5
    one_pass = -(-len(manifest.usable) // (settings.clips * num_rounds))
    num_batches = settings.batches or max(one_pass, _BATCHES_PER_WORKER * max(workers))
    seen = _Seen(lambda done, name: rounds.tell(done, len(workers) * num_rounds * num_batches, name))
    # Workers start before the network runs: threads of torch do not outlive a fork.
    walks = [_Walk(count, dataset, collate, order, num_batches, settings, seen) for count in workers]
    stages = _Stages(dataset, collate, order, model, settings, seen)
    works: dict[str, Callable[[], object]] = {f"loader {walk.workers}": walk for walk in walks}
    stages()  # what is made once: kernels, the optimizer's state
    works |= {name: getattr(stages, name) for name in STAGES}
    timings = interleave(works, rounds=num_rounds, warmup=0, device=settings.device)
    kept = seen.kept / seen.dense
    arms = [
        Arm("loader", kept, details={"workers": walk.workers}, timing=walk.per_batch(timings[f"loader {walk.workers}"]))
        for walk in walks
    ]
    arms += [Arm(name, kept if name in ("tokens", "network") else 1.0, timing=timings[name]) for name in STAGES]
    extra = {"batches_per_round": num_batches, **_conclusions(arms, settings.clips), "replaced": seen.replaced}
    return BenchmarkResult("loader", settings, arms, "network", extra)


def usual_workers() -> list[int]:
    """No worker, one, then twice as many each time, up to one for each core."""
    cores = os.cpu_count() or 1
    return [0, *(2**power for power in range(cores.bit_length()) if 2**power < cores), cores]


@dataclass
class _Seen:
    """What is noted of all batches."""

    tell: Callable[[int, str], None]
    """Called with (counted batches of the loaders so far, what comes next)."""
    done: int = 0
    kept: int = 0
    dense: int = 0
    replaced: dict[str, str] = field(default_factory=dict)
    """Videos that could not be decoded: path -> error."""

    def note(self, batch: Batch) -> None:
        self.kept += batch.packed.num_tokens
        self.dense += batch.packed.num_dense
        self.replaced.update(batch.failed)


class _Next(Sampler[list[SampleKey]]):
    """So many of the next batches, each time it is asked."""

    def __init__(self, order: Iterator[list[SampleKey]], count: int) -> None:
        self.order = order
        self.count = count

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return islice(self.order, self.count)


class _Walk:
    """Takes the next batches from a loader; nothing is prefetched beyond them, so that runs do not overlap."""

    def __init__(
        self,
        workers: int,
        dataset: TrainingDataset,
        collate: Collate,
        order: Iterator[list[SampleKey]],
        num_batches: int,
        settings: BenchmarkSettings,
        seen: _Seen,
    ) -> None:
        self.workers = workers
        self.seen = seen
        self.next = _Next(order, workers)
        self.loader: TimedLoader = training_loader(
            dataset, collate, self.next, num_workers=workers, pin_memory=settings.device != "cpu"
        )
        self.num_batches = num_batches
        for _ in self.loader:  # one for each worker, which starts them
            seen.tell(0, f"{workers} workers start")
        self.next.count = num_batches

    def __call__(self) -> None:
        """One walk."""
        for batch in self.loader:
            self.seen.note(batch)
            self.seen.done += 1
            self.seen.tell(self.seen.done, f"{self.workers} workers")

    def per_batch(self, timing: Timing) -> Timing:
        """Times of one batch, from those of walks."""
        return Timing(tuple(seconds / self.num_batches for seconds in timing.seconds))


class _Stages:
    """The stages of a batch, one call each; each takes what the one before has left."""

    samples: list[TrainingSample]
    batch: Batch

    def __init__(
        self,
        dataset: TrainingDataset,
        collate: Collate,
        order: Iterator[list[SampleKey]],
        model: torch.nn.Module,
        settings: BenchmarkSettings,
        seen: _Seen,
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.order = order
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        self.settings = settings
        self.seen = seen

    def __call__(self) -> None:
        """All of them."""
        for name in STAGES:
            getattr(self, name)()

    def decode(self) -> None:
        self.samples = [self.dataset.read(key) for key in next(self.order)]

    def augmentation(self) -> None:
        self.samples = [self.dataset.augmented(sample) for sample in self.samples]

    def tokens(self) -> None:
        self.batch = self.collate(self.samples)

    def network(self) -> None:
        self.seen.note(self.batch)
        train_step(self.model, [self.batch.packed.to(self.settings.device)], self.optimizer, self.settings)


def _conclusions(arms: list[Arm], clips: int) -> dict[str, object]:
    """What limits training, for each number of workers, if the network had its device or cores to itself.

    Without workers it is the longest of the `STAGES`, which follow each other. With workers it is the network where
    batches come as fast as it takes them, else the longest of the stages before it.
    """
    seconds = {arm.name: arm.timing.median for arm in arms if arm.name in STAGES}
    batch = {int(str(arm.details["workers"])): arm.timing.median for arm in arms if arm.name == "loader"}
    network, before = seconds["network"], {name: seconds[name] for name in STAGES[:-1]}

    def slowest(stages: dict[str, float]) -> str:
        return max(stages, key=stages.__getitem__)

    limits, rates = {}, {}
    for count, loading in batch.items():
        if count == 0:
            limits[count], step = slowest(seconds), loading + network
        else:
            limits[count], step = "network" if loading <= network else slowest(before), max(loading, network)
        rates[count] = clips / step
    return {
        "shares": {name: value / sum(seconds.values()) for name, value in seconds.items()},
        "clips_per_second": {str(count): clips / loading for count, loading in batch.items()},
        "training_clips_per_second": {str(count): rate for count, rate in rates.items()},
        "limits": {str(count): limit for count, limit in limits.items()},
    }

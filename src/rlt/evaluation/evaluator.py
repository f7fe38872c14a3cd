"""A model over a manifest: the same views on every run, the mean of their softmax per video."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlt.data.batch import EvaluationBatch, collate_evaluation
from rlt.data.clips import ViewConfig
from rlt.data.dataset import EvaluationDataset, EvaluationSample
from rlt.data.manifest import Manifest, VideoEntry
from rlt.errors import InvalidArgumentError, VideoError
from rlt.evaluation.metrics import ClassificationMetrics
from rlt.evaluation.predictions import VideoPrediction
from rlt.evaluation.results import EvaluationResult, EvaluationSettings, PeakMemory, Seconds
from rlt.measure import machine_info, stopwatch
from rlt.network.flops import forward_flops
from rlt.network.vit import VisionTransformer
from rlt.structures import PackedTokens, pack
from rlt.tokens import Rule
from rlt.video import ClipSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Precisions of the forward pass."""


def evaluate(
    model: VisionTransformer,
    manifest: Manifest,
    *,
    clip: ClipSpec,
    views: ViewConfig,
    rule: Rule,
    batch_videos: int = 1,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    decoder: str = "pyav",
    max_videos: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> EvaluationResult:
    """Classify the videos of a manifest and measure accuracy, tokens, speed and memory.

    A video's prediction is the mean of the softmax over its views, which are the same on every run. Videos that
    cannot be read are listed and left out. One clip goes through the network before the clock starts.

    Args:
        model: moved to `device`, and in evaluation mode meanwhile.
        manifest: videos and classes; classes are those of the model, in the same order.
        clip: frames and size.
        views: clips and crops per video.
        rule: which tokens the network gets.
        batch_videos: videos whose views go through the network together, at least 1.
        num_workers: processes that decode and tokenize, 0 or more; 0 = this one.
        device: where the network runs.
        dtype: float32; bfloat16 or float16 run under torch's autocast, with weights in their own precision.
        seed: of rules that draw.
        decoder: see `rlt.read_clip`.
        max_videos: evaluate only so many, evenly spread over the manifest, which may be sorted by class.
        on_progress: called with (videos done, videos in all, name of the last one).

    Raises:
        InvalidArgumentError: for an argument out of range, or classes that are not those of the model.
        VideoError: if not a single video could be evaluated.
        MissingDependencyError: if torchmetrics cannot be imported.
    """
    _check(model, manifest, batch_videos=batch_videos, num_workers=num_workers, dtype=dtype, max_videos=max_videos)
    model.config.patches.grid((clip.num_frames, *clip.frame_size, 3))  # told before any video is read
    metrics = ClassificationMetrics(model.config.num_classes)
    entries = _spread(manifest.entries, max_videos)
    failed = [(entry.path, entry.status) for entry in entries if not entry.usable]
    usable = [entry for entry in entries if entry.usable]
    if not usable:
        raise VideoError(f"none of {len(entries)} videos can be used; the first: {failed[0][0]}: {failed[0][1]}")
    dataset = EvaluationDataset(usable, clip, views, rule, model.config.patches, seed=seed, decoder=decoder)
    loader: DataLoader[EvaluationSample] = DataLoader(
        dataset,
        batch_size=batch_videos,
        num_workers=num_workers,
        collate_fn=collate_evaluation,
        pin_memory=torch.device(device).type == "cuda",
    )
    forward = _Forward(model.to(device), torch.device(device), dtype)
    tally = _Tally(metrics, failed=failed)
    was_training = model.training
    model.eval()
    try:
        wall, peak = _run(
            loader,
            forward,
            tally,
            lambda done: on_progress and on_progress(done, len(usable), Path(usable[done - 1].path).name),
        )
    finally:
        model.train(was_training)
    if not tally.predictions:
        raise VideoError(f"none of {len(entries)} videos could be evaluated; the first: {failed[0][0]}: {failed[0][1]}")
    merges = model.merge_per_block
    settings = EvaluationSettings(
        clip,
        views,
        rule,
        merges,
        batch_videos,
        num_workers,
        str(device),
        str(dtype).removeprefix("torch."),
        seed,
        decoder,
    )
    return _result(settings, model, manifest, tally, forward, wall, peak)


def _check(
    model: VisionTransformer,
    manifest: Manifest,
    *,
    batch_videos: int,
    num_workers: int,
    dtype: torch.dtype,
    max_videos: int | None,
) -> None:
    for name, value, least in (
        ("batch_videos", batch_videos, 1),
        ("num_workers", num_workers, 0),
        ("max_videos", 1 if max_videos is None else max_videos, 1),
    ):
        if value < least:
            raise InvalidArgumentError(f"{name} is {value}; a whole number of at least {least} is needed")
    if dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype is {dtype}; allowed are {', '.join(map(str, DTYPES))}")
    _check_classes(model, manifest)


def _check_classes(model: VisionTransformer, manifest: Manifest) -> None:
    """The same number of classes, and none that both know under different numbers: accuracy would mean nothing."""
    ours, theirs = model.config.num_classes, len(manifest.class_names)
    if ours != theirs:
        raise InvalidArgumentError(
            f"the model has {ours} classes, the manifest {theirs}; evaluate on the data set that it was trained for"
        )
    numbers = {_plain(name): number for number, name in enumerate(model.config.labels)}
    for number, name in enumerate(manifest.class_names):
        if numbers.get(_plain(name), number) != number:
            raise InvalidArgumentError(
                f"{name!r} is class {number} of the manifest and class {numbers[_plain(name)]} of the model; "
                "write the manifest with the model's order of classes"
            )


def _plain(name: str) -> str:
    """A class name without the differences in spelling between class folders and label files."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _spread(entries: tuple[VideoEntry, ...], max_videos: int | None) -> list[VideoEntry]:
    count = len(entries) if max_videos is None else min(max_videos, len(entries))
    return [entries[position * len(entries) // count] for position in range(count)]


@dataclass
class _Forward:
    """The network in the asked precision, with a stopwatch."""

    network: VisionTransformer
    device: torch.device
    dtype: torch.dtype
    seconds: float = 0.0

    def __call__(self, packed: PackedTokens) -> Tensor:
        """Probabilities float32 [clips, classes] on the CPU."""
        packed = packed.to(self.device, non_blocking=True)
        logits: list[Tensor] = []

        def run() -> None:
            with self._precision(), torch.inference_mode():
                logits.append(self.network(packed))

        self.seconds += stopwatch(run, self.device)
        return logits[0].float().softmax(-1).cpu()

    def _precision(self) -> AbstractContextManager[None]:
        if self.dtype == torch.float32:
            return nullcontext()
        autocast: AbstractContextManager[None] = torch.autocast(self.device.type, self.dtype)
        return autocast


@dataclass
class _Tally:
    """What has been seen so far."""

    metrics: ClassificationMetrics
    failed: list[tuple[str, str]]
    notes: list[tuple[str, str]] = field(default_factory=list)
    predictions: list[VideoPrediction] = field(default_factory=list)
    decode: float = 0.0
    tokenize: float = 0.0

    def add_unread(self, sample: EvaluationSample) -> bool:
        """Count the times of a sample; True if it could not be read."""
        self.decode += sample.seconds_decode
        self.tokenize += sample.seconds_tokenize
        self.notes += [(sample.path, note) for note in sample.notes]
        if sample.error is not None:
            self.failed.append((sample.path, sample.error))
        return sample.error is not None

    def add(self, sample: EvaluationSample, view_probabilities: Tensor, counts: tuple[int, ...], dense: int) -> None:
        """Count a video whose views have these probabilities, float32 [views, classes]."""
        probabilities = view_probabilities.mean(0)
        if not bool(probabilities.isfinite().all()):
            self.failed.append((sample.path, "the network's output is not finite"))
            return
        order = probabilities.argsort(descending=True, stable=True)
        self.metrics.update(order[None], torch.tensor([sample.label_id]))
        top = order[: self.metrics.top_k]
        self.predictions.append(
            VideoPrediction(
                sample.path,
                sample.label_id,
                tuple(top.tolist()),
                tuple(probabilities[top].tolist()),
                counts,
                dense,
            )
        )


def _run(
    loader: Iterable[EvaluationBatch], forward: _Forward, tally: _Tally, on_done: Callable[[int], object]
) -> tuple[float, PeakMemory | None]:
    """Go through all batches; returns wall-clock seconds, and the peak of memory."""
    warm, warming, done = False, 0.0, 0
    if forward.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forward.device)
    begin = time.perf_counter()
    for batch in loader:
        if not warm and batch.packed is not None:
            first = pack(batch.packed.unpack()[0])
            warming, warm = stopwatch(lambda first=first: forward(first), forward.device), True  # type: ignore[misc]
            forward.seconds = 0.0
        _add_batch(batch, forward, tally)
        done += len(batch)
        on_done(done)
    return time.perf_counter() - begin - warming, _peak_memory(forward.device)


def _add_batch(batch: EvaluationBatch, forward: _Forward, tally: _Tally) -> None:
    read = [not tally.add_unread(sample) for sample in batch.samples]
    if batch.packed is None:
        return
    probabilities = forward(batch.packed)
    begin = 0
    for sample, num_views, is_read in zip(batch.samples, batch.views_per_video, read, strict=True):
        rows = slice(begin, begin + num_views)
        begin += num_views
        if is_read:
            dense = batch.packed.grids[rows.start].num_tokens
            tally.add(sample, probabilities[rows], batch.packed.segments.lengths[rows], dense)


def _peak_memory(device: torch.device) -> PeakMemory | None:
    if device.type == "cuda":
        return PeakMemory(torch.cuda.max_memory_allocated(device), "tensors on the device during the evaluation")
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return PeakMemory(peak, "resident memory of the process since it started, without data workers")


def _result(
    settings: EvaluationSettings,
    model: VisionTransformer,
    manifest: Manifest,
    tally: _Tally,
    forward: _Forward,
    wall: float,
    peak: PeakMemory | None,
) -> EvaluationResult:
    top1, top5, confusion = tally.metrics.compute()
    merges = settings.merge_per_block
    clips = Counter(count for video in tally.predictions for count in video.tokens)
    dense = Counter(video.tokens_dense for video in tally.predictions for _ in video.tokens)
    return EvaluationResult(
        settings=settings,
        class_names=manifest.class_names,
        predictions=tuple(tally.predictions),
        failed=tuple(tally.failed),
        notes=tuple(tally.notes),
        top1=top1,
        top5=top5,
        top_k=tally.metrics.top_k,
        confusion=confusion,
        seconds=Seconds(wall, forward.seconds, tally.decode, tally.tokenize),
        flops=sum(forward_flops(model.config, count, merges) * number for count, number in clips.items()),
        flops_dense=sum(forward_flops(model.config, count) * number for count, number in dense.items()),
        peak_memory=peak,
        machine=machine_info(settings.device),
    )

"""A model over a manifest: the same views on every run, the mean of their softmax per video."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rlt.checks import at_least
from rlt.data.batch import EvaluationBatch, collate_evaluation
from rlt.data.dataset import EvaluationDataset, EvaluationSample
from rlt.data.manifest import Manifest, VideoEntry
from rlt.data.stored import StoredEvaluation
from rlt.data.token_files import TokenFile, token_settings
from rlt.errors import InvalidArgumentError, VideoError
from rlt.evaluation.predictions import MAX_TOP, VideoPrediction
from rlt.evaluation.results import EvaluationResult, EvaluationSettings, PeakMemory, Seconds
from rlt.measure import machine_info, stopwatch
from rlt.network.flops import forward_flops
from rlt.network.vit import VisionTransformer
from rlt.pretrained import PatchedNetwork
from rlt.structures import PackedTokens, pack


def evaluate(
    model: VisionTransformer,
    manifest: Manifest,
    settings: EvaluationSettings,
    *,
    stored: TokenFile | None = None,
    max_videos: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> EvaluationResult:
    """Classify the videos of a manifest and measure accuracy, tokens, speed and memory.

    A video's prediction is the mean of the softmax over its views, which are the same on every run. Videos that
    cannot be read are listed and left out. One clip goes through the network before the clock starts.

    Args:
        model: moved to the device of the settings, and in evaluation mode meanwhile.
        manifest: videos and classes; classes are those of the model, in the same order.
        settings: views, tokens, device and precision.
        stored: the tokens of those videos, in the place of decoding: of each the window in the middle.
        max_videos: evaluate only so many, evenly spread over the manifest, which may be sorted by class.
        on_progress: called with (videos done, videos in all, name of the last one).

    Raises:
        InvalidArgumentError: for an argument out of range, or classes that are not those of the model.
        VideoError: if not a single video could be evaluated.
    """
    at_least(1, max_videos=max_videos)
    check_classes(model, manifest)
    model.config.patches.grid((settings.clip.num_frames, *settings.clip.frame_size, 3))  # told before a video is read
    if stored is not None:
        _check_stored(stored, model, settings)
    entries = evenly_chosen(manifest.entries, max_videos)
    usable = [entry for entry in entries if entry.usable]
    tally = _Tally(failed=[(entry.path, entry.status) for entry in entries if not entry.usable])
    was_training = model.training
    try:
        forward = _Forward(model.eval(), settings)
        begin = time.perf_counter()
        for batch in _loader(usable, model, settings, stored) if usable else ():
            tally.add(batch, None if batch.packed is None else forward(batch.packed))
            if on_progress is not None:
                on_progress(tally.done, len(usable), Path(usable[tally.done - 1].path).name)
        wall = time.perf_counter() - begin - forward.seconds_warming
    finally:
        model.train(was_training)
    if not tally.predictions:
        path, reason = tally.failed[0]
        raise VideoError(f"none of {len(entries)} videos could be evaluated; the first: {path}: {reason}")
    clips = Counter(count for video in tally.predictions for count in video.tokens)
    dense = Counter(video.tokens_dense for video in tally.predictions for _ in video.tokens)
    merges = model.merge_per_block
    return EvaluationResult(
        settings=settings,
        merge_per_block=merges,
        class_names=manifest.class_names,
        predictions=tuple(tally.predictions),
        failed=tuple(tally.failed),
        notes=tuple(tally.notes),
        seconds=Seconds(wall, forward.seconds, tally.seconds_decode, tally.seconds_tokenize),
        flops=sum(forward_flops(model.config, count, merges) * number for count, number in clips.items()),
        flops_dense=sum(forward_flops(model.config, count) * number for count, number in dense.items()),
        peak_memory=_peak_memory(forward.device),
        machine=machine_info(settings.device),
    )


def _check_stored(stored: TokenFile, model: VisionTransformer, settings: EvaluationSettings) -> None:
    """Hold that a file of tokens was made as the settings say."""
    views = settings.views
    if (views.num_clips, views.num_crops) != (1, 1):
        raise InvalidArgumentError(
            f"num_clips is {views.num_clips} and num_crops is {views.num_crops}, but {stored.table.path} holds tokens "
            "of windows, of which one is taken; give data.views.num_clips=1 data.views.num_crops=1, or the manifest of "
            "the videos"
        )
    stored.check(token_settings(settings.clip, settings.rule, model.config.patches))


def _loader(
    entries: list[VideoEntry], model: VisionTransformer, settings: EvaluationSettings, stored: TokenFile | None
) -> DataLoader[EvaluationSample]:
    dataset: EvaluationDataset | StoredEvaluation
    if stored is not None:
        dataset = StoredEvaluation(stored, entries, model.config.patches)
    else:
        dataset = EvaluationDataset(
            entries,
            settings.clip,
            settings.views,
            settings.rule,
            model.config.patches,
            seed=settings.seed,
            decoder=settings.decoder,
        )
    return DataLoader(
        dataset,
        batch_size=settings.batch_videos,
        num_workers=settings.num_workers,
        collate_fn=collate_evaluation,
        pin_memory=torch.device(settings.device).type == "cuda",
    )


def evenly_chosen(entries: Sequence[VideoEntry], max_videos: int | None) -> list[VideoEntry]:
    """So many videos, evenly spread over a list that may be sorted by class; all of them for None."""
    chosen = min(max_videos or len(entries), len(entries))
    return [entries[position * len(entries) // chosen] for position in range(chosen)]


def check_classes(model: VisionTransformer | PatchedNetwork, manifest: Manifest) -> None:
    """The same number of classes, and none that both know under different numbers: accuracy would mean nothing."""
    ours, theirs = model.config.num_classes, len(manifest.class_names)
    if ours != theirs:
        raise InvalidArgumentError(
            f"the model has {ours} classes, the manifest {theirs}; evaluate on the data set that it was trained for"
        )
    if ours < 2:
        raise InvalidArgumentError(f"the model has {ours} classes; accuracy needs at least 2")
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


class _Forward:
    """The network in the asked precision, with a stopwatch that leaves out a first clip, which warms it up."""

    def __init__(self, network: VisionTransformer, settings: EvaluationSettings) -> None:
        self.device = torch.device(settings.device)
        self.network = network.to(self.device)
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.seconds = 0.0
        self.seconds_warming = 0.0
        self._warm = False
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __call__(self, packed: PackedTokens) -> Tensor:
        """Probabilities float32 [clips, classes] on the CPU."""
        if not self._warm:
            first = pack(packed.unpack()[0])
            self.seconds_warming = stopwatch(lambda: self._timed(first), self.device)
            self.seconds, self._warm = 0.0, True
        return self._timed(packed)

    def _timed(self, packed: PackedTokens) -> Tensor:
        packed = packed.to(self.device, non_blocking=True)
        logits: list[Tensor] = []

        def run() -> None:
            half = self.dtype != torch.float32
            with torch.autocast(self.device.type, self.dtype) if half else nullcontext(), torch.inference_mode():
                logits.append(self.network(packed))

        self.seconds += stopwatch(run, self.device)
        return logits[0].float().softmax(-1).cpu()


@dataclass
class _Tally:
    """What has been seen so far."""

    failed: list[tuple[str, str]]
    notes: list[tuple[str, str]] = field(default_factory=list)
    predictions: list[VideoPrediction] = field(default_factory=list)
    done: int = 0
    seconds_decode: float = 0.0
    seconds_tokenize: float = 0.0

    def add(self, batch: EvaluationBatch, probabilities: Tensor | None) -> None:
        """Count the videos of a batch whose views have these probabilities, float32 [views, classes]."""
        begin = 0
        for sample, num_views in zip(batch.samples, batch.views_per_video, strict=True):
            self.done += 1
            self.seconds_decode += sample.seconds_decode
            self.seconds_tokenize += sample.seconds_tokenize
            self.notes += [(sample.path, note) for note in sample.notes]
            views = slice(begin, begin + num_views)
            begin += num_views
            if sample.error is not None or batch.packed is None or probabilities is None:
                self.failed.append((sample.path, str(sample.error)))
                continue
            mean = probabilities[views].mean(0)
            if not bool(mean.isfinite().all()):
                self.failed.append((sample.path, "the network's output is not finite"))
                continue
            top = mean.argsort(descending=True, stable=True)[:MAX_TOP]
            ids, values = tuple(top.tolist()), tuple(mean[top].tolist())
            counts, dense = batch.packed.segments.lengths[views], batch.packed.grids[views.start].num_tokens
            self.predictions.append(VideoPrediction(sample.path, sample.label_id, ids, values, counts, dense))


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

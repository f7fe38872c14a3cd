"""The numbers of one evaluation, and their JSON."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean, stdev

from rlt.checks import at_least, one_of
from rlt.conf.schema import PRECISIONS
from rlt.data.clips import ViewConfig
from rlt.evaluation.predictions import MAX_TOP, VideoPrediction
from rlt.evaluation.statistics import Interval, wilson_interval
from rlt.measure import check_device
from rlt.tokens import Rule, Threshold, rule_options
from rlt.video import ClipSpec

HISTOGRAM_BINS = 20
"""Bins of equal width, 0.05, over the share of the tokens that a clip keeps: fixed, so that runs can be laid side by
side."""


@dataclass(frozen=True)
class EvaluationSettings:
    """How an evaluation is made."""

    clip: ClipSpec = field(default_factory=ClipSpec)
    """Frames and size of a clip."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Clips and crops per video."""
    rule: Rule = field(default_factory=Threshold)
    """Which tokens the network gets."""
    batch_videos: int = 1
    """Videos whose views go through the network together, at least 1."""
    num_workers: int = 0
    """Processes that decode and tokenize, 0 or more; 0 = the evaluating one."""
    device: str = "cpu"
    """Where the network runs."""
    dtype: str = "float32"
    """Precision of the forward pass; "bfloat16" and "float16" are torch's autocast, with weights in their own."""
    seed: int = 0
    """Of rules that draw."""
    decoder: str = "pyav"
    """See `rlt.read_clip`."""

    def __post_init__(self) -> None:
        at_least(1, batch_videos=self.batch_videos)
        at_least(0, num_workers=self.num_workers)
        one_of(PRECISIONS, dtype=self.dtype)
        check_device(self.device)


@dataclass(frozen=True)
class Seconds:
    """Where the time went."""

    wall: float
    """From the first file to the last prediction, without warming up."""
    forward: float
    """Forward passes, waited for, without copying tokens to the device."""
    decode: float
    """Reading and decoding, added up over the workers."""
    tokenize: float
    """Selecting tokens, added up over the workers."""


@dataclass(frozen=True)
class PeakMemory:
    """The most memory that was in use."""

    bytes: int
    """How much."""
    meaning: str
    """What was counted: tensors on the device, or all memory of the process since it started."""


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that one evaluation found."""

    settings: EvaluationSettings
    """How it was made."""
    merge_per_block: int
    """Tokens that each block of the network merged away."""
    class_names: tuple[str, ...]
    """Name of each class, by label id."""
    predictions: tuple[VideoPrediction, ...]
    """The videos that were evaluated, in the order of the manifest."""
    failed: tuple[tuple[str, str], ...]
    """(path, reason) of the videos that could not be evaluated. Accuracies leave them out."""
    notes: tuple[tuple[str, str], ...]
    """(path, remark) on videos that were evaluated but deserve a look."""
    seconds: Seconds
    """Where the time went."""
    flops: int
    """FLOPs of the forward passes over all clips, 2 per multiply-add: the closed form of `rlt.network.flops` for each
    token count, which equals what torch's counter finds."""
    flops_dense: int
    """The same with all tokens and no merging."""
    peak_memory: PeakMemory | None
    """None where the system does not tell."""
    machine: dict[str, str | int | float]
    """Where it was measured."""

    @property
    def num_videos(self) -> int:
        """Videos that were evaluated."""
        return len(self.predictions)

    @property
    def top1(self) -> float:
        """Share of the videos whose most probable class is right."""
        return self.top1_interval.value

    @property
    def top5(self) -> float:
        """Share of the videos whose class is among the `top_k` most probable ones."""
        return self.top5_interval.value

    @property
    def top_k(self) -> int:
        """5, or the number of classes where there are fewer."""
        return min(MAX_TOP, len(self.class_names))

    @cached_property
    def confusion(self) -> tuple[tuple[int, ...], ...]:
        """Number of videos by class (row) and predicted class (column)."""
        counts = Counter((video.label_id, video.predicted_id) for video in self.predictions)
        classes = range(len(self.class_names))
        return tuple(tuple(counts[label, predicted] for predicted in classes) for label in classes)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Share of the tokens that entered the network, for each clip (view)."""
        return tuple(count / video.tokens_dense for video in self.predictions for count in video.tokens)

    @property
    def num_clips(self) -> int:
        """Clips (views) that went through the network."""
        return len(self.shares)

    @property
    def tokens_kept(self) -> float:
        """Share of the tokens that entered the network, mean over the clips. Merging within the network not counted."""
        return fmean(self.shares)

    @property
    def tokens_kept_spread(self) -> float:
        """Standard deviation of that share over the clips; 0 for a single clip."""
        return stdev(self.shares) if self.num_clips > 1 else 0.0

    @property
    def tokens_histogram(self) -> tuple[int, ...]:
        """Number of clips by share of the tokens: `HISTOGRAM_BINS` bins, lower edges included, 1 in the last."""
        clips = [0] * HISTOGRAM_BINS
        for video in self.predictions:
            for count in video.tokens:  # in whole numbers, so that no edge depends on rounding
                clips[min(count * HISTOGRAM_BINS // video.tokens_dense, HISTOGRAM_BINS - 1)] += 1
        return tuple(clips)

    @cached_property
    def top1_interval(self) -> Interval:
        """Top-1 with Wilson's 95 % interval."""
        return wilson_interval(sum(video.correct for video in self.predictions), self.num_videos)

    @cached_property
    def top5_interval(self) -> Interval:
        """Top-5 with Wilson's 95 % interval."""
        return wilson_interval(sum(video.in_top for video in self.predictions), self.num_videos)

    @property
    def clips_per_second(self) -> float:
        """Clips (views) a second in the forward pass alone."""
        return self.num_clips / self.seconds.forward

    @property
    def clips_per_second_end_to_end(self) -> float:
        """Clips (views) a second from file to prediction."""
        return self.num_clips / self.seconds.wall

    def per_class(self) -> list[dict[str, object]]:
        """For each class: its videos, how many are right, and the accuracy with its interval (null without videos)."""
        rows = []
        for label_id, (name, row) in enumerate(zip(self.class_names, self.confusion, strict=True)):
            videos, right = sum(row), row[label_id]
            accuracy = wilson_interval(right, videos).to_json() if videos else None
            rows.append({"label_id": label_id, "label": name, "videos": videos, "correct": right, "accuracy": accuracy})
        return rows

    @property
    def mean_class_accuracy(self) -> float:
        """Mean of the accuracies of the classes that have videos."""
        return fmean(row[index] / sum(row) for index, row in enumerate(self.confusion) if sum(row))

    def to_json(self) -> dict[str, object]:
        """All numbers, ready for JSON; single predictions go to Parquet instead."""
        return {
            "num_videos": self.num_videos,
            "num_clips": self.num_clips,
            "top1": self.top1,
            "top1_interval": self.top1_interval.to_json(),
            "top5": self.top5,
            "top5_interval": self.top5_interval.to_json(),
            "top5_counts_the_best": self.top_k,
            "top1_failed_as_wrong": self.top1 * self.num_videos / (self.num_videos + len(self.failed)),
            "mean_class_accuracy": self.mean_class_accuracy,
            "tokens_kept": self.tokens_kept,
            "tokens_kept_spread": self.tokens_kept_spread,
            "tokens_histogram": {
                "edges": [bin_ / HISTOGRAM_BINS for bin_ in range(HISTOGRAM_BINS + 1)],
                "clips": list(self.tokens_histogram),
            },
            "clips_per_second": self.clips_per_second,
            "clips_per_second_end_to_end": self.clips_per_second_end_to_end,
            "seconds": asdict(self.seconds),
            "flops": {
                "total": self.flops,
                "per_clip": self.flops / self.num_clips,
                "per_clip_dense": self.flops_dense / self.num_clips,
                "share_of_dense": self.flops / self.flops_dense,
            },
            "peak_memory": asdict(self.peak_memory) if self.peak_memory else None,
            "failed": [{"path": path, "error": error} for path, error in self.failed],
            "notes": [{"path": path, "note": note} for path, note in self.notes],
            "settings": self.settings_json(),
            "machine": self.machine,
            "per_class": self.per_class(),
            "confusion": [list(row) for row in self.confusion],
        }

    def settings_json(self) -> dict[str, object]:
        """How it was made, ready for JSON."""
        options = rule_options(self.settings.rule)
        tokenizer = {
            "policy": options.pop("rule"),
            "threshold": options.pop("threshold", None),
            "keep_ratio": options.pop("keep_ratio", None),
            "merge_per_block": self.merge_per_block,
            **options,
        }
        content = asdict(self.settings) | {"rule": tokenizer}
        return {"tokenizer" if name == "rule" else name: value for name, value in content.items()}

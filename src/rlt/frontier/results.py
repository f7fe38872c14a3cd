"""What was measured: points with intervals, paired differences, and the file for both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlt.evaluation.results import EvaluationSettings
from rlt.evaluation.statistics import Interval
from rlt.frontier.arms import DENSE, FrontierArm

COLUMNS = ("agrees", "kl", "cosine", "correct", "tokens_kept", "flops", "flops_share")
"""Of one view under one arm: whether its most probable class is the dense network's; the Kullback-Leibler divergence of
its probabilities from the dense ones, in nats; cosine of the features; whether the class is right; tokens and FLOPs."""
_SETTINGS = ("clip", "views", "device", "dtype", "seed", "decoder")
_HELD_AGAINST = ("aware", "anchor", "anchor+gain", "motion")
"""Families that the others are subtracted from."""
_RESAMPLES = 2000
_MOTION_GROUPS = ("still", "some motion", "much motion")


@dataclass(frozen=True, eq=False)
class VideoFidelity:
    """One video."""

    path: str
    """Its file."""
    label_id: int
    """Its class."""
    values: dict[FrontierArm, NDArray[np.float64]]
    """float64 [views, columns] of each arm."""


@dataclass(frozen=True)
class Point:
    """One arm over all videos, or over some; seeds of a random arm are averaged."""

    arm: FrontierArm
    num_seeds: int
    means: dict[str, float]
    agreement: Interval
    kl: Interval
    accuracy: Interval

    def to_json(self) -> dict[str, object]:
        """Flat, with intervals as [low, high]."""
        means = self.means
        return {
            **self.arm.to_json(),
            "seeds": self.num_seeds,
            "tokens_kept": means["tokens_kept"],
            "flops": means["flops"],
            "flops_share": means["flops_share"],
            "top1_agreement": means["agrees"],
            "agreement_interval": [self.agreement.low, self.agreement.high],
            "kl": means["kl"],
            "kl_interval": [self.kl.low, self.kl.high],
            "feature_cosine": means["cosine"],
            "accuracy": means["correct"],
            "accuracy_interval": [self.accuracy.low, self.accuracy.high],
        }


@dataclass(frozen=True, eq=False)
class FrontierResult:
    """Every arm on every video. Intervals are 95 %, by bootstrap over videos, paired where arms are compared."""

    settings: EvaluationSettings
    arms: tuple[FrontierArm, ...]
    videos: tuple[VideoFidelity, ...]
    failed: tuple[tuple[str, str], ...]
    machine: Mapping[str, object]
    left_out: tuple[str, ...] = ()
    """Families of arms that the model cannot have."""

    @cached_property
    def points(self) -> list[Point]:
        """One for each arm, seeds taken together, in the order of the arms."""
        return self._points(range(len(self.videos)))

    @property
    def dense_accuracy(self) -> float:
        """Share of views that the dense network gets right."""
        return float(self._table([DENSE])[:, COLUMNS.index("correct")].mean())

    def motion_groups(self) -> dict[str, tuple[float, list[Point]]]:
        """Videos in three parts by the share of tokens that the first arm keeps: the largest of each, its points."""
        table = self._table([self._groups[0][0]])[:, COLUMNS.index("tokens_kept")]
        parts = np.array_split(np.argsort(table, kind="stable"), len(_MOTION_GROUPS))
        return {
            name: (float(table[part].max()), self._points(part))
            for name, part in zip(_MOTION_GROUPS, parts, strict=True)
            if len(part)
        }

    def differences(self, family: str) -> list[dict[str, Any]]:
        """`family` minus every other arm with the same threshold or share, video by video, with paired intervals."""
        weights, found = _bootstrap_weights(len(self.videos)), []
        ours = {arm.level: members for members in self._groups for arm in members[:1] if arm.family == family}
        for members in self._groups:
            arm = members[0]
            if arm.family == family or arm.level not in ours:
                continue
            change = self._table(ours[arm.level]) - self._table(members)
            row: dict[str, Any] = {"arm": family, "minus": arm.family, "level": list(arm.level)}
            for name, column in (("top1_agreement", "agrees"), ("kl", "kl"), ("accuracy", "correct")):
                interval = _interval(change[:, COLUMNS.index(column)], weights)
                row |= {name: interval.value, f"{name}_interval": [interval.low, interval.high]}
            found.append(row)
        return found

    def to_json(self) -> dict[str, object]:
        """Points, paired differences, and points by share of motion, ready for JSON."""
        groups = {
            name: {"tokens_kept_up_to": most, "points": [point.to_json() for point in points]}
            for name, (most, points) in self.motion_groups().items()
        }
        return {
            "videos": len(self.videos),
            "views_per_video": len(next(iter(self.videos[0].values.values()))),
            "dense_accuracy": self.dense_accuracy,
            "points": [point.to_json() for point in self.points],
            "differences": [row for family in _HELD_AGAINST for row in self.differences(family)],
            "by_motion": groups,
            "left_out": list(self.left_out),
            "failed": [{"path": path, "reason": reason} for path, reason in self.failed],
            "settings": {name: value for name, value in asdict(self.settings).items() if name in _SETTINGS},
            "machine": dict(self.machine),
        }

    @cached_property
    def _groups(self) -> list[list[FrontierArm]]:
        """Arms that differ in their seed alone, together."""
        groups: dict[object, list[FrontierArm]] = defaultdict(list)
        for arm in self.arms:
            groups[arm.family, arm.run_lengths, arm.level].append(arm)
        return list(groups.values())

    def _table(self, members: Sequence[FrontierArm]) -> NDArray[np.float64]:
        """float64 [videos, columns]: mean over the views of each video, and over arms that differ in their seed."""
        return np.stack([np.mean([video.values[arm].mean(0) for arm in members], axis=0) for video in self.videos])

    def _points(self, rows: Sequence[int] | range | NDArray[np.intp]) -> list[Point]:
        weights = _bootstrap_weights(len(rows))
        points = []
        for members in self._groups:
            table = self._table(members)[list(rows)]
            agreement, kl, accuracy = (
                _interval(table[:, COLUMNS.index(name)], weights) for name in ("agrees", "kl", "correct")
            )
            means = dict(zip(COLUMNS, table.mean(0).tolist(), strict=True))
            points.append(Point(members[0], len(members), means, agreement, kl, accuracy))
        return points


def _bootstrap_weights(num_videos: int) -> NDArray[np.float64]:
    """float64 [resamples, videos]: how often each video is drawn, as a share."""
    drawn = np.random.default_rng(0).multinomial(num_videos, np.full(num_videos, 1 / num_videos), size=_RESAMPLES)
    return drawn / num_videos


def _interval(values: NDArray[np.float64], weights: NDArray[np.float64]) -> Interval:
    """The mean with the middle 95 % of its resamples."""
    low, high = np.quantile(weights @ values, (0.025, 0.975)).tolist()
    return Interval(float(values.mean()), low, high)

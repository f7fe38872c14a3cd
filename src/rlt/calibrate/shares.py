"""What is kept at any threshold, found in one pass over the frames of every video.

Shape legend: N videos, B clips of one, K thresholds, P places of these clips, T' time steps.
"""

from __future__ import annotations

from math import ceil
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlt.calibrate.results import CalibrateSettings
from rlt.errors import InvalidArgumentError
from rlt.tokens import PatchView
from rlt.tokens.differences import LARGEST_DIFFERENCE

_GRID = np.unique([0.0, *(float(f"{x:.4g}") for x in np.geomspace(0.001, LARGEST_DIFFERENCE, 1024))])
"""Thresholds among which the best is found where anchors make the mask depend on the threshold: steps of 0.8 %."""
CURVE = _GRID[::16]
"""Thresholds that are shown beside the one that was found."""


class Shares(Protocol):
    """What is kept of each video at any threshold, found in one pass over the frames."""

    def __len__(self) -> int:
        """Videos."""

    def add(self, frames: PatchView) -> None:
        """The clips of one more video."""

    def kept(self, thresholds_K: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of the tokens of each video, float64 [N, K]."""

    def find(self, target: float) -> float:
        """The threshold whose share over all videos is nearest to the target."""


def shares_of(settings: CalibrateSettings) -> Shares:
    """Exact where tokens are compared with the previous ones; on a fine grid of thresholds with anchors."""
    return _OfAnchors(settings) if settings.rule.reference == "anchor" else _OfPrevious(settings)


class _OfPrevious:
    """Sorted differences of every video: 11 kB for a clip of 16 frames at 224 pixels."""

    def __init__(self, settings: CalibrateSettings) -> None:
        self.camera = settings.rule.camera
        self.tokens = settings.grid.num_tokens * settings.num_clips
        self.videos: list[NDArray[np.float64]] = []

    def __len__(self) -> int:
        return len(self.videos)

    def add(self, frames: PatchView) -> None:
        self.videos.append(np.sort(frames.differences_under(self.camera).double().flatten().numpy()))

    def kept(self, thresholds_K: NDArray[np.float64]) -> NDArray[np.float64]:
        dropped = [differences.searchsorted(thresholds_K, side="right") for differences in self.videos]
        return 1 - np.stack(dropped) / self.tokens

    def find(self, target: float) -> float:
        differences = np.sort(np.concatenate(self.videos))  # what is not in it is the first time step
        total = self.tokens * len(self.videos)
        wanted = round((1 - target) * total)  # to be dropped: the smallest
        most, least = (int(differences.searchsorted(x, side="right")) for x in (LARGEST_DIFFERENCE + 1, 0.0))
        _refuse_what_no_threshold_keeps(target, wanted, 1 - least / total, 1 - most / total, total)
        if wanted <= least:
            return 0.0
        # Differences of one size are kept or dropped together: whichever is nearer.
        tied = [int(differences.searchsorted(differences[wanted - 1], side=side)) for side in ("left", "right")]
        wanted = min(tied, key=lambda count: abs(count - wanted))
        low = float(differences[wanted - 1]) if wanted > 0 else 0.0
        high = float(differences[wanted]) if wanted < most else low + 0.01
        return _roundest(low, high)


class _OfAnchors:
    """Counts of every video at every threshold of a grid: coarse with motion, where each is a pass of its own."""

    def __init__(self, settings: CalibrateSettings) -> None:
        self.camera = settings.rule.camera
        self.tokens = settings.grid.num_tokens * settings.num_clips
        self.thresholds = CURVE if self.camera.motion == "global" else _GRID
        self.counts: list[NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, frames: PatchView) -> None:
        if self.camera.motion == "global":
            masks = (frames.differ(x, reference="anchor", camera=self.camera) for x in self.thresholds.tolist())
            self.counts.append(np.array([int(mask.sum()) for mask in masks]))
        else:
            pairs = frames.pair_differences(self.camera)
            self.counts.append(_anchored_counts(pairs, torch.from_numpy(self.thresholds)).numpy())

    def kept(self, thresholds_K: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.stack(self.counts)[:, np.searchsorted(self.thresholds, thresholds_K)] / self.tokens

    def find(self, target: float) -> float:
        total = self.tokens * len(self.counts)
        shares = np.sum(self.counts, axis=0) / total
        wanted = round((1 - target) * total)
        _refuse_what_no_threshold_keeps(target, wanted, float(shares[0]), float(shares.min()), total)
        return float(self.thresholds[np.abs(shares - target).argmin()])


def _anchored_counts(pairs: Tensor, thresholds_K: Tensor) -> Tensor:
    """Tokens that the rule with anchors keeps at each threshold: [B, T', T', H', W'] -> int64 [K], over all clips."""
    pairs_TTP = pairs.movedim(0, 2).flatten(2)
    limits_K1 = thresholds_K.to(pairs.dtype)[:, None]
    time, _, places = pairs_TTP.shape
    anchor_KP = torch.zeros(len(thresholds_K), places, dtype=torch.int64)
    counts_K = torch.full((len(thresholds_K),), places)
    for t in range(1, time):
        differs_KP = pairs_TTP[t].gather(0, anchor_KP) > limits_K1
        anchor_KP[differs_KP] = t
        counts_K += differs_KP.sum(1)
    return counts_K


def _refuse_what_no_threshold_keeps(target: float, wanted: int, most: float, least: float, total: int) -> None:
    """Targets above what exact repeats leave, or below what scenes that are kept whole leave, to the token."""
    if wanted < round((1 - most) * total):
        raise InvalidArgumentError(
            f"target_keep is {target:g}, but threshold 0, which drops repeats only, keeps {most:.1%} of these "
            f"tokens; give at most that, or take --rule none"
        )
    if wanted > round((1 - least) * total):
        raise InvalidArgumentError(
            f"target_keep is {target:g}, but no threshold keeps less than {least:.1%} of these tokens: first steps and "
            f"new scenes are kept whole; take more frames, or --rule budget --keep-ratio {target:g}"
        )


def _roundest(low: float, high: float) -> float:
    """A number of few digits near the middle of [low, high)."""
    middle = low + (high - low) / 2
    candidates = (round(middle, digits) for digits in range(1, 17))
    return next((number for number in candidates if low <= number < high), low)


def refuse_less_than_a_step(target_keep: float, settings: CalibrateSettings) -> None:
    """Found before anything is decoded: the first time step stays at any threshold."""
    least = 1 / settings.grid.time
    if target_keep < least:
        frames = settings.spec.tubelet_size * ceil(1 / target_keep)
        raise InvalidArgumentError(
            f"target_keep is {target_keep:g}, but at any threshold a clip of {settings.clip.num_frames} frames keeps "
            f"its first time step, {least:.1%} of its tokens; take {frames} frames or more, or --rule budget "
            f"--keep-ratio {target_keep:g}"
        )

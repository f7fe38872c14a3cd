"""The jobs behind `rlt calibrate`: by the share of tokens, or by how often a network changes its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from rlt.calibrate.results import CalibrateSettings, Calibration, Step
from rlt.calibrate.shares import CURVE, refuse_less_than_a_step, shares_of
from rlt.checks import share
from rlt.data.clips import ViewConfig
from rlt.data.manifest import MANIFEST_EXTENSIONS, Manifest, VideoEntry, read_manifest
from rlt.errors import InvalidArgumentError, VideoError
from rlt.evaluation.results import EvaluationSettings
from rlt.evaluation.statistics import bootstrap_means, wilson_interval
from rlt.frontier.arms import FrontierArm
from rlt.frontier.measure import measure_frontier
from rlt.frontier.results import COLUMNS
from rlt.network.vit import VisionTransformer
from rlt.tokens import PatchView
from rlt.video import list_videos, read_spread

LADDER = (0.0125, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6)
"""Thresholds that `calibrate_agreement` tries, rising."""
Progress = Callable[[int, int, str], None]
"""Called with (videos done, videos in all, name of the last one)."""


def calibrate_tokens(
    data: Sequence[str | Path],
    target_keep: float,
    settings: CalibrateSettings | None = None,
    *,
    on_progress: Progress | None = None,
) -> Calibration:
    """Find the threshold at which the rule keeps a share of the tokens of a data set; each video is decoded once.

    Where tokens are compared with the previous ones the threshold is exact: it lies between the smallest difference
    that is to be kept and the largest that is not. With anchors it is the best of a thousand thresholds 0.8 % apart.

    Args:
        data: one manifest, or videos and folders.
        target_keep: share of the tokens, mean over clips, above 0 and up to 1.
        settings: the rule and the clips.
        on_progress: called after every video.

    Returns:
        The rule with its threshold. Differences of exactly one size cannot be told apart: `found` says what is kept.

    Raises:
        InvalidArgumentError: for a share that no threshold keeps, with the nearest.
        VideoError: if no video can be read.
    """
    share(target_keep=target_keep)
    settings = settings or CalibrateSettings()
    refuse_less_than_a_step(target_keep, settings)
    manifest = _videos(data)
    shares = shares_of(settings)
    failed = [(entry.path, entry.status) for entry in manifest.entries if not entry.usable]
    for done, entry in enumerate(manifest.usable, 1):
        try:
            clips = read_spread(entry.path, settings.clip, settings.num_clips, decoder=settings.decoder)
            shares.add(PatchView(torch.stack([clip.frames for clip in clips]), settings.spec))
        except VideoError as error:
            failed.append((entry.path, str(error)))
        if on_progress is not None:
            on_progress(done, len(manifest.usable), Path(entry.path).name)
    if not len(shares):
        raise VideoError(f"none of {len(manifest)} videos can be read; the first: {': '.join(failed[0])}")
    threshold = shares.find(target_keep)
    thresholds = np.array([threshold, *CURVE])
    found, *curve = map(Step, thresholds.tolist(), bootstrap_means(shares.kept(thresholds)))
    return Calibration(
        rule=replace(settings.rule, threshold=threshold),
        found=found,
        curve=tuple(curve),
        asked={"target_keep": target_keep},
        data=tuple(map(str, data)),
        settings=settings,
        num_videos=len(shares),
        failed=tuple(failed),
    )


def calibrate_agreement(
    data: Sequence[str | Path],
    max_disagreement: float,
    model: VisionTransformer,
    settings: CalibrateSettings | None = None,
    *,
    thresholds: Sequence[float] = LADDER,
    device: str = "cpu",
    dtype: str = "float32",
    checkpoint: str | None = None,
    cache: str | Path | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Find the largest threshold at which a network nearly always puts the class first that it puts first densely.

    It is the last of the rising thresholds before the first that differs too often. `Calibration.is_certain` tells
    whether the data set is large enough to say so.

    Args:
        data: one manifest, or videos and folders.
        max_disagreement: share of the clips, above 0 and up to 1.
        model: counts run lengths where its `run_lengths` says; its patches are those that are compared.
        settings: the rule and the clips.
        thresholds: what is tried, see `LADDER`.
        device: where the network runs.
        dtype: "float32", "bfloat16" or "float16".
        checkpoint: where the network comes from, for the record.
        cache: folder for the numbers of single videos, see `rlt.frontier.measure_frontier`.
        on_progress: called after every video.

    Raises:
        InvalidArgumentError: if already the smallest threshold differs too often.
        VideoError: if no video can be read.
    """
    share(max_disagreement=max_disagreement)
    if not thresholds:
        raise InvalidArgumentError("thresholds are none; give at least one")
    settings = replace(settings or CalibrateSettings(), spec=model.config.patches)
    arms = [
        FrontierArm("calibrated", replace(settings.rule, threshold=x), model.run_lengths) for x in sorted(thresholds)
    ]
    how = EvaluationSettings(
        settings.clip, ViewConfig(settings.num_clips, 1), device=device, dtype=dtype, decoder=settings.decoder
    )
    result = measure_frontier(model, _videos(data), how, arms, cache=cache, on_progress=on_progress)
    kept_NK, agrees_NK = (
        np.array([[video.values[arm][:, COLUMNS.index(name)].mean() for arm in arms] for video in result.videos])
        for name in ("tokens_kept", "agrees")
    )
    count = len(result.videos)
    differ = [wilson_interval(other, count) for other in (1 - agrees_NK).sum(0).clip(0, count).tolist()]
    curve = tuple(map(Step, sorted(thresholds), bootstrap_means(kept_NK), differ))
    within = [interval.value <= max_disagreement for interval in differ]
    if not within[0]:
        raise InvalidArgumentError(
            f"max_disagreement is {max_disagreement:g}, but already at threshold {curve[0].threshold:g} the class "
            f"differs in {differ[0].value:.1%} of the clips; allow more, or take --rule none"
        )
    found = curve[[*within, False].index(False) - 1]
    return Calibration(
        rule=replace(settings.rule, threshold=found.threshold),
        found=found,
        curve=curve,
        asked={"max_disagreement": max_disagreement},
        data=tuple(map(str, data)),
        settings=settings,
        num_videos=count,
        failed=result.failed,
        network={"checkpoint": checkpoint, "run_lengths": model.run_lengths, "device": device, "dtype": dtype},
    )


def _videos(data: Sequence[str | Path]) -> Manifest:
    """A manifest as it is, or one of videos and folders, all of one class."""
    if len(data) == 1 and Path(data[0]).suffix.lower() in MANIFEST_EXTENSIONS:
        return read_manifest(data[0])
    return Manifest(tuple(VideoEntry(str(path), 0, "video") for path in list_videos(list(data))), ("video",))

"""Two runs on the same videos, compared video by video."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rlt.errors import InvalidArgumentError
from rlt.evaluation.predictions import VideoPrediction, read_predictions
from rlt.evaluation.statistics import Interval, PairedCounts, accuracy_difference, mcnemar_exact, wilson_interval


@dataclass(frozen=True)
class PairedComparison:
    """How two runs differ on the videos that both have."""

    first: str
    second: str
    """Names of the runs: their files."""
    counts: PairedCounts
    """How many videos each gets right, top-1."""
    same_prediction: int
    """Videos to which both give the same class, right or wrong."""
    top1_first: Interval
    top1_second: Interval
    """Top-1 of each run with Wilson's 95 % interval."""
    difference: Interval
    """Top-1 of the first minus the second, with Newcombe's paired 95 % interval."""
    p_value: float
    """Of McNemar's exact two-sided test."""
    tokens_kept_first: float
    tokens_kept_second: float
    """Share of the tokens that entered the network in each run, mean over the videos."""
    left_out: tuple[str, ...]
    """Videos that only one of the runs has, because the other could not read them."""

    def to_json(self) -> dict[str, object]:
        """All numbers, ready for JSON."""
        counts = self.counts
        return {name: value for name, value in asdict(self).items() if name != "counts"} | {
            "num_videos": counts.total,
            "both_right": counts.both,
            "only_first_right": counts.only_first,
            "only_second_right": counts.only_second,
            "both_wrong": counts.neither,
            "difference_interval": "Newcombe, paired, 95 %",
            "test": "McNemar, exact, two-sided",
        }


def compare_predictions(first: str | Path, second: str | Path) -> PairedComparison:
    """Compare two Parquet files of `write_predictions` on the videos that both hold, matched by path.

    Raises:
        InvalidArgumentError: if a file cannot be read, no video is in both, or a video has another label in each.
        MissingDependencyError: if pyarrow cannot be imported.
    """
    runs = [{video.path: video for video in read_predictions(path)} for path in (first, second)]
    shared = [path for path in runs[0] if path in runs[1]]
    if not shared:
        raise InvalidArgumentError(f"{first} and {second} have no video in common; evaluate both on the same manifest")
    pairs = [(runs[0][path], runs[1][path]) for path in shared]
    for ours, theirs in pairs:
        if ours.label_id != theirs.label_id:
            raise InvalidArgumentError(
                f"{ours.path} has label {ours.label_id} in {first} and {theirs.label_id} in {second}; "
                "evaluate both on the same manifest"
            )
    counts = _count(pairs)
    return PairedComparison(
        first=str(first),
        second=str(second),
        counts=counts,
        same_prediction=sum(ours.predicted_id == theirs.predicted_id for ours, theirs in pairs),
        top1_first=wilson_interval(counts.both + counts.only_first, counts.total),
        top1_second=wilson_interval(counts.both + counts.only_second, counts.total),
        difference=accuracy_difference(counts),
        p_value=mcnemar_exact(counts.only_first, counts.only_second),
        tokens_kept_first=fmean(ours.tokens_kept for ours, _ in pairs),
        tokens_kept_second=fmean(theirs.tokens_kept for _, theirs in pairs),
        left_out=tuple(sorted(runs[0].keys() ^ runs[1].keys())),
    )


def _count(pairs: list[tuple[VideoPrediction, VideoPrediction]]) -> PairedCounts:
    outcomes = [(ours.correct, theirs.correct) for ours, theirs in pairs]
    return PairedCounts(
        both=outcomes.count((True, True)),
        only_first=outcomes.count((True, False)),
        only_second=outcomes.count((False, True)),
        neither=outcomes.count((False, False)),
    )

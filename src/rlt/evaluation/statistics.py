"""How sure a difference is: intervals for accuracies, and a paired test of two runs.

Plain functions of counts and numbers, exact where that is possible; the bootstrap draws the same samples every time.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from rlt.errors import InvalidArgumentError

_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A number with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """All three."""
        return asdict(self)


def wilson_interval(successes: float, total: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: it keeps its coverage for few videos and near 0 and 1.

    Successes may be parts of one: a video that half of its clips speak for.
    """
    if not 0 <= successes <= total or total < 1:
        raise InvalidArgumentError(f"{successes} successes of {total}; at least 1 trial and 0 to all successes needed")
    if not 0 < confidence < 1:
        raise InvalidArgumentError(f"confidence is {confidence}; between 0 and 1 is needed, such as 0.95")
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    share = successes / total
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2))) / (1 + z2 / total)
    # At 0 and 1 the ends are exact, whatever rounding says.
    return Interval(share, 0.0 if successes == 0 else centre - half, 1.0 if successes == total else centre + half)


def bootstrap_means(values_NK: NDArray[np.float64], *, confidence: float = 0.95) -> list[Interval]:
    """The mean of each of K columns over N videos, with the middle 95 % of the means of 2000 resamples."""
    draws, count = np.random.default_rng(0), len(values_NK)
    shares = (np.bincount(draws.integers(count, size=count), minlength=count) / count for _ in range(_RESAMPLES))
    means = np.stack([share @ values_NK for share in shares])
    ends = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2), axis=0)
    return [Interval(*ours) for ours in zip(values_NK.mean(0).tolist(), *ends.tolist(), strict=True)]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: do two runs on the same videos differ in accuracy?

    Under the hypothesis that they do not, a video that only one of them gets right is either's with chance 1/2. The
    p-value is twice the smaller tail of that binomial distribution, at most 1.
    """
    if min(only_first, only_second) < 0:
        raise InvalidArgumentError(f"counts are {only_first} and {only_second}; 0 or more is needed")
    total = only_first + only_second
    ways, tail = 1, 1  # binomial coefficients one from the other, in whole numbers: no rounding for any count
    for chosen in range(min(only_first, only_second)):
        ways = ways * (total - chosen) // (chosen + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


@dataclass(frozen=True)
class PairedCounts:
    """How many videos are right in both of two runs, in only one of them, and in neither."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def total(self) -> int:
        """All videos."""
        return self.both + self.only_first + self.only_second + self.neither


def accuracy_difference(counts: PairedCounts, *, confidence: float = 0.95) -> Interval:
    """Accuracy of the first run minus that of the second, with Newcombe's interval for paired proportions.

    Method 10 of Newcombe, Statistics in Medicine 17 (1998): the two Wilson intervals joined, with the correlation of
    the runs corrected for continuity. Like them it holds for few videos and does not leave -1..1.
    """
    first = wilson_interval(counts.both + counts.only_first, counts.total, confidence=confidence)
    second = wilson_interval(counts.both + counts.only_second, counts.total, confidence=confidence)
    correlation = _corrected_correlation(counts)

    def joined(ours: float, theirs: float) -> float:
        return math.sqrt(max(ours**2 - 2 * correlation * ours * theirs + theirs**2, 0.0))

    difference = (counts.only_first - counts.only_second) / counts.total
    return Interval(
        difference,
        difference - joined(first.value - first.low, second.high - second.value),
        difference + joined(first.high - first.value, second.value - second.low),
    )


def _corrected_correlation(counts: PairedCounts) -> float:
    """Phi coefficient; a positive one is pulled towards 0 by half the number of videos."""
    both, only_first, only_second, neither = counts.both, counts.only_first, counts.only_second, counts.neither
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    product: float = both * neither - only_first * only_second
    if product > 0:
        product = max(product - counts.total / 2, 0.0)
    return product / math.sqrt(margins)

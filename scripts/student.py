"""The mean over repetitions, such as seeds, with Student's t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from rlt.errors import InvalidArgumentError
from rlt.evaluation.statistics import Interval


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean over repetitions, such as seeds, with Student's t interval. A single value has an endless interval.

    Raises:
        InvalidArgumentError: for no values, or a confidence out of range.
    """
    if not values:
        raise InvalidArgumentError("no values to average; give at least one")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = student_quantile(len(values) - 1, confidence=confidence) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def student_quantile(degrees: int, *, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = confidence, for Student's distribution with a whole number of degrees of freedom.

    Raises:
        InvalidArgumentError: for degrees below 1, or a confidence out of range.
    """
    if degrees < 1:
        raise InvalidArgumentError(f"degrees is {degrees}; at least 1 is needed")
    if not 0 < confidence < 1:
        raise InvalidArgumentError(f"confidence is {confidence}; between 0 and 1 is needed, such as 0.95")
    # By bisection of the angle arctan(t / sqrt(degrees)), in which the probability is a finite sum.
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_probability(angle: float, degrees: int) -> float:
    """P(|T| < sqrt(degrees) tan(angle)): the finite series in sine and cosine that whole degrees have."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for index in range(1 + odd, degrees - 2, 2):
        term *= index / (index + 1) * cosine**2
        total += term
    if odd:
        return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
    return sine * total

"""Intervals and tests against closed forms, published examples and enumeration."""

from __future__ import annotations

import math
import runpy
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlt.errors import InvalidArgumentError
from rlt.evaluation.statistics import (
    Interval,
    PairedCounts,
    accuracy_difference,
    bootstrap_means,
    mcnemar_exact,
    wilson_interval,
)

STUDENT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "student.py"))
mean_interval, student_quantile = STUDENT["mean_interval"], STUDENT["student_quantile"]


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_examples(successes: int, total: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 857, table I."""
    found = wilson_interval(successes, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_holds_the_share_and_solves_its_equation(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    found, mirrored = wilson_interval(successes, total), wilson_interval(total - successes, total)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    for end in (found.low, found.high):  # the score test stands at its limit there
        distance = abs(found.value - end)
        assert distance == pytest.approx(1.959963985 * math.sqrt(end * (1 - end) / total), abs=1e-7)


def test_mcnemar_by_enumeration() -> None:
    """All ways to give each discordant video to one of the runs."""
    for total in range(9):
        for ours in range(total + 1):
            extreme = max(ours, total - ours)
            flips = [sum(way) for way in product((0, 1), repeat=total)]
            as_extreme = sum(max(count, total - count) >= extreme for count in flips)
            assert mcnemar_exact(ours, total - ours) == pytest.approx(min(1.0, as_extreme / 2**total))


def test_mcnemar_closed_forms() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 6) == mcnemar_exact(6, 0) == 2 / 2**6
    assert mcnemar_exact(1, 9) == 2 * (1 + 10) / 2**10
    assert mcnemar_exact(50, 50) == 1.0
    assert mcnemar_exact(3, 1000) < 1e-280  # no overflow, no underflow to nonsense
    tail = sum(Fraction(math.comb(2000, k), 2**2000) for k in range(951))
    assert mcnemar_exact(950, 1050) == pytest.approx(float(2 * tail), rel=1e-12)


def test_the_paired_difference_equals_the_published_example() -> None:
    """Newcombe, Statistics in Medicine 17 (1998) 2635: 36, 12, 2, 0 gives 0.0569 to 0.3404 by method 10."""
    found = accuracy_difference(PairedCounts(36, 12, 2, 0))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=5e-5)


def test_the_paired_difference_without_discordant_videos() -> None:
    """All right in both: with no correlation to be seen, the Wilson intervals join as independent ones."""
    found, wilson = accuracy_difference(PairedCounts(30, 0, 0, 0)), wilson_interval(30, 30)
    assert found.value == 0
    assert (found.low, found.high) == pytest.approx((wilson.low - 1, 1 - wilson.low))


@given(*[st.integers(0, 60)] * 4)
def test_the_paired_difference_turns_around_and_stays_in_range(both: int, first: int, second: int, none: int) -> None:
    if both + first + second + none == 0:
        return
    found = accuracy_difference(PairedCounts(both, first, second, none))
    turned = accuracy_difference(PairedCounts(both, second, first, none))
    assert -1 - 1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    assert (found.low, found.high) == pytest.approx((-turned.high, -turned.low), abs=1e-12)


def test_the_paired_difference_covers_as_often_as_it_says() -> None:
    """Exact coverage, by enumeration of all outcomes of 20 videos with a true difference of 0.1."""
    chances = (0.6, 0.2, 0.1, 0.1)
    covered = 0.0
    for both, first, second in product(range(21), repeat=3):
        if (none := 20 - both - first - second) < 0:
            continue
        counts = (both, first, second, none)
        ways = math.factorial(20) // math.prod(map(math.factorial, counts))
        found = accuracy_difference(PairedCounts(*counts))
        if found.low <= 0.1 <= found.high:
            covered += ways * math.prod(chance**count for chance, count in zip(chances, counts, strict=True))
    assert 0.94 < covered < 0.98


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (5, 2.57058), (10, 2.22814), (30, 2.04227)],
)
def test_students_t_equals_the_table(degrees: int, quantile: float) -> None:
    assert student_quantile(degrees) == pytest.approx(quantile, rel=3e-6)


def test_students_t_closed_forms() -> None:
    assert student_quantile(1, confidence=0.5) == pytest.approx(1.0)  # Cauchy: quartiles at -1 and 1
    assert student_quantile(2, confidence=0.9) == pytest.approx(0.9 * math.sqrt(2 / (1 - 0.9**2)))
    assert student_quantile(5000) == pytest.approx(1.96, abs=1e-3)
    assert student_quantile(3, confidence=0.99) == pytest.approx(5.84091, rel=1e-5)


def test_the_mean_over_seeds() -> None:
    found = mean_interval([0.7, 0.8, 0.9])
    half = 4.30265 * 0.1 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8 - half, 0.8 + half), rel=1e-5)
    assert mean_interval([0.7]) == Interval(0.7, -math.inf, math.inf)


def test_the_bootstrap_of_a_mean() -> None:
    values = np.stack([np.random.default_rng(1).normal(3, 2, 400), np.full(400, 0.3), np.arange(400) % 2], axis=1)
    normal, constant, coin = bootstrap_means(values)
    half = 1.96 * values[:, 0].std() / 20
    assert (normal.low, normal.high) == pytest.approx((normal.value - half, normal.value + half), abs=0.03)
    assert (constant.value, constant.low, constant.high) == pytest.approx((0.3, 0.3, 0.3))
    assert (coin.low, coin.high) == pytest.approx((0.451, 0.549), abs=0.006)
    assert bootstrap_means(values) == [normal, constant, coin]
    assert bootstrap_means(values[:, 2:], confidence=0.5)[0].high == pytest.approx(0.5 + 0.674 / 40, abs=0.004)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="5 successes of 4"):
        wilson_interval(5, 4)
    with pytest.raises(InvalidArgumentError, match="0 successes of 0"):
        accuracy_difference(PairedCounts(0, 0, 0, 0))
    with pytest.raises(InvalidArgumentError, match="counts are -1 and 2"):
        mcnemar_exact(-1, 2)
    with pytest.raises(InvalidArgumentError, match="no values"):
        mean_interval([])
    with pytest.raises(InvalidArgumentError, match=r"confidence is 95; .* such as 0\.95"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(InvalidArgumentError, match="degrees is 0"):
        student_quantile(0)

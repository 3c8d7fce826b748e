"""Intervals against known values and their own promise."""

from __future__ import annotations

import numpy as np
import pytest

from longtake.eval.stats import (
    bootstrap,
    estimate,
    paired_difference,
    paired_ratio,
    unpaired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    # From Wilson's formula evaluated by hand and R's prop.test(correct=FALSE).
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (10, 10, 0.7225, 1.0)],
)
def test_wilson_against_published_values(successes: int, total: int, low: float, high: float) -> None:
    assert wilson(successes, total) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(120):
        low, high = bootstrap(rng.normal(3.0, 1.0, 40).tolist())
        hits += low <= 3.0 <= high
    assert 0.87 <= hits / 120 <= 1.0


def test_estimates_choose_their_interval() -> None:
    assert estimate([1.0, 1.0, 0.0, 1.0], proportion=True).high == pytest.approx(wilson(3, 4)[1])
    nothing = estimate([0.0, 0.0, 0.0])  # a magnitude, of which all that was seen is zero
    assert (nothing.low, nothing.high) == (0, 0)
    spread = estimate([0.5, 0.7, None, float("nan"), 0.9])
    assert spread.num == 3
    assert spread.value == pytest.approx(0.7)
    assert spread.low is not None
    assert spread.high is not None
    assert spread.low < 0.7 < spread.high
    assert estimate([None]).value is None


def test_paired_differences_see_what_pooled_ones_miss() -> None:
    rng = np.random.default_rng(2)
    theirs = rng.uniform(0, 1, 50)
    ours = theirs - 0.05 + rng.normal(0, 0.01, 50)
    difference = paired_difference(ours.tolist(), theirs.tolist())
    assert difference.high is not None
    assert difference.high < 0
    assert difference.value == pytest.approx(-0.05, abs=0.01)
    assert estimate(ours.tolist()).high > estimate(theirs.tolist()).low  # type: ignore[operator]
    assert paired_difference([None, 1.0], [2.0, None]).num == 0
    few = paired_difference([1.0] * 4, [0.5] * 4)
    assert (few.value, few.interval, few.num) == (0.5, None, 4)  # four alike are no certainty
    assert paired_difference([1.0] * 5, [0.5] * 5).interval == (0.5, 0.5)


def test_unpaired_differences_need_no_common_scenes() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(1.0, 0.2, 60), rng.normal(1.1, 0.2, 90)
    found = unpaired_difference(ours.tolist(), [*theirs.tolist(), None])
    assert found.value == pytest.approx(ours.mean() - theirs.mean())
    assert found.num == 60
    assert found.low is not None
    assert found.high is not None
    # The normal approximation of the interval's width.
    width = 2 * 1.96 * np.sqrt(ours.var() / 60 + theirs.var() / 90)
    assert found.high - found.low == pytest.approx(width, rel=0.1)
    assert unpaired_difference([], [1.0]).value is None


def test_ratios_are_of_means() -> None:
    found = paired_ratio([1.0, 3.0, None], [2.0, 2.0, 5.0])
    assert (found.value, found.num) == (1.0, 2)
    assert found.low is not None
    assert found.low >= 0.5
    assert paired_ratio([1.0], [0.0]).value is None


def test_shares_that_are_nearly_alike_are_no_surer_than_wilson_is() -> None:
    """A resample of few such values hardly ever differs from them."""
    nearly = estimate([1.0] * 8 + [0.98], proportion=True)
    exact = estimate([1.0] * 9, proportion=True)
    assert nearly.low == pytest.approx(exact.low, abs=0.02)
    assert estimate([0.96], proportion=True).low == pytest.approx(wilson(0.96, 1)[0])
    spread = [0.0, 1.0] * 20 + [0.5]
    assert estimate(spread, proportion=True).low <= bootstrap(spread)[0]

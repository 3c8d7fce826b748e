"""95 % intervals: Wilson's for proportions of independent scenes, the bootstrap over scenes for means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

from longtake.config import Config

Z_95: Final = 1.959964
NUM_RESAMPLES: Final = 2000
BOOTSTRAP_SEED: Final = 0
MIN_SCENES: Final = 5
"""Fewer differences than this say nothing of how they vary: resampling them would call equal ones certain."""


class Estimate(Config):
    """A value with its 95 % interval over `num` scenes; all None where nothing could be measured, the
    interval where there are too few scenes for one.
    """

    value: float | None
    low: float | None
    high: float | None
    num: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high, where they are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


def wilson(successes: float, total: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 %.

    Sensible at 0 and 1 and for small totals, where the normal approximation is not. (0, 1) without data.
    """
    if total == 0:
        return (0.0, 1.0)
    share = successes / total
    square = Z_95**2
    center = (share + square / (2 * total)) / (1 + square / total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total**2)) / (1 + square / total)
    # At the ends the bound is the share itself; rounding must not say otherwise.
    return (0.0 if successes == 0 else center - half, 1.0 if successes == total else center + half)


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, 95 %, resampling scenes; the same for the same values."""
    sample = np.asarray(values, np.float64)
    indices = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(sample), (NUM_RESAMPLES, len(sample)))
    low, high = np.percentile(sample[indices].mean(axis=1), [2.5, 97.5])
    return (float(low), float(high))


def estimate(values: Sequence[float | None], proportion: bool = False) -> Estimate:
    """Mean of one value per scene, None and NaN left out.

    Args:
        values: One per scene.
        proportion: Whether they are shares, 0 to 1. Wilson's interval of their mean is then the least: it is
            exact where each is 0 or 1, wide enough for shares between, and no point where few are all alike.
    """
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not known:
        return Estimate(value=None, low=None, high=None, num=0)
    if proportion and all(value in (0.0, 1.0) for value in known):
        low, high = wilson(sum(known), len(known))
    else:
        low, high = bootstrap(known)
        if proportion:
            least, most = wilson(sum(known), len(known))
            low, high = min(low, least), max(high, most)
    return Estimate(value=float(np.mean(known)), low=low, high=high, num=len(known))


def paired_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate:
    """Mean of ours - theirs over the scenes where both are known, with the paired bootstrap's interval, or
    without one where they are fewer than `MIN_SCENES`.
    """
    pairs = zip(ours, theirs, strict=True)
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    known = [value for value in differences if not math.isnan(value)]
    if not known:
        return Estimate(value=None, low=None, high=None, num=0)
    low, high = bootstrap(known) if len(known) >= MIN_SCENES else (None, None)
    return Estimate(value=float(np.mean(known)), low=low, high=high, num=len(known))


def unpaired_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate:
    """Mean of ours less mean of theirs, of different scenes, with the bootstrap over both.

    Its `num` is the smaller of the two numbers of scenes.
    """
    mine, others = _known(ours), _known(theirs)
    if not len(mine) or not len(others):
        return Estimate(value=None, low=None, high=None, num=0)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    means = [
        sample[rng.integers(0, len(sample), (NUM_RESAMPLES, len(sample)))].mean(axis=1)
        for sample in (mine, others)
    ]
    low, high = np.percentile(means[0] - means[1], [2.5, 97.5])
    value = float(mine.mean() - others.mean())
    return Estimate(value=value, low=float(low), high=float(high), num=min(len(mine), len(others)))


def paired_ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate:
    """Mean of ours over mean of theirs, of the scenes where both are known, with the paired bootstrap.

    Nothing where the mean of theirs is not positive.
    """
    pairs = [
        (mine, other)
        for mine, other in zip(ours, theirs, strict=True)
        if mine is not None and other is not None and not math.isnan(mine) and not math.isnan(other)
    ]
    if not pairs or sum(other for _, other in pairs) <= 0:
        return Estimate(value=None, low=None, high=None, num=0)
    sample = np.asarray(pairs, np.float64)
    indices = np.random.default_rng(BOOTSTRAP_SEED).integers(0, len(sample), (NUM_RESAMPLES, len(sample)))
    means = sample[indices].mean(axis=1)
    possible = means[means[:, 1] > 0]  # a resample may hold nothing but zeros
    low, high = np.percentile(possible[:, 0] / possible[:, 1], [2.5, 97.5])
    value = sample[:, 0].mean() / sample[:, 1].mean()
    return Estimate(value=float(value), low=float(low), high=float(high), num=len(pairs))


def _known(values: Sequence[float | None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([value for value in values if value is not None and not math.isnan(value)], np.float64)

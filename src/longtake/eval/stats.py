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


class Estimate(Config):
    """A value with its 95 % interval over `num` scenes; all None where nothing could be measured."""

    value: float | None
    low: float | None
    high: float | None
    num: int


def wilson(successes: int, total: int) -> tuple[float, float]:
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
        proportion: Whether they are shares, 0 to 1; where each is 0 or 1 the interval is then Wilson's.
    """
    known = [float(value) for value in values if value is not None and not math.isnan(value)]
    if not known:
        return Estimate(value=None, low=None, high=None, num=0)
    if proportion and all(value in (0.0, 1.0) for value in known):
        low, high = wilson(round(sum(known)), len(known))
    else:
        low, high = bootstrap(known)
    return Estimate(value=float(np.mean(known)), low=low, high=high, num=len(known))


def paired_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate:
    """Mean of ours - theirs over the scenes where both are known, with the paired bootstrap's interval."""
    pairs = zip(ours, theirs, strict=True)
    differences = [mine - other for mine, other in pairs if mine is not None and other is not None]
    known = [value for value in differences if not math.isnan(value)]
    if not known:
        return Estimate(value=None, low=None, high=None, num=0)
    low, high = bootstrap(known)
    return Estimate(value=float(np.mean(known)), low=low, high=high, num=len(known))

"""Diversity across seeds: do videos of one prompt begin as differently as real clips of it?

Real clips of a prompt differ in what it leaves open: the place of the object, where it is heading (which for
an orbit says its phase) and its size. Measured on the first object of the prompt, over the first second.

Legend: s samples, k object slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from longtake.config import Config
from longtake.world.motion import Float64
from longtake.world.vocabulary import FPS, REFERENCE_HEIGHT

MIN_WAY_PX: Final = 2.0
"""An object that gets less far than this in the first second has no heading."""
SPREADS: Final = ("diversity_px", "diversity_heading", "diversity_radius_px")
"""`diversity_px`: mean distance between first places, pixels of 64; `diversity_heading`: circular variance of
the headings, 0 (all the same) to 1; `diversity_radius_px`: mean difference of the radii, pixels of 64."""


class Start(Config):
    """How an object begins, in pixels of 64.

    Attributes:
        center: (x, y) where it is first seen.
        radius: Median over the first second.
        heading: Direction of its way over the first second, radians; None where it hardly moves.
    """

    center: tuple[float, float]
    radius: float
    heading: float | None


def start_of(center_s2: Float64, radius_s: Float64, frames_s: NDArray[np.int64]) -> Start | None:
    """The start of a track; None where it is not seen in the first second.

    Args:
        center_s2: Centres in view heights, NaN where it is not seen.
        radius_s: Radii in view heights.
        frames_s: Frame number of each sample.
    """
    seen_s = np.isfinite(center_s2).all(axis=1) & (frames_s < FPS)
    if not seen_s.any():
        return None
    track_s2 = center_s2[seen_s] * REFERENCE_HEIGHT
    x, y = (track_s2[-1] - track_s2[0]).tolist()
    moves = float(np.hypot(x, y)) >= MIN_WAY_PX
    return Start(
        center=(float(track_s2[0, 0]), float(track_s2[0, 1])),
        radius=float(np.median(radius_s[seen_s])) * REFERENCE_HEIGHT,
        heading=float(np.arctan2(y, x)) if moves else None,
    )


def spreads(starts: Sequence[Start]) -> dict[str, float | None]:
    """The `SPREADS` of one prompt's videos; None where fewer than two of them can be compared."""
    if len(starts) < 2:
        return dict.fromkeys(SPREADS)
    headings = np.array([start.heading for start in starts if start.heading is not None])
    # Of still objects, a few may creep; most must move for a heading to mean anything.
    enough = len(headings) >= max(2, len(starts) / 2)
    return {
        "diversity_px": _mean_distance(np.array([start.center for start in starts])),
        "diversity_heading": float(1 - abs(np.exp(1j * headings).mean())) if enough else None,
        "diversity_radius_px": _mean_distance(np.array([[start.radius] for start in starts])),
    }


def _mean_distance(points_nd: Float64) -> float:
    """Mean distance between two of the points."""
    distance_nn = np.linalg.norm(points_nd[:, None] - points_nd, axis=-1)
    return float(distance_nn[np.triu_indices(len(points_nd), 1)].mean())

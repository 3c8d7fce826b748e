"""What kind of motion a track of centres is: each of the world's motions is fitted, the best one named.

A track that none of them explains to within two pixels (of 64) is called by no name, so that jerky or
drifting paths do not pass for bouncing.

Legend: t samples, g grid points of a fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.world.motion import Float64, reflect
from longtake.world.vocabulary import MOTIONS, ORBIT_RADII_PX, REFERENCE_HEIGHT, SPEED_RANGE_PX, Motion

MIN_SAMPLES = 6
MIN_SEEN = 0.6
"""Share of the samples in which the object must have been found."""
STILL_SPREAD = 1.5 / REFERENCE_HEIGHT
"""A track whose root-mean-square distance from its median is below this is still."""
LEVEL_RANGE = 3.0 / REFERENCE_HEIGHT
"""A sweep's height may be this much,"""
MAX_RESIDUAL = 2.0 / REFERENCE_HEIGHT
"""Root-mean-square distance from the fitted motion up to which it is named."""
LEVEL_RATIO = 0.2
"""or this share of its width, whichever is more."""
_ORBIT_RADII = (ORBIT_RADII_PX[0] * 0.6 / REFERENCE_HEIGHT, ORBIT_RADII_PX[1] * 1.4 / REFERENCE_HEIGHT)
_TURNS = (0.5 * SPEED_RANGE_PX[0] / ORBIT_RADII_PX[1], 1.5 * SPEED_RANGE_PX[1] / ORBIT_RADII_PX[0])


@dataclass(frozen=True)
class MotionFit:
    """The motion that explains a track best.

    Attributes:
        motion: Index into `MOTIONS`, -1 where the track is too short, too patchy or like none of them.
        residual: Root-mean-square distance of the track from that motion in view heights (NaN: too short).
    """

    motion: int
    residual: float


def classify_motion(center_xy: Float64, frames: NDArray[np.int64]) -> MotionFit:
    """Names the motion of one object.

    Args:
        center_xy: Centres in view heights, [T, 2]; NaN rows where the object was not found.
        frames: Frame number of each sample, rising, [T]. Five seconds in steps of up to 6 frames are enough.
    """
    seen = np.isfinite(center_xy).all(axis=1)
    if seen.sum() < MIN_SAMPLES or seen.mean() < MIN_SEEN:
        return MotionFit(-1, float("nan"))
    track_t2 = center_xy[seen]
    time_t = (frames[seen] - frames[seen][0]).astype(np.float64)
    low, high = np.percentile(track_t2, [4, 96], axis=0)
    width, tall = (high - low).tolist()
    name: Motion = "still"
    residual = _spread(track_t2)
    if residual >= STILL_SPREAD:
        name, residual = _best_moving(track_t2, time_t, width, tall)
    named = residual <= MAX_RESIDUAL
    return MotionFit(MOTIONS.index(name) if named else -1, residual)


def _best_moving(track_t2: Float64, time_t: Float64, width: float, tall: float) -> tuple[Motion, float]:
    """The best of the moving motions and its residual."""
    across = _triangle_residual(track_t2[:, 0], time_t)
    name: Motion
    if tall < max(LEVEL_RANGE, LEVEL_RATIO * width):
        name, residual = "sweeping", float(np.hypot(across, _spread(track_t2[:, 1:])))
    else:
        name, residual = "bouncing", float(np.hypot(across, _triangle_residual(track_t2[:, 1], time_t)))
    orbit = _orbit_residual(track_t2, time_t)
    return ("orbiting", orbit) if orbit < residual else (name, residual)


def _spread(track_td: Float64) -> float:
    """Root-mean-square distance from the median."""
    offset_td = track_td - np.median(track_td, axis=0)
    return float(np.sqrt((offset_td**2).sum(axis=1).mean()))


def _orbit_residual(track_t2: Float64, time_t: Float64) -> float:
    """Distance from the best uniform circular motion with a radius like the world's.

    At a given angular speed w, center + (a cos wt - b sin wt, a sin wt + b cos wt) is linear in all three.
    """
    best = np.inf
    magnitudes = np.linspace(*_TURNS, 120)
    for turn in np.concatenate([-magnitudes, magnitudes]):
        cos_t, sin_t = np.cos(turn * time_t), np.sin(turn * time_t)
        one_t, zero_t = np.ones_like(time_t), np.zeros_like(time_t)
        design = np.concatenate(
            [np.stack([one_t, zero_t, cos_t, -sin_t], 1), np.stack([zero_t, one_t, sin_t, cos_t], 1)]
        )
        target = track_t2.T.ravel()
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        radius = float(np.hypot(solution[2], solution[3]))
        if _ORBIT_RADII[0] <= radius <= _ORBIT_RADII[1]:
            error = float(np.sqrt(((design @ solution - target) ** 2).sum() / len(time_t)))
            best = min(best, error)
    return best


def _triangle_residual(position_t: Float64, time_t: Float64) -> float:
    """Distance of a coordinate from the best motion at constant speed between two walls.

    The walls are looked for at and just beyond the outermost samples; speed and phase first on a coarse grid
    and then around its best point.
    """
    pixel = 1.0 / REFERENCE_HEIGHT
    fastest = 1.3 * SPEED_RANGE_PX[1] * pixel
    best, best_at = np.inf, (0.0, 0.0, 0.0, 0.0)
    for below in (0.0, 1.5, 3.0):
        for above in (0.0, 1.5, 3.0):
            low, high = position_t.min() - below * pixel, position_t.max() + above * pixel
            speeds = np.linspace(0.02 * fastest, fastest, 60)
            phases = np.linspace(0, 2 * (high - low), 48, endpoint=False)
            error, speed, phase = _best_triangle(position_t, time_t, low, high, speeds, phases)
            if error < best:
                best, best_at = error, (low, high, speed, phase)
    low, high, speed, phase = best_at
    speed_step, phase_step = fastest / 60, (high - low) / 24
    for _ in range(4):
        speeds = speed + speed_step * np.linspace(-1, 1, 9)
        phases = phase + phase_step * np.linspace(-1, 1, 9)
        for edge_low in (low - pixel / 2, low, low + pixel / 2):
            for edge_high in (high - pixel / 2, high, high + pixel / 2):
                found = _best_triangle(position_t, time_t, edge_low, edge_high, speeds, phases)
                if found[0] < best:
                    best, best_at = found[0], (edge_low, edge_high, found[1], found[2])
        low, high, speed, phase = best_at
        speed_step, phase_step, pixel = speed_step / 3, phase_step / 3, pixel / 2
    return best


def _best_triangle(
    position_t: Float64, time_t: Float64, low: float, high: float, speeds: Float64, phases: Float64
) -> tuple[float, float, float]:
    """The smallest rms error on a grid of speeds and phases, with its speed and phase."""
    unfolded = low + phases[:, None] + speeds[:, None, None] * time_t
    error = np.sqrt(((reflect(unfolded, low, high) - position_t) ** 2).mean(axis=-1))
    row, column = np.unravel_index(int(error.argmin()), error.shape)
    return float(error[row, column]), float(speeds[row]), float(phases[column])

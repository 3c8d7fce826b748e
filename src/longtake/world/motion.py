"""Trajectories in closed form: where an object or the camera is at any frame, without the frames before it.

Lengths are in view heights, times in frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def reflect(position: Float64, low: float, high: float) -> Float64:
    """A point moving on a line, folded back into [low, high] as by two mirrors (a triangle wave)."""
    span = high - low
    if span <= 0:
        return np.full_like(position, (low + high) / 2)
    phase = np.mod(position - low, 2 * span)
    folded: Float64 = low + np.where(phase > span, 2 * span - phase, phase)
    return folded


@dataclass(frozen=True)
class Line:
    """Constant velocity, reflected at the walls of a box; still where the velocity is zero.

    Attributes:
        start: (x, y) at frame 0.
        velocity: (x, y) per frame, before any reflection.
        low: (x, y) of the box that the centre stays in.
        high: (x, y) of the box's other corner.
    """

    start: tuple[float, float]
    velocity: tuple[float, float]
    low: tuple[float, float]
    high: tuple[float, float]

    def centers(self, frames: NDArray[np.int64]) -> Float64:
        """Centres at the given frame numbers, [T, 2] as (x, y)."""
        time = frames.astype(np.float64)
        return np.stack(
            [
                reflect(self.start[axis] + self.velocity[axis] * time, self.low[axis], self.high[axis])
                for axis in (0, 1)
            ],
            axis=1,
        )

    @property
    def speed(self) -> float:
        """View heights per frame."""
        return math.hypot(*self.velocity)


@dataclass(frozen=True)
class Orbit:
    """A circle at constant speed.

    Attributes:
        center: (x, y) of the circle.
        radius: Of the circle.
        phase: Angle at frame 0 in radians.
        turn: Radians per frame, signed.
    """

    center: tuple[float, float]
    radius: float
    phase: float
    turn: float

    def centers(self, frames: NDArray[np.int64]) -> Float64:
        """Centres at the given frame numbers, [T, 2] as (x, y)."""
        angle = self.phase + self.turn * frames.astype(np.float64)
        return np.stack(
            [self.center[0] + self.radius * np.cos(angle), self.center[1] + self.radius * np.sin(angle)],
            axis=1,
        )

    @property
    def speed(self) -> float:
        """View heights per frame."""
        return abs(self.turn) * self.radius


Path = Line | Orbit


@dataclass(frozen=True)
class Camera:
    """A view that glides left and right over a wider scene; fixed where `speed` is zero.

    Attributes:
        travel: How far the view moves from its leftmost place.
        speed: Of the camera, per frame.
        start: The view's left edge at frame 0, before reflection at 0 and `travel`.
    """

    travel: float = 0.0
    speed: float = 0.0
    start: float = 0.0

    def offsets(self, frames: NDArray[np.int64]) -> Float64:
        """Left edge of the view at the given frame numbers, [T]."""
        return reflect(self.start + self.speed * frames.astype(np.float64), 0.0, self.travel)

    @property
    def panning(self) -> bool:
        """Whether the view moves."""
        return self.speed != 0 and self.travel > 0


@dataclass(frozen=True)
class Paused:
    """A view that stands still on a camera's way, and then goes on.

    Attributes:
        camera: Whose way it is.
        begin: Frame number from which it stands.
        num_frames: For how many it does.
    """

    camera: Camera
    begin: int
    num_frames: int

    def offsets(self, frames: NDArray[np.int64]) -> Float64:
        """Left edge of the view at the given frame numbers, [T]."""
        return self.camera.offsets(frames - np.clip(frames - self.begin, 0, self.num_frames))

    @property
    def panning(self) -> bool:
        """Whether the view moves at any time."""
        return self.camera.panning


@dataclass(frozen=True)
class Glide:
    """A view that stands, glides to another place of the scene, and stands there.

    Attributes:
        start: The view's left edge before.
        end: And after.
        speed: Of the camera, per frame, positive.
        begin: Frame number from which it glides.
    """

    start: float
    end: float
    speed: float
    begin: int

    def offsets(self, frames: NDArray[np.int64]) -> Float64:
        """Left edge of the view at the given frame numbers, [T]."""
        way = np.maximum(frames.astype(np.float64) - self.begin, 0.0) * self.speed
        offsets: Float64 = self.start + math.copysign(1.0, self.end - self.start) * np.minimum(
            way, abs(self.end - self.start)
        )
        return offsets

    @property
    def panning(self) -> bool:
        """Whether the view moves at any time."""
        return self.start != self.end

    @property
    def num_frames(self) -> int:
        """For how many frames it moves."""
        return math.ceil(abs(self.end - self.start) / self.speed)

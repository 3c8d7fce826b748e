"""Scenes and their ground truth: everything about a clip, known at any frame without rendering it.

Lengths are in view heights (x to the right, y downwards, the origin at the view's or the scene's top left),
times in frames. A `Scene` is a list of `Segment`s, each in force from its own first frame.

Legend: t frames, n objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from longtake.world.errors import WorldError
from longtake.world.motion import Camera, Float64, Glide, Path, Paused
from longtake.world.shapes import coverage, extents
from longtake.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    REFERENCE_HEIGHT,
    SHAPES,
    SIZES,
    Background,
    Colour,
    Motion,
    Shape,
    Size,
)

VISIBILITY_FRAMES_AT_ONCE = 64
"""Bounds the memory that counting hidden pixels takes."""


@dataclass(frozen=True)
class SceneObject:
    """One shape on its path; `radius` is in view heights."""

    colour: Colour
    shape: Shape
    size: Size
    radius: float
    motion: Motion
    path: Path

    @property
    def reach(self) -> tuple[float, float, float, float]:
        """How far it reaches from its centre: (left, right, up, down)."""
        left, right, up, down = extents(self.shape)
        return (left * self.radius, right * self.radius, up * self.radius, down * self.radius)


@dataclass(frozen=True)
class Hills:
    """The outline of the hills: a sum of two sines over the scene's x.

    Attributes:
        level: Mean height of the outline below the view's top.
        waves: (amplitude, wavelength, phase) of each sine.
    """

    level: float
    waves: tuple[tuple[float, float, float], ...]

    def outline(self, x: Float64) -> Float64:
        """Height of the outline below the top at scene positions x."""
        height = np.full_like(x, self.level)
        for amplitude, wavelength, phase in self.waves:
            height = height + amplitude * np.sin(2 * np.pi * x / wavelength + phase)
        return height


@dataclass(frozen=True)
class Segment:
    """What is shown from frame `start` until the next segment.

    Attributes:
        start: First frame.
        objects: Back to front.
        background: What is behind them.
        hills: Given exactly where the background is "hills".
        camera: How the view moves over the scene.
        caption: The prompt in force; it need not name everything that is there.
    """

    start: int
    objects: tuple[SceneObject, ...]
    background: Background
    hills: Hills | None
    camera: Camera | Glide | Paused
    caption: str


@dataclass(frozen=True)
class Truth:
    """Ground truth of T frames and N object slots; unused slots have `present` False, indices -1 and NaN.

    Attributes:
        present: bool [T, N], the segment has an object in this slot (it may be out of view: see `visible`).
        center_xy: float [T, N, 2] in view heights, relative to the view.
        radius: float [T, N] in view heights.
        visible: float [T, N], share of the shape's area that is in view and not covered by objects before it.
        colour: int [T, N], index into `COLOURS`.
        shape: int [T, N], index into `SHAPES`.
        size: int [T, N], index into `SIZES`.
        motion: int [T, N], index into `MOTIONS`.
        background: int [T], index into `BACKGROUNDS`.
        camera_x: float [T], left edge of the view in the scene.
        segment: int [T], index of the segment in force.
    """

    present: NDArray[np.bool_]
    center_xy: Float64
    radius: Float64
    visible: Float64
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    size: NDArray[np.int64]
    motion: NDArray[np.int64]
    background: NDArray[np.int64]
    camera_x: Float64
    segment: NDArray[np.int64]


@dataclass(frozen=True)
class Scene:
    """A clip of any length.

    Attributes:
        seed: What it was drawn from.
        level: Of difficulty, 1 to 3.
        aspect: Width of the view over its height.
        segments: In order; the first starts at frame 0.
    """

    seed: int
    level: int
    aspect: float
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        starts = [segment.start for segment in self.segments]
        if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
            raise WorldError(
                f"segments start at frames {starts}", "let the first start at 0 and the rest rise"
            )

    @property
    def caption(self) -> str:
        """The first prompt."""
        return self.segments[0].caption

    @property
    def captions(self) -> tuple[tuple[int, str], ...]:
        """Every (first frame, prompt); more than one where prompts switch."""
        return tuple((segment.start, segment.caption) for segment in self.segments)

    def spans(self, start: int, stop: int) -> list[tuple[Segment, int, int]]:
        """The segments in force over the frames [start, stop), each with its part of the range.

        Raises:
            WorldError: The range is empty or starts before frame 0.
        """
        if start < 0 or stop <= start:
            raise WorldError(f"frames {start} to {stop} are no range", "use 0 <= start < stop")
        ends = [segment.start for segment in self.segments[1:]] + [stop]
        return [
            (segment, max(start, segment.start), min(stop, end))
            for segment, end in zip(self.segments, ends, strict=True)
            if max(start, segment.start) < min(stop, end)
        ]

    def truth(self, start: int, stop: int) -> Truth:
        """Ground truth of the frames [start, stop).

        Raises:
            WorldError: The range is empty or starts before frame 0.
        """
        spans = self.spans(start, stop)
        num_objects = max((len(segment.objects) for segment, _, _ in spans), default=0)
        frames = stop - start
        slots = (frames, num_objects)
        truth = Truth(
            present=np.zeros(slots, bool),
            center_xy=np.full((*slots, 2), np.nan),
            radius=np.full(slots, np.nan),
            visible=np.zeros(slots),
            colour=np.full(slots, -1),
            shape=np.full(slots, -1),
            size=np.full(slots, -1),
            motion=np.full(slots, -1),
            background=np.full(frames, -1),
            camera_x=np.zeros(frames),
            segment=np.zeros(frames, np.int64),
        )
        for segment, first, last in spans:
            rows = slice(first - start, last - start)
            times = np.arange(first, last)
            camera_t = segment.camera.offsets(times)
            truth.camera_x[rows] = camera_t
            truth.background[rows] = BACKGROUNDS.index(segment.background)
            truth.segment[rows] = self.segments.index(segment)
            for slot, item in enumerate(segment.objects):
                centers = item.path.centers(times)
                centers[:, 0] -= camera_t
                truth.center_xy[rows, slot] = centers
                truth.present[rows, slot] = True
                truth.radius[rows, slot] = item.radius
                truth.colour[rows, slot] = COLOURS.index(item.colour)
                truth.shape[rows, slot] = SHAPES.index(item.shape)
                truth.size[rows, slot] = SIZES.index(item.size)
                truth.motion[rows, slot] = MOTIONS.index(item.motion)
            for begin in range(rows.start, rows.stop, VISIBILITY_FRAMES_AT_ONCE):
                block = slice(begin, min(begin + VISIBILITY_FRAMES_AT_ONCE, rows.stop))
                visible_tn = self._visible(segment, truth.center_xy[block])
                truth.visible[block, : len(segment.objects)] = visible_tn
        return truth

    def _visible(self, segment: Segment, center_tn2: Float64) -> Float64:
        """Visible share of each object, by counting covered pixels where anything could hide it."""
        num = len(segment.objects)
        if num <= 1 and not segment.camera.panning:
            return np.ones((len(center_tn2), num))
        reach = max((max(item.reach) for item in segment.objects), default=0.0)
        # A margin of one object around the view, so that parts beyond the edges are counted too.
        pixel = 1.0 / REFERENCE_HEIGHT
        x_w = np.arange(-2 * reach, self.aspect + 2 * reach, pixel) + pixel / 2
        y_h = np.arange(0, 1, pixel) + pixel / 2
        inside_w = (x_w > 0) & (x_w < self.aspect)
        hidden_thw = np.zeros((len(center_tn2), len(y_h), len(x_w)), np.float32)
        visible_tn = np.zeros((len(center_tn2), num))
        for slot in reversed(range(num)):
            item = segment.objects[slot]
            center_t2 = center_tn2[:, slot]
            dx_tw = ((x_w - center_t2[:, :1]) / pixel).astype(np.float32)
            dy_th = ((y_h - center_t2[:, 1:]) / pixel).astype(np.float32)
            alpha_thw = coverage(item.shape, dx_tw, dy_th, item.radius / pixel)
            seen_thw = alpha_thw * (1 - hidden_thw) * inside_w
            whole_t = alpha_thw.sum(axis=(1, 2))
            visible_tn[:, slot] = np.where(
                whole_t > 0, seen_thw.sum(axis=(1, 2)) / np.where(whole_t > 0, whole_t, 1), 0
            )
            hidden_thw = 1 - (1 - hidden_thw) * (1 - alpha_thw)
        return visible_tn

"""Drawing scenes from seeds: the world's levels and its train/held-out split.

Only `Generator.random` is used, so that a seed means the same scene with every numpy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from longtake.world.captions import Described, Split, parse_caption, write_caption
from longtake.world.errors import WorldError
from longtake.world.motion import Camera, Line, Orbit, Path
from longtake.world.scene import Hills, Scene, SceneObject, Segment
from longtake.world.shapes import extents
from longtake.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELDOUT_COMBINATIONS,
    HELDOUT_SPEED_RANGE_PX,
    LEVEL_1_BACKGROUNDS,
    LEVELS,
    MOTIONS,
    ORBIT_RADII_PX,
    REFERENCE_HEIGHT,
    SHAPES,
    SIZE_RADII_PX,
    SPEED_RANGE_PX,
    Background,
    Colour,
    Motion,
    Shape,
    Size,
)

T = TypeVar("T")
Combination = tuple[Colour, Shape, Motion]

EDGE_MARGIN: Final = 0.5 / REFERENCE_HEIGHT
"""Kept free between an object and its walls."""
BOUNCE_ANGLES: Final = (25.0, 65.0)
"""Degrees between a bouncing object's direction and the horizontal."""
PAN_VIEWS: Final = 3
"""Width of a panned scene in views."""
PAN_SPEED_RANGE_PX: Final = (0.8, 1.6)
SWITCH_FRAMES: Final = (48, 160)
"""A prompt switch comes this many frames after the one before it."""

PROMPT_KEY: Final = 3
"""Keeps the draws of `scene_for_prompt` apart from those of the splits."""


class Draw:
    """Random choices from one key."""

    def __init__(self, *key: int) -> None:
        self._generator = np.random.default_rng(key)

    def uniform(self, low: float, high: float) -> float:
        """Between two numbers."""
        return low + (high - low) * float(self._generator.random())

    def below(self, count: int) -> int:
        """An index below a count."""
        return min(int(self._generator.random() * count), count - 1)

    def choice(self, items: Sequence[T]) -> T:
        """One of some things."""
        return items[self.below(len(items))]


def combinations(split: Split) -> tuple[Combination, ...]:
    """The colour-shape-motion combinations of a split, in a fixed order."""
    every = tuple((colour, shape, motion) for colour in COLOURS for shape in SHAPES for motion in MOTIONS)
    if split == "any":
        return every
    return tuple(item for item in every if (item in HELDOUT_COMBINATIONS) == (split == "heldout"))


def sample_scene(seed: int, level: int = 1, split: Split = "train", aspect: float = 1.0) -> Scene:
    """The scene of a seed.

    Level 1: one large object, fixed camera, no hills. Level 2: one to three objects of both sizes, hills too.
    Level 3: level 2 with either a camera panning over three views, so that objects leave and come back, or
    one or two prompt switches. Objects of one scene differ in colour.

    Args:
        seed: Any non-negative integer. The same arguments always give the same scene.
        level: 1 to 3.
        split: "train" keeps out the held-out combinations, speeds and wordings; "heldout" uses only those;
            "any" draws from all.
        aspect: Width of the view over its height.

    Raises:
        WorldError: An unknown level or split, a negative seed, or a view narrower than its height.
    """
    if level not in LEVELS:
        raise WorldError(f"unknown world level {level}", f"use one of {', '.join(map(str, LEVELS))}")
    if split not in ("train", "heldout", "any"):
        raise WorldError(f"unknown split {split!r}", "use 'train', 'heldout' or 'any'")
    if seed < 0:
        raise WorldError(f"seed {seed} is negative", "use 0 or more")
    if aspect < 1:
        raise WorldError(f"aspect {aspect:g} is narrower than the world's objects need", "use 1 or more")
    draw = Draw(seed, level, ("train", "heldout", "any").index(split))
    if level < 3:
        segments: tuple[Segment, ...] = (_segment(draw, level, split, aspect, 0, panning=False),)
    elif draw.below(2):
        segments = (_segment(draw, level, split, aspect, 0, panning=True),)
    else:
        segments = _switches(draw, level, split, aspect)
    return Scene(seed=seed, level=level, aspect=aspect, segments=segments)


def scene_for_prompt(text: str, seed: int, level: int = 1, aspect: float = 1.0) -> Scene:
    """A real clip of what a prompt asks for; what it leaves open (places, speeds) is drawn from the seed.

    Args:
        text: A prompt that names at least one object by colour and shape; see `captions.parse_caption`.
        seed: Any non-negative integer.
        level: 1 or 2: which backgrounds may be drawn where the prompt names none.
        aspect: Width of the view over its height.

    Raises:
        WorldError: The prompt names no object.
    """
    asked = parse_caption(text)
    if not asked.objects:
        raise WorldError(
            f"the prompt {text!r} names no object",
            f"name a colour ({', '.join(COLOURS)}) and a shape ({', '.join(SHAPES)})",
        )
    draw = Draw(seed, level, PROMPT_KEY)
    drawn: Background = draw.choice(LEVEL_1_BACKGROUNDS if level == 1 else BACKGROUNDS)
    background = drawn if asked.background is None else asked.background
    objects = []
    for item in asked.objects:
        assert item.colour is not None, "a parsed object has a colour"
        assert item.shape is not None, "a parsed object has a shape"
        motion = draw.choice(MOTIONS) if item.motion is None else item.motion
        combination = (item.colour, item.shape, motion)
        objects.append(draw_object(draw, combination, item.size or "large", "any", 0.0, aspect))
    hills = draw_hills(draw) if background == "hills" else None
    segment = Segment(0, tuple(objects), background, hills, Camera(), text)
    return Scene(seed=seed, level=level, aspect=aspect, segments=(segment,))


def _segment(draw: Draw, level: int, split: Split, aspect: float, start: int, panning: bool) -> Segment:
    background = draw.choice(LEVEL_1_BACKGROUNDS if level == 1 else BACKGROUNDS)
    camera = Camera()
    if panning:
        speed = draw.uniform(*PAN_SPEED_RANGE_PX) / REFERENCE_HEIGHT
        camera = Camera(travel=(PAN_VIEWS - 1) * aspect, speed=speed, start=0.0)
    objects: list[SceneObject] = []
    taken: set[Colour] = set()  # distinct colours keep overlapping objects apart and identities checkable
    for index in range(1 if level == 1 else 1 + draw.below(3)):
        free = [item for item in combinations(split) if item[0] not in taken]
        combination = draw.choice(free)
        taken.add(combination[0])
        # The first object of a panned scene is in view at frame 0.
        zone = draw.below(PAN_VIEWS) if panning and index else 0
        size: Size = "large" if level == 1 or draw.below(2) else "small"
        objects.append(draw_object(draw, combination, size, split, zone * aspect, aspect))
    hills = draw_hills(draw) if background == "hills" else None
    caption = _caption(draw, objects, background, split, panning)
    return Segment(start, tuple(objects), background, hills, camera, caption)


def draw_hills(draw: Draw) -> Hills:
    """Hills of one scene."""
    waves = tuple(
        (draw.uniform(*amplitude), draw.uniform(*wavelength), draw.uniform(0, 2 * math.pi))
        for amplitude, wavelength in (((0.05, 0.09), (0.9, 1.4)), ((0.02, 0.04), (0.4, 0.6)))
    )
    return Hills(level=draw.uniform(0.6, 0.7), waves=waves)


def _caption(
    draw: Draw, objects: Sequence[SceneObject], background: Background, split: Split, panning: bool
) -> str:
    described = [Described(item.colour, item.shape, item.size, item.motion) for item in objects]
    return write_caption(described, background, draw.below, split, panning)


def draw_object(
    draw: Draw, combination: Combination, size: Size, split: Split, left: float, aspect: float
) -> SceneObject:
    """An object with the speed of a split, in the view whose left edge is at `left`."""
    colour, shape, motion = combination
    radius = draw.uniform(*SIZE_RADII_PX[size]) / REFERENCE_HEIGHT
    reach = [radius * extent for extent in extents(shape)]
    low = (left + reach[0] + EDGE_MARGIN, reach[2] + EDGE_MARGIN)
    high = (left + aspect - reach[1] - EDGE_MARGIN, 1 - reach[3] - EDGE_MARGIN)
    speed = 0.0 if motion == "still" else _speed(draw, split)
    path = _path(draw, motion, speed, low, high)
    return SceneObject(colour, shape, size, radius, motion, path)


def _speed(draw: Draw, split: Split) -> float:
    low, high = SPEED_RANGE_PX
    band = HELDOUT_SPEED_RANGE_PX
    if split == "heldout":
        speed = draw.uniform(*band)
    else:
        speed = draw.uniform(low, high - (band[1] - band[0] if split == "train" else 0))
        if split == "train" and speed >= band[0]:
            speed += band[1] - band[0]
    return speed / REFERENCE_HEIGHT


def _path(
    draw: Draw, motion: Motion, speed: float, low: tuple[float, float], high: tuple[float, float]
) -> Path:
    if motion == "orbiting":
        room = min(high[0] - low[0], high[1] - low[1]) / 2
        smallest, largest = (radius / REFERENCE_HEIGHT for radius in ORBIT_RADII_PX)
        radius = draw.uniform(smallest, min(largest, room))
        center = (
            draw.uniform(low[0] + radius, high[0] - radius),
            draw.uniform(low[1] + radius, high[1] - radius),
        )
        turn = speed / radius * (1 if draw.below(2) else -1)
        return Orbit(center, radius, draw.uniform(0, 2 * math.pi), turn)
    start = (draw.uniform(low[0], high[0]), draw.uniform(low[1], high[1]))
    if motion == "still":
        return Line(start, (0.0, 0.0), low, high)
    angle = math.radians(draw.uniform(*BOUNCE_ANGLES)) if motion == "bouncing" else 0.0
    velocity = (
        speed * math.cos(angle) * (1 if draw.below(2) else -1),
        speed * math.sin(angle) * (1 if draw.below(2) else -1),
    )
    return Line(start, velocity, low, high)


def _switches(draw: Draw, level: int, split: Split, aspect: float) -> tuple[Segment, ...]:
    """Two or three segments: the colour, the background or everything changes; what stays keeps its path."""
    segments = [_segment(draw, level, split, aspect, 0, panning=False)]
    for _ in range(1 + draw.below(2)):
        last = segments[-1]
        low, high = SWITCH_FRAMES
        start = last.start + low + draw.below(high - low + 1)
        fresh = _segment(draw, level, split, aspect, start, panning=False)
        change = draw.choice(("colour", "background", "everything"))
        if change == "colour":
            objects = _recoloured(draw, last.objects, split)
            caption = _caption(draw, objects, last.background, split, False)
            fresh = dataclasses.replace(last, start=start, objects=objects, caption=caption)
        elif change == "background" and fresh.background != last.background:
            caption = _caption(draw, last.objects, fresh.background, split, False)
            fresh = dataclasses.replace(fresh, objects=last.objects, caption=caption)
        segments.append(fresh)
    return tuple(segments)


def _recoloured(draw: Draw, objects: tuple[SceneObject, ...], split: Split) -> tuple[SceneObject, ...]:
    """The same objects with another colour for one of them, within the split, unlike the others'."""
    index = draw.below(len(objects))
    target = objects[index]
    taken = {item.colour for item in objects}
    same = [item for item in combinations(split) if item[1:] == (target.shape, target.motion)]
    allowed = {item[0] for item in same}
    free = [colour for colour in COLOURS if colour in allowed - taken]
    if not free:  # the held-out split may know one colour only for this shape and motion
        return objects
    changed = dataclasses.replace(target, colour=draw.choice(free))
    return (*objects[:index], changed, *objects[index + 1 :])

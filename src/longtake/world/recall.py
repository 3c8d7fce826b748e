"""Scenes that ask for recall: something is shown, is out of view for as long as one likes, and comes back
without being named.

Four prompts follow each other. *Opening*: another object, until whatever a model keeps for ever of a video's
beginning is full. *Shown*: the target alone, standing still. *Away*: the camera glides one view to the side,
where a third object lives, and stays there. *Back*: it glides back, to where the target still stands. The
last two prompts name the third object and the camera alone, so that neither a prompt nor the beginning of
the video tells what comes back.

Times are in frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from longtake.world.captions import AWAY_PHRASE, BACK_PHRASE, Described, Split, write_caption
from longtake.world.errors import WorldError
from longtake.world.motion import Camera, Glide, Paused
from longtake.world.sampling import Draw, combinations, draw_hills, draw_object
from longtake.world.scene import Scene, SceneObject, Segment
from longtake.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    HELDOUT_COMBINATIONS,
    REFERENCE_HEIGHT,
    SHAPES,
    SIZES,
    Colour,
    Shape,
    Size,
)

RECALL_LEVEL: Final = 3
GLIDE_SPEED_PX: Final = 1.6
"""Of the camera, always: what comes into view when shall follow from the prompts."""
OPENING_FRAMES: Final = 33
SHOWN_FRAMES: Final = 60
WATCHED_FRAMES: Final = 48
"""The scene goes on for this long once the camera is back."""

_KEY: Final = 11
_TARGETS_KEY: Final = 12

Target = tuple[Colour, Shape, Size]
Align = Callable[[int], int]


@dataclass(frozen=True)
class RecallScene:
    """A scene with what there is to know about its target.

    Attributes:
        scene: Four segments: opening, shown, away, back.
        target: What comes back: the second segment's object, and the first of the last one.
        left_at: First frame in which nothing of it is in view.
        back_at: First frame after that in which any of it is.
        home_at: First frame in which the view is again what it was when it was shown.
        num_frames: Length of the scene.
    """

    scene: Scene
    target: SceneObject
    left_at: int
    back_at: int
    home_at: int
    num_frames: int

    @property
    def shown_from(self) -> int:
        """First frame of the prompt that names the target."""
        return self.scene.segments[1].start

    @property
    def away_from(self) -> int:
        """First frame of the prompt that leads away."""
        return self.scene.segments[2].start

    @property
    def back_from(self) -> int:
        """First frame of the prompt that leads back."""
        return self.scene.segments[3].start

    @property
    def opener(self) -> SceneObject:
        """What the video begins with."""
        return self.scene.segments[0].objects[0]

    @property
    def third(self) -> SceneObject:
        """What is seen while the target is away."""
        return self.scene.segments[2].objects[-1]

    @property
    def absence_frames(self) -> int:
        """For how long nothing of the target is in view."""
        return self.back_at - self.left_at


def recall_targets(count: int, seed: int = 0, split: Split = "any") -> list[Target]:
    """Colours, shapes and sizes of targets, each combination as often as any other (but for one).

    Args:
        count: How many.
        seed: Decides their order.
        split: "train" leaves out what may not stand still in training, "heldout" has only that.
    """
    every = [
        (colour, shape, size)
        for colour in COLOURS
        for shape in SHAPES
        for size in SIZES
        if split == "any" or ((colour, shape, "still") in HELDOUT_COMBINATIONS) == (split == "heldout")
    ]
    generator = np.random.default_rng((seed, _TARGETS_KEY))
    targets: list[Target] = []
    while len(targets) < count:
        order = np.argsort(generator.random(len(every)), kind="stable")
        targets += [every[int(i)] for i in order]
    return targets[:count]


def recall_scene(
    seed: int,
    target: Target,
    absence_frames: int,
    align: Align = lambda frame: frame,
    split: Split = "any",
    aspect: float = 1.0,
    earliest_back: int = 0,
) -> RecallScene:
    """The recall scene of a seed.

    Args:
        seed: Any non-negative integer; decides everything but the target's looks.
        target: Colour, shape and size of what comes back.
        absence_frames: For how many frames at least nothing of it is in view.
        align: The first frame at or after a given one at which a prompt can come into force.
        split: Of the other objects and of the wordings; "train" and "heldout" as in `sample_scene`.
        aspect: Width of the view over its height.
        earliest_back: The camera does not go back before this frame.

    Raises:
        WorldError: A negative seed, an absence that is too short for the camera to come to rest, or an
            impossible view.
    """
    if seed < 0 or aspect < 1:
        raise WorldError(
            f"seed {seed} and aspect {aspect:g} make no scene",
            "use a seed of 0 or more and an aspect of 1 or more",
        )
    glide = glide_frames(aspect)
    if absence_frames < glide:
        raise WorldError(
            f"an absence of {absence_frames} frames ends before the camera is at rest",
            f"use {glide} frames or more",
        )
    cast = _Cast(Draw(seed, _KEY), target, split, aspect, third_zone=1)
    seen, opener, third, caption = cast.seen, cast.opener, cast.third, cast.caption
    background, hills = cast.background, cast.hills
    speed = GLIDE_SPEED_PX / REFERENCE_HEIGHT
    starts = [0, align(OPENING_FRAMES)]
    starts.append(align(starts[1] + SHOWN_FRAMES))
    away = Glide(0.0, aspect, speed, starts[2])
    segments = [
        Segment(starts[0], (opener,), background, hills, Camera(), caption(opener)),
        Segment(starts[1], (seen,), background, hills, Camera(), caption(seen)),
        Segment(starts[2], (seen, third), background, hills, away, caption(third, AWAY_PHRASE)),
    ]
    # At the latest when the camera rests: what stood at the very edge of the view keeps a blurred pixel.
    left_at = _first(segments[-1], starts[2], starts[2] + away.num_frames, lambda share: share <= 0)
    # It comes into view when the camera has gone back as far as it went until it was out.
    starts.append(align(max(starts[2] + away.num_frames, left_at + absence_frames - glide, earliest_back)))
    while True:
        back = Glide(aspect, 0.0, speed, starts[3])
        last = Segment(starts[3], (seen, third), background, hills, back, segments[2].caption)
        back_at = _first(last, starts[3] + 1, starts[3] + back.num_frames, lambda share: share > 0)
        if back_at - left_at >= absence_frames:
            break
        starts[3] = align(starts[3] + 1)
    last = dataclasses.replace(last, caption=caption(third, BACK_PHRASE))
    home_at = starts[3] + back.num_frames
    scene = Scene(seed=seed, level=RECALL_LEVEL, aspect=aspect, segments=(*segments, last))
    return RecallScene(scene, seen, left_at, back_at, home_at, align(home_at + WATCHED_FRAMES))


def glide_frames(aspect: float = 1.0) -> int:
    """How long the camera takes to the next view, and so the shortest absence."""
    return Glide(0.0, aspect, GLIDE_SPEED_PX / REFERENCE_HEIGHT, 0).num_frames


def longest_recall_frames(absence_frames: int, align_frames: int, aspect: float = 1.0) -> tuple[int, int]:
    """No recall scene of an absence is longer than the first number, nor its part from the prompt that leads
    back on than the second; for prompts that come into force every `align_frames` at the latest.
    """
    glide = glide_frames(aspect)
    wait = align_frames
    back = glide + WATCHED_FRAMES + wait
    # Shown at the latest; the target is out when the camera rests; the way back may begin that much later.
    before = OPENING_FRAMES + SHOWN_FRAMES + 2 * wait + max(glide, absence_frames) + wait
    return before + glide + back, back


def narrative_scene(
    seed: int,
    target: Target,
    absence_frames: int,
    align: Align = lambda frame: frame,
    split: Split = "any",
    aspect: float = 1.0,
) -> RecallScene:
    """Two prompts in turns, A, B and A again, behind an opening: what A showed is to be seen as it was.

    The second A names the target in the same words, so that its looks follow from the prompt, but not where
    in the view it stood, nor how large it was within its size.

    Args and errors as of `recall_scene`; nothing moves the camera, so that any absence is possible.
    """
    if seed < 0 or aspect < 1 or absence_frames < 1:
        raise WorldError(
            f"seed {seed}, aspect {aspect:g} and an absence of {absence_frames} frames make no scene",
            "use a seed of 0 or more, an aspect of 1 or more and an absence of 1 or more",
        )
    cast = _Cast(Draw(seed, _KEY, 1), target, split, aspect, third_zone=0)
    seen, opener, other, caption = cast.seen, cast.opener, cast.third, cast.caption
    background, hills = cast.background, cast.hills
    starts = [0, align(OPENING_FRAMES)]
    starts.append(align(starts[1] + SHOWN_FRAMES))
    starts.append(align(starts[2] + absence_frames))

    again = caption(seen)
    segments = tuple(
        Segment(start, (item,), background, hills, Camera(), text)
        for start, item, text in zip(
            starts, (opener, seen, other, seen), (caption(opener), again, caption(other), again), strict=True
        )
    )
    scene = Scene(seed=seed, level=RECALL_LEVEL, aspect=aspect, segments=segments)
    last = starts[3]
    return RecallScene(scene, seen, starts[2], last, last, align(last + WATCHED_FRAMES))


class _Cast:
    """What a scene shows, drawn in a fixed order, and how its captions say so.

    Args:
        draw: Source of the choices.
        target: Looks of what comes back; it stands still in the first view.
        split: Of the other objects and of the wordings.
        aspect: Width of the view over its height.
        third_zone: View in which what is seen meanwhile lives.
    """

    def __init__(self, draw: Draw, target: Target, split: Split, aspect: float, third_zone: int) -> None:
        self._draw, self._split = draw, split
        colour, shape, size = target
        self.background = draw.choice(BACKGROUNDS)
        self.hills = draw_hills(draw) if self.background == "hills" else None
        self.seen = draw_object(draw, (colour, shape, "still"), size, split, 0.0, aspect)
        self.opener = self._other({colour}, 0.0, aspect)
        self.third = self._other({colour, self.opener.colour}, third_zone * aspect, aspect)

    def caption(self, item: SceneObject, camera: str = "") -> str:
        """One object, and what the camera does."""
        described = Described(item.colour, item.shape, item.size, item.motion)
        return write_caption([described], self.background, self._draw.below, self._split) + camera

    def _other(self, taken: set[Colour], left: float, aspect: float) -> SceneObject:
        """An object in a colour that is not taken, in the view whose left edge is at `left`."""
        free = [item for item in combinations(self._split) if item[0] not in taken]
        combination = self._draw.choice(free)
        return draw_object(self._draw, combination, self._draw.choice(SIZES), self._split, left, aspect)


def _first(segment: Segment, start: int, stop: int, holds: Callable[[float], bool]) -> int:
    """First frame from `start` to `stop` at which the share in view of the segment's first object is as
    asked; `stop` where it is never.
    """
    for frame in range(start, stop):
        if holds(_share_in_view(segment.objects[0], segment.camera, frame)):
            return frame
    return stop


def _share_in_view(item: SceneObject, camera: Camera | Glide | Paused, frame: int) -> float:
    """Share of an object's width in view, a pixel of blurred edge included; 0 where it is out."""
    times = np.array([frame])
    x = float(item.path.centers(times)[0, 0] - camera.offsets(times)[0])
    left, right = (reach + 1 / REFERENCE_HEIGHT for reach in item.reach[:2])
    return float(np.clip((x + right) / (left + right), 0.0, 1.0))

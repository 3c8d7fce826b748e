"""What a stream is asked for: one prompt, or several with the frames from which they are in force.

Lengths are in pixel frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from longtake.eval.errors import EvalError
from longtake.world import Scene, SceneObject, Segment, parse_caption, scene_for_prompt
from longtake.world.motion import Camera, Line
from longtake.world.sampling import PAN_SPEED_RANGE_PX, PAN_VIEWS
from longtake.world.vocabulary import REFERENCE_HEIGHT

PAN_KEY: Final = 7
"""Keeps what a panning prompt leaves open (speed, places) apart from the other draws of its seed."""
SEGMENTS_APART: Final = 1 << 50
"""Distance between the seeds of a script's segments: more than evaluations have seeds."""


@dataclass(frozen=True)
class Chunking:
    """How a source's frames come.

    Attributes:
        first_frames: Frames of the first chunk: a causal video autoencoder's first frame stands alone, so
            that 3 latent frames of 4 give 9 frames first and 12 from then on.
        frames: Frames of every later chunk.
        window_frames: Frames that a chunk can look back on, itself included; None for no limit.
    """

    first_frames: int = 9
    frames: int = 12
    window_frames: int | None = 48

    def boundary(self, frame: int) -> int:
        """First frame of the first chunk that begins at or after `frame`: where a new prompt takes effect."""
        if frame <= 0:
            return 0
        later = max(0, -(-(frame - self.first_frames) // self.frames))
        return self.first_frames + later * self.frames


@dataclass(frozen=True)
class Span:
    """A stretch of a video under one prompt.

    Attributes:
        start: First frame.
        stop: First frame after it.
        judged_from: First frame that is held to the prompt: `start`, or a chunk later after a switch.
        prompt: In force.
    """

    start: int
    stop: int
    judged_from: int
    prompt: str


@dataclass(frozen=True)
class Script:
    """Prompts in the order of their first frames.

    Attributes:
        prompts: (first frame, text); the first is in force from frame 0.

    Raises:
        EvalError: No prompt, a first one that starts later, or frames that do not rise.
    """

    prompts: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.prompts]
        if not starts or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
            raise EvalError(
                f"prompts come into force at frames {starts}", "let the first start at 0 and the rest rise"
            )

    @classmethod
    def of(cls, text: str) -> Script:
        """A single prompt."""
        return cls(((0, text),))

    @property
    def text(self) -> str:
        """All prompts on one line, with the frames of the switches."""
        first, *rest = self.prompts
        return first[1] + "".join(f" | from frame {start}: {text}" for start, text in rest)

    @property
    def panning(self) -> bool:
        """Whether its prompts say that the camera pans."""
        return any(parse_caption(text).panning for _, text in self.prompts)

    def on(self, chunking: Chunking, num_frames: int) -> Script:
        """The script as a source can follow it: switches at chunk boundaries, none beyond the video's end.

        Of switches that come to the same boundary the last one counts.
        """
        starts = {chunking.boundary(start): text for start, text in self.prompts}
        return Script(tuple((start, text) for start, text in starts.items() if start < num_frames))

    def spans(self, num_frames: int, transition: int) -> list[Span]:
        """The prompts' stretches of a video; `transition` frames after each switch are not judged."""
        ends = [start for start, _ in self.prompts[1:]] + [num_frames]
        return [
            Span(start, end, min(end, start + transition) if start else 0, text)
            for (start, text), end in zip(self.prompts, ends, strict=True)
        ]


def scene_for_script(script: Script, seed: int, level: int = 1, aspect: float = 1.0) -> Scene:
    """A real clip of a script, as the world's own: `scene_for_prompt` for each prompt.

    Where "the camera pans", the first object is in the first view and the others in any of the three. What a
    switch leaves as it is (an object's shape, size and motion; hills) keeps its place and path.

    Args:
        script: Prompts that name at least one object each.
        seed: Any non-negative integer.
        level: 1 to 3: which backgrounds may be drawn where a prompt names none.
        aspect: Width of the view over its height.

    Raises:
        WorldError: A prompt names no object.
    """
    segments: list[Segment] = []
    for number, (start, text) in enumerate(script.prompts):
        drawn = scene_for_prompt(text, seed + number * SEGMENTS_APART, level, aspect).segments[0]
        if parse_caption(text).panning:
            drawn = _panned(drawn, seed + number * SEGMENTS_APART, aspect)
        elif segments:
            drawn = _continued(segments[-1], drawn)
        segments.append(dataclasses.replace(drawn, start=start))
    return Scene(seed=seed, level=level, aspect=aspect, segments=tuple(segments))


def scenes_for(scripts: Sequence[Script], seeds: Sequence[int], level: int, aspect: float) -> list[Scene]:
    """`scene_for_script` of each pair."""
    return [
        scene_for_script(script, seed, level, aspect) for script, seed in zip(scripts, seeds, strict=True)
    ]


def _panned(segment: Segment, seed: int, aspect: float) -> Segment:
    generator = np.random.default_rng((seed, PAN_KEY))
    low, high = PAN_SPEED_RANGE_PX
    speed = (low + (high - low) * float(generator.random())) / REFERENCE_HEIGHT
    views = [0, *(min(int(generator.random() * PAN_VIEWS), PAN_VIEWS - 1) for _ in segment.objects[1:])]
    objects = [_shifted(item, view * aspect) for item, view in zip(segment.objects, views, strict=True)]
    camera = Camera(travel=(PAN_VIEWS - 1) * aspect, speed=speed, start=0.0)
    return dataclasses.replace(segment, objects=tuple(objects), camera=camera)


def _shifted(item: SceneObject, dx: float) -> SceneObject:
    """The object, its whole path moved to the right."""

    def moved(point: tuple[float, float]) -> tuple[float, float]:
        return (point[0] + dx, point[1])

    path = item.path
    if isinstance(path, Line):
        path = dataclasses.replace(path, start=moved(path.start), low=moved(path.low), high=moved(path.high))
    else:
        path = dataclasses.replace(path, center=moved(path.center))
    return dataclasses.replace(item, path=path)


def _continued(before: Segment, drawn: Segment) -> Segment:
    """The new segment, with the paths of what goes on."""
    objects = []
    for index, item in enumerate(drawn.objects):
        old = before.objects[index] if index < len(before.objects) else None
        same = old is not None and (old.shape, old.size, old.motion) == (item.shape, item.size, item.motion)
        objects.append(dataclasses.replace(old, colour=item.colour) if same and old is not None else item)
    hills = before.hills if before.background == drawn.background else drawn.hills
    return dataclasses.replace(drawn, objects=tuple(objects), hills=hills)

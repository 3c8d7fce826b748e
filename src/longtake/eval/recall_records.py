"""What the recall test is, and what is kept of each of its streams.

A target is shown, leaves the view for longer than the model's window, and comes back (`world.recall`).
Judged are frames: *shown* are those under the prompt that names the target, *absent* those in which it
must be out of view, *returned* those in which the view must be what it was. What is not of the third
object's colour may be the target.

Legend: s frames, k object slots.
"""

from __future__ import annotations

import math
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.meter import Measured
from longtake.eval.runner import FIRST_EVAL_SEED, SEEDS_APART
from longtake.eval.script import Chunking
from longtake.world import FPS, VERSION, Split
from longtake.world.detect import Detections
from longtake.world.recall import (
    Align,
    RecallScene,
    glide_frames,
    narrative_scene,
    recall_scene,
    recall_targets,
)
from longtake.world.vocabulary import COLOURS, REFERENCE_HEIGHT, SHAPES, SIZES

NAME: Final = "longtake-recall-v1"
"""Raised with every change to scenes, phases or metrics."""
SETTLE_FRAMES: Final = 12
"""After a switch of prompt a chunk passes before the view is judged; of the camera's stops, a few frames."""
STOP_FRAMES: Final = 4
LEAVING_FRAMES: Final = 8
PLACE_PX: Final = 6.0
"""Back in its place is what is this close (pixels of 64) to where it was shown."""
SHOWN_SHARE: Final = 0.5
"""It was shown where at least this share of the frames has it as asked."""
LEFT_SHARE: Final = 0.1
"""It has left where at most this share of the frames while it must be away has an object of its colour."""
SAMPLE_EVERY_FRAMES: Final = 1

Kind = Literal["pan", "narrative"]
IDENTITY: Final = ("colour", "shape", "size", "place")


class RecallConfig(Config):
    """A recall test.

    Attributes:
        scenes: For each absence.
        absence: Lengths for which the target is away, in the model's windows; what left less than one ago is
            still in it.
        kind: "pan": the camera leaves and comes back, and no prompt names the target then. "narrative": the
            prompts are A, B and A again.
        seed: Chooses the scenes.
        split: Which combinations and wordings: "train", "heldout" or "any".
        batch: Streams generated together.
    """

    scenes: int = Field(64, ge=2, le=SEEDS_APART)
    absence: tuple[float, ...] = Field((1.0, 2.0, 5.0, 10.0), min_length=1)
    kind: Kind = "pan"
    seed: int = Field(0, ge=0)
    split: Split = "any"
    batch: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _differ(self) -> RecallConfig:
        if len(set(self.absence)) < len(self.absence):
            raise ConfigError(f"absence={self.absence} repeats a length", "name each once")
        if min(self.absence) < 1:
            raise ConfigError(
                f"absence={self.absence}: what left less than a window ago is still in it", "use 1 or more"
            )
        return self


class Observed(Config):
    """What is seen at the target's return, over the frames with anything that may be it.

    Attributes:
        colour, shape, size: Seen most often, as words; None where never named.
        x, y: Median place, pixels of 64.
    """

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float


class RecallRecord(Config):
    """One stream.

    Attributes:
        index: Of the scene. ``absence``: As asked, in windows.
        seed: Of the scene and of the stream's noise.
        prompts: (first frame, text).
        target: Colour, shape and size. ``others``: Colours of the opening's and of the third object.
        absence_frames: For how long nothing of it is in view.
        shown: Share of the frames of its prompt in which it is as asked.
        shown_x, shown_y: Where, pixels of 64; None where it never is.
        seen_while_absent: Share of the frames in which it must be away with an object of its colour.
        present: Share of the frames after its return in which there is anything that may be it.
        colour, shape, size, place: Of these, the share that equals what was asked for and shown; None where
            nothing was present, and place where it never was shown.
        recalled: Share of the frames after its return with an object of its colour and shape.
        observed: What came back, None where nothing did.
        phases: For every frame "v" (visible), "a" (absent), "r" (returned) or "-" (neither).
        seen: For every frame "1" where an object of its colour and shape is in view.
    """

    index: int
    absence: float
    seed: int
    prompts: tuple[tuple[int, str], ...]
    target: tuple[str, str, str]
    others: tuple[str, str]
    absence_frames: int
    shown: float
    shown_x: float | None
    shown_y: float | None
    seen_while_absent: float
    present: float
    colour: float | None
    shape: float | None
    size: float | None
    place: float | None
    recalled: float
    observed: Observed | None
    phases: str
    seen: str

    @property
    def was_shown(self) -> bool:
        """Whether the target was there, as asked, before it left."""
        return self.shown >= SHOWN_SHARE

    @property
    def has_left(self) -> bool:
        """Whether nothing of its colour was seen while it must be away."""
        return self.seen_while_absent <= LEFT_SHARE

    @property
    def gated(self) -> bool:
        """Whether it was shown and did leave, so that its return says something."""
        return self.was_shown and self.has_left


def scenes_of(
    config: RecallConfig, absence: float, window_frames: int, align: Align, aspect: float = 1.0
) -> list[RecallScene]:
    """The scenes of one absence, the same for every source whose chunks begin at the same frames; a larger
    number of them begins with those of a smaller one.

    Raises:
        EvalError: An absence in which the camera does not come to rest.
    """
    make = recall_scene if config.kind == "pan" else narrative_scene
    if config.kind == "pan" and round(absence * window_frames) < glide_frames(aspect):
        raise EvalError(
            f"an absence of {absence:g} windows of {window_frames} frames ends before the camera is at rest",
            f"use {math.ceil(100 * glide_frames(aspect) / window_frames) / 100:g} windows or more",
        )
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    targets = recall_targets(config.scenes, config.seed, config.split)
    frames = round(absence * window_frames)
    return [make(first + i, target, frames, align, config.split, aspect) for i, target in enumerate(targets)]


def header_of(config: RecallConfig, chunking: Chunking, aspect: float) -> dict[str, object]:
    """What runs must share for their records to be put together: all that a scene depends on but its number
    and its absence, so that scenes and absences can be added.

    Args:
        config: The test.
        chunking: Of the subject, in whose windows absences are counted.
        aspect: Width of the view over its height.
    """
    return {
        "test": NAME,
        "kind": config.kind,
        "seed": config.seed,
        "split": config.split,
        "world": VERSION,
        "window_frames": chunking.window_frames,
        "chunks": [chunking.first_frames, chunking.frames],
        "aspect": aspect,
        "sample_every_frames": SAMPLE_EVERY_FRAMES,
    }


def record_of(index: int, absence: float, made: RecallScene, measured: Measured) -> RecallRecord:
    """What is kept of one stream, every frame of which was measured."""
    found, frames = measured.detections, measured.frames
    target = made.target
    wanted = (COLOURS.index(target.colour), SHAPES.index(target.shape), SIZES.index(target.size))
    coloured_sk = found.colour == wanted[0]
    same_sk = coloured_sk & (found.shape == wanted[1])
    exact_sk = same_sk & (found.size == wanted[2])

    visible_s = (frames >= made.shown_from + SETTLE_FRAMES) & (frames < made.away_from)
    pans = made.home_at > made.back_from
    leaving = LEAVING_FRAMES if pans else SETTLE_FRAMES
    absent_s = (frames >= made.left_at + leaving) & (frames < made.back_from)
    settle = STOP_FRAMES if pans else SETTLE_FRAMES
    returned_s = (frames >= made.home_at + settle) & (frames < made.num_frames)

    exact_s = exact_sk.any(axis=1)
    shown_xy = _median_place(found, exact_sk, visible_s)
    third = COLOURS.index(made.third.colour)
    may_be_sk = np.isfinite(found.radius) & (found.colour != third)
    present_s = may_be_sk.any(axis=1) & returned_s
    slot_s = may_be_sk.argmax(axis=1)  # the largest comes first
    values = {
        name: getattr(found, name)[np.arange(len(frames)), slot_s] for name in ("colour", "shape", "size")
    }
    place_s2 = found.center_xy[np.arange(len(frames)), slot_s] * REFERENCE_HEIGHT

    def share(right_s: NDArray[np.bool_]) -> float | None:
        return float(right_s[present_s].mean()) if present_s.any() else None

    place = None
    if shown_xy is not None:
        place = share(np.linalg.norm(place_s2 - np.array(shown_xy), axis=1) <= PLACE_PX)
    own = frames < made.num_frames  # a batch goes on until its longest scene ends
    phases = np.full(len(frames), "-")
    for letter, rows in (("v", visible_s), ("a", absent_s), ("r", returned_s)):
        phases[rows] = letter
    return RecallRecord(
        index=index,
        absence=absence,
        seed=made.scene.seed,
        prompts=made.scene.captions,
        target=(target.colour, target.shape, target.size),
        others=(made.opener.colour, made.third.colour),
        absence_frames=made.absence_frames,
        shown=float(exact_s[visible_s].mean()),
        shown_x=None if shown_xy is None else shown_xy[0],
        shown_y=None if shown_xy is None else shown_xy[1],
        seen_while_absent=float(coloured_sk.any(axis=1)[absent_s].mean()),
        present=float(present_s[returned_s].mean()),
        colour=share(values["colour"] == wanted[0]),
        shape=share(values["shape"] == wanted[1]),
        size=share(values["size"] == wanted[2]),
        place=place,
        recalled=float(same_sk.any(axis=1)[returned_s].mean()),
        observed=_observed(values, place_s2, present_s),
        phases="".join(phases[own]),
        seen="".join("01"[int(value)] for value in same_sk.any(axis=1)[own]),
    )


def _median_place(
    found: Detections, which_sk: NDArray[np.bool_], rows_s: NDArray[np.bool_]
) -> tuple[float, float] | None:
    rows = np.flatnonzero(which_sk.any(axis=1) & rows_s)
    if not len(rows):
        return None
    place_s2 = found.center_xy[rows, which_sk[rows].argmax(axis=1)] * REFERENCE_HEIGHT
    return float(np.median(place_s2[:, 0])), float(np.median(place_s2[:, 1]))


def _observed(
    values: dict[str, NDArray[np.int64]], place_s2: NDArray[np.float64], present_s: NDArray[np.bool_]
) -> Observed | None:
    if not present_s.any():
        return None

    def word(name: str, words: tuple[str, ...]) -> str | None:
        named = values[name][present_s]
        named = named[named >= 0]
        return words[int(np.bincount(named).argmax())] if len(named) else None

    x, y = np.median(place_s2[present_s], axis=0).tolist()
    return Observed(
        colour=word("colour", COLOURS), shape=word("shape", SHAPES), size=word("size", SIZES), x=x, y=y
    )


def seconds_of(frames: float) -> float:
    """Seconds of some frames."""
    return frames / FPS

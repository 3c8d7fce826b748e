"""Scores of one stream against its prompts: one number per metric, and the same per window of the clip.

Scores are shares of the sampled frames (or windows) in which something is right, and so 1 is best; the rest
are magnitudes to be compared with those of real clips. A missing object counts as a wrong one.

Legend: s samples, n expected objects, k object slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.config import Config
from longtake.eval.diversity import Start
from longtake.eval.judge import Judged, judge, whole
from longtake.eval.meter import Measured, pick
from longtake.eval.returns import RETURNS, Return, return_scores, returns
from longtake.eval.script import Chunking, Script, Span
from longtake.world.captions import Attributes, parse_caption
from longtake.world.detect import Detections
from longtake.world.motion import Float64
from longtake.world.sampling import PAN_SPEED_RANGE_PX, PAN_VIEWS
from longtake.world.tracking import classify_motion
from longtake.world.vocabulary import COLOURS, MOTIONS, REFERENCE_HEIGHT, SHAPES

Scores = dict[str, float | None]

JUDGED: tuple[str, ...] = ("present", "colour", "shape", "size", "background", "all_right", "binding")
"""Metrics with a verdict on every sample, see `judge.Judged`. `all_right`: present, colour, shape and
background in one frame; `binding`: share over frames and asked objects in which one and the same object has
the asked colour and shape, where no other object touches or covers it."""
SHARES: tuple[str, ...] = (*JUDGED, "motion", "moving", "switch", "shown", *RETURNS)
"""Metrics that are shares of right answers. `motion`: the motion's class, `moving`: still against moving,
both per window; `switch`: share of frames after a prompt switch, its first chunk left out, in which what it
changes (the background, each object with a new pair of colour and shape) is as asked; `shown`: share of the
asked objects that a panning clip shows at all."""
MAGNITUDES: tuple[str, ...] = (
    "speed_px",
    "jerk_px",
    "frozen",
    "change",
    "flicker",
    "seam",
    "background_error",
    "colour_error",
    "size_change",
    "binding_judged",
    "departures",
)
"""`speed_px`: path length per frame, `jerk_px`: mean second difference of the track at the sampling
distance, both in pixels of 64 and under a fixed camera; `frozen`: share of windows in which an object that
should move stays; `change`, `flicker`: mean absolute first and second difference of the pixels in time;
`seam`: `change` at chunk boundaries less that elsewhere; `background_error`, `colour_error`: distance from
the true colours, per channel of 255; `size_change`: spread of the radius over its mean; `binding_judged`:
share of frames and asked objects on which binding is judged under a fixed camera; `departures`: how many
objects leave a panning view early enough that their return is due. Transitions after prompt switches
are left out."""
METRICS = SHARES + MAGNITUDES
PROPORTIONS = frozenset({*SHARES, "frozen", "binding_judged"})
"""Metrics between 0 and 1."""

MIN_MOTION_FRAMES = 28
"""The slowest object must have had the time to move by its radius before its motion is judged."""


class Record(Config):
    """What is kept of one stream.

    Attributes:
        kind: "scene", or "diversity" for the repetitions of a prompt under other seeds.
        index: Which scene's prompt.
        seed: Of the stream.
        prompts: (first frame, text), as the source followed them.
        heldout: Whether a prompt asks for a combination that is held out from training.
        scores: One value per metric; None where it does not apply.
        windows: The scores of each window of the clip.
        returns: Departures from a panning view and what came of them.
        start: How the first object begins; None if it is not seen.
    """

    kind: str
    index: int
    seed: int
    prompts: tuple[tuple[int, str], ...]
    heldout: bool
    scores: Scores
    windows: tuple[Scores, ...]
    returns: tuple[Return, ...]
    start: Start | None


def assign(found: Detections, wanted: Attributes) -> NDArray[np.int64]:
    """Which detection stands for which expected object on each sample, [S, N]; -1 for none.

    The largest detection of the object's colour, else the largest that is left.
    """
    num_samples, num_wanted = len(found.num_objects), len(wanted.objects)
    slots_sn = np.full((num_samples, num_wanted), -1)
    colours = [COLOURS.index(item.colour) if item.colour else -1 for item in wanted.objects]
    if num_wanted == 1:
        slots_sn[found.num_objects > 0, 0] = 0
        return slots_sn
    for sample in range(num_samples):
        free = list(range(min(int(found.num_objects[sample]), found.colour.shape[1])))
        for position in range(num_wanted):
            match = [slot for slot in free if found.colour[sample, slot] == colours[position]]
            if match:
                slots_sn[sample, position] = match[0]
                free.remove(match[0])
        for position in range(num_wanted):
            if slots_sn[sample, position] < 0 and free:
                slots_sn[sample, position] = free.pop(0)
    return slots_sn


def score(
    measured: Measured,
    script: Script,
    window_frames: int,
    chunking: Chunking | None = None,
) -> tuple[Scores, tuple[Scores, ...], tuple[Return, ...]]:
    """Scores of the whole clip, of each of its windows, and what came back to a panning view.

    Every frame is held to the prompt in force; from a prompt switch on, one chunk is left out.

    Args:
        measured: The stream's measurements.
        script: What it was asked for, with switches on the source's chunk boundaries.
        window_frames: Length of a window; a last window shorter than three quarters of it is left out unless
            it is the only one.
        chunking: Of the source.
    """
    chunking = chunking or Chunking()
    num_frames = len(measured.change) + 1
    clip = _Clip.of(measured, script, chunking.frames)
    starts = range(0, num_frames, window_frames)
    spans = [(start, min(start + window_frames, num_frames)) for start in starts]
    spans = [span for span in spans if span[1] - span[0] >= 0.75 * window_frames] or spans[:1]
    # Within a clip of switches a piece must be long enough to tell one motion from another.
    shortest = MIN_MOTION_FRAMES if len(script.prompts) == 1 else round(0.75 * window_frames)
    windows = tuple(_scores(clip, start, stop, shortest) for start, stop in spans)
    # Motion is judged window by window: a minute of it is no single track.
    whole = _scores(clip, 0, num_frames, None)
    for name in ("motion", "moving", "frozen"):
        whole[name] = _mean([window[name] for window in windows])
    whole["switch"] = _mean([_switched(clip, number) for number in range(1, len(clip.parts))])
    came_back: tuple[Return, ...] = ()
    if script.panning:
        whole["shown"] = _shown(clip, num_frames)
        # A panning clip begins with an object in view: one in which none is ever seen whole has it wrong.
        for name in ("colour", "shape", "size", "binding"):
            whole[name] = whole[name] or 0.0
        came_back = tuple(
            returns(measured.detections, measured.frames, clip.parts[0].wanted, num_frames, chunking.frames)
        )
        whole |= return_scores(came_back, num_frames, chunking.window_frames)
    return whole, windows, came_back


@dataclass(frozen=True)
class _Part:
    """One prompt's stretch of a clip: its judged samples and the verdicts on them."""

    span: Span
    wanted: Attributes
    inside: NDArray[np.bool_]
    slots_sn: NDArray[np.int64]
    verdicts: Judged


@dataclass(frozen=True)
class _Clip:
    """Measurements with the verdicts on each prompt's stretch; `steps` are those outside transitions."""

    measured: Measured
    parts: tuple[_Part, ...]
    steps: NDArray[np.bool_]

    @classmethod
    def of(cls, measured: Measured, script: Script, transition: int) -> _Clip:
        parts = []
        steps = np.ones(len(measured.change), bool)
        for span in script.spans(len(measured.change) + 1, transition):
            wanted = parse_caption(span.prompt)
            inside = (measured.frames >= span.judged_from) & (measured.frames < span.stop)
            found = pick(measured.detections, inside)
            slots_sn = assign(found, wanted)
            verdicts = judge(found, measured.frames[inside], wanted, slots_sn)
            parts.append(_Part(span, wanted, inside, slots_sn, verdicts))
            if span.start:
                steps[span.start - 1 : span.judged_from - 1] = False
        return cls(measured, tuple(parts), steps)


def _scores(clip: _Clip, start: int, stop: int, shortest: int | None) -> Scores:
    """Scores of the frames [start, stop); those of motion only in pieces of at least `shortest` frames."""
    measured = clip.measured
    values: dict[str, list[NDArray[np.float64]]] = {name: [] for name in (*JUDGED, "background_error")}
    objects: dict[str, list[float | None]] = {
        name: [] for name in ("speed_px", "jerk_px", "colour_error", "size_change")
    }
    judged: list[NDArray[np.bool_]] = []
    pairs: list[tuple[int, int]] = []
    for part in clip.parts:
        frames = measured.frames[part.inside]
        rows = (frames >= start) & (frames < stop)
        if not rows.any():
            continue
        for name in JUDGED:
            values[name].append(getattr(part.verdicts, name)[rows].ravel())
        found = pick(pick(measured.detections, part.inside), rows)
        values["background_error"].append(found.background_error)
        if part.wanted.panning:  # a track mixes the object's motion with the camera's
            objects["colour_error"].append(_mean(np.where(whole(found), found.colour_error, np.nan)))
            continue
        judged.append(np.isfinite(part.verdicts.binding[rows]).ravel())
        slots_sn, frames = part.slots_sn[rows], frames[rows]
        tracks = [picked(found.center_xy, slots_sn[:, n]) for n in range(len(part.wanted.objects))]
        objects["speed_px"] += [_speed(track, frames) for track in tracks]
        objects["jerk_px"] += [_jerk(track) for track in tracks]
        for n in range(len(part.wanted.objects)):
            objects["colour_error"].append(_mean(picked(found.colour_error, slots_sn[:, n])))
            objects["size_change"].append(_relative_spread(picked(found.radius, slots_sn[:, n])))
        length = min(stop, part.span.stop) - max(start, part.span.judged_from)
        if shortest is not None and length >= shortest:
            pairs += [
                (classify_motion(track, frames).motion, MOTIONS.index(item.motion))
                for track, item in zip(tracks, part.wanted.objects, strict=True)
                if item.motion is not None
            ]
    still = MOTIONS.index("still")
    steps = clip.steps[start : stop - 1]
    change, flicker = measured.change[start : stop - 1], measured.flicker[start : max(start, stop - 2)]
    return {
        **dict.fromkeys(METRICS),
        **{name: _mean(np.concatenate(listed)) if listed else None for name, listed in values.items()},
        **{name: _mean(listed) for name, listed in objects.items()},
        "motion": _mean([float(seen == motion) for seen, motion in pairs]),
        "moving": _mean(
            [float(seen >= 0 and (seen == still) == (motion == still)) for seen, motion in pairs]
        ),
        "frozen": _mean([float(seen == still) for seen, motion in pairs if motion != still]),
        "binding_judged": _mean(np.concatenate(judged)) if judged else None,
        "change": _mean(change[steps]),
        "flicker": _mean(flicker[steps[:-1] & steps[1:]]),
        "seam": _seam(change, measured.boundaries, steps, start, stop),
    }


def _switched(clip: _Clip, number: int) -> float | None:
    """Share of frames in which what the switch to part `number` changes is as asked; see `SHARES`."""
    before, now = clip.parts[number - 1].wanted, clip.parts[number]
    known = {(item.colour, item.shape) for item in before.objects}
    fresh = [n for n, item in enumerate(now.wanted.objects) if (item.colour, item.shape) not in known]
    answers = list(now.verdicts.binding[:, fresh].T)
    if now.wanted.background != before.background:
        answers.append(now.verdicts.background)
    return _mean(np.concatenate(answers)) if answers else None


def _shown(clip: _Clip, num_frames: int) -> float | None:
    """Share of the asked objects that a panning clip shows whole, on two samples at least."""
    slowest = (PAN_VIEWS - 1) * REFERENCE_HEIGHT / PAN_SPEED_RANGE_PX[0]
    if num_frames < slowest:
        return None  # the camera may not have been everywhere
    found = clip.measured.detections
    seen = [
        np.sum((found.colour == colour) & (found.shape == shape) & whole(found)) >= 2
        for item in clip.parts[0].wanted.objects
        if item.colour is not None and item.shape is not None
        for colour, shape in [(COLOURS.index(item.colour), SHAPES.index(item.shape))]
    ]
    return _mean([float(value) for value in seen])


def picked(values_sk: Float64, slots_s: NDArray[np.int64]) -> Float64:
    """The value of each sample's assigned detection (slot -1: none), NaN where there is none."""
    picked = values_sk[np.arange(len(slots_s)), slots_s].copy()
    picked[slots_s < 0] = np.nan
    return picked


def _mean(values: NDArray[np.generic] | Sequence[float | None]) -> float | None:
    """Mean of what is known; None where nothing is."""
    array = np.array([np.nan if value is None else value for value in values], np.float64)
    known = array[np.isfinite(array)]
    return float(known.mean()) if len(known) else None


def _speed(track_s2: Float64, frames_s: NDArray[np.int64]) -> float | None:
    steps = np.linalg.norm(np.diff(track_s2, axis=0), axis=1) / np.diff(frames_s)
    return _mean(steps * REFERENCE_HEIGHT)


def _jerk(track_s2: Float64) -> float | None:
    return _mean(np.linalg.norm(np.diff(track_s2, n=2, axis=0), axis=1) * REFERENCE_HEIGHT)


def _relative_spread(radius_s: Float64) -> float | None:
    known = radius_s[np.isfinite(radius_s)]
    return float(known.std() / known.mean()) if len(known) > 1 else None


def _seam(
    change: Float64, boundaries: NDArray[np.int64], steps: NDArray[np.bool_], start: int, stop: int
) -> float | None:
    at = np.zeros(len(change), bool)
    inside = boundaries[(boundaries >= start) & (boundaries < stop - 1)] - start
    at[inside] = True
    if not (at & steps).any() or not (~at & steps).any():
        return None
    return float(change[at & steps].mean() - change[~at & steps].mean())

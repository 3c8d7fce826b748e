"""Scores of one stream against its prompt: one number per metric, and the same per window of the clip.

Scores are shares of the sampled frames (or windows) in which something is right, and so 1 is best; the rest
are magnitudes to be compared with those of real clips. A missing object counts as a wrong one.

Legend: s samples, n expected objects, k object slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from longtake.config import Config
from longtake.eval.meter import Measured
from longtake.world.captions import Attributes
from longtake.world.detect import Detections
from longtake.world.motion import Float64
from longtake.world.tracking import classify_motion
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, REFERENCE_HEIGHT, SHAPES, SIZES

Scores = dict[str, float | None]

SHARES: tuple[str, ...] = (
    "present",
    "colour",
    "shape",
    "background",
    "size",
    "all_right",
    "motion",
    "moving",
)
"""Metrics that are shares of right answers. `all_right`: present, colour, shape and background in one frame;
`motion`: the motion's class, `moving`: still against moving, both per window."""
MAGNITUDES: tuple[str, ...] = (
    "speed_px",
    "jerk_px",
    "frozen",
    "flicker",
    "seam",
    "background_error",
    "colour_error",
    "size_change",
)
"""`speed_px`: path length per frame, `jerk_px`: mean second difference of the track at the sampling distance,
both in pixels of 64; `frozen`: share of windows in which an object that should move stays; `flicker`: mean
absolute second difference of the pixels in time; `seam`: mean absolute frame-to-frame difference at chunk
boundaries less that elsewhere; `background_error`, `colour_error`: distance from the true colours, per
channel of 255; `size_change`: spread of the radius over its mean."""
METRICS = SHARES + MAGNITUDES
PROPORTIONS = frozenset({*SHARES, "frozen"})
"""Metrics between 0 and 1."""

MIN_MOTION_FRAMES = 28
"""The slowest object must have had the time to move by its radius before its motion is judged."""


class Record(Config):
    """What is kept of one stream.

    Attributes:
        kind: "scene", or "diversity" for the repetitions of a prompt under other seeds.
        index: Which scene's prompt.
        seed: Of the stream.
        prompt: The text.
        heldout: Whether the prompt asks for a combination that is held out from training.
        scores: One value per metric; None where it does not apply.
        windows: The scores of each window of the clip.
        first_center: Where the first object is on the first sample, (x, y) in pixels of 64; None if nowhere.
    """

    kind: str
    index: int
    seed: int
    prompt: str
    heldout: bool
    scores: Scores
    windows: tuple[Scores, ...]
    first_center: tuple[float, float] | None


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


def score(measured: Measured, wanted: Attributes, window_frames: int) -> tuple[Scores, tuple[Scores, ...]]:
    """Scores of the whole clip, and of each of its windows.

    Args:
        measured: The stream's measurements.
        wanted: What its prompt asks for.
        window_frames: Length of a window; a last window shorter than three quarters of it is left out unless
            it is the only one.
    """
    num_frames = len(measured.change) + 1
    slots_sn = assign(measured.detections, wanted)
    starts = range(0, num_frames, window_frames)
    spans = [(start, min(start + window_frames, num_frames)) for start in starts]
    spans = [span for span in spans if span[1] - span[0] >= 0.75 * window_frames] or spans[:1]
    windows = tuple(_scores(measured, wanted, slots_sn, start, stop, fit=True) for start, stop in spans)
    # Motion is judged window by window: a minute of it is no single track.
    whole = _scores(measured, wanted, slots_sn, 0, num_frames, fit=False)
    for name in ("motion", "moving", "frozen"):
        whole[name] = _mean([window[name] for window in windows])
    return whole, windows


def _scores(
    measured: Measured, wanted: Attributes, slots_sn: NDArray[np.int64], start: int, stop: int, fit: bool
) -> Scores:
    """Scores of the frames [start, stop); those of motion only where `fit` and long enough to tell."""
    inside = (measured.frames >= start) & (measured.frames < stop)
    found, frames = measured.detections, measured.frames[inside]
    slots_sn = slots_sn[inside]
    present_s = found.num_objects[inside] == len(wanted.objects)
    right = {
        name: _right(found, inside, slots_sn, name, expected)
        for name, expected in (
            ("colour", [COLOURS.index(item.colour) if item.colour else None for item in wanted.objects]),
            ("shape", [SHAPES.index(item.shape) if item.shape else None for item in wanted.objects]),
            ("size", [SIZES.index(item.size) if item.size else None for item in wanted.objects]),
        )
    }
    background_s = np.ones(len(frames))
    if wanted.background is not None:
        background_s = (found.background[inside] == BACKGROUNDS.index(wanted.background)).astype(np.float64)
    all_right_s = present_s & (right["colour"] == 1) & (right["shape"] == 1) & (background_s == 1)
    tracks = [_picked(found.center_xy[inside], slots_sn[:, n]) for n in range(len(wanted.objects))]
    radii = [_picked(found.radius[inside], slots_sn[:, n]) for n in range(len(wanted.objects))]
    errors = [_picked(found.colour_error[inside], slots_sn[:, n]) for n in range(len(wanted.objects))]
    pairs = []
    if fit and stop - start >= MIN_MOTION_FRAMES:
        asked = [item.motion for item in wanted.objects]
        pairs = [
            (classify_motion(track, frames).motion, MOTIONS.index(motion))
            for track, motion in zip(tracks, asked, strict=True)
            if motion is not None
        ]
    still = MOTIONS.index("still")
    change, flicker = measured.change[start : stop - 1], measured.flicker[start : max(start, stop - 2)]
    return {
        "present": _mean(present_s),
        "colour": _mean(right["colour"]),
        "shape": _mean(right["shape"]),
        "background": _mean(background_s),
        "size": _mean(right["size"]),
        "all_right": _mean(all_right_s),
        "motion": _mean([float(seen == motion) for seen, motion in pairs]),
        "moving": _mean(
            [float(seen >= 0 and (seen == still) == (motion == still)) for seen, motion in pairs]
        ),
        "speed_px": _mean([_speed(track, frames) for track in tracks]),
        "jerk_px": _mean([_jerk(track) for track in tracks]),
        "frozen": _mean([float(seen == still) for seen, motion in pairs if motion != still]),
        "flicker": _mean(flicker),
        "seam": _seam(change, measured.boundaries, start, stop),
        "background_error": _mean(found.background_error[inside]),
        "colour_error": _mean([_mean(values) for values in errors]),
        "size_change": _mean([_relative_spread(values) for values in radii]),
    }


def _right(
    found: Detections,
    inside: NDArray[np.bool_],
    slots_sn: NDArray[np.int64],
    name: str,
    expected: list[int | None],
) -> Float64:
    """Share of the expected objects whose attribute is right, [S]."""
    values_sk = {"colour": found.colour, "shape": found.shape, "size": found.size}[name][inside]
    hits = [
        np.where(slots_sn[:, n] >= 0, values_sk[np.arange(len(values_sk)), slots_sn[:, n]] == value, False)
        for n, value in enumerate(expected)
        if value is not None
    ]
    return np.mean(hits, axis=0) if hits else np.ones(len(values_sk))


def _picked(values_sk: Float64, slots_s: NDArray[np.int64]) -> Float64:
    """The value of each sample's assigned detection, NaN where there is none."""
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


def _seam(change: Float64, boundaries: NDArray[np.int64], start: int, stop: int) -> float | None:
    at = np.zeros(len(change), bool)
    inside = boundaries[(boundaries >= start) & (boundaries < stop - 1)] - start
    at[inside] = True
    if not at.any() or at.all():
        return None
    return float(change[at].mean() - change[~at].mean())

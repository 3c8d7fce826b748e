"""Judges the sampled frames of one stretch of video against the prompt in force, frame by frame.

Two cases. Under a fixed camera every asked object is in view, though others may cover it. Under a panning
one nobody can say from a prompt what is in view, so each object that is seen whole is held to what the
prompt names.

*Attribute binding* (the term of T2I-CompBench and GenEval): one and the same object has both the asked
colour and the asked shape. An object is judged on a frame where it touches no other object; where it is not
seen it counts as wrong, unless another one can be covering it: it was close to another just before or
after, and is gone for at most `MAX_COVERED_FRAMES`.

Legend: s samples, n asked objects, k object slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from longtake.world.captions import Attributes
from longtake.world.detect import Detections
from longtake.world.motion import Float64
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, REFERENCE_HEIGHT, SHAPES, SIZES

Bool = NDArray[np.bool_]
Int64 = NDArray[np.int64]

TOUCHING_PX: Final = 3.0
"""Objects are apart where the discs of their areas leave this many pixels (of 64) between them: shapes reach
up to a third beyond the disc."""
NEAR_PX: Final = 12.0
"""Between two samples an object can get behind one that was this far off."""
MAX_COVERED_FRAMES: Final = 48
"""Slow objects stay behind each other for about this long."""


@dataclass(frozen=True)
class Judged:
    """Verdicts on S samples; NaN where a question does not arise.

    Attributes:
        present: 1 where exactly as many objects are seen as are asked for, [S].
        colour: Share of the asked objects that have their colour, [S]; panning: of those seen whole.
        shape: Likewise.
        size: Likewise.
        background: 1 where it is right or none is asked for, [S].
        all_right: 1 where present, colour, shape and background are all right, [S].
        binding: 1 or 0 for each asked object (panning: for each slot seen whole), [S, N or K].
    """

    present: Float64
    colour: Float64
    shape: Float64
    size: Float64
    background: Float64
    all_right: Float64
    binding: Float64


def judge(found: Detections, frames: Int64, wanted: Attributes, slots_sn: Int64) -> Judged:
    """Verdicts on a stretch under one prompt.

    Args:
        found: Detections of S samples.
        frames: Their frame numbers, rising.
        wanted: What the prompt asks for.
        slots_sn: Which detection stands for which asked object, see `score.assign`.
    """
    background_s = np.ones(len(frames))
    if wanted.background is not None:
        background_s = (found.background == BACKGROUNDS.index(wanted.background)).astype(np.float64)
    if wanted.panning:
        return _judge_panning(found, wanted, background_s)
    present_s = (found.num_objects == len(wanted.objects)).astype(np.float64)
    colour_s, shape_s, size_s = (
        _right(values, slots_sn, asked) for values, asked in asked_values(found, wanted)
    )
    all_right_s = (present_s == 1) & (colour_s == 1) & (shape_s == 1) & (background_s == 1)
    return Judged(
        present=present_s,
        colour=colour_s,
        shape=shape_s,
        size=size_s,
        background=background_s,
        all_right=all_right_s.astype(np.float64),
        binding=bound(found, frames, wanted),
    )


def touching(found: Detections, gap_px: float = TOUCHING_PX) -> Bool:
    """Which detections are within `gap_px` (of 64) of another one, [S, K]."""
    reach_sk = np.nan_to_num(found.radius)
    distance_skj = np.linalg.norm(found.center_xy[:, :, None] - found.center_xy[:, None], axis=-1)
    limit_skj = reach_sk[:, :, None] + reach_sk[:, None] + gap_px / REFERENCE_HEIGHT
    close_skj = np.nan_to_num(distance_skj, nan=np.inf) < limit_skj
    close_skj[:, np.arange(reach_sk.shape[1]), np.arange(reach_sk.shape[1])] = False
    close_sk: Bool = close_skj.any(axis=2)
    return close_sk


def whole(found: Detections) -> Bool:
    """Which detections are seen whole: clear of the view's border and of each other, [S, K]."""
    return np.isfinite(found.radius) & ~found.at_edge & ~touching(found)


def bound(found: Detections, frames: Int64, wanted: Attributes) -> Float64:
    """Attribute binding of each asked object under a fixed camera: 1, 0 or NaN (not judged), [S, N]."""
    verdicts_sn = np.full((len(frames), len(wanted.objects)), np.nan)
    asked = [COLOURS.index(item.colour) for item in wanted.objects if item.colour is not None]
    touching_sk, near_sk = touching(found), touching(found, NEAR_PX)
    exists_sk = np.isfinite(found.radius)
    stray_s = (exists_sk & ~touching_sk & ~np.isin(found.colour, asked)).any(axis=1)
    sample_s = np.arange(len(frames))
    for n, item in enumerate(wanted.objects):
        if item.colour is None or item.shape is None:
            continue
        coloured_sk = found.colour == COLOURS.index(item.colour)
        slot_s = coloured_sk.argmax(axis=1)  # the largest comes first
        seen_s = coloured_sk.any(axis=1)
        clear_s = seen_s & ~touching_sk[sample_s, slot_s]
        right_s = found.shape[sample_s, slot_s] == SHAPES.index(item.shape)
        verdicts_sn[clear_s, n] = right_s[clear_s]
        near_s = seen_s & near_sk[sample_s, slot_s]
        wrong_s = ~seen_s & (stray_s | ~_covered(seen_s, near_s, frames))
        verdicts_sn[wrong_s, n] = 0
    return verdicts_sn


def _covered(seen_s: Bool, near_s: Bool, frames: Int64) -> Bool:
    """Which samples another object may explain: in short gaps that begin or end close to one."""
    covered_s = np.zeros(len(seen_s), bool)
    gone = np.flatnonzero(~seen_s)
    for run in np.split(gone, np.flatnonzero(np.diff(gone) > 1) + 1) if len(gone) else []:
        before, after = int(run[0]) - 1, int(run[-1]) + 1
        first = frames[max(before, 0)]
        last = frames[min(after, len(frames) - 1)]
        close = (before >= 0 and near_s[before]) or (after < len(seen_s) and near_s[after])
        covered_s[run] = close and last - first <= MAX_COVERED_FRAMES
    return covered_s


def _judge_panning(found: Detections, wanted: Attributes, background_s: Float64) -> Judged:
    """Every object seen whole must be one that the prompt names."""
    whole_sk = whole(found)
    (colour_sk, colours), (shape_sk, shapes), (size_sk, sizes) = asked_values(found, wanted)
    named_sk = np.zeros_like(whole_sk)
    for colour, shape in zip(colours, shapes, strict=True):
        named_sk |= (colour_sk == colour) & (shape_sk == shape)
    empty_s = np.full(len(background_s), np.nan)
    return Judged(
        present=empty_s,
        colour=_share(_one_of(colour_sk, colours), whole_sk),
        shape=_share(_one_of(shape_sk, shapes), whole_sk),
        size=_share(_one_of(size_sk, sizes), whole_sk),
        background=background_s,
        all_right=empty_s,
        binding=np.where(whole_sk, named_sk.astype(np.float64), np.nan),
    )


def _one_of(values_sk: Int64, asked: list[int | None]) -> Bool:
    return np.isin(values_sk, [value for value in asked if value is not None])


def _share(right_sk: Bool, judged_sk: Bool) -> Float64:
    count_s = judged_sk.sum(axis=1)
    right_s = (right_sk & judged_sk).sum(axis=1)
    share_s: Float64 = np.where(count_s > 0, right_s / np.maximum(count_s, 1), np.nan)
    return share_s


def asked_values(found: Detections, wanted: Attributes) -> list[tuple[Int64, list[int | None]]]:
    """Detected values and asked ones of colour, shape and size."""
    return [
        (found.colour, [COLOURS.index(item.colour) if item.colour else None for item in wanted.objects]),
        (found.shape, [SHAPES.index(item.shape) if item.shape else None for item in wanted.objects]),
        (found.size, [SIZES.index(item.size) if item.size else None for item in wanted.objects]),
    ]


def hits(values_sk: Int64, slots_sn: Int64, expected: list[int | None]) -> Bool:
    """Which expected objects have their value, [S, M]; objects of which None is expected are left out."""
    sample_s = np.arange(len(values_sk))
    columns = [
        np.where(slots_sn[:, n] >= 0, values_sk[sample_s, slots_sn[:, n]] == value, False)
        for n, value in enumerate(expected)
        if value is not None
    ]
    return np.stack(columns, axis=1) if columns else np.ones((len(values_sk), 0), bool)


def _right(values_sk: Int64, slots_sn: Int64, expected: list[int | None]) -> Float64:
    """Share of the expected objects whose attribute is right, [S]."""
    hits_sm = hits(values_sk, slots_sn, expected)
    return hits_sm.mean(axis=1) if hits_sm.shape[1] else np.ones(len(values_sk))

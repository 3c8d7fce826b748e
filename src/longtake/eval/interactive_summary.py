"""Figures of an interactive test from the records of its streams.

Legend: s samples (every frame).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from longtake.eval.interactive_records import (
    ADHERENCE,
    ATTRIBUTES,
    InteractiveRecord,
    InteractiveSource,
    Latency,
)
from longtake.eval.stats import Estimate, estimate, paired_difference, wilson
from longtake.world import parse_caption

HOLD_FRAMES: Final = 8
"""A prompt has arrived when it holds for this many frames in a row: half a second."""
PARTS: Final = 6
"""The first and the last of so many parts of a stream are compared."""


def latencies(record: InteractiveRecord) -> dict[str, list[int | None]]:
    """Latency of each switch that changes something, by attribute and for "all" together.

    None for a switch whose prompt does not arrive before the next switch or the end.
    """
    asked = [parse_caption(text) for _, text in record.prompts]
    starts = [start for start, _ in record.prompts]
    right = {name: np.array([mark == "1" for mark in marks]) for name, marks in record.right.items()}
    right["all"] = np.logical_and.reduce([right[name] for name in ATTRIBUTES])
    ends = [*starts[1:], len(right["all"])]
    found: dict[str, list[int | None]] = {name: [] for name in ("all", *ATTRIBUTES)}
    for number in range(1, len(asked)):
        before, now = asked[number - 1], asked[number]
        changed = {
            "colour": [item.colour for item in before.objects] != [item.colour for item in now.objects],
            "shape": [item.shape for item in before.objects] != [item.shape for item in now.objects],
            "background": before.background != now.background,
        }
        changed["all"] = any(changed.values())
        for name, differs in changed.items():
            if differs:
                found[name].append(arrival(right[name][starts[number] : ends[number]]))
    return found


def arrival(right_s: NDArray[np.bool_]) -> int | None:
    """First frame from which it is right for `HOLD_FRAMES` in a row, None if there is none."""
    if len(right_s) < HOLD_FRAMES:
        return None
    held = np.lib.stride_tricks.sliding_window_view(right_s, HOLD_FRAMES).all(axis=1)
    return int(held.argmax()) if held.any() else None


def summarize_source(records: Sequence[InteractiveRecord], about: dict[str, str]) -> InteractiveSource:
    """Puts one source's streams into tables."""
    num = min(len(record.settled) for record in records)
    by_name: dict[str, list[int | None]] = {name: [] for name in ("all", *ATTRIBUTES)}
    for record in records:
        for name, listed in latencies(record).items():
            by_name[name] += listed
    return InteractiveSource(
        about=about,
        settled=tuple(_estimates([record.settled[i] for record in records]) for i in range(num)),
        whole=tuple(_estimates([record.whole[i] for record in records]) for i in range(num)),
        mean_settled=_estimates([_mean_of(record.settled) for record in records]),
        mean_whole=_estimates([_mean_of(record.whole) for record in records]),
        last_less_first=_last_less_first(records, max(1, num // PARTS)),
        latency={name: _latency(listed) for name, listed in by_name.items()},
    )


def _last_less_first(records: Sequence[InteractiveRecord], num_prompts: int) -> dict[str, Estimate]:
    first, last = (
        [_mean_of(record.settled[part]) for record in records]
        for part in (slice(num_prompts), slice(-num_prompts, None))
    )
    return {
        name: paired_difference([item[name] for item in last], [item[name] for item in first])
        for name in ADHERENCE
    }


def _estimates(scores: Sequence[Mapping[str, float | None]]) -> dict[str, Estimate]:
    return {name: estimate([item[name] for item in scores], proportion=True) for name in ADHERENCE}


def _mean_of(scores: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    return {name: estimate([item[name] for item in scores]).value for name in ADHERENCE}


def _latency(listed: Sequence[int | None]) -> Latency:
    missing = sum(value is None for value in listed)
    low, high = wilson(missing, len(listed))
    share = missing / len(listed) if listed else None
    return Latency(
        switches=len(listed),
        median=_quantile(listed, 0.5),
        quantile_90=_quantile(listed, 0.9),
        never=Estimate(value=share, low=low, high=high, num=len(listed)),
    )


def _quantile(listed: Sequence[int | None], level: float) -> float | None:
    """Of all switches, those that never arrive being the slowest: a value that occurs, or None."""
    if not listed:
        return None
    ranked = sorted(listed, key=lambda value: np.inf if value is None else value)
    value = ranked[min(len(ranked) - 1, int(np.ceil(level * len(ranked))) - 1)]
    return None if value is None else float(value)

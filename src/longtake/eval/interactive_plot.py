"""The picture of an interactive test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtake.eval.interactive_records import (
    ATTRIBUTES,
    InteractiveConfig,
    InteractiveRecord,
    InteractiveSummary,
)
from longtake.io.plot import pyplot
from longtake.world import FPS


def draw(
    config: InteractiveConfig,
    records: Mapping[str, Sequence[InteractiveRecord]],
    summary: InteractiveSummary,
    path: Path,
) -> None:
    """Two panels: adherence prompt by prompt, and how the new prompt arrives after a switch.

    Args:
        config: what was tested.
        records: by source, the model first.
        summary: the figures.
        path: of the PNG.
    """
    plt = pyplot()
    subject = next(iter(records))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), dpi=100)
    for number, metric in enumerate(("colour", "shape", "background", "all_right")):
        for name, source in summary.sources.items():
            points = [(i * config.seconds_each, item[metric].value) for i, item in enumerate(source.settled)]
            known = [(time, value) for time, value in points if value is not None]
            style = {"marker": "o", "label": metric} if name == subject else {"linestyle": ":"}
            times, shares = [time for time, _ in known], [value for _, value in known]
            left.plot(times, shares, color=f"C{number}", markersize=3, **style)
    left.set_xlabel(f"prompt in force from (s); {config.streams} streams, dotted: real clips")
    left.set_ylabel("share right, transitions left out")
    left.set_ylim(-0.02, 1.02)
    left.legend(fontsize=7)
    for number, attribute in enumerate(ATTRIBUTES):
        for name, listed in records.items():
            curve = _after_switch(listed, attribute)
            style = {"label": attribute} if name == subject else {"linestyle": ":"}
            right.plot(np.arange(len(curve)) / FPS, curve, color=f"C{number}", **style)
    right.set_xlabel("seconds after a switch takes effect")
    right.set_ylabel("share of streams that are right")
    right.set_ylim(-0.02, 1.02)
    right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _after_switch(records: Sequence[InteractiveRecord], attribute: str) -> NDArray[np.float64]:
    """Share of the switches after which an attribute is right, by frame since the switch."""
    rows = []
    for record in records:
        marks = np.array([mark == "1" for mark in record.right[attribute]])
        starts = [start for start, _ in record.prompts]
        rows += [marks[start:end] for start, end in zip(starts[1:], [*starts[2:], len(marks)], strict=True)]
    shortest = min(len(row) for row in rows)
    share_s: NDArray[np.float64] = np.stack([row[:shortest] for row in rows]).mean(axis=0)
    return share_s

"""From records to tables: metrics with their intervals, differences to the ceilings, drift, subsets, bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from longtake.config import Config
from longtake.eval.runner import WorldEvalConfig
from longtake.eval.score import METRICS, PROPORTIONS, Record
from longtake.eval.stats import Estimate, estimate, paired_difference
from longtake.world import VERSION

AUTOENCODER: Final = "vae"
"""Name of the source whose colour errors bound the subject's."""
BARS: Final[Mapping[str, float]] = {"present": 0.95, "colour": 0.90, "shape": 0.90, "background": 0.90}
"""What a level must reach before the next one is climbed."""
MAX_LOSS: Final = 0.05
"""How far the mean of a long clip may fall below its first window, and how often it may freeze."""
MAX_ERROR_RATIO: Final = 2.0
"""Colours of the last window may be this many times as far off as the autoencoder's own."""


class SourceSummary(Config):
    """One source's figures.

    Attributes:
        about: Its provenance.
        metrics: Mean over scenes of every metric, and `diversity_px`: mean distance (pixels of 64) between
            the first places of the object in videos of one prompt with different seeds.
        heldout: The same for prompts with a combination held out from training.
        seen: The same for the others.
        windows: The metrics of each window of the clips, in order.
        drift: Last window less first window, paired by scene; empty for clips of one window.
    """

    about: dict[str, str]
    metrics: dict[str, Estimate]
    heldout: dict[str, Estimate]
    seen: dict[str, Estimate]
    windows: tuple[dict[str, Estimate], ...]
    drift: dict[str, Estimate]


class Bar(Config):
    """A requirement and whether it is met.

    Attributes:
        metric: What is required of the subject.
        required: The bound.
        at_most: Whether it is an upper bound.
        value: What was measured; None where nothing could be, which meets no requirement.
        met: Whether the value keeps the bound.
    """

    metric: str
    required: float
    at_most: bool
    value: float | None
    met: bool

    @classmethod
    def of(cls, metric: str, value: float | None, required: float, at_most: bool = False) -> Bar:
        """Compares a value with its bound."""
        met = value is not None and (value <= required if at_most else value >= required)
        return cls(metric=metric, required=required, at_most=at_most, value=value, met=met)


class Summary(Config):
    """An evaluation's result.

    Attributes:
        config: What was evaluated.
        config_digest: Of it.
        world_version: Of the generator of scenes.
        subject: Name of the source under evaluation; the others are ceilings.
        sources: Figures by source name.
        differences: The subject less each ceiling, paired by scene.
        bars: Requirements on the subject.
    """

    config: WorldEvalConfig
    config_digest: str
    world_version: str
    subject: str
    sources: dict[str, SourceSummary]
    differences: dict[str, dict[str, Estimate]]
    bars: tuple[Bar, ...]


def summarize(
    config: WorldEvalConfig,
    subject: str,
    records: Mapping[str, Sequence[Record]],
    about: Mapping[str, dict[str, str]],
) -> Summary:
    """Puts the records of the subject and its ceilings into tables.

    Args:
        config: Of the evaluation.
        subject: Which source is under evaluation.
        records: By source, in job order.
        about: Provenance by source.
    """
    scenes = {name: [item for item in listed if item.kind == "scene"] for name, listed in records.items()}
    sources = {
        name: SourceSummary(
            about=about[name],
            metrics={**_estimates(scenes[name]), "diversity_px": estimate(_spreads(listed))},
            heldout=_estimates([item for item in scenes[name] if item.heldout]),
            seen=_estimates([item for item in scenes[name] if not item.heldout]),
            windows=_windows(scenes[name]),
            drift=_drift(scenes[name]),
        )
        for name, listed in records.items()
    }
    differences = {
        name: {
            metric: paired_difference(
                [item.scores[metric] for item in scenes[subject]], [item.scores[metric] for item in theirs]
            )
            for metric in METRICS
        }
        for name, theirs in scenes.items()
        if name != subject
    }
    return Summary(
        config=config,
        config_digest=config.digest(),
        world_version=VERSION,
        subject=subject,
        sources=sources,
        differences=differences,
        bars=_bars(subject, sources),
    )


def _bars(subject: str, sources: Mapping[str, SourceSummary]) -> tuple[Bar, ...]:
    """Every clip's bars, and those of clips of several windows: no loss, no freezing, no drift of colours."""
    ours = sources[subject]
    bars = [Bar.of(metric, ours.metrics[metric].value, required) for metric, required in BARS.items()]
    if len(ours.windows) < 2:
        return tuple(bars)
    for metric in BARS:
        first, whole = ours.windows[0][metric].value, ours.metrics[metric].value
        loss = None if first is None or whole is None else first - whole
        bars.append(Bar.of(f"loss of {metric}", loss, MAX_LOSS, at_most=True))
    bars.append(Bar.of("frozen", ours.metrics["frozen"].value, MAX_LOSS, at_most=True))
    own = sources.get(AUTOENCODER)
    for metric in ("background_error", "colour_error"):
        bound = own.metrics[metric].value if own is not None else None
        if bound is not None:
            last = ours.windows[-1][metric].value
            bars.append(Bar.of(f"last {metric}", last, MAX_ERROR_RATIO * bound, at_most=True))
    return tuple(bars)


def _estimates(scenes: Sequence[Record]) -> dict[str, Estimate]:
    return {metric: _estimate(metric, [item.scores[metric] for item in scenes]) for metric in METRICS}


def _estimate(metric: str, values: Sequence[float | None]) -> Estimate:
    return estimate(values, proportion=metric in PROPORTIONS)


def _windows(scenes: Sequence[Record]) -> tuple[dict[str, Estimate], ...]:
    count = min((len(item.windows) for item in scenes), default=0)
    return tuple(
        {metric: _estimate(metric, [item.windows[number][metric] for item in scenes]) for metric in METRICS}
        for number in range(count)
    )


def _drift(scenes: Sequence[Record]) -> dict[str, Estimate]:
    if not scenes or min(len(item.windows) for item in scenes) < 2:
        return {}
    return {
        metric: paired_difference(
            [item.windows[-1][metric] for item in scenes], [item.windows[0][metric] for item in scenes]
        )
        for metric in METRICS
    }


def _spreads(records: Sequence[Record]) -> list[float]:
    """Mean pairwise distance of the first places of each repeated prompt."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for item in records:
        if item.kind == "diversity" and item.first_center is not None:
            groups.setdefault(item.index, []).append(item.first_center)
    spreads = []
    for places in groups.values():
        if len(places) > 1:
            points = np.array(places)
            distances = np.linalg.norm(points[:, None] - points, axis=-1)
            spreads.append(float(distances[np.triu_indices(len(points), 1)].mean()))
    return spreads

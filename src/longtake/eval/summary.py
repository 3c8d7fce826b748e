"""From records to tables: metrics with their intervals, differences to the ceilings, drift, subsets, bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from longtake.config import Config
from longtake.eval.bars import TRUTH, Bar, bars_of
from longtake.eval.diversity import SPREADS, Start, spreads
from longtake.eval.runner import WorldEvalConfig
from longtake.eval.score import METRICS, PROPORTIONS, SHARES, Record
from longtake.eval.stats import Estimate, estimate, paired_difference, paired_ratio, unpaired_difference
from longtake.world import VERSION

RATIOS: Final[tuple[str, ...]] = ("speed_px", "change", "departures")
"""Magnitudes that should be those of real clips of the same prompts; so should the spreads."""


class SourceSummary(Config):
    """One source's figures.

    Attributes:
        about: Its provenance.
        metrics: Mean over scenes of every metric, and over prompts of the `diversity.SPREADS`.
        heldout: The same for prompts with a combination held out from training.
        seen: The same for the others.
        generalization: Held out less seen, of the shares, unpaired; empty where either has no scenes.
        ratios: `RATIOS` and spreads over those of real clips, paired by prompt; empty without real clips.
        windows: The metrics of each window of the clips, in order.
        drift: Last window less first window, paired by scene; empty for clips of one window.
    """

    about: dict[str, str]
    metrics: dict[str, Estimate]
    heldout: dict[str, Estimate]
    seen: dict[str, Estimate]
    generalization: dict[str, Estimate]
    ratios: dict[str, Estimate]
    windows: tuple[dict[str, Estimate], ...]
    drift: dict[str, Estimate]


class Summary(Config):
    """An evaluation's result.

    Attributes:
        config: What was evaluated.
        config_digest: Of it.
        world_version: Of the generator of scenes.
        subject: Name of the source under evaluation; the others are ceilings.
        sources: Figures by source name.
        differences: The subject less each ceiling, paired by scene.
        against: The subject's figures less those in another evaluation; empty without one.
        against_same_scenes: Whether these are paired by scene, all metrics and spreads; else shares,
            unpaired.
        bars: Requirements on the subject.
    """

    config: WorldEvalConfig
    config_digest: str
    world_version: str
    subject: str
    sources: dict[str, SourceSummary]
    differences: dict[str, dict[str, Estimate]]
    against: dict[str, Estimate]
    against_same_scenes: bool
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Other:
    """Another evaluation: its subject's records in job order, and whether they are of the same scenes."""

    records: Sequence[Record]
    same_scenes: bool


def summarize(
    config: WorldEvalConfig,
    subject: str,
    records: Mapping[str, Sequence[Record]],
    about: Mapping[str, dict[str, str]],
    other: Other | None = None,
) -> Summary:
    """Puts the records of the subject and its ceilings into tables.

    Args:
        config: Of the evaluation.
        subject: Which source is under evaluation.
        records: By source, in job order.
        about: Provenance by source.
        other: Another evaluation to compare with.
    """
    scenes = {name: [item for item in listed if item.kind == "scene"] for name, listed in records.items()}
    sources = {
        name: SourceSummary(
            about=about[name],
            metrics={
                **_estimates(scenes[name]),
                **{key: estimate(_spreads(listed)[key]) for key in SPREADS},
            },
            heldout=_estimates([item for item in scenes[name] if item.heldout]),
            seen=_estimates([item for item in scenes[name] if not item.heldout]),
            generalization=_shortfall(
                [item for item in scenes[name] if item.heldout],
                [item for item in scenes[name] if not item.heldout],
            ),
            ratios=(_of_same_jobs(paired_ratio, RATIOS, listed, records[TRUTH]) if TRUTH in records else {}),
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
    against: dict[str, Estimate] = {}
    if other is not None and other.same_scenes:
        against = _of_same_jobs(paired_difference, METRICS, records[subject], other.records)
    elif other is not None:
        against = _shortfall(scenes[subject], [item for item in other.records if item.kind == "scene"])
    same_scenes = other is not None and other.same_scenes
    return Summary(
        config=config,
        config_digest=config.digest(),
        world_version=VERSION,
        subject=subject,
        sources=sources,
        differences=differences,
        against=against,
        against_same_scenes=same_scenes,
        bars=bars_of(config.level, subject, sources, scenes[subject], against, same_scenes),
    )


def _shortfall(ours: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Estimate]:
    """Ours less theirs, of the shares; empty where either is."""
    if not ours or not theirs:
        return {}
    return {
        metric: unpaired_difference(
            [item.scores[metric] for item in ours], [item.scores[metric] for item in theirs]
        )
        for metric in SHARES
    }


def _of_same_jobs(
    statistic: Callable[[Sequence[float | None], Sequence[float | None]], Estimate],
    metrics: Sequence[str],
    ours: Sequence[Record],
    theirs: Sequence[Record],
) -> dict[str, Estimate]:
    """A statistic of pairs: metrics of the scenes that both have, and spreads of such prompts."""
    ours, theirs = _common(ours, theirs), _common(theirs, ours)
    pairs = [
        (mine.scores, other.scores) for mine, other in zip(ours, theirs, strict=True) if mine.kind == "scene"
    ]
    found = {
        metric: statistic([mine[metric] for mine, _ in pairs], [other[metric] for _, other in pairs])
        for metric in metrics
    }
    mine, other = _spreads(ours), _spreads(theirs)
    return found | {key: statistic(mine[key], other[key]) for key in SPREADS}


def _common(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    """Those of streams that are among the others too, in the order of evaluations."""
    known = {(item.kind, item.index, item.seed) for item in others}
    return [item for item in records if (item.kind, item.index, item.seed) in known]


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


def _spreads(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """The spreads of each repeated prompt, in the order of the prompts."""
    groups: dict[int, list[Start]] = {}
    for item in records:
        if item.kind == "diversity":
            group = groups.setdefault(item.index, [])
            if item.start is not None:
                group.append(item.start)
    found = [spreads(groups[index]) for index in sorted(groups)]
    return {key: [values[key] for values in found] for key in SPREADS}

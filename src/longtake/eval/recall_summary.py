"""Figures of a recall test: by source and absence, gated and over all scenes, with chance and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from longtake.config import Config
from longtake.eval.recall_records import IDENTITY, PLACE_PX, RecallConfig, RecallRecord, seconds_of
from longtake.eval.stats import Estimate, estimate, paired_difference

METRICS: Final = ("recalled", "present", *IDENTITY)


class AbsenceFigures(Config):
    """One source at one absence.

    Attributes:
        windows: The absence as asked, in windows of the model.
        seconds: Mean absence.
        gate: Share of the scenes in which the target was shown and did leave.
        shown: Share of the scenes in which it was shown. ``left``: In which it did leave.
        gated: Metrics over the scenes that pass the gate; identity (colour, shape, size, place) given
            presence.
        all: The same over all scenes.
        chance: Of each identity metric, over the gated scenes: share that what came back would have if it
            were compared with the targets of other scenes, of a colour that is possible in its own.
    """

    windows: float
    seconds: float
    gate: Estimate
    shown: Estimate
    left: Estimate
    gated: dict[str, Estimate]
    all: dict[str, Estimate]
    chance: dict[str, float | None]


class SourceFigures(Config):
    """One source's figures.

    Attributes:
        about: Its provenance.
        absences: In the order asked for.
        less_subject: By absence, each metric less the first source's, paired over the scenes that both gate.
    """

    about: dict[str, str]
    absences: tuple[AbsenceFigures, ...]
    less_subject: tuple[dict[str, Estimate], ...]


class RecallSummary(Config):
    """A recall test's result.

    Attributes:
        test: Name and version of the test. ``generator``: Hash of all its scenes.
        config: What was tested.
        world_version: Of the generator of scenes.
        window_frames: Of the model.
        subject: Name of the first source.
        sources: Figures by source name.
    """

    test: str
    generator: str
    config: RecallConfig
    world_version: str
    window_frames: int
    subject: str
    sources: dict[str, SourceFigures]


def summarize(
    records: Mapping[str, Sequence[RecallRecord]], abouts: Mapping[str, dict[str, str]]
) -> dict[str, SourceFigures]:
    """Tables of every source.

    Args:
        records: By source, the subject first; the same scenes in the same order.
        abouts: Provenance by source.
    """
    subject = next(iter(records))
    absences = list(dict.fromkeys(record.absence for record in records[subject]))
    made = {}
    for name, listed in records.items():
        figures, differences = [], []
        for absence in absences:
            mine = [record for record in listed if record.absence == absence]
            theirs = [record for record in records[subject] if record.absence == absence]
            figures.append(_figures(absence, mine))
            differences.append(_differences(mine, theirs))
        made[name] = SourceFigures(
            about=abouts[name], absences=tuple(figures), less_subject=tuple(differences)
        )
    return made


def _figures(absence: float, records: Sequence[RecallRecord]) -> AbsenceFigures:
    gated = [record for record in records if record.gated]
    return AbsenceFigures(
        windows=absence,
        seconds=seconds_of(float(np.mean([record.absence_frames for record in records]))),
        gate=estimate([float(record.gated) for record in records], proportion=True),
        shown=estimate([float(record.was_shown) for record in records], proportion=True),
        left=estimate([float(record.has_left) for record in records], proportion=True),
        gated=_estimates(gated),
        all=_estimates(records),
        chance={name: _chance(name, gated) for name in IDENTITY},
    )


def _estimates(records: Sequence[RecallRecord]) -> dict[str, Estimate]:
    return {
        name: estimate([getattr(record, name) for record in records], proportion=True) for name in METRICS
    }


def _differences(mine: Sequence[RecallRecord], theirs: Sequence[RecallRecord]) -> dict[str, Estimate]:
    pairs = [pair for pair in zip(mine, theirs, strict=True) if all(record.gated for record in pair)]
    return {
        name: paired_difference(
            [getattr(record, name) for record, _ in pairs], [getattr(record, name) for _, record in pairs]
        )
        for name in METRICS
    }


def _chance(name: str, records: Sequence[RecallRecord]) -> float | None:
    """Mean over what came back of how many of the other scenes' targets it would have matched."""
    shares = []
    for record in records:
        seen = record.observed
        if seen is None:
            continue
        others = [
            other for other in records if other.index != record.index and other.target[0] not in record.others
        ]
        if name == "place":
            places = [
                (other.shown_x, other.shown_y)
                for other in others
                if other.shown_x is not None and other.shown_y is not None
            ]
            matches = [float(np.hypot(seen.x - x, seen.y - y) <= PLACE_PX) for x, y in places]
        else:
            which = IDENTITY.index(name)
            matches = [float(getattr(seen, name) == other.target[which]) for other in others]
        if matches:
            shares.append(float(np.mean(matches)))
    return float(np.mean(shares)) if shares else None

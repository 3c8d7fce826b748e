"""What a model must reach: every requirement of an evaluation against the world, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from longtake.config import Config
from longtake.eval.stats import Estimate, paired_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from longtake.eval.score import Record
    from longtake.eval.summary import SourceSummary

TRUTH: Final = "truth"
"""Name of the source of real clips, which motion and seams are compared with."""
AUTOENCODER: Final = "vae"
"""Name of the source whose colour errors bound the subject's."""

LEVEL_BARS: Final[Mapping[int, Mapping[str, float]]] = MappingProxyType(
    {
        1: {"present": 0.97, "colour": 0.97, "shape": 0.97, "background": 0.97, "motion": 0.90},
        2: {"binding": 0.90},
        3: {"return_present_in_window": 0.85, "return_colour_in_window": 0.85},
    }
)
"""Least values by level: what must hold before the next level is climbed."""
STEADY: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {1: tuple(LEVEL_BARS[1]), 2: ("binding", "background"), 3: ("binding", "background")}
)
"""Metrics by level that clips of several windows must not lose."""
MAX_LOSS: Final = 0.02
"""How far the mean of a long clip may fall below its own first window."""
MAX_HELDOUT_LOSS: Final = 0.05
"""How far what is held out from training may fall below what is not."""
MAX_TEACHER_LOSS: Final = 0.02
"""How far a few-step model may fall below its many-step teacher on the same scenes."""
MAX_SPEED_DEVIATION: Final = 0.15
"""How far the objects' mean speed may be off that of real clips of the same prompts, as a share of it."""
MIN_DEPARTURES: Final = 0.5
"""At level 3, objects leave the view at least this many times as often as in real clips of the same prompts:
a camera that stands still makes returns easy."""
MAX_SEAM: Final = 0.10
"""How much more or less a frame may change at chunk boundaries, as a share of real clips' mean change."""
MAX_FROZEN: Final = 0.05
"""Share of windows in which an object that should move may stay,"""
MAX_FROZEN_WHERE_NEVER: Final = 0.02
"""or this where real clips' objects never do."""
MAX_ERROR_RATIO: Final = 2.0
"""Colours of the last window may be this many times as far off as the autoencoder's own."""


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

    @classmethod
    def most(cls, metric: str, value: float | None, required: float) -> Bar:
        """An upper bound."""
        return cls.of(metric, value, required, at_most=True)


def bars_of(
    level: int,
    subject: str,
    sources: Mapping[str, SourceSummary],
    scenes: Sequence[Record],
    against: Mapping[str, Estimate],
    same_scenes: bool = False,
) -> tuple[Bar, ...]:
    """All requirements on the subject.

    Those that compare with another source are left out where it was not evaluated, and those on held-out
    prompts where a split has none.

    Args:
        level: World level.
        subject: Name of the source under evaluation.
        sources: Figures by source name.
        scenes: The subject's records.
        against: The subject's differences from another evaluation, or nothing.
        same_scenes: Whether that was of the same scenes, as a rule by the teacher.
    """
    ours, real = sources[subject], sources.get(TRUTH)
    asked = LEVEL_BARS[level]
    bars = [Bar.of(metric, ours.metrics[metric].value, required) for metric, required in asked.items()]
    for label, differences, bound in (
        ("held out", ours.generalization, MAX_HELDOUT_LOSS),
        ("against the other run", against, MAX_TEACHER_LOSS if same_scenes else MAX_HELDOUT_LOSS),
    ):
        bars += [
            Bar.most(f"loss of {metric} {label}", 0.0 - value, bound)
            for metric in asked
            if metric in differences and (value := differences[metric].value) is not None
        ]
    if real is not None:
        bars += _motion_bars(ours, real)
        if real.metrics["departures"].value is not None:
            bars.append(
                Bar.of("departures over real clips'", ours.ratios["departures"].value, MIN_DEPARTURES)
            )
    if len(ours.windows) > 1:
        bars += _long_bars(level, ours, real, sources.get(AUTOENCODER), scenes)
    return tuple(bars)


def _motion_bars(ours: SourceSummary, real: SourceSummary) -> list[Bar]:
    bars = []
    if real.metrics["speed_px"].value is not None:
        speed = ours.ratios["speed_px"].value
        deviation = None if speed is None else abs(speed - 1)
        bars.append(Bar.most("speed off real clips'", deviation, MAX_SPEED_DEVIATION))
    change, seam = real.metrics["change"].value, ours.metrics["seam"].value
    if change and real.metrics["seam"].value is not None:
        relative = None if seam is None else abs(seam) / change
        bars.append(Bar.most("seam over change of real clips", relative, MAX_SEAM))
    return bars


def _long_bars(
    level: int,
    ours: SourceSummary,
    real: SourceSummary | None,
    coded: SourceSummary | None,
    scenes: Sequence[Record],
) -> list[Bar]:
    """Clips of several windows: no loss, no freezing, no drift of colours."""
    bars = []
    for metric in STEADY[level]:
        first = [item.windows[0][metric] for item in scenes]
        loss = paired_difference(first, [item.scores[metric] for item in scenes])
        bars.append(Bar.most(f"loss of {metric}", loss.value, MAX_LOSS))
    never = real is not None and real.metrics["frozen"].value == 0
    if ours.metrics["frozen"].value is not None:
        bound = MAX_FROZEN_WHERE_NEVER if never else MAX_FROZEN
        bars.append(Bar.most("frozen", ours.metrics["frozen"].value, bound))
    for metric in ("background_error", "colour_error"):
        own = coded.metrics[metric].value if coded is not None else None
        if own is not None:
            last = ours.windows[-1][metric].value
            bars.append(Bar.most(f"last {metric}", last, MAX_ERROR_RATIO * own))
    return bars

"""What an interactive test is, what is kept of each of its streams, and what it results in.

Legend: s samples (every frame), k attributes, n asked objects.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from longtake.config import Config
from longtake.eval.judge import Judged, asked_values, hits, judge
from longtake.eval.meter import Measured, pick
from longtake.eval.runner import SEEDS_APART
from longtake.eval.score import assign
from longtake.eval.script import Script
from longtake.eval.stats import Estimate
from longtake.world import FPS, Split, parse_caption
from longtake.world.captions import Attributes

MAX_PROMPTS: Final = 64
ADHERENCE: Final = ("present", "colour", "shape", "background", "all_right")
ATTRIBUTES: Final = ("colour", "shape", "background")


class InteractiveConfig(Config):
    """An interactive test.

    Attributes:
        level: World level of the prompts, 1 or 2.
        streams: How many.
        prompts: Of each stream, one after the other, drawn independently.
        seconds_each: How long each is in force, to the next chunk boundary.
        seed: Chooses the prompts.
        split: Which combinations and wordings: "train", "heldout" or "any".
        batch: Streams generated together.
    """

    level: Literal[1, 2] = 1
    streams: int = Field(16, ge=1, le=SEEDS_APART // MAX_PROMPTS)
    prompts: int = Field(6, ge=2, le=MAX_PROMPTS)
    seconds_each: float = Field(10.0, ge=2.0)
    seed: int = Field(0, ge=0)
    split: Split = "any"
    batch: int = Field(16, ge=1)

    @property
    def num_frames(self) -> int:
        """Frames of every stream."""
        return round(self.prompts * self.seconds_each * FPS)


class InteractiveRecord(Config):
    """One stream.

    Attributes:
        index: Which stream.
        seed: Of its noise.
        prompts: (first frame, text), on chunk boundaries.
        settled: Adherence to each prompt, the first chunk after a switch left out.
        whole: The same with it.
        right: For each of `ATTRIBUTES` a "1" or "0" for every frame.
    """

    index: int
    seed: int
    prompts: tuple[tuple[int, str], ...]
    settled: tuple[dict[str, float | None], ...]
    whole: tuple[dict[str, float | None], ...]
    right: dict[str, str]


class Latency(Config):
    """How long switches take, in frames from the one where they take effect.

    Attributes:
        switches: Those that change the attribute.
        median: None where the half of them never arrives.
        quantile_90: None where a tenth of them never arrives.
        never: Share of the switches that do not arrive before the next one, with Wilson's interval.
    """

    switches: int
    median: float | None
    quantile_90: float | None
    never: Estimate


class InteractiveSource(Config):
    """One source's figures.

    Attributes:
        about: Its provenance.
        settled: Adherence to each prompt in order, without transitions; mean over streams.
        whole: The same with transitions.
        mean_settled: Over all prompts.
        mean_whole: Over all prompts, with transitions.
        last_less_first: Adherence to the last sixth of the prompts less that to the first (transitions left
            out), paired over streams: of an hour the last ten minutes less the first ten.
        latency: "all" (colour, shape and background together) and each of `ATTRIBUTES`.
    """

    about: dict[str, str]
    settled: tuple[dict[str, Estimate], ...]
    whole: tuple[dict[str, Estimate], ...]
    mean_settled: dict[str, Estimate]
    mean_whole: dict[str, Estimate]
    last_less_first: dict[str, Estimate]
    latency: dict[str, Latency]


class InteractiveSummary(Config):
    """An interactive test's result.

    Attributes:
        config: What was tested.
        world_version: Of the generator of scenes.
        sources: Figures by source name.
    """

    config: InteractiveConfig
    world_version: str
    sources: dict[str, InteractiveSource]


def record_of(
    index: int, seed: int, script: Script, measured: Measured, transition: int
) -> InteractiveRecord:
    """What is kept of one stream, every frame of which was measured.

    Args:
        index: Which stream.
        seed: Of its noise.
        script: Prompts on chunk boundaries.
        measured: Its measurements.
        transition: Frames after a switch that `settled` leaves out.
    """
    settled, whole = [], []
    right: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in ATTRIBUTES}
    for span in script.spans(len(measured.change) + 1, transition):
        wanted = parse_caption(span.prompt)
        inside = (measured.frames >= span.start) & (measured.frames < span.stop)
        found, frames = pick(measured.detections, inside), measured.frames[inside]
        slots_sn = assign(found, wanted)
        verdicts = judge(found, frames, wanted, slots_sn)
        settled.append(_adherence(verdicts, frames >= span.judged_from))
        whole.append(_adherence(verdicts, frames >= span.start))
        values = asked_values(found, wanted)
        excused_sn = _excused(verdicts, wanted)
        for name, (seen_sk, asked) in zip(("colour", "shape"), values[:2], strict=True):
            fine_sn = hits(seen_sk, slots_sn, asked) | excused_sn
            right[name].append(np.logical_and.reduce(fine_sn, axis=1))
        right["background"].append(verdicts.background == 1)
    return InteractiveRecord(
        index=index,
        seed=seed,
        prompts=script.prompts,
        settled=tuple(settled),
        whole=tuple(whole),
        right={
            name: "".join("01"[int(value)] for value in np.concatenate(listed))
            for name, listed in right.items()
        },
    )


def _excused(verdicts: Judged, wanted: Attributes) -> NDArray[np.bool_]:
    """Where one of several asked objects touches or is covered by another, [S, N]."""
    if len(wanted.objects) == 1:
        return np.zeros(verdicts.binding.shape, bool)
    return np.isnan(verdicts.binding)


def _adherence(verdicts: Judged, rows: NDArray[np.bool_]) -> dict[str, float | None]:
    return {name: float(getattr(verdicts, name)[rows].mean()) if rows.any() else None for name in ADHERENCE}

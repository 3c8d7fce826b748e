"""The interactive test: streams whose prompt is switched every few seconds, as a user would.

Measured are adherence to each prompt while it is in force, and *switch latency*: frames from the one where a
switch takes effect until the first one from which what the new prompt asks for holds for `HOLD_FRAMES`.

Legend: s samples (every frame), n asked objects, b streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from longtake.config import Config
from longtake.eval.judge import Judged, asked_values, hits, judge
from longtake.eval.lazy import pyplot
from longtake.eval.meter import Measured, Meter, pick
from longtake.eval.records import RecordFile
from longtake.eval.runner import FIRST_EVAL_SEED, SEEDS_APART
from longtake.eval.score import assign
from longtake.eval.script import Script
from longtake.eval.sheet import SheetKeeper
from longtake.eval.stats import Estimate, estimate, wilson
from longtake.world import FPS, VERSION, Split, parse_caption, sample_scene
from longtake.world.captions import Attributes

if TYPE_CHECKING:
    from longtake.eval.source import VideoSource  # which imports torch; a command's help does without

HOLD_FRAMES: Final = 8
"""A prompt has arrived when it holds for this many frames in a row: half a second."""
MAX_PROMPTS: Final = 64
SUMMARY_NAME: Final = "interactive.json"
PNG_NAME: Final = "interactive.png"
ADHERENCE: Final = ("present", "colour", "shape", "background", "all_right")
ATTRIBUTES: Final = ("colour", "shape", "background")
SHEET_COLUMNS: Final = 24
SHEET_ROWS: Final = 8


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
        latency: "all" (colour, shape and background together) and each of `ATTRIBUTES`.
    """

    about: dict[str, str]
    settled: tuple[dict[str, Estimate], ...]
    whole: tuple[dict[str, Estimate], ...]
    mean_settled: dict[str, Estimate]
    mean_whole: dict[str, Estimate]
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


def scripts_of(config: InteractiveConfig) -> list[tuple[int, Script]]:
    """Seed and script of every stream."""
    listed = []
    for index in range(config.streams):
        first = FIRST_EVAL_SEED + config.seed * SEEDS_APART + index * MAX_PROMPTS
        texts = [
            sample_scene(first + number, config.level, config.split).caption
            for number in range(config.prompts)
        ]
        starts = [round(number * config.seconds_each * FPS) for number in range(config.prompts)]
        listed.append((first, Script(tuple(zip(starts, texts, strict=True)))))
    return listed


def run_interactive(
    config: InteractiveConfig,
    sources: Sequence[VideoSource],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> InteractiveSummary:
    """Tests every source; writes `interactive.json`, `interactive.png` and contact sheets.

    Streams that are recorded in `out` are not generated again.

    Args:
        config: What to test.
        sources: The model first, then real clips to compare with.
        out: Directory; created if missing.
        progress: Called with a source's name and its (finished, all) streams after every batch.

    Raises:
        EvalError: `out` holds records of another test, or matplotlib (extra `eval`) is missing.
    """
    pyplot()  # a missing package is told before the work, not after
    records = {source.name: _records(config, source, out, progress) for source in sources}
    summary = InteractiveSummary(
        config=config,
        world_version=VERSION,
        sources={source.name: summarize_source(records[source.name], source.about) for source in sources},
    )
    summary.dump(out / SUMMARY_NAME)
    _draw(config, records, summary, out / PNG_NAME)
    return summary


def _records(
    config: InteractiveConfig,
    source: VideoSource,
    out: Path,
    progress: Callable[[str, int, int], None] | None,
) -> list[InteractiveRecord]:
    comparable = config.replace(batch=InteractiveConfig().batch)  # the batch changes no result
    header = {
        "config": comparable.digest(),
        "world": VERSION,
        "source": source.name,
        "about": source.about,
    }
    file = RecordFile(out / f"interactive-{source.name}.jsonl", InteractiveRecord, header)
    records = file.resume()
    done = {record.index for record in records}
    todo = [(index, *item) for index, item in enumerate(scripts_of(config)) if index not in done]
    sheet = out / f"interactive-{source.name}.png"
    for begin in range(0, len(todo), config.batch):
        batch = todo[begin : begin + config.batch]
        scripts = [script.on(source.chunking, config.num_frames) for _, _, script in batch]
        meter = Meter(config.num_frames, 1)
        keeper = SheetKeeper(config.num_frames, SHEET_COLUMNS, SHEET_ROWS)
        for chunk_bthwc in source.generate(scripts, [seed for _, seed, _ in batch], config.num_frames):
            meter.feed(chunk_bthwc)
            keeper.feed(chunk_bthwc)
            if meter.done:
                break
        fresh = [
            record_of(index, seed, script, measured, source.chunking.frames)
            for (index, seed, _), script, measured in zip(batch, scripts, meter.results(), strict=True)
        ]
        file.append(fresh)
        records += fresh
        if not sheet.exists():
            keeper.write(sheet, [script.text for script in scripts])
        if progress is not None:
            progress(source.name, len(records), config.streams)
    return sorted(records, key=lambda record: record.index)


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
        latency={name: _latency(listed) for name, listed in by_name.items()},
    )


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


def _draw(
    config: InteractiveConfig,
    records: Mapping[str, Sequence[InteractiveRecord]],
    summary: InteractiveSummary,
    path: Path,
) -> None:
    """Two panels: adherence prompt by prompt, and how the new prompt arrives after a switch."""
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

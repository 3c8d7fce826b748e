"""`longtake eval recall`: is what left the view for longer than the window still known when it comes back?

One line of JSON per finished stream is appended to `recall-<source>.jsonl`; a run that finds its streams
there skips them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from longtake.eval.errors import EvalError
from longtake.eval.meter import Meter
from longtake.eval.model import ModelSource
from longtake.eval.recall_plot import draw
from longtake.eval.recall_records import (
    NAME,
    SAMPLE_EVERY_FRAMES,
    RecallConfig,
    RecallRecord,
    header_of,
    record_of,
    scenes_of,
)
from longtake.eval.recall_summary import RecallSummary, summarize
from longtake.eval.records import RecordFile
from longtake.eval.script import Script
from longtake.eval.sheet import SheetKeeper
from longtake.eval.source import Source, TruthSource
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import MemoryGrid
from longtake.history.positions import Absolute, Relative
from longtake.history.window import WindowConfig
from longtake.io.plot import pyplot
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import PromptSwitch, StreamState
from longtake.world import VERSION, render
from longtake.world.recall import RecallScene

if TYPE_CHECKING:
    from longtake.eval.model import BeforeChunk

Frames = NDArray[np.uint8]
SUMMARY_NAME: Final = "recall.json"
PNG_NAME: Final = "recall.png"
SHEET_COLUMNS: Final = 24
OWN: Final = "own"
SWAPPED: Final = "swapped"


class RecallVideos(Source, Protocol):
    """Makes videos of recall scenes, a batch at a time."""

    @property
    def aspect(self) -> float:
        """Width of the view over its height."""
        ...

    def check(self, scenes: Sequence[RecallScene]) -> None:
        """Refuses scenes that it cannot film as asked. Raises EvalError."""
        ...

    def film(self, scenes: Sequence[RecallScene], num_frames: int) -> Iterator[Frames]:
        """Chunks of uint8 [B, T, H, W, 3]; the scenes are whole pairs, see `ModelVideos`."""
        ...


class TruthVideos:
    """Real clips: the ceiling."""

    name = "truth"

    def __init__(self, truth: TruthSource) -> None:
        self._truth = truth
        self.chunking = truth.chunking
        self.about = truth.about
        self.aspect = truth.width / truth.height

    def check(self, scenes: Sequence[RecallScene]) -> None:
        """Anything can be rendered."""

    def film(self, scenes: Sequence[RecallScene], num_frames: int) -> Iterator[Frames]:
        """Rendered."""
        start, stop = 0, self.chunking.first_frames
        while start < num_frames:
            yield np.stack(
                [render(made.scene, start, stop, self._truth.height, self._truth.width) for made in scenes]
            )
            start, stop = stop, stop + self.chunking.frames


class ModelVideos:
    """Streams of a model under one policy of what becomes of its past.

    Args:
        pipeline: The model, with the policy.
        model: Its name. ``name``: Of the policy.
        switch: What becomes of the past at prompt switches; its text does not matter.
        swaps: A control: once both targets of a pair have left view and window, the streams go on with each
            other's memory.

    Raises:
        EvalError: Memories are to be swapped, and there are none, or prompt switches would undo it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        model: str,
        name: str,
        switch: PromptSwitch,
        *,
        swaps: bool = False,
    ) -> None:
        self.name = name
        self._pipeline, self._model, self._switch, self._swaps = pipeline, model, switch, swaps
        memory = pipeline.dit.policy(
            pipeline.config.history.policy, pipeline.dit.token_grid(*pipeline.latent_shape[2:])
        ).memory_grid
        if swaps and memory is None:
            raise EvalError(
                f"{name!r} has no memories to swap", "leave it out, or test a model with a memory"
            )
        if swaps and switch.memory != "keep":
            raise EvalError(
                f"{name!r}: memory={switch.memory!r} at prompt switches leaves nothing of what was swapped",
                'use memory "keep"',
            )
        source = self._source(None)
        config = pipeline.config
        self.chunking = source.chunking
        self.aspect = config.width / config.height
        self.about = {
            **source.about,
            "policy": config.history.policy.model_dump_json(),
            "window": _window_in_words(config.history),
            "memory": "none" if memory is None else _memory_in_words(memory, pipeline.dit.config.num_layers),
            "swaps": str(swaps),
        }

    def check(self, scenes: Sequence[RecallScene]) -> None:
        """What is asked for must come after the sink has filled. Where memories are swapped, both of a pair
        must be away for long enough.
        """
        history = self._pipeline.config.history
        sink = self._pipeline.num_pixel_frames(history.sink_frames) if history.sink_frames else 0
        earliest = min(made.shown_from for made in scenes)
        if sink > earliest:
            raise EvalError(
                f"{self.name}: a sink of {history.sink_frames} latent frames keeps what is to be recalled, "
                f"which comes at frame {earliest}",
                "test a model with a smaller sink",
            )
        if self._swaps:
            self._swap_frames(scenes)

    def film(self, scenes: Sequence[RecallScene], num_frames: int) -> Iterator[Frames]:
        """Generated from the scenes' prompts and seeds."""
        scripts = [Script(made.scene.captions) for made in scenes]
        hook = self._swapping(scenes) if self._swaps else None
        seeds = [made.scene.seed for made in scenes]
        yield from self._source(hook).generate(scripts, seeds, num_frames)

    def _source(self, hook: BeforeChunk | None) -> ModelSource:
        return ModelSource(
            self._pipeline, self._model, self._switch, source_name=self.name, before_chunk=hook
        )

    def _swap_frames(self, scenes: Sequence[RecallScene]) -> dict[int, list[int]]:
        """By frame the first streams of the pairs that swap their memories then: when nothing of either
        target is left in the window, so that no memory takes in what it should know nothing of, and before
        any of one should come into view.
        """
        history = self._pipeline.config.history
        stride = self._pipeline.vae.config.temporal_stride
        held = stride * ((history.local_frames or 0) + history.chunk_frames)
        due: dict[int, list[int]] = {}
        for first in range(0, len(scenes), 2):
            pair = scenes[first : first + 2]
            frame = self.chunking.boundary(max(made.left_at for made in pair) + held)
            if len(pair) < 2 or frame > min(made.back_at for made in pair):
                shortest = min(made.absence_frames for made in pair)
                raise EvalError(
                    f"memories cannot be swapped in an absence of {shortest} frames, since the window keeps "
                    f"what left for {held}"
                    if len(pair) == 2
                    else f"{len(scenes)} scenes make no pairs whose memories could be swapped",
                    "use an even number of scenes and absences of two windows or more",
                )
            due.setdefault(frame, []).append(first)
        return due

    def _swapping(self, scenes: Sequence[RecallScene]) -> BeforeChunk:
        due = self._swap_frames(scenes)

        def swap(engine: Engine, states: Sequence[StreamState]) -> None:
            for first in due.get(states[0].num_frames, ()):
                for one, other in zip(states[first].slots, states[first + 1].slots, strict=True):
                    engine.history.exchange_memories(one, other)

        return swap


def with_policy(pipeline: Pipeline, text: str) -> Pipeline:
    """A model with another policy.

    Args:
        pipeline: The model.
        text: "own" or "swapped" for its own; "off" or "prior" for a learned memory's other modes; "window"
            for none; "full" for an unlimited window, with ids that the model may never have seen; else a
            policy's kind. Kinds may have settings, "key_frames:stride=4,num_frames=3", of which
            "window_frames" and "f_max" are the window's and the positions'. A policy that keeps frames keeps
            as many as the model's own memory has, where nothing else is asked for.

    Raises:
        EvalError: No such policy, settings where there are none, or more frames than the ids of the model
            hold. ConfigError: Settings that do not fit.
    """
    history = pipeline.config.history
    kind, _, rest = text.partition(":")
    if rest and kind in (OWN, SWAPPED, "off", "prior", "full"):
        raise EvalError(f"{text!r}: {kind!r} has no settings", f"write {kind!r}")
    if kind in (OWN, SWAPPED):
        return pipeline
    if kind in ("off", "prior"):
        own = history.policy
        if not isinstance(own, EvolvingConfig):
            raise EvalError(
                f"{text!r} is a mode of a learned memory, which this model has not", "leave it out"
            )
        changed = history.replace(policy=own.replace(mode=kind))
    elif kind == "full":
        changed = history.replace(window_frames=None, positions=Absolute(), policy=WindowConfig())
    else:
        settings = _settings(rest, text)
        whole = json.loads(history.dumps())
        if "window_frames" in settings:
            whole["window_frames"] = settings.pop("window_frames")
        if "f_max" in settings:
            whole["positions"] = {"kind": "relative", "f_max": settings.pop("f_max")}
        grid = pipeline.dit.token_grid(*pipeline.latent_shape[2:])
        memory = pipeline.dit.policy(history.policy, grid).memory_grid
        if memory is not None and kind in _KEEPS_FRAMES:
            settings.setdefault("num_frames", memory.num_frames)
        whole["policy"] = {"kind": kind, **settings}
        changed = HistoryConfig.loads(json.dumps(whole), source=f"--policies {text}")
        _check_room(pipeline, changed, text)
    return pipeline.with_history(changed)


_KEEPS_FRAMES: Final = ("key_frames", "most_attended")


def _check_room(pipeline: Pipeline, history: HistoryConfig, text: str) -> None:
    """Refuses what needs ids that the model was not trained with, unless they are asked for."""
    grid = pipeline.dit.token_grid(*pipeline.latent_shape[2:])
    memory = pipeline.dit.policy(history.policy, grid).memory_grid
    if history.window_frames is None or not isinstance(history.positions, Relative):
        return
    needed = history.window_frames + (0 if memory is None else memory.num_frames) - 1
    if needed > history.positions.f_max:
        raise EvalError(
            f"{text!r} needs ids up to {needed}, and the model has them up to {history.positions.f_max}",
            f"ask for less, or add f_max={needed} to run it with ids that it has never seen",
        )


def _window_in_words(history: HistoryConfig) -> str:
    ids = f"ids 0..{history.positions.f_max}" if isinstance(history.positions, Relative) else "absolute ids"
    if history.window_frames is None:
        return f"no limit, {ids}"
    return f"{history.window_frames} latent frames, {history.sink_frames} of them a sink, {ids}"


def _memory_in_words(memory: MemoryGrid, num_layers: int) -> str:
    readers = num_layers if memory.layers is None else len(memory.layers)
    return f"{memory.num_tokens} tokens, read by {readers} of {num_layers} layers"


def _settings(text: str, whole: str) -> dict[str, object]:
    settings: dict[str, object] = {}
    for item in filter(None, re.split(r",(?=\w+=)", text)):  # commas within a list stay
        key, equals, value = item.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
        if not equals:
            raise EvalError(f"{item!r} in the policy {whole!r} has no value", "write KEY=VALUE")
    return settings


def run_recall(
    config: RecallConfig,
    sources: Sequence[RecallVideos],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> RecallSummary:
    """Tests every source; writes `recall.json`, `recall.png` and contact sheets.

    Args:
        config: What to test.
        sources: The subject first, whose window lengths are counted in; then others and real clips.
        out: Directory; created if missing.
        progress: Called with a source's name and its (finished, all) streams after every batch.

    Raises:
        EvalError: `out` holds records of another test, or sources whose chunks differ. PackageError:
            matplotlib (extra `eval`) is missing.
    """
    pyplot()  # a missing package is told before the work, not after
    chunking = sources[0].chunking
    window = chunking.window_frames
    if window is None:
        raise EvalError(
            "an absence is counted in windows, and the model's is unlimited", "test another model"
        )
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise EvalError(f"sources {names} share a name", "name each policy once")
    aspect = sources[0].aspect
    scenes = {
        length: scenes_of(config, length, window, chunking.boundary, aspect) for length in config.absence
    }
    files = {}
    for source in sources:
        theirs = source.chunking
        if (theirs.first_frames, theirs.frames) != (chunking.first_frames, chunking.frames):
            raise EvalError(f"{source.name} makes chunks of another length", "compare models of equal chunks")
        if source.aspect != aspect:
            raise EvalError(f"{source.name} makes pictures of another shape", "compare models of one shape")
        for listed in scenes.values():
            source.check(listed)
        header = {**header_of(config, chunking, aspect), "source": source.name, "about": source.about}
        files[source.name] = RecordFile(out / f"recall-{source.name}.jsonl", RecallRecord, header)
    found = {name: file.resume() for name, file in files.items()}  # refused before anything is filmed
    records = {
        source.name: _records(config, source, scenes, files[source.name], found[source.name], progress)
        for source in sources
    }
    generator = hashlib.sha256(repr(list(scenes.values())).encode()).hexdigest()
    summary = RecallSummary(
        test=NAME,
        generator=generator,
        config=config,
        world_version=VERSION,
        window_frames=window,
        subject=names[0],
        sources=summarize(records, {source.name: source.about for source in sources}),
    )
    summary.dump(out / SUMMARY_NAME)
    draw(summary, out / PNG_NAME)
    return summary


def _records(
    config: RecallConfig,
    source: RecallVideos,
    scenes: dict[float, list[RecallScene]],
    file: RecordFile[RecallRecord],
    recorded: Sequence[RecallRecord],
    progress: Callable[[str, int, int], None] | None,
) -> list[RecallRecord]:
    wanted = [(absence, index) for absence, listed in scenes.items() for index in range(len(listed))]
    found = {(record.absence, record.index): record for record in recorded}
    found = {key: found[key] for key in wanted if key in found}
    for absence, listed in scenes.items():
        sheet = file.path.parent / f"recall-{source.name}-{absence:g}.png"
        for indices in _batches(config, absence, len(listed), found):
            batch = [listed[index] for index in indices]
            num_frames = max(made.num_frames for made in batch)
            meter = Meter(num_frames, SAMPLE_EVERY_FRAMES)
            keeper = SheetKeeper(num_frames, SHEET_COLUMNS)
            for chunk_bthwc in source.film(batch, num_frames):
                meter.feed(chunk_bthwc)
                keeper.feed(chunk_bthwc)
                if meter.done:
                    break
            fresh = [
                record_of(index, absence, made, measured)
                for index, made, measured in zip(indices, batch, meter.results(), strict=True)
            ]
            file.append(fresh)
            found |= {(record.absence, record.index): record for record in fresh}
            if not sheet.exists():
                keeper.write(sheet, [Script(made.scene.captions).text for made in batch])
            if progress is not None:
                progress(source.name, len(found), len(wanted))
    return [found[key] for key in wanted]


def _batches(
    config: RecallConfig, absence: float, count: int, found: dict[tuple[float, int], RecallRecord]
) -> Iterator[list[int]]:
    """Indices of scenes that are not recorded, whole pairs together."""
    pairs = [list(range(first, min(first + 2, count))) for first in range(0, count, 2)]
    missing = [pair for pair in pairs if any((absence, index) not in found for index in pair)]
    size = max(1, config.batch // 2)
    for begin in range(0, len(missing), size):
        yield [index for pair in missing[begin : begin + size] for index in pair]

"""Who is asked for recall: a model under one of its policies, or real clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from longtake.eval.errors import EvalError
from longtake.eval.model import ModelSource
from longtake.eval.script import Script
from longtake.eval.source import Source, TruthSource
from longtake.history.base import HistoryConfig
from longtake.history.policy import MemoryGrid
from longtake.history.positions import Relative
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import PromptSwitch, StreamState
from longtake.world import render
from longtake.world.recall import RecallScene

if TYPE_CHECKING:
    from longtake.eval.model import BeforeChunk

Frames = NDArray[np.uint8]


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
        sink = self._pipeline.num_pixel_frames(history.sink_frames)
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


def _window_in_words(history: HistoryConfig) -> str:
    ids = f"ids 0..{history.positions.f_max}" if isinstance(history.positions, Relative) else "absolute ids"
    if history.window_frames is None:
        return f"no limit, {ids}"
    return f"{history.window_frames} latent frames, {history.sink_frames} of them a sink, {ids}"


def _memory_in_words(memory: MemoryGrid, num_layers: int) -> str:
    readers = num_layers if memory.layers is None else len(memory.layers)
    return f"{memory.num_tokens} tokens, read by {readers} of {num_layers} layers"

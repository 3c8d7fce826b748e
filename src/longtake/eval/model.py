"""A streaming model under evaluation, and its ceilings: real clips, and real clips through its autoencoder.

Legend: b streams, t frames, h rows, w columns, c channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longtake.eval.errors import EvalError
from longtake.eval.script import Chunking, Script
from longtake.eval.source import ReconstructionSource, TruthSource
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import PromptSwitch, StreamState

Frames = NDArray[np.uint8]
BeforeChunk = Callable[[Engine, Sequence[StreamState]], None]


class ModelSource:
    """Streams of a pipeline, advanced in one batch by the engine that also serves them.

    Args:
        pipeline: The model.
        name: Name of the model, for provenance.
        policy: What becomes of the past at prompt switches; its text does not matter. None: the model's way.
        source_name: What the source is called in tables.
        before_chunk: Called with the engine and its streams before every chunk.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        name: str,
        policy: PromptSwitch | None = None,
        *,
        source_name: str = "model",
        before_chunk: BeforeChunk | None = None,
    ) -> None:
        self.name = source_name
        self._before_chunk = before_chunk
        self._pipeline = pipeline
        self._model = name
        self._policy = policy or PromptSwitch(text="", memory=pipeline.config.memory_at_switch)
        self.chunking = chunking_of(pipeline)

    @property
    def about(self) -> dict[str, str]:
        """The model, its weights' hash, the hash of how it is run, and how it switches prompts."""
        policy = self._policy
        return {
            "model": self._model,
            "weights": self._pipeline.digest,
            "stream_config": self._pipeline.config.digest(),
            "switches": f"sink {policy.sink}, memory {policy.memory}, window {policy.window}",
        }

    def generate(self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        """Chunks of all streams; the same script and seed give the same video, to rounding, in any batch.

        Raises:
            EvalError: A script switches its prompt within a chunk.
        """
        for script in scripts:
            for start, _ in script.prompts:
                if self.chunking.boundary(start) != start:
                    raise EvalError(
                        f"a prompt comes into force at frame {start}, within a chunk",
                        f"use frame {self.chunking.boundary(start)}, see Script.on",
                    )
        pipeline = self._pipeline
        chunk_frames = pipeline.config.history.chunk_frames
        num_chunks = 1
        while pipeline.num_pixel_frames(num_chunks * chunk_frames) < num_frames:
            num_chunks += 1
        engine = Engine(pipeline, len(scripts), max_frames=num_chunks * chunk_frames)
        due = [dict(script.prompts) for script in scripts]
        states = [engine.open(prompts[0], seed) for prompts, seed in zip(due, seeds, strict=True)]
        for index in range(num_chunks):
            for state, prompts in zip(states, due, strict=True):
                if index and state.num_frames in prompts:
                    text = prompts[state.num_frames]
                    engine.set_prompt(state, self._policy.replace(text=text))
            if self._before_chunk is not None:
                self._before_chunk(engine, states)
            frames = [chunk.frames for chunk in engine.advance(states)]
            yield np.stack([made for made in frames if made is not None])


def chunking_of(pipeline: Pipeline) -> Chunking:
    """How a pipeline's frames come, in pixel frames."""
    history = pipeline.config.history
    first = pipeline.num_pixel_frames(history.chunk_frames)
    stride = pipeline.vae.config.temporal_stride
    return Chunking(
        first_frames=first,
        frames=pipeline.num_pixel_frames(2 * history.chunk_frames) - first,
        window_frames=None if history.window_frames is None else history.window_frames * stride,
    )


def ceilings(pipeline: Pipeline, level: int) -> tuple[TruthSource | ReconstructionSource, ...]:
    """What the model is compared with: real clips in chunks like its own, and their reconstructions.

    Args:
        pipeline: The model.
        level: World level, for what prompts leave open.
    """
    truth = TruthSource(level, pipeline.config.height, pipeline.config.width, chunking_of(pipeline))
    if not isinstance(pipeline.vae, TinyVAE):
        return (truth,)  # a decoder alone: nothing to encode real clips with
    stride = pipeline.vae.config.temporal_stride
    about = {"weights": pipeline.digest}
    return (truth, ReconstructionSource(truth, pipeline.vae, stride, about, pipeline.device))

"""A streaming model under evaluation, and its ceilings: real clips, and real clips through its autoencoder.

Legend: b streams, t frames, h rows, w columns, c channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longtake.eval.source import ReconstructionSource, TruthSource
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline

Frames = NDArray[np.uint8]


class ModelSource:
    """Streams of a pipeline, advanced in one batch by the engine that also serves them.

    Args:
        pipeline: The model.
        name: Name of the model, for provenance.
    """

    name = "model"

    def __init__(self, pipeline: Pipeline, name: str) -> None:
        self._pipeline = pipeline
        self._model = name

    @property
    def about(self) -> dict[str, str]:
        """The model, its weights' hash and the hash of how it is run."""
        return {
            "model": self._model,
            "weights": self._pipeline.digest,
            "stream_config": self._pipeline.config.digest(),
        }

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        """Chunks of all streams; the same prompt and seed give the same video, to rounding, in any batch."""
        pipeline = self._pipeline
        chunk_frames = pipeline.config.history.chunk_frames
        num_chunks = 1
        while pipeline.num_pixel_frames(num_chunks * chunk_frames) < num_frames:
            num_chunks += 1
        engine = Engine(pipeline, len(prompts), max_frames=num_chunks * chunk_frames)
        states = [engine.open(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for _ in range(num_chunks):
            frames = [chunk.frames for chunk in engine.advance(states)]
            yield np.stack([made for made in frames if made is not None])


def ceilings(pipeline: Pipeline, level: int) -> tuple[TruthSource | ReconstructionSource, ...]:
    """What the model is compared with: real clips in chunks like its own, and their reconstructions.

    Args:
        pipeline: The model.
        level: World level, for what prompts leave open.
    """
    chunk_frames = pipeline.config.history.chunk_frames
    first = pipeline.num_pixel_frames(chunk_frames)
    truth = TruthSource(
        level,
        pipeline.config.height,
        pipeline.config.width,
        chunk_frames=pipeline.num_pixel_frames(2 * chunk_frames) - first,
        first_chunk_frames=first,
    )
    if not isinstance(pipeline.vae, TinyVAE):
        return (truth,)  # a decoder alone: nothing to encode real clips with
    stride = pipeline.vae.config.temporal_stride
    about = {"weights": pipeline.digest}
    return (truth, ReconstructionSource(truth, pipeline.vae, stride, about, pipeline.device))

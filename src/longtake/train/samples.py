"""Samples of a model under training: short streams of held-out prompts, made by the engine that serves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longtake.models.dit import DiT
from longtake.models.protocols import TextEncoder, VideoVAE
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline, StreamConfig


@dataclass(frozen=True)
class SampleRollouts:
    """What is shown of a text-to-latents model at each evaluation.

    Args:
        vae: decodes; on the DiT's device.
        stream: size, history, schedule and guidance. A stage that trains a many-step model is better shown
            with more steps than the few it will be distilled to.
        prompts: one stream each, with seeds 0, 1, 2 and so on; the same at every evaluation.
        num_chunks: of each stream.
    """

    vae: VideoVAE
    stream: StreamConfig
    prompts: Sequence[str]
    num_chunks: int = 4

    @torch.no_grad()
    def __call__(self, dit: DiT, text: TextEncoder) -> Tensor:
        """Frames, uint8 [b,t,h,w,3], of the networks as they are.

        Raises:
            PromptError: a prompt that the text encoder refuses.
        """
        pipeline = Pipeline(dit, self.vae, text, self.stream)
        num_frames = self.num_chunks * self.stream.history.chunk_frames
        engine = Engine(pipeline, len(self.prompts), max_frames=num_frames)
        states = [engine.open(prompt, seed) for seed, prompt in enumerate(self.prompts)]
        chunks = [engine.advance(states) for _ in range(self.num_chunks)]
        frames = [
            np.concatenate([made.frames for made in of_stream if made.frames is not None])
            for of_stream in zip(*chunks, strict=True)
        ]
        return torch.from_numpy(np.stack(frames))

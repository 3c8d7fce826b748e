"""Clips that a network makes of their prompts itself, through the engine that serves.

Rendered clips never show a network where its own long videos lead to; a teacher that is asked there says how
to go on (on-policy distillation).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from longtake.models.protocols import VideoVAE
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.stream.state import PromptSwitch
from longtake.train.latents import Clips
from longtake.train.networks import TextToLatents


@dataclass(frozen=True)
class OwnRollouts:
    """What networks under training make of clips' prompts as they will be served.

    Args:
        vae: says of what shape latents are; nothing is decoded.
        stream: history, steps and guidance.
        switch: what becomes of the past where prompts switch; its text does not matter.
    """

    vae: VideoVAE
    stream: StreamConfig
    switch: PromptSwitch

    @torch.no_grad()
    def __call__(self, networks: TextToLatents, clips: Clips, num_chunks: int, seed: int) -> Clips:
        """Clips of the same prompts, all of whose cells count alike.

        Args:
            networks: as they are.
            clips: whose prompts switch where chunks begin; their latents do not matter.
            num_chunks: of what is made.
            seed: of the noise.
        """
        pipeline = Pipeline(networks.dit, self.vae, networks.text, self.stream)
        chunk_frames = self.stream.history.chunk_frames
        num_frames = num_chunks * chunk_frames
        engine = Engine(pipeline, len(clips), max_frames=num_frames)
        states = [
            engine.open(prompts[0][1], seed * len(clips) + row) for row, prompts in enumerate(clips.prompts)
        ]
        made = []
        for start in range(0, num_frames, chunk_frames):
            for state, prompts in zip(states, clips.prompts, strict=True):
                for frame, text in prompts:
                    if frame == start > 0:
                        engine.set_prompt(state, self.switch.replace(text=text))
            made.append(torch.stack([chunk.latents for chunk in engine.advance(states, decode=False)]))
        latents = torch.cat(made, dim=1)
        return dataclasses.replace(
            clips,
            latents_bfchw=latents,
            foreground_bfhw=torch.zeros_like(latents[:, :, 0]),
            guide_bfkhw=None,
        )

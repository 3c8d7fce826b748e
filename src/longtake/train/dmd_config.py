"""Settings of distribution matching distillation (`train.dmd`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.positions import Absolute
from longtake.stream.state import PromptSwitch
from longtake.train.loop import LoopConfig
from longtake.train.lora import LoRAConfig
from longtake.train.optim import AdamWConfig


class DMDConfig(Config):
    """Stage `dmd`."""

    loop: LoopConfig = LoopConfig()
    num_clips: int = Field(8, ge=1, description="rollouts per step")
    num_chunks: int = Field(7, ge=1, description="chunks of a rollout")
    critic_updates: int = Field(5, ge=1, description="updates of the critic for one of the generator")
    num_critic_copies: int = Field(2, ge=1, description="noisy copies of each chunk for the critic")
    max_lead_chunks: int = Field(
        0,
        ge=0,
        description="chunks before those that are scored: their number is drawn from 0 to this for every "
        "step, so that the model meets its own long videos",
    )
    overlap_chunks: int = Field(
        0,
        ge=0,
        description="where something precedes them, so many of the scored chunks teach nothing and are only "
        'seen by teacher and critic; for scores="clips", which see nothing else of the past',
    )
    memory_credit: Literal["none", "first_exit", "chain"] = Field(
        "chain",
        description="which rollouts teach what a policy learns from evicted frames: first_exit: those that "
        "stop at the first step, as published; chain: all",
    )
    credit_updates: int | None = Field(
        None,
        ge=1,
        description="gradients flow through so many of a memory's last updates; None: through all of a "
        "rollout, its lead included",
    )
    switch_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of steps in whose rollouts all prompts switch, at a random scored chunk or, where "
        "clips are scored, at a random one before them",
    )
    switch: PromptSwitch = Field(
        PromptSwitch(text=""),
        description="what becomes of the past at these switches, as in serving; its text does not matter",
    )
    scores: Literal["chunks", "clips"] = Field(
        "chunks",
        description="chunks: teacher and critic are causal; clips: they see all scored chunks at once, and "
        "nothing before them",
    )
    guidance: float = Field(2.0, ge=0, description="scale of classifier-free guidance of the teacher")
    negative_prompt: str = Field("", description="what the teacher's guidance leads away from")
    score_shift: float = Field(3.0, gt=0, description="shift of the noise levels at which chunks are scored")
    min_score_sigma: float = Field(0.02, gt=0, lt=1)
    max_score_sigma: float = Field(0.98, gt=0, lt=1)
    critic_error: Literal["clean", "flow"] = Field(
        "clean", description="what the critic's squared error is of; published recipes take the flow's"
    )
    min_weight_sigma: float = Field(
        0.25, gt=0, le=1, description="the critic's errors of clean latents weigh 1/max(sigma, this)"
    )
    momentum: float = Field(0.8, ge=0, lt=1, description="of the generator's optimiser: its target moves")
    muon_learning_rate: float = Field(1e-4, gt=0)
    adamw_learning_rate: float = Field(4e-5, gt=0)
    critic_muon_learning_rate: float = Field(1e-3, gt=0)
    critic_adamw_learning_rate: float = Field(4e-4, gt=0)
    generator_optimizer: AdamWConfig | None = Field(
        None, description="for everything, instead of Muon with AdamW"
    )
    critic_optimizer: AdamWConfig | None = Field(None, description="the same of the critic")
    memory_rate: float = Field(
        1.0, gt=0, description="learning rates of the generator's memory, over those of all else"
    )
    lora: LoRAConfig | None = Field(
        None,
        description="generator and critic learn low-rank updates of their blocks, and a memory whole; None: "
        "everything learns",
    )
    num_evaluation_clips: int = Field(32, ge=1, description="held-out captions rolled out at an evaluation")

    @model_validator(mode="after")
    def _has_room(self) -> DMDConfig:
        if self.min_score_sigma >= self.max_score_sigma:
            raise ConfigError(
                f"min_score_sigma={self.min_score_sigma} is not below max_score_sigma={self.max_score_sigma}",
                "use for instance 0.02 and 0.98",
            )
        if self.scores == "chunks" and self.overlap_chunks > 0:
            raise ConfigError(
                f'scores="chunks" sees the past anyway, and overlap_chunks={self.overlap_chunks}',
                'use overlap_chunks=0 or scores="clips"',
            )
        if self.overlap_chunks >= self.num_chunks:
            raise ConfigError(
                f"overlap_chunks={self.overlap_chunks} of num_chunks={self.num_chunks} leaves nothing new",
                "use fewer",
            )
        if self.scores == "clips" and self.switch_share > 0 and self.max_lead_chunks == 0:
            raise ConfigError(
                f'scores="clips" shows a clip one prompt, and switch_share={self.switch_share} switches some',
                'use max_lead_chunks, switch_share=0 or scores="chunks"',
            )
        return self


def score_history(config: DMDConfig, history: HistoryConfig) -> HistoryConfig:
    """What teacher and critic score by: the generator's history, or one chunk as long as the clip."""
    if config.scores == "chunks":
        return history
    length = config.num_chunks * history.chunk_frames
    return HistoryConfig(window_frames=None, sink_frames=0, chunk_frames=length, positions=Absolute())

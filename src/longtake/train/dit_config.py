"""Settings of the stages that teach the small DiT with teacher forcing (`train.dit`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from longtake.errors import ConfigError
from longtake.train.latents import ClipsPerStep
from longtake.train.loop import LoopConfig
from longtake.train.optim import AdamWConfig

ClipKind = Literal["first", "whole", "long", "recall"]
"""First chunks alone, whole clips, those of several windows, those that ask for recall."""

Taught = ClipKind | Literal["returns"]
"""A kind of clips, or of long ones only the chunks in which a panning camera brings something back."""


class DiTTrainingConfig(ClipsPerStep):
    """One stage of teacher forcing: first chunks alone, whole clips, or both in every step."""

    loop: LoopConfig = LoopConfig()
    learns_from: Literal["clips", "parent", "start"] = Field(
        "clips",
        description="what it is to predict: the clips themselves, or what the recipe's parent predicts where "
        "it has seen the same of them, or what the networks themselves predict as the stage begins, their "
        "memory left off",
    )
    clips_teach: tuple[Taught, ...] = Field(
        (),
        description="with another teacher than clips: kinds that are learned from as they are all the same, "
        "such as those that ask a teacher without a memory for recall, or of long clips the chunks in which "
        "something returns",
    )
    num_copies: int = Field(2, ge=1, description="noisy copies of each chunk")
    first_weight: float = Field(
        1.0, gt=0, description="of chunks that are trained alone, against 1 for each chunk of whole clips"
    )
    text_dropout: float = Field(0.1, ge=0, lt=1, description="share of clips trained without their caption")
    foreground_weight: float = Field(4.0, ge=1, description="weight of foreground cells at the start")
    final_foreground_weight: float = Field(1.5, ge=1, description="and at the end of the stage")
    min_weight_sigma: float = Field(
        0.25, gt=0, le=1, description="errors of the clean latents weigh 1/max(sigma, this)"
    )
    sigma_shift: float = Field(
        1.0, gt=0, description="shift of the training sigmas, as in sampling; above 1: more of high noise"
    )
    context_noise: float = Field(0.05, ge=0, description="upper end of the noise added to clean context")
    resampled_sigmas: tuple[float, ...] = Field(
        (),
        description="the sampler's noise levels, falling: the network makes context again from a random one "
        "of them on, or leaves it as it is, so that it meets its own mistakes in the past",
    )
    guide_weight: float = Field(
        0.0, ge=0, description="of the error of reading off tokens where objects are and go; fresh clips only"
    )
    guide_layer: int = Field(2, ge=0, description="layer whose tokens are read")
    guide_ahead: tuple[int, ...] = Field(
        (), description="pixel frames: where objects will be after so many is to be read as well"
    )
    guide_relative: bool = Field(
        False,
        description="the logarithms of what is read count, those of clean context and of noisy chunks apart: "
        "small errors go on falling",
    )
    memory_guide_weight: float = Field(
        0.0,
        ge=0,
        description="of the error of reading off the memory, while it is away, where what is to come back "
        "was; needs clips that ask for recall",
    )
    prompt_guide_weight: float = Field(
        0.0, ge=0, description="of the error of reading off the text encoder's tokens what prompts ask for"
    )
    num_first_copies: int | None = Field(
        None, ge=1, description="noisy copies of chunks that are trained alone; None: as many as of others"
    )
    num_recall_clips: int = Field(
        0, ge=0, description="clips per step that ask for recall (`train.recall`); needs fresh clips"
    )
    recall_absence: tuple[float, float] = Field(
        (1.0, 3.0), description="shortest and longest absence in them, in windows"
    )
    recall_learned_share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="of the chunks of them that there is something to learn from, drawn anew in every step",
    )
    recall_away_chunks: int = Field(
        0,
        ge=0,
        description="chunks of them that are learned from while the camera rests elsewhere, where what is "
        "remembered is not to be seen",
    )
    recall_back_weight: float = Field(
        1.0,
        gt=0,
        description="of the chunks of them in which it comes back, against 1 for each chunk of other clips",
    )
    num_long_clips: int = Field(
        0,
        ge=0,
        description="clips per step that go on for several windows and ask for no recall "
        "(`train.long_clips`); needs fresh clips",
    )
    num_long_chunks: int = Field(14, ge=1, description="the most chunks of such a clip")
    num_long_learned: int = Field(
        4, ge=1, description="chunks of it that are learned from, after sink and window have filled"
    )
    num_long_returns: int = Field(
        0,
        ge=0,
        description="so many of these are, as far as there are any, chunks in which a panning camera brings "
        "back what the window has lost",
    )
    long_pauses: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the panning ones among them whose camera stands still for longer than the "
        "window holds and goes on, which rollouts often fail to; the clip teaches that, whoever teaches the "
        "rest",
    )
    long_rollouts: bool = Field(
        False,
        description="in place of such clips the network's own rollouts of their prompts, guided as served; "
        "needs another teacher than clips",
    )
    muon_learning_rate: float = Field(4e-3, gt=0)
    adamw_learning_rate: float = Field(1.5e-3, gt=0)
    optimizer: AdamWConfig | None = Field(None, description="for everything, instead of Muon with AdamW")

    @model_validator(mode="after")
    def _falls(self) -> DiTTrainingConfig:
        sigmas = self.resampled_sigmas
        if any(a <= b for a, b in pairwise((1.0, *sigmas, 0.0))):
            raise ConfigError(
                f"resampled_sigmas={sigmas} do not fall between 1 and 0", "use for instance [0.8, 0.5]"
            )
        return self

    @model_validator(mode="after")
    def _has_a_parent(self) -> DiTTrainingConfig:
        if self.clips_teach and self.learns_from == "clips":
            raise ConfigError(
                f"clips_teach={self.clips_teach}, but clips teach everything",
                "set learns_from=parent or start",
            )
        return self

    @model_validator(mode="after")
    def _rolls_out(self) -> DiTTrainingConfig:
        told = self.learns_from == "clips" or not {"long", "returns"}.isdisjoint(self.clips_teach)
        if self.long_rollouts and told:
            raise ConfigError(
                f"long_rollouts=true with learns_from={self.learns_from!r} and clips_teach="
                f"{self.clips_teach}: a network's own rollouts do not say what is right",
                "set learns_from=parent or start, and leave long and returns out of clips_teach",
            )
        if self.long_rollouts and self.long_pauses > 0:
            raise ConfigError(
                f"long_pauses={self.long_pauses} of clips that long_rollouts=true replaces",
                "set long_pauses=0, or long_rollouts=false",
            )
        if self.long_rollouts and self.num_long_clips == 0:
            raise ConfigError(
                "long_rollouts=true with num_long_clips=0 rolls nothing out",
                "set num_long_clips=2, or long_rollouts=false",
            )
        return self

    @model_validator(mode="after")
    def _can_recall(self) -> DiTTrainingConfig:
        low, high = self.recall_absence
        if not 1 <= low <= high:
            raise ConfigError(
                f"recall_absence={self.recall_absence} is no range of absences", "use for instance [1.0, 3.0]"
            )
        for name in ("num_recall_clips", "num_long_clips"):
            count = getattr(self, name)
            if count > 0 and not self.fresh_clips:
                raise ConfigError(f"{name}={count} are rendered anew for every step", "set fresh_clips=true")
        if self.memory_guide_weight > 0 and self.num_recall_clips == 0:
            raise ConfigError(
                f"memory_guide_weight={self.memory_guide_weight} reads memories that nothing asks for",
                "set num_recall_clips, or memory_guide_weight=0",
            )
        return self

    @model_validator(mode="after")
    def _looks_ahead(self) -> DiTTrainingConfig:
        if any(frames <= 0 for frames in self.guide_ahead):
            raise ConfigError(
                f"guide_ahead={self.guide_ahead} looks back or nowhere", "use frame counts like [8, 16, 24]"
            )
        if self.guide_weight > 0 and not self.fresh_clips:
            raise ConfigError(
                f"guide_weight={self.guide_weight}: clips in a cache come without a guide",
                "set fresh_clips=true, or guide_weight=0",
            )
        return self

    @property
    def guided(self) -> bool:
        """Whether clips are to come with their guide."""
        return self.guide_weight > 0 or self.memory_guide_weight > 0

    @property
    def num_draws(self) -> int:
        """Draws that the stage takes in all."""
        return self.loop.num_steps * self.loop.accumulation_steps

    def copies_of(self, num_chunks: int) -> int:
        """Noisy copies of each chunk of clips that are walked so far."""
        return (self.num_first_copies if num_chunks == 1 else None) or self.num_copies

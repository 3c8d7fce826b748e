"""What a distillation of a large model consists of, what it will take, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal

import torch
from pydantic import Field

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.stream.pipeline import StreamConfig
from longtake.train.checks import check_storage
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dit_costs import DiTCosts
from longtake.train.dmd import dmd_optimizers
from longtake.train.dmd_config import DMDConfig, score_history
from longtake.train.dmd_plans import Role, dmd_phases
from longtake.train.fit import check_fits, check_multiple
from longtake.train.lora import add_lora
from longtake.train.networks import TextToLatents
from longtake.train.plan import DeviceKind, Machine, StagePlan, plan_stage
from longtake.train.prompts import EmbeddedPrompts
from longtake.train.stage_plans import Sizes, plan_dit, plan_trajectory
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.videos import (
    VideoClipsConfig,
)

DistillationStage = Literal["prompts", "clips", "teacher_forcing", "consistency", "dmd", "export"]
ON_VIDEOS: Final[tuple[DistillationStage, ...]] = ("clips", "teacher_forcing", "consistency")
TRAINING: Final[tuple[DistillationStage, ...]] = ("teacher_forcing", "consistency", "dmd")
"""Stages that leave weights, in their order."""

UNTRAINED = "untrained"
"""In the place of a path of weights: random ones, to try a setup out."""


class DistillationRecipe(Config):
    """A causal few-step model from a bidirectional many-step one.

    Args:
        stages: prompts (embed them once), clips (encode videos once), teacher_forcing (many steps, on clean
            clips), consistency (few steps, taught by what teacher forcing left), dmd (few steps, on
            rollouts), export (write the generator's weights). Each goes on from what the one before it left;
            the first of them from `generator`.
        dit_model: generator and critic. A memory that the generator's weights lack starts untrained.
        teacher_model: the real score, perhaps larger.
        stream: what the generator is trained to stream; its guidance and fps play no part.
        spatial_stride: pixels per latent cell of the autoencoder, which itself is not needed.
        prompts, held_out_prompts: text files, one prompt per line, for training and for evaluation.
        text_encoder: folder or hub name of the model in diffusers' layout whose text encoder is used.
        videos: for the stages on videos, beside their captions, which stage prompts embeds too.
        autoencoder: folder or hub name of the model in diffusers' layout whose autoencoder encodes them.
        generator: weights that, where dmd comes first, stream in few steps already: a file, or a folder of
            safetensors files, with official, diffusers' or own names; or "untrained".
        critic, teacher: the many-step model's weights, likewise.
        half_teacher: under bf16 arithmetic the frozen teacher is kept in bf16.
        device: where everything lives.
    """

    name: str = Field(min_length=1)
    seed: int = 0
    stages: tuple[DistillationStage, ...] = ("prompts", "dmd", "export")
    dit_model: DiTConfig
    teacher_model: DiTConfig
    stream: StreamConfig
    spatial_stride: int = Field(8, ge=1)
    prompts: str = "prompts.txt"
    held_out_prompts: str = "held-out-prompts.txt"
    text_encoder: str
    generator: str
    critic: str
    teacher: str
    half_teacher: bool = True
    device: DeviceKind = "cuda"
    videos: VideoClipsConfig = VideoClipsConfig()
    autoencoder: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    teacher_forcing: DiTTrainingConfig = DiTTrainingConfig(num_clips=1)
    consistency: TrajectoryConfig = TrajectoryConfig(num_clips=1, num_first_clips=0, target="consistency")
    dmd: DMDConfig

    @property
    def critic_model(self) -> DiTConfig:
        """The generator's; without its memory where the critic sees whole clips, of which none leaves."""
        return self.dit_model.replace(memory=None) if self.dmd.scores == "clips" else self.dit_model

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        height, width = self.stream.height // self.spatial_stride, self.stream.width // self.spatial_stride
        return self.dit_model.in_channels, height, width

    def plan(self, stage: str, machine: Machine) -> StagePlan | None:
        """What a stage will take on a machine; None where it trains nothing."""
        if stage in ("teacher_forcing", "consistency"):
            schedule, (_, height, width) = self.stream.schedule, self.latent_shape
            sizes = Sizes(None, None, self.dit_model, self.stream.history, schedule, height, width)
            if stage == "consistency":
                return plan_trajectory(stage, sizes, self.consistency, machine, 0)
            return plan_dit(stage, sizes, self.teacher_forcing, machine, 0, keeps_copy=False)
        if stage != "dmd":
            return None
        config, history = self.dmd, self.stream.history
        arithmetic = machine.arithmetic(config.loop.precision)
        with torch.device("meta"):
            generator, critic, teacher = (
                TextToLatents(EmbeddedPrompts({}, model.text_width), DiT(model))
                for model in (self.dit_model, self.critic_model, self.teacher_model)
            )
        teacher.requires_grad_(False)
        if config.lora is not None:
            add_lora(generator, config.lora)
            add_lora(critic, config.lora)
        if arithmetic.half and self.half_teacher:
            teacher.to(torch.bfloat16)
        learning = DiTCosts(self.dit_model, history, *self.latent_shape[1:], arithmetic)
        scoring = replace(learning, config=self.critic_model, history=score_history(config, history))
        real = replace(scoring, config=self.teacher_model)
        phases = dmd_phases(
            config,
            self.stream.schedule,
            Role(learning, learning.text),
            Role(scoring, scoring.text),
            Role(real, real.text),
        )
        networks = {"generator": generator, "critic": critic, "teacher": teacher}
        optimizers = dmd_optimizers(config, generator, critic)
        learners = list(zip((generator, critic), optimizers, strict=True))
        return plan_stage(stage, config.loop, networks, learners, phases, arithmetic)

    def check(self, stages: Sequence[str], machine: Machine) -> None:
        """Refuse stages that cannot be trained on a machine, before they are.

        Raises:
            ConfigError: as `check_settings`.
            TrainingError: more memory is needed than there is, with settings that need less.
        """
        self.check_settings(stages)
        for stage in TRAINING:
            if stage in stages:
                plan = self.plan(stage, machine)
                assert plan is not None, "a stage that trains"
                check_fits(self, stage, plan, machine)

    def check_settings(self, stages: Sequence[str]) -> None:
        """Refuse stages that would stumble later, on any machine.

        Raises:
            ConfigError: settings that do not fit each other, or stages that the recipe does not have.
        """
        for stage in stages:
            if stage not in self.stages:
                raise ConfigError(
                    f"stage {stage} is none of {self.name}'s: {', '.join(self.stages)}",
                    "add it to the recipe's stages, with settings of its own",
                )
        if "export" in stages and not any(stage in TRAINING for stage in self.stages):
            raise ConfigError(
                f"stages={list(self.stages)} train nothing that could be exported", "add a stage that trains"
            )
        ours, theirs = self.dit_model, self.teacher_model
        for name in ("in_channels", "out_channels", "text_width", "text_length"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(
                    f"dit_model.{name}={getattr(ours, name)}, but teacher_model has {getattr(theirs, name)}",
                    "use a teacher of the same latents and prompts",
                )
        if ours.patch_size[0] != 1:
            raise ConfigError(f"dit_model.patch_size={ours.patch_size} joins frames", "use 1 frame a patch")
        for name, model in (("dit_model", ours), ("teacher_model", theirs)):
            unit = (self.spatial_stride * model.patch_size[1], self.spatial_stride * model.patch_size[2])
            check_multiple(
                "stream", self.stream.height, self.stream.width, unit, f"a token's place in {name}"
            )
        check_storage(ours.latent, self.stream.history.policy)
        for stage in ("teacher_forcing", "consistency"):
            if stage in self.stages and ("clips" in stages or stage in stages):
                self._check_walks(stage)

    def _check_walks(self, stage: str) -> None:
        """Refuse what needs the small model's world, or longer clips than there are."""
        config, frames = getattr(self, stage), self.stream.history.chunk_frames
        idle: dict[str, object] = {"fresh_clips": False}
        if isinstance(config, DiTTrainingConfig):
            idle |= {"guide_weight": 0.0, "prompt_guide_weight": 0.0, "num_recall_clips": 0}
            idle |= {"num_long_clips": 0, "learns_from": "clips"}
        for name, value in idle.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"{stage}.{name}={getattr(config, name)}: there are videos with captions, and no more",
                    f"set {stage}.{name}={value}",
                )
        policy = self.stream.history.policy
        if isinstance(policy, EvolvingConfig) and policy.timing == "second_pass":
            raise ConfigError(
                f'policy.timing="second_pass" is of passes that follow each other, which stage {stage} does '
                "not have",
                'set stream.history.policy.timing="chunk", or train by dmd alone',
            )
        if not config.walks:
            raise ConfigError(
                f"{stage}.num_clips=0 and {stage}.num_first_clips=0 leave nothing to learn from",
                "raise either",
            )
        if config.num_chunks * frames > self.videos.num_latent_frames:
            raise ConfigError(
                f"videos.num_latent_frames={self.videos.num_latent_frames}, but {stage} walks "
                f"{config.num_chunks * frames}",
                f"set {stage}.num_chunks={self.videos.num_latent_frames // frames}",
            )

"""A recipe: the networks, the stream and the stages of a small model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.bundle import ModelCard
from longtake.stream.pipeline import StreamConfig
from longtake.train.checks import check_parts, plan_of
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_config import DMDConfig
from longtake.train.evictions import EvictionsConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.fit import check_fits
from longtake.train.layers import LayersConfig
from longtake.train.plan import DeviceKind, Machine, StagePlan
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.vae import VAETrainingConfig

Stage = Literal[
    "vae",
    "latents",
    "layers",
    "first",
    "windows",
    "evictions",
    "memory",
    "trajectory",
    "dmd",
    "decoder",
    "export",
]


STAGES: tuple[Stage, ...] = get_args(Stage)


PLAIN_STAGES: tuple[Stage, ...] = tuple(
    stage for stage in STAGES if stage not in ("evictions", "memory", "layers")
)


class Recipe(Config):
    """A small text-to-video model and how it is trained.

    Args:
        warm_start: model name or file whose weights the networks start from, also where the recipe's have
            grown (see `train.warm_start`), or their attention has become latent: then it is converted first
            (`train.start`). None starts from scratch.
        base: name of a shipped model, or of one beside the exported file: what the model shares with it is
            not exported again. None exports everything.
        device: where networks are trained; on a CUDA device the stages latents, first, windows, memory and
            export.
        num_workers: processes that render clips ahead of a DiT's teacher forcing; 0: in its own.
        parent: model name or file of the dense model that stage layers, and stages with
            `learns_from="parent"`, learn from.
        stages: vae (reconstruction), latents (encode clips once), layers (every latent layer learns to answer
            as the parent's), first (first chunks only), windows (whole clips through the history), evictions
            (a memory alone, from what the frozen network's window lets go), memory (windows with clips that
            ask for recall), trajectory (few steps and guidance, learned from the teacher's paths), dmd (the
            same, matched to the teacher's distribution on self-rollouts), decoder (the autoencoder's decoder
            alone, latents untouched), export (write the model file).
    """

    name: str = Field(min_length=1)
    level: int = Field(1, ge=1, description="highest world level it is trained for")
    seed: int = 0
    warm_start: str | None = None
    base: str | None = None
    device: DeviceKind = "cpu"
    num_workers: int = Field(0, ge=0)
    parent: str | None = None
    stages: tuple[Stage, ...] = PLAIN_STAGES
    vae_model: TinyVAEConfig
    text_model: TinyTextConfig
    dit_model: DiTConfig
    stream: StreamConfig
    vae: VAETrainingConfig
    first_latents: LatentCacheConfig
    latents: LatentCacheConfig
    held_out: LatentCacheConfig
    layers: LayersConfig = LayersConfig()
    first: DiTTrainingConfig
    windows: DiTTrainingConfig
    evictions: EvictionsConfig = EvictionsConfig()
    memory: DiTTrainingConfig = DiTTrainingConfig(num_recall_clips=2, num_clips=2, fresh_clips=True)
    trajectory: TrajectoryConfig
    dmd: DMDConfig
    decoder: VAETrainingConfig

    @model_validator(mode="after")
    def _same_chunks(self) -> Recipe:
        chunk_frames = self.stream.history.chunk_frames
        for name in ("first_latents", "latents", "held_out"):
            of_cache = getattr(self, name).chunk_frames
            if of_cache != chunk_frames:
                raise ConfigError(
                    f"{name}.chunk_frames={of_cache}, but the stream's chunks have {chunk_frames} frames",
                    f"set {name}.chunk_frames={chunk_frames}",
                )
        return self

    def needs_parent(self, stages: Collection[str]) -> bool:
        """Whether any of these stages learns from the parent."""
        learning = (name for name in ("first", "windows", "memory") if name in stages)
        return "layers" in stages or any(getattr(self, name).learns_from == "parent" for name in learning)

    def history_of(self, stage: str) -> HistoryConfig:
        """What a stage of the DiT walks through: the stream's, but without its memory in stages that come
        before the memory's own.
        """
        history = self.stream.history
        if (
            stage in ("first", "windows")
            and "memory" in self.stages
            and isinstance(history.policy, EvolvingConfig)
        ):
            return history.replace(policy=history.policy.replace(mode="off"))
        return history

    @property
    def card(self) -> ModelCard:
        """The description that goes into the model file, in which folders of this machine have no place."""
        return ModelCard(
            name=self.name,
            level=self.level,
            recipe=self.replace(
                warm_start=_file_name(self.warm_start), parent=_file_name(self.parent)
            ).model_dump_json(),
            vae=self.vae_model,
            text=self.text_model,
            dit=self.dit_model,
            stream=self.stream,
        )

    def plan(self, stage: str, machine: Machine) -> StagePlan | None:
        """What a stage will take on a machine; None where it trains nothing."""
        return plan_of(self, stage, machine)

    def check(self, stages: Sequence[str], machine: Machine) -> None:
        """Refuse stages that cannot be trained on a machine, before they are.

        Raises:
            ConfigError: settings that do not fit each other.
            TrainingError: more memory is needed than there is, with settings that need less.
        """
        check_parts(self, stages)
        for stage in stages:
            plan = self.plan(stage, machine)
            if plan is not None:
                check_fits(self, stage, plan, machine)


def _file_name(model: str | None) -> str | None:
    """A model's name, or that of its file."""
    return None if model is None else Path(model).name

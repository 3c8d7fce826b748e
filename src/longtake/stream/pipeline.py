"""A model bundle: networks, how they are run, and the hash of their weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from longtake.config import Config
from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig, check_ids_fit
from longtake.io.checkpoints import weights_digest
from longtake.models.dit import DiT, TextContext
from longtake.models.protocols import TextEncoder, VideoVAE, Weighted

Temperature = Annotated[float, Field(ge=0, le=2)]


class StreamConfig(Config):
    """How a bundle generates.

    Args:
        height, width: of the video, in pixels.
        fps: frames per second at which the video plays.
        history: window, sink, chunk and positions.
        schedule: denoising steps.
        opening_schedule: denoising steps of a chunk that opens something, the first of a stream or the first
            under a new prompt; there is nothing yet that it could be copied from. None for `schedule`.
        temperature: scale of the noise from which chunks that open nothing are made, one number or one for
            each step of `schedule`. Below 1 less of the model's own doubt gets into them: paths are calmer,
            but what is likely in no single chunk, as that something comes back into a panning view, then
            never happens. The first steps decide what happens and the last ones where it is, so the last
            ones may be colder.
        guidance: scale of classifier-free guidance, which doubles the cost; None for none.
        opening_guidance: the same of chunks that open something, on which most of a prompt is decided; None
            for `guidance`. Where other chunks have none, both branches read the same past.
        negative_prompt: what guidance leads away from.
        memory_at_switch: what a prompt switch does with the memory unless it says otherwise (see
            `stream.state.PromptSwitch`): "rebuild" it from the window, as LongLive and Echo-Infinity do;
            "keep" it where prompts may also lead away from something and back.
    """

    height: int = Field(gt=0)
    width: int = Field(gt=0)
    fps: float = Field(default=16.0, gt=0)
    history: HistoryConfig = HistoryConfig()
    schedule: Schedule = Schedule()
    opening_schedule: Schedule | None = None
    temperature: Temperature | tuple[Temperature, ...] = 1.0
    guidance: float | None = Field(default=None, ge=0)
    opening_guidance: float | None = Field(default=None, ge=0)
    negative_prompt: str = ""
    memory_at_switch: Literal["keep", "rebuild", "reset"] = "rebuild"

    @model_validator(mode="after")
    def _has_temperatures(self) -> StreamConfig:
        if isinstance(self.temperature, tuple) and len(self.temperature) != len(self.schedule.steps):
            raise ConfigError(
                f"temperature={self.temperature} has {len(self.temperature)} numbers for "
                f"{len(self.schedule.steps)} denoising steps",
                "give one number, or one for each step",
            )
        return self

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperature of each step of `schedule`."""
        if isinstance(self.temperature, tuple):
            return self.temperature
        return (self.temperature,) * len(self.schedule.steps)


@dataclass(frozen=True)
class Pipeline:
    """Networks in evaluation mode on one device, and how to run them. Shared by any number of streams,
    never changed.

    Raises:
        ConfigError: parts that do not fit each other, or a size they cannot make.
    """

    dit: DiT
    vae: VideoVAE
    text_encoder: TextEncoder
    config: StreamConfig

    def __post_init__(self) -> None:
        geometry, dit = self.vae.config, self.dit.config
        stride = geometry.spatial_stride
        if self.config.height % stride or self.config.width % stride:
            raise ConfigError(
                f"height={self.config.height} and width={self.config.width} are no multiples of {stride}",
                f"use multiples of {stride}, which the video autoencoder makes",
            )
        if not dit.in_channels == dit.out_channels == geometry.latent_channels:
            raise ConfigError(
                f"the DiT takes {dit.in_channels} and makes {dit.out_channels} channels, "
                f"the video autoencoder has {geometry.latent_channels}",
                "use parts of one model",
            )
        if dit.patch_size[0] != 1:
            raise ConfigError(f"patch_size={dit.patch_size} joins frames", "a stream needs 1 frame a patch")
        grid = self.dit.token_grid(*self.latent_shape[2:])
        memory = self.dit.policy(self.config.history.policy, grid).memory_grid
        check_ids_fit(self.config.history, 0 if memory is None else memory.num_frames)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """A chunk's latents: frames, channels, height, width."""
        geometry = self.vae.config
        stride = geometry.spatial_stride
        size = (self.config.height // stride, self.config.width // stride)
        return (self.config.history.chunk_frames, geometry.latent_channels, *size)

    @property
    def device(self) -> torch.device:
        """Where the DiT lives."""
        return self.dit.patch_embedding.weight.device

    def with_sampler(self, num_steps: int | None = None, guidance: float | None = None) -> Pipeline:
        """The same networks, sampled otherwise; None leaves what the model says.

        Args:
            num_steps: denoising steps of every chunk, opening ones too; where it is not the model's own
                number, they are evenly spaced, and temperatures that were given step by step are 1.
            guidance: scale of classifier-free guidance of every chunk; 1 for none.

        Raises:
            ConfigError: not 1 to 1000 steps.
        """
        changes: dict[str, Any] = {}
        if num_steps is not None:
            changes["schedule"] = self.config.schedule.with_num_steps(num_steps)
            changes["opening_schedule"] = None
            if num_steps != len(self.config.schedule.steps) and isinstance(self.config.temperature, tuple):
                changes["temperature"] = 1.0
        if guidance is not None:
            changes |= {"guidance": None if guidance == 1 else guidance, "opening_guidance": None}
        return dataclasses.replace(self, config=self.config.replace(**changes)) if changes else self

    def with_history(self, history: HistoryConfig) -> Pipeline:
        """The same networks with another window, other positions or another policy.

        Raises:
            ConfigError: what does not fit these networks.
        """
        return dataclasses.replace(self, config=self.config.replace(history=history))

    def num_pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that the first latent frames of a stream decode to."""
        return 1 + (latent_frames - 1) * self.vae.config.temporal_stride if latent_frames > 0 else 0

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> TextContext:
        """A prompt as the DiT reads it; always encoded alone, so that no batch changes its numbers."""
        embeddings, mask = self.text_encoder.encode([prompt])
        weight = self.dit.patch_embedding.weight
        return self.dit.encode_text(embeddings.to(weight), mask.to(weight.device))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all weights; computed once."""
        parts: dict[str, Weighted] = {"dit": self.dit, "vae": self.vae, "text": self.text_encoder}
        tensors = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict().items()
        }
        return weights_digest(tensors)

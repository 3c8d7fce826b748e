"""Sizes of the chunk-causal diffusion transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig


class DiTConfig(Config):
    """Sizes of the transformer; the defaults of the options are Wan2.1's behaviour.

    Args:
        width, ffn_width, num_layers, num_heads: of the transformer; ``width / num_heads`` must be even.
        in_channels, out_channels: latent channels.
        patch_size: latent frames, rows and columns per token. Causal histories need 1 frame.
        text_width, text_length: size of a text embedding and the most tokens of a prompt.
        frequency_width: sinusoidal features of the timestep.
        eps: of all norms. ``qk_norm``: RMS norm of queries and keys over the full width.
        mask_text: attend to valid text tokens only. False zero-pads to ``text_length`` without a mask, as
            Wan does.
        cross_attention_layers: layers that attend to the prompt, "all" or their indices.
        pooled_text: add a projection of the mean of the valid embedded text tokens to the time embedding,
            so that modulation sees the prompt.
        spatial_embedding: token grid (rows, columns) of a learned absolute position added to every token,
            or None.
        frame_embedding: latent frames after which a learned embedding of a frame's place in its chunk, added
            to its tokens, repeats; None for none. Rotary positions tell attention how far apart two tokens
            are, but no token how far ahead of its past it is.
        prediction: what the head predicts, the flow or the clean latent. The forward pass returns the flow
            anyway.
        clean_sigma_min: with "clean", the smallest sigma that ``flow = (x - x0) / sigma`` divides by.
        memory: sizes of a learned memory of what left the window, or None.
        latent: sizes of self-attention over a shared low-rank latent, or None for per-head keys and values.
    """

    width: int = Field(gt=0)
    ffn_width: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    in_channels: int = Field(gt=0)
    out_channels: int = Field(gt=0)
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_width: int = Field(gt=0)
    text_length: int = Field(gt=0)
    frequency_width: int = Field(default=256, gt=0)
    eps: float = Field(default=1e-6, gt=0)
    qk_norm: bool = True
    mask_text: bool = False
    cross_attention_layers: Literal["all"] | tuple[int, ...] = "all"
    pooled_text: bool = False
    spatial_embedding: tuple[int, int] | None = None
    frame_embedding: int | None = Field(default=None, ge=1)
    prediction: Literal["flow", "clean"] = "flow"
    clean_sigma_min: float = Field(default=1e-3, gt=0)
    memory: MemoryEncoderConfig | None = None
    latent: LatentConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> DiTConfig:
        if self.width % self.num_heads or self.head_dim % 2:
            raise ConfigError(
                f"width={self.width} does not split into num_heads={self.num_heads} heads of even size",
                "use a width that is a multiple of 2 * num_heads",
            )
        if self.frequency_width % 2:
            raise ConfigError(f"frequency_width={self.frequency_width} is odd", "use an even number")
        if self.cross_attention_layers != "all":
            wrong = [layer for layer in self.cross_attention_layers if not 0 <= layer < self.num_layers]
            if wrong:
                raise ConfigError(
                    f"cross_attention_layers names layer {wrong[0]}", f"use 0..{self.num_layers - 1}"
                )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size={self.patch_size} holds a number below 1", "use 1 or more")
        if self.memory is not None and (self.memory.width, self.memory.num_heads) != (
            self.width,
            self.num_heads,
        ):
            raise ConfigError(
                f"a memory of width {self.memory.width} and {self.memory.num_heads} heads does not fit a DiT "
                f"of width {self.width} and {self.num_heads} heads",
                "give both the same",
            )
        if self.memory is not None and self.memory.read_as_latent is not None:
            expected = None
            if self.latent is not None and isinstance(self.latent.kv_rank, int):
                expected = (self.latent.kv_rank, self.latent.rope_dim)
            if self.memory.read_as_latent != expected:
                raise ConfigError(
                    f"memory.read_as_latent={self.memory.read_as_latent} does not fit latent={self.latent}",
                    "use its kv_rank, which must be one for all layers, and its rope_dim; or null",
                )
        if self.latent is not None:
            self.latent.ranks(self.num_layers)
            self.latent.selected(self.head_dim)
            if self.memory is not None and not self.latent.splits(self.head_dim):
                still = self.latent.still_dim(self.head_dim)
                raise ConfigError(
                    f"a memory reads and is read as heads of {self.head_dim} channels, but nope_dim="
                    f"{self.latent.nope_dim} and rope_bands={self.latent.rope_bands} make heads of "
                    f"{self.latent.nope_dim + self.head_dim - still}",
                    f"use nope_dim={still}",
                )
        return self

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.width // self.num_heads

    def dense(self) -> DiTConfig:
        """The same network with per-head keys and values."""
        memory = None if self.memory is None else self.memory.replace(read_as_latent=None)
        return self.replace(latent=None, memory=memory)

    def has_cross_attention(self, layer: int) -> bool:
        """Whether a layer attends to the prompt."""
        return self.cross_attention_layers == "all" or layer in self.cross_attention_layers


def wan_dit(width: int = 1536, ffn_width: int = 8960, num_layers: int = 30, num_heads: int = 12) -> DiTConfig:
    """Wan2.1's text-to-video DiT; the defaults are T2V-1.3B, 14B has 5120, 13824, 40 and 40."""
    return DiTConfig(
        width=width,
        ffn_width=ffn_width,
        num_layers=num_layers,
        num_heads=num_heads,
        in_channels=16,
        out_channels=16,
        patch_size=(1, 2, 2),
        text_width=4096,
        text_length=512,
    )

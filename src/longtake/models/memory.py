"""Memory Queries: a fixed number of tokens that take in what leaves the window (Echo-Infinity, arXiv
2606.04527), under the parameter names of the published encoder.

This module holds parameters and arithmetic; a stream holds the state, and `history/evolving.py` says when it
is updated and read.

Legend: b rows, m memory tokens, n memory frames, k evicted tokens of f frames, r/c rows and columns of the
memory, y/x those of a cell, h heads, d head dim, w width.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from longtake.cache.latent import CONTENT, ROPE_KEY
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.models.layers import RMSNorm
from longtake.ops.attention import attention

_INITIAL_STD = 0.014


class MemoryEncoderConfig(Config):
    """Sizes of the memory; the defaults of the options are the paper's.

    Args:
        width, num_heads: of the DiT.
        num_frames: frame-equivalents of memory.
        rows, columns: of the grid that the memory tokens of a frame stand on, whatever the video's own.
        num_layers: of attention and feed-forward over evicted entries.
        attends: "all" evicted tokens, as published; or those of its "cell" alone, the part of the picture
            that a memory token stands in the middle of. The memory then is a picture from the first step on,
            where otherwise it has to learn what comes from where, and its attention costs next to nothing.
        ffn_ratio: width of the feed-forward over that of the DiT.
        gate_bias: of the gate before training; 2 keeps 88 % of the old state.
        num_readings: sets of keys and values that the state is projected to: 1, which all layers that read
            share, as published; or one for each of them, so that a memory can be to every layer what a past
            frame is.
        normalize_keys: RMS norm of the keys that are read.
        read_as_latent: sizes of the latent and of the rotary key that the memory is read as, where it is not
            as per-head keys and values; those of the DiT's latent attention.
        eps: of all norms.
    """

    width: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_frames: int = Field(default=3, ge=1)
    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    num_layers: int = Field(default=2, ge=1)
    attends: Literal["all", "cell"] = "all"
    ffn_ratio: int = Field(default=4, ge=1)
    gate_bias: float = 2.0
    num_readings: int = Field(default=1, ge=1)
    normalize_keys: bool = False
    read_as_latent: tuple[int, int] | None = None
    eps: float = Field(default=1e-6, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> MemoryEncoderConfig:
        if self.width % self.num_heads:
            raise ConfigError(
                f"width={self.width} does not split into num_heads={self.num_heads}",
                "use the DiT's width and heads",
            )
        return self

    @property
    def num_tokens(self) -> int:
        """Memory tokens in all."""
        return self.num_frames * self.rows * self.columns


class MemoryLayer(nn.Module):
    """Memory tokens attend to evicted entries, then a feed-forward; both add to the tokens."""

    def __init__(self, config: MemoryEncoderConfig) -> None:
        super().__init__()
        width, eps = config.width, config.eps
        self.num_heads = config.num_heads
        self.norm1 = RMSNorm(width, eps)
        self.q = nn.Linear(width, width)
        self.norm_q = RMSNorm(width, eps)
        self.o = nn.Linear(width, width)
        self.norm2 = RMSNorm(width, eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, config.ffn_ratio * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_ratio * width, width),
        )

    def forward(self, state_bmw: Tensor, k_bkhd: Tensor, v_bkhd: Tensor) -> Tensor:
        """``[b, m, w]``; evicted entries are used as they are, without further projections."""
        q_bmhd = torch.unflatten(self.norm_q(self.q(self.norm1(state_bmw))), -1, (self.num_heads, -1))
        state_bmw = state_bmw + self.o(attention(q_bmhd, k_bkhd, v_bkhd))
        out: Tensor = state_bmw + self.ffn(self.norm2(state_bmw))
        return out


class MemoryEncoder(nn.Module):
    """Learned initial state, gated update from evicted entries, and the keys and values that chunks read."""

    def __init__(self, config: MemoryEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.query_init = nn.Parameter(_INITIAL_STD * torch.randn(1, config.num_tokens, width))
        self.layers = nn.ModuleList(MemoryLayer(config) for _ in range(config.num_layers))
        self.connector_proj = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(approximate="tanh"),
            nn.Linear(width, width),
            RMSNorm(width, config.eps),
        )
        self.gate_linear = nn.Linear(2 * width, width)
        nn.init.constant_(self.gate_linear.bias, config.gate_bias)
        readings = config.num_readings
        if config.read_as_latent is None:
            self.to_k = nn.Linear(width, readings * width)
            self.to_v = nn.Linear(width, readings * width)
            self.norm_k_out = RMSNorm(width, config.eps) if config.normalize_keys else nn.Identity()
        else:
            rank, rope_dim = config.read_as_latent
            self.to_c = nn.Linear(width, readings * rank)
            self.norm_c = RMSNorm(rank, config.eps)
            self.to_k_rope = nn.Linear(width, readings * rope_dim)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frame-equivalents, rows and columns of the memory tokens."""
        return self.config.num_frames, self.config.rows, self.config.columns

    def initial(self, batch: int) -> Tensor:
        """The state ``[b, m, w]`` of streams that have evicted nothing; gradients reach `query_init`."""
        return self.query_init.expand(batch, -1, -1).clone()

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Refuses a video's tokens per frame (rows, columns) that do not split into the memory's cells.

        Raises:
            ConfigError: so it is.
        """
        rows, columns = self.config.rows, self.config.columns
        if self.config.attends == "cell" and (grid[0] % rows or grid[1] % columns):
            raise ConfigError(
                f"a memory of {rows} x {columns} cells does not divide frames of {grid[0]} x {grid[1]} "
                "tokens",
                'use memory.rows and memory.columns that do, or memory.attends="all"',
            )

    def forward(
        self, state_bmw: Tensor, k_bkhd: Tensor, v_bkhd: Tensor, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """The state after some frames have left the window (equations 2 to 4 of the paper).

        Args:
            state_bmw: before; it may be more precise than the weights, and stays so.
            k_bkhd, v_bkhd: evicted entries of one layer of the DiT, keys after their norm and un-rotated.
            grid: their tokens per frame (rows, columns); needed where tokens attend to cells.
        """
        if self.config.attends == "all":
            return self._updated(state_bmw, k_bkhd, v_bkhd)
        assert grid is not None, "cells are parts of a grid"
        rows, columns = self.config.rows, self.config.columns
        cells = {"r": rows, "c": columns, "y": grid[0] // rows, "x": grid[1] // columns}
        k_bkhd, v_bkhd = (
            rearrange(entries, "b (f r y c x) h d -> (b r c) (f y x) h d", **cells)
            for entries in (k_bkhd, v_bkhd)
        )
        folded = rearrange(state_bmw, "b (n r c) w -> (b r c) n w", r=rows, c=columns)
        updated = self._updated(folded, k_bkhd, v_bkhd)
        return rearrange(updated, "(b r c) n w -> b (n r c) w", r=rows, c=columns)

    def _updated(self, state_bmw: Tensor, k_bkhd: Tensor, v_bkhd: Tensor) -> Tensor:
        known_bmw = candidate_bmw = state_bmw.type_as(self.query_init)
        for layer in self.layers:
            candidate_bmw = layer(candidate_bmw, k_bkhd, v_bkhd)
        candidate_bmw = self.connector_proj(candidate_bmw)
        gate_bmw = self.gate_linear(torch.cat([known_bmw, candidate_bmw], dim=-1))
        gate_bmw, candidate_bmw = torch.sigmoid(gate_bmw.type_as(state_bmw)), candidate_bmw.type_as(state_bmw)
        updated_bmw: Tensor = gate_bmw * state_bmw + (1 - gate_bmw) * candidate_bmw
        return updated_bmw

    @property
    def num_readings(self) -> int:
        """Sets of entries that `read` makes."""
        return self.config.num_readings

    def read(self, state_bmw: Tensor) -> list[dict[str, Tensor]]:
        """For each reading un-rotated keys and values ``k`` and ``v`` ``[b, m, h, d]``; or latents ``c``
        ``[b, m, rank]`` and ``k_rope`` ``[b, m, 1, rope_dim]``.
        """
        state_bmw = state_bmw.type_as(self.query_init)
        if self.config.read_as_latent is not None:
            latents = (self.norm_c(c) for c in self._readings(self.to_c(state_bmw)))
            rope_keys = (key_bmp.unsqueeze(2) for key_bmp in self._readings(self.to_k_rope(state_bmw)))
            return [{CONTENT: c, ROPE_KEY: key} for c, key in zip(latents, rope_keys, strict=True)]
        heads = (self.config.num_heads, -1)
        keys = (torch.unflatten(self.norm_k_out(k), -1, heads) for k in self._readings(self.to_k(state_bmw)))
        values = (torch.unflatten(v, -1, heads) for v in self._readings(self.to_v(state_bmw)))
        return [{"k": k, "v": v} for k, v in zip(keys, values, strict=True)]

    def _readings(self, projected: Tensor) -> tuple[Tensor, ...]:
        return projected.chunk(self.config.num_readings, dim=-1)

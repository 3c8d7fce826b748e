"""The chunk-causal diffusion transformer: Wan2.1's text-to-video DiT with its parameter names, any size
from config.

Legend: r rows (streams times copies), f latent frames, c channels, h w height and width, t tokens, l text
tokens.

The network never mutates anything: it reads a :class:`~longtake.history.base.HistoryView` and returns,
beside the flow, the entries its tokens would leave in a history.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.cache.base import Entries, Rows, take_rows
from longtake.cache.dense import dense_layout
from longtake.cache.latent import latent_layout
from longtake.cache.spec import CacheSpec
from longtake.errors import ConfigError
from longtake.history.base import HistoryView
from longtake.history.policy import Policy, PolicyConfig, Surroundings, as_stored
from longtake.models.dit_config import DiTConfig
from longtake.models.latent import LatentAttention
from longtake.models.layers import (
    Block,
    FrameEmbedding,
    Head,
    PatchEmbedding,
    SelfAttention,
    SpatialEmbedding,
    TimeFrequencies,
)
from longtake.models.memory import MemoryEncoder

TIMESTEPS = 1000.0
"""Timestep of pure noise: sigma = timestep / 1000."""


@dataclass(frozen=True)
class TextContext:
    """A batch of prompts as the DiT reads them: cross-attention keys and values of every layer, once per
    prompt.

    Args:
        layers: per layer keys and values ``[r, l, heads, head dim]``, None where the layer has no
            cross-attention.
        mask_r11l: True at valid tokens, None where all are read.
        pooled_rw: the prompt's share of the time embedding, or None.
    """

    layers: tuple[tuple[Tensor, Tensor] | None, ...]
    mask_r11l: Tensor | None = None
    pooled_rw: Tensor | None = None

    def select(self, rows: Rows) -> TextContext:
        """Some rows."""
        return TextContext(
            tuple(
                None if kv is None else (take_rows(kv[0], rows), take_rows(kv[1], rows)) for kv in self.layers
            ),
            None if self.mask_r11l is None else take_rows(self.mask_r11l, rows),
            None if self.pooled_rw is None else take_rows(self.pooled_rw, rows),
        )

    def repeat(self, copies: int) -> TextContext:
        """All rows ``copies`` times, copy-major (row ``copy * r + i``).

        Copies data: do it once per prompt.
        """

        def repeated(tensor: Tensor) -> Tensor:
            return tensor.expand(copies, *tensor.shape).flatten(0, 1)

        if copies == 1:
            return self
        return TextContext(
            tuple(None if kv is None else (repeated(kv[0]), repeated(kv[1])) for kv in self.layers),
            None if self.mask_r11l is None else repeated(self.mask_r11l),
            None if self.pooled_rw is None else repeated(self.pooled_rw),
        )

    def detach(self) -> TextContext:
        """The same numbers, cut off from autograd."""
        return TextContext(
            tuple(None if kv is None else (kv[0].detach(), kv[1].detach()) for kv in self.layers),
            self.mask_r11l,
            None if self.pooled_rw is None else self.pooled_rw.detach(),
        )

    @staticmethod
    def stack(contexts: Sequence[TextContext]) -> TextContext:
        """Join contexts of one model along rows."""

        def joined(pick: Sequence[Tensor | None]) -> Tensor | None:
            tensors = [tensor for tensor in pick if tensor is not None]
            return torch.cat(tensors) if tensors else None

        layers: list[tuple[Tensor, Tensor] | None] = []
        for column in zip(*(context.layers for context in contexts), strict=True):
            pairs = [kv for kv in column if kv is not None]
            layers.append(
                (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs])) if pairs else None
            )
        return TextContext(
            tuple(layers),
            joined([context.mask_r11l for context in contexts]),
            joined([context.pooled_rw for context in contexts]),
        )


class DiT(nn.Module):
    """The network. Parameters as in Wan2.1's checkpoints, plus those of the options that are switched on."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, eps = config.width, config.eps
        pt, ph, pw = config.patch_size
        self.patch_embedding = PatchEmbedding(config.in_channels, width, config.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_frequencies = TimeFrequencies(config.frequency_width)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.frequency_width, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.pooled_text = nn.Linear(width, width) if config.pooled_text else None
        self.spatial_embedding = (
            SpatialEmbedding(config.spatial_embedding, width)
            if config.spatial_embedding is not None
            else None
        )
        self.frame_embedding = (
            FrameEmbedding(config.frame_embedding, width) if config.frame_embedding is not None else None
        )
        self.blocks = nn.ModuleList(
            Block(
                self._self_attention(layer),
                width,
                config.ffn_width,
                config.num_heads,
                eps,
                config.qk_norm,
                config.has_cross_attention(layer),
            )
            for layer in range(config.num_layers)
        )
        self.head = Head(width, pt * ph * pw * config.out_channels, eps)
        self._initialise()
        self.memory = MemoryEncoder(config.memory) if config.memory is not None else None

    def policy(self, config: PolicyConfig, grid: tuple[int, int]) -> Policy:
        """What becomes of frames that leave the window, for a history of this network.

        Args:
            config: its settings, a history config's ``policy``.
            grid: tokens per frame as (rows, columns).

        Raises:
            ConfigError: settings that do not fit this network.
        """
        spec, latent = self.cache_spec(), self.config.latent
        if latent is None:
            return config.make(Surroundings(spec, grid, self.memory))
        if self.config.memory is not None and self.config.memory.read_as_latent is not None:
            read_as = latent_layout(latent.ranks(self.config.num_layers), spec.rope)
        else:
            sizes = (self.config.num_layers, self.config.num_heads, self.config.head_dim)
            read_as = dense_layout(*sizes, rope=latent.dense_rope(self.config.head_dim))
        return config.make(Surroundings(spec, grid, self.memory, read_as, self._dense))

    def cache_spec(self) -> CacheSpec:
        """The layout of this network's entries."""
        config = self.config
        if config.latent is not None:
            latent = config.latent
            ranks, rope = latent.ranks(config.num_layers), latent.rope(config.head_dim)
            return latent_layout(ranks, rope, latent.storage, latent.key_storage)
        return dense_layout(config.num_layers, config.num_heads, config.head_dim)

    def _self_attention(self, layer: int) -> nn.Module:
        config, latent = self.config, self.config.latent
        if latent is None:
            return SelfAttention(config.width, config.num_heads, config.eps, config.qk_norm)
        rank = latent.ranks(config.num_layers)[layer]
        return LatentAttention(config.width, config.num_heads, config.eps, latent, rank)

    def _dense(self, layer: int, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values of a layer's entries."""
        block = self.blocks[layer]
        assert isinstance(block, Block)
        attention = block.self_attn
        return attention.dense(parts) if isinstance(attention, LatentAttention) else as_stored(layer, parts)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Tokens per frame as (rows, columns), for latents of this height and width.

        Raises:
            ConfigError: the patch does not divide the latent's size.
        """
        _, ph, pw = self.config.patch_size
        if height % ph or width % pw:
            raise ConfigError(
                f"latents of {height}x{width} do not split into patches of {ph}x{pw}",
                f"use a latent height that is a multiple of {ph} and a width that is a multiple of {pw}",
            )
        return height // ph, width // pw

    def encode_text(self, embeddings_rlw: Tensor, mask_rl: Tensor | None = None) -> TextContext:
        """Everything the network needs of some prompts, computed once per prompt.

        Args:
            embeddings_rlw: text embeddings ``[r, l, text_width]`` with at most ``text_length`` tokens;
                tokens that are padding must be zero where the config does not mask them.
            mask_rl: bool, True at valid tokens; None where all are. A row without valid tokens reads its
                first one.

        Raises:
            ConfigError: too many tokens, or embeddings of another width.
        """
        _, length, width = embeddings_rlw.shape
        if width != self.config.text_width:
            raise ConfigError(
                f"text embeddings of width {width} do not fit text_width={self.config.text_width}",
                "use the text encoder that the DiT was trained with",
            )
        if length > self.config.text_length:
            raise ConfigError(
                f"a prompt of {length} tokens exceeds text_length={self.config.text_length}",
                "shorten the prompt",
            )
        if mask_rl is None:
            mask_rl = torch.ones(embeddings_rlw.shape[:2], dtype=torch.bool, device=embeddings_rlw.device)
        first = torch.arange(length, device=mask_rl.device) == 0
        mask_rl = mask_rl | (first & ~mask_rl.any(1, keepdim=True))
        # Prompts of all lengths take the same shape, so that any of them stack.
        embeddings_rlw = nn.functional.pad(embeddings_rlw, (0, 0, 0, self.config.text_length - length))
        mask_rl = nn.functional.pad(mask_rl, (0, self.config.text_length - length))
        text_rlw = self.text_embedding(embeddings_rlw)
        pooled_rw = None
        if self.pooled_text is not None:
            weight_rl1 = mask_rl.unsqueeze(-1).type_as(text_rlw)
            pooled_rw = self.pooled_text((text_rlw * weight_rl1).sum(1) / weight_rl1.sum(1))
        layers: list[tuple[Tensor, Tensor] | None] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            layers.append(None if block.cross_attn is None else block.cross_attn.text(text_rlw))
        return TextContext(
            tuple(layers), mask_rl[:, None, None] if self.config.mask_text else None, pooled_rw
        )

    def forward(
        self,
        x_rfchw: Tensor,
        timesteps_rf: Tensor,
        text: TextContext,
        view: HistoryView,
        recompute: bool = False,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor, Entries]:
        """Predict the flow ``noise - clean`` of some frames that read a history.

        Args:
            x_rfchw: noisy latents; rows as the view's (``copies * base rows``, copy-major).
            timesteps_rf: per frame, 0 (clean) to 1000 (noise), on the latents' device.
            text: prompts, one row per latent row.
            view: what the frames read, from a history or :func:`~longtake.history.base.full_view`. With
                ``recompute`` its tensors must not be overwritten before the backward pass.
            recompute: where gradients are recorded, keep only what enters and leaves each block, and compute
                the rest again in the backward pass.
            observe: called with each layer's index and the tokens ``[r, t, w]`` that leave it.

        Returns:
            The flow, of the latents' shape with ``out_channels``, and the tokens' entries (keys un-rotated).

        Raises:
            HistoryError: the view is older than a commit.
        """
        view.check_fresh()
        pt, ph, pw = self.config.patch_size
        grid = self.token_grid(*x_rfchw.shape[-2:])
        assert grid == view.grid, "the view is for another resolution"
        assert x_rfchw.shape[1] == view.num_frames * pt, "the view is for another number of frames"
        x_rtw = self.patch_embedding(x_rfchw)
        if self.spatial_embedding is not None:
            x_rtw = (x_rtw.unflatten(1, (view.num_frames, -1)) + self.spatial_embedding(grid)).flatten(1, 2)
        if self.frame_embedding is not None:
            x_rtw = (
                x_rtw.unflatten(1, (view.num_frames, -1)) + self.frame_embedding(view.num_frames)
            ).flatten(1, 2)
        time_rfw = self.time_embedding(self.time_frequencies(timesteps_rf[:, ::pt]).type_as(x_rtw))
        if text.pooled_rw is not None:
            time_rfw = time_rfw + text.pooled_rw.unsqueeze(1)
        time_rf6w = self.time_projection(time_rfw).unflatten(-1, (6, -1))
        layers = []
        for layer, block in enumerate(self.blocks):
            inputs = (x_rtw, time_rf6w, text.layers[layer], text.mask_r11l, view, layer)
            if recompute and torch.is_grad_enabled():
                # Blocks draw no random numbers, so the generator's state need not be kept.
                x_rtw, entries = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_rtw, entries = block(*inputs)
            layers.append(entries)
            if observe is not None:
                observe(layer, x_rtw)
        patches = self.head(x_rtw, time_rfw)
        out_rfchw = rearrange(
            patches,
            "r (f h w) (pt ph pw c) -> r (f pt) c (h ph) (w pw)",
            f=view.num_frames,
            h=grid[0],
            pt=pt,
            ph=ph,
            pw=pw,
        )
        if self.config.prediction == "clean":
            sigma = (timesteps_rf / TIMESTEPS).clamp_min(self.config.clean_sigma_min).type_as(x_rfchw)
            out_rfchw = (x_rfchw - out_rfchw) / sigma[:, :, None, None, None]
        return out_rfchw, Entries(tuple(layers))

    def _initialise(self) -> None:
        """Wan's initial weights: Xavier matrices, zero biases and head, small text and time embeddings."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for sequence in (self.text_embedding, self.time_embedding):
            for module in sequence.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

"""The parts of the DiT, under Wan2.1's parameter names.

Legend: r rows (streams times copies), t own tokens, k keys, l text tokens, f frames, h heads, d head dim, w
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.history.base import QUERIES, HistoryView
from longtake.ops.attention import attention

TIME_SCALE = 10_000.0
"""Longest period of the timestep embedding, in steps of 1000 (the same in every diffusion transformer)."""


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as the input."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) * self.weight


class PatchEmbedding(nn.Module):
    """Non-overlapping patches to tokens: a 3D convolution's weight, applied as one matrix product."""

    def __init__(self, in_channels: int, width: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, in_channels, *patch_size))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_rfchw: Tensor) -> Tensor:
        """Tokens ``[r, t, w]``, frame by frame, row by row."""
        pt, ph, pw = self.patch_size
        patches = rearrange(
            x_rfchw, "r (f pt) c (h ph) (w pw) -> r (f h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw
        )
        return F.linear(patches, self.weight.flatten(1), self.bias)


class SpatialEmbedding(nn.Module):
    """A learned absolute position per place of the token grid, bilinearly resized for other grids."""

    def __init__(self, grid: tuple[int, int], width: int) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.zeros(width, *grid))

    def forward(self, grid: tuple[int, int]) -> Tensor:
        """``[rows * columns, w]``."""
        if grid == self.grid:
            return self.weight.flatten(1).T
        resized = F.interpolate(self.weight[None], size=grid, mode="bilinear", align_corners=False)
        return resized[0].flatten(1).T


class FrameEmbedding(nn.Module):
    """A learned embedding of a frame's place in its chunk."""

    def __init__(self, chunk_frames: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(chunk_frames, width))

    def forward(self, num_frames: int) -> Tensor:
        """``[num_frames, 1, w]``, from a chunk's first frame on."""
        places = torch.arange(num_frames, device=self.weight.device) % len(self.weight)
        return self.weight[places].unsqueeze(1)


class TimeFrequencies(nn.Module):
    """Sinusoidal features of a timestep, cosines first, in float64 and then cast. No parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        """``[..., width]`` float32."""
        half = self.width // 2
        exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
        angles = timesteps.double().unsqueeze(-1) * TIME_SCALE**-exponents
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class _Projections(nn.Module):
    """What both attentions have: queries, keys (each with its norm), values and output, under Wan's names."""

    def __init__(self, width: int, num_heads: int, eps: float, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_q = RMSNorm(width, eps) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(width, eps) if qk_norm else nn.Identity()

    def queries(self, x_rtw: Tensor) -> Tensor:
        """``[r, t, h, d]``, normed."""
        return torch.unflatten(self.norm_q(self.q(x_rtw)), -1, (self.num_heads, -1))

    def keys_and_values(self, x_rtw: Tensor) -> tuple[Tensor, Tensor]:
        """``[r, t, h, d]`` each, the keys normed."""
        heads = (self.num_heads, -1)
        return torch.unflatten(self.norm_k(self.k(x_rtw)), -1, heads), torch.unflatten(
            self.v(x_rtw), -1, heads
        )


class SelfAttention(_Projections):
    """Attention of a chunk over its history and itself. Dense layout: ``k`` (after its norm) and ``v``."""

    def forward(self, x_rtw: Tensor, view: HistoryView, layer: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The output ``[r, t, w]`` and the tokens' entries, keys un-rotated."""
        q_rthd = self.queries(x_rtw)
        k_rthd, v_rthd = self.keys_and_values(x_rtw)
        k_rkhd = view.with_own(layer, "k", view.rotate(k_rthd))
        v_rkhd = view.with_own(layer, "v", v_rthd)
        out = attention(view.rotate(q_rthd), k_rkhd, v_rkhd, view.mask(layer))
        entries = {"k": k_rthd, "v": v_rthd}
        return self.o(out), entries | {QUERIES: q_rthd} if view.wants_queries else entries


class CrossAttention(_Projections):
    """Attention of a chunk over its prompt; keys and values come once per prompt from ``text``."""

    def text(self, text_rlw: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[r, l, h, d]`` of embedded text; parameters stay inside their modules."""
        return self.keys_and_values(text_rlw)

    def forward(self, x_rtw: Tensor, text: tuple[Tensor, Tensor], mask_r11l: Tensor | None) -> Tensor:
        """``[r, t, w]``."""
        out: Tensor = self.o(attention(self.queries(x_rtw), *text, mask_r11l))
        return out


def modulated(x_rtw: Tensor, shift_rfw: Tensor, scale_rfw: Tensor, eps: float) -> Tensor:
    """Layer norm without weights, then scale and shift per frame."""
    frames = shift_rfw.shape[1]
    normed = torch.unflatten(F.layer_norm(x_rtw.float(), x_rtw.shape[-1:], eps=eps), 1, (frames, -1))
    return (
        torch.addcmul(shift_rfw.unsqueeze(2), normed, 1 + scale_rfw.unsqueeze(2)).flatten(1, 2).type_as(x_rtw)
    )


def gated(x_rtw: Tensor, update_rtw: Tensor, gate_rfw: Tensor) -> Tensor:
    """Residual update scaled per frame."""
    frames = gate_rfw.shape[1]
    update = torch.unflatten(update_rtw, 1, (frames, -1)) * gate_rfw.unsqueeze(2)
    return (x_rtw + update.flatten(1, 2)).type_as(x_rtw)


class Block(nn.Module):
    """Self-attention over the history, cross-attention to the prompt where the layer has it, feed-forward.

    Args:
        self_attention: of any layout; called as `SelfAttention` is.
        width, ffn_width, num_heads, eps, qk_norm: as of the DiT.
        cross_attention: whether the layer attends to the prompt.
    """

    def __init__(
        self,
        self_attention: nn.Module,
        width: int,
        ffn_width: int,
        num_heads: int,
        eps: float,
        qk_norm: bool,
        cross_attention: bool,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = self_attention
        self.norm3 = nn.LayerNorm(width, eps) if cross_attention else None
        self.cross_attn = CrossAttention(width, num_heads, eps, qk_norm) if cross_attention else None
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn_width), nn.GELU(approximate="tanh"), nn.Linear(ffn_width, width)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))

    def forward(
        self,
        x_rtw: Tensor,
        time_rf6w: Tensor,
        text: tuple[Tensor, Tensor] | None,
        text_mask_r11l: Tensor | None,
        view: HistoryView,
        layer: int,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Tokens ``[r, t, w]`` and their entries in this layer."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + time_rf6w).unbind(2)
        update, entries = self.self_attn(modulated(x_rtw, shift_a, scale_a, self.eps), view, layer)
        x_rtw = gated(x_rtw, update, gate_a)
        if self.cross_attn is not None and self.norm3 is not None:
            assert text is not None, "the text context belongs to another model"
            x_rtw = x_rtw + self.cross_attn(self.norm3(x_rtw), text, text_mask_r11l)
        x_rtw = gated(x_rtw, self.ffn(modulated(x_rtw, shift_f, scale_f, self.eps)), gate_f)
        return x_rtw, entries


class Head(nn.Module):
    """Tokens to patches of the prediction."""

    def __init__(self, width: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(width, out_features)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / math.sqrt(width))

    def forward(self, x_rtw: Tensor, time_rfw: Tensor) -> Tensor:
        """``[r, t, out_features]``."""
        shift, scale = (self.modulation + time_rfw.unsqueeze(2)).unbind(2)
        out: Tensor = self.head(modulated(x_rtw, shift, scale, self.eps))
        return out

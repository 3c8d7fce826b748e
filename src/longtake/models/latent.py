"""Latent self-attention: keys and values of all heads come from one low-rank latent and one shared rotary key
(VideoMLA, arXiv 2605.30351; multi-head latent attention: DeepSeek-V2, arXiv 2405.04434).

Legend: r rows, b base rows, t own tokens, k keys, h heads, w width, c latent, n channels without positions, p
channels with positions, d head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtake.cache.latent import CONTENT, ROPE_KEY, SCALES
from longtake.cache.quantized import (
    FP8,
    GROUP,
    num_groups,
    pack_fp8,
    pack_int4,
    rounded,
    scales_of,
    unpack_fp8,
    unpack_int4,
)
from longtake.history.base import QUERIES, HistoryView
from longtake.models.latent_config import LatentConfig
from longtake.models.layers import RMSNorm
from longtake.ops.attention import attention
from longtake.ops.latent import DenseKeys, LatentPath, LatentSizes, absorbed_attention

LEAST_TURN = 1e-3
"""No head's key is less of the shared one than this."""


class LatentAttention(nn.Module):
    """Attention of a chunk over its history and itself. Latent layout: ``c`` (after its norm) and
    ``k_rope``.

    A converted layer's heads had rotary keys of their own, of which the shared ones are turned and stretched
    means: a head's is the sum of the shared keys of each pair of channels, as complex numbers times its
    ``turns``. Where ``heads_mix="keys"`` those are weights, and keys are made so. Where queries have taken
    them over, they keep by how much, so that per-head keys (a memory's) meet heads as they were.

    Args:
        width, num_heads, eps: as of the dense attention; values have ``width / num_heads`` channels.
        config: ranks and channels. ``kv_rank``: this layer's.
    """

    def __init__(self, width: int, num_heads: int, eps: float, config: LatentConfig, kv_rank: int) -> None:
        super().__init__()
        self.config = config
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self._keys_mix = config.heads_mix == "keys"
        self._asked_dim = config.head_rope_dim(self.head_dim)
        mixed = self._asked_dim if self._keys_mix else None
        self.sizes = LatentSizes(num_heads, kv_rank, config.nope_dim, config.rope_dim, self.head_dim, mixed)
        rank = config.query_rank
        self.q_down = nn.Linear(width, rank) if rank is not None else nn.Identity()
        self.norm_q = RMSNorm(rank, eps) if rank is not None else nn.Identity()
        self.q_nope = nn.Linear(rank or width, num_heads * config.nope_dim)
        self.q_rope = nn.Linear(rank or width, num_heads * self._asked_dim)
        self.kv_down = nn.Linear(width, kv_rank)
        self.norm_kv = RMSNorm(kv_rank, eps)
        self.k_rope = nn.Linear(width, config.rope_dim)
        self.k_up = nn.Linear(kv_rank, num_heads * config.nope_dim)
        self.v_up = nn.Linear(kv_rank, width)
        self.o = nn.Linear(width, width)
        self._channels = config.channels(self.head_dim)  # of an original head, in the order of `_expand`
        self._keys_of_pairs = list(config.keys_of_pairs(self.head_dim))
        self._first_pairs: list[int] | None = None  # of the shared key's pairs those that queries have
        ones_hp2 = torch.tensor([1.0, 0.0]).expand(num_heads, config.rope_dim // 2, 2).clone()
        self.turns: Tensor
        if self._keys_mix:
            counts = self._keys_of_pairs
            self._first_pairs = [sum(counts[:i]) for i in range(len(counts))]
            self.turns = nn.Parameter(ones_hp2)
        else:
            self.register_buffer("turns", ones_hp2)

    def forward(self, x_rtw: Tensor, view: HistoryView, layer: int) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The output ``[r, t, w]`` and the tokens' entries, rotary keys un-rotated."""
        query_rtc = self.norm_q(self.q_down(x_rtw))
        q_nope_rthn = torch.unflatten(self.q_nope(query_rtc), -1, (self.num_heads, -1))
        q_rope_rthp = torch.unflatten(self.q_rope(query_rtc), -1, (self.num_heads, -1))
        content_rtc, key_rt1p = self.norm_kv(self.kv_down(x_rtw)), self.k_rope(x_rtw).unsqueeze(2)
        entries = {**self._stored(content_rtc, view.packs), ROPE_KEY: key_rt1p}
        own = self._numbers({CONTENT: content_rtc, ROPE_KEY: view.rotate(key_rt1p)})
        asked = [q_nope_rthn, view.rotate(q_rope_rthp, self._first_pairs)]
        if self.config.debias:
            asked.append(self._error_queries(q_nope_rthn))
        q_rthd = torch.cat(asked, dim=-1)
        if self.config.path == "kept" and not torch.is_grad_enabled():
            read = self._expanded_once(q_rthd, own, view, layer)
        elif self.path(x_rtw.shape[:2], view, layer) == "expand":
            read = self._expanded(q_rthd, own, self._past(view, layer), view, layer)
        else:
            read = self._absorbed(q_rthd, own, self._past(view, layer), view, layer)
        out_rtw = self.o(read)
        if view.wants_queries:
            if not self._keys_mix:
                q_rope_rthp = self._mixed(_turned(q_rope_rthp, self._inverse(conjugate=True)))
            queries = self._in_head_order(torch.cat([q_nope_rthn, q_rope_rthp], dim=-1))
            queries = queries * (self._scale * queries.shape[-1] ** 0.5)  # who gets them scales by channels
            return out_rtw, entries | {QUERIES: queries}
        return out_rtw, entries

    def path(self, shape_rt: tuple[int, ...], view: HistoryView, layer: int) -> LatentPath:
        """How attention over a view is computed for so many rows and tokens."""
        if self.config.path != "auto":
            return "absorbed" if self.config.path == "absorbed" else "expand"
        rows, tokens = shape_rt
        past = view.past(layer)
        latent = sum(parts[CONTENT].shape[1] for parts in past if CONTENT in parts)
        dense = sum(parts["k"].shape[1] for parts in past if "k" in parts)
        return self.sizes.cost(rows, tokens, latent, view.copies, dense).cheapest

    def dense(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[b, t, h, d]`` of entries; channels of the keys as in an original head where
        they are as many, else those without positions first.
        """
        keys, values = self._expand(_Latents(self._content(parts), parts[ROPE_KEY]))
        if not self._keys_mix:
            still, turning = torch.split(keys, [self.config.nope_dim, self.config.rope_dim], dim=-1)
            keys = torch.cat([still, self._mixed(_turned(turning, self.turns))], dim=-1)
        return self._in_head_order(keys), values

    def _expand(self, latents: _Latents) -> tuple[Tensor, Tensor]:
        """Keys, those channels first that do not turn with position, and values, ``[b, t, h, d]``."""
        rope_bthp = self._of_all_heads(latents.rope_key)
        # Keys first: what is left over when they are joined is gone before there are values.
        keys = torch.cat([self._heads(self.k_up(latents.content)), rope_bthp], dim=-1)
        return keys, self._heads(self.v_up(latents.content))

    def _of_all_heads(self, key_bt1p: Tensor) -> Tensor:
        """What each head has of the shared keys, and of further channels beside them, ``[b, t, h, d]``."""
        if not self._keys_mix:
            return key_bt1p.expand(-1, -1, self.num_heads, -1)
        shared, others = key_bt1p.tensor_split([self.config.rope_dim], dim=-1)
        mixed = self._heads(shared.squeeze(2) @ self._mixture().flatten(1))
        if others.shape[-1] == 0:
            return mixed
        return torch.cat([mixed, others.expand(-1, -1, self.num_heads, -1)], dim=-1)

    def _mixture(self) -> Tensor:
        """What heads make of the shared key's channels, ``[p, h, d]``."""
        real_hp, imaginary_hp = self.turns.unbind(-1)
        turning = torch.stack([real_hp, imaginary_hp, -imaginary_hp, real_hp], dim=-1)
        of_pairs = torch.split(torch.unflatten(turning, -1, (2, 2)), self._keys_of_pairs, dim=1)
        after = self._asked_dim - 2
        placed = [nn.functional.pad(pair, (2 * i, after - 2 * i)) for i, pair in enumerate(of_pairs)]
        return torch.cat(placed, dim=1).permute(1, 2, 0, 3).flatten(0, 1)

    def _stored(self, content_rtc: Tensor, packs: bool) -> dict[str, Tensor]:
        """Latents as a cache keeps them, or as numbers that were rounded so."""
        storage = self.config.storage
        if storage == "full":
            return {CONTENT: content_rtc}
        if storage == "fp8":
            return {CONTENT: pack_fp8(content_rtc) if packs else rounded(content_rtc, storage)}
        packed, scales = pack_int4(content_rtc)
        return {CONTENT: packed if packs else rounded(content_rtc, storage), SCALES: scales}

    def _content(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Latents of entries, however they are kept."""
        content = parts[CONTENT]
        if content.dtype != torch.uint8:
            return content
        dtype = self.k_up.weight.dtype
        if SCALES in parts:
            return unpack_int4(content, parts[SCALES], self.sizes.kv_rank, dtype)
        return unpack_fp8(content, dtype)

    def _numbers(self, parts: Mapping[str, Tensor]) -> _Latents:
        """Latents and keys that calculations take. With `debias` the squared step of each group of packed
        latents stands in further channels of the key, to which `_error_queries` are the queries.
        """
        content, key = self._content(parts), parts[ROPE_KEY]
        if key.dtype == FP8:
            key = key.to(self.k_rope.weight.dtype)
        if self.config.debias:
            steps = content.new_zeros(*content.shape[:2], num_groups(self.sizes.kv_rank))
            if SCALES in parts:
                steps = scales_of(parts[SCALES], content.dtype).square()
            key = torch.cat([key, steps.unsqueeze(2).type_as(key)], dim=-1)
        return _Latents(content, key)

    def _error_queries(self, q_nope_rthn: Tensor) -> Tensor:
        """Of every group of latents what its squared step adds to scores, half the variance of an even
        rounding error, with the sign that takes it away; ``[r, t, h, groups]``.
        """
        asked_rthc = self._asked_of_latents(q_nope_rthn).square()
        rank = self.sizes.kv_rank
        padded = nn.functional.pad(asked_rthc, (0, num_groups(rank) * GROUP - rank))
        by_group = torch.unflatten(padded, -1, (-1, GROUP)).sum(-1)
        return -self._scale / 24 * by_group

    @property
    def _scale(self) -> float:
        return float((self.config.nope_dim + self._asked_dim) ** -0.5)

    def _past(self, view: HistoryView, layer: int) -> _Past:
        """What the layer reads, as numbers; dense segments come first."""
        past = view.past(layer)
        dense = [self._of_head(parts) for parts in past if CONTENT not in parts]
        assert all(CONTENT in parts for parts in past[len(dense) :]), "latents come last"
        return _Past(dense, [self._numbers(parts) for parts in past[len(dense) :]])

    def _expanded(self, q_rthd: Tensor, own: _Latents, past: _Past, view: HistoryView, layer: int) -> Tensor:
        """Keys and values of all tokens, then attention as ever."""
        if view.copies == 1:  # join what is small, then expand
            others = past.dense
            k_rkhd, v_rkhd = self._expand(_joined(view, past.latents, own))
        else:
            others = [*past.dense, *(self._expand(latents) for latents in past.latents)]
            k_rkhd, v_rkhd = self._expand(own)
        if others:
            k_rkhd = view.joined([keys for keys, _ in others], k_rkhd)
            v_rkhd = view.joined([values for _, values in others], v_rkhd)
        return self._attended(q_rthd, k_rkhd, v_rkhd, view, layer)

    def _expanded_once(self, q_rthd: Tensor, own: _Latents, view: HistoryView, layer: int) -> Tensor:
        """As `_expanded`; what the past says is made by the first of the passes over a view."""
        k_rkhd, v_rkhd = self._expand(own)
        if layer not in view.made:
            past = self._past(view, layer)
            if segments := [*past.dense, *(self._expand(latents) for latents in past.latents)]:
                keys, values = (torch.cat(parts, dim=1) for parts in zip(*segments, strict=True))
                view.made[layer] = keys, values
        if layer in view.made:
            keys, values = view.made[layer]
            k_rkhd, v_rkhd = view.joined([keys], k_rkhd), view.joined([values], v_rkhd)
        return self._attended(q_rthd, k_rkhd, v_rkhd, view, layer)

    def _attended(
        self, q_rthd: Tensor, k_rkhd: Tensor, v_rkhd: Tensor, view: HistoryView, layer: int
    ) -> Tensor:
        if self.config.debias:  # attention scales by the channels that it gets
            q_rthd = q_rthd * (self._scale * q_rthd.shape[-1] ** 0.5)
        return attention(q_rthd, k_rkhd, v_rkhd, view.mask(layer))

    def _absorbed(self, q_rthd: Tensor, own: _Latents, past: _Past, view: HistoryView, layer: int) -> Tensor:
        """Attention in the latent space, see `ops.latent`."""
        latents = _joined(view, past.latents, own)
        q_nope_rthn, q_rope_rthp = q_rthd.tensor_split([self.config.nope_dim], dim=-1)
        if self._keys_mix:
            q_rope_rthp = self._asked_of_shared(q_rope_rthp)
        k_bias_hn = torch.unflatten(self.k_up.bias, 0, (self.num_heads, -1))
        v_up_hdc = torch.unflatten(self.v_up.weight, 0, (self.num_heads, -1))
        v_bias_hd = torch.unflatten(self.v_up.bias, 0, (self.num_heads, -1))
        other = None
        if past.dense:
            k_rmhd, v_rmhd = (
                _for_all_rows(torch.cat(tensors, dim=1), view.copies)
                for tensors in zip(*past.dense, strict=True)
            )
            other = DenseKeys(q_rthd, k_rmhd, v_rmhd)
        out = absorbed_attention(
            torch.cat([self._asked_of_latents(q_nope_rthn), q_rope_rthp], dim=-1),
            torch.cat([latents.content, latents.rope_key.squeeze(2)], dim=-1),
            latents.content,
            self._scale,
            (q_nope_rthn * k_bias_hn).sum(-1, keepdim=True) * self._scale,
            other,
            view.mask(layer),
        )
        v_rthd = torch.einsum("rthc,hdc->rthd", out.content, v_up_hdc) + out.weight * v_bias_hd
        return (v_rthd if out.dense is None else v_rthd + out.dense).flatten(2)

    def _asked_of_latents(self, q_nope_rthn: Tensor) -> Tensor:
        """Queries as latents meet them, ``[r, t, h, c]``."""
        k_up_hnc = torch.unflatten(self.k_up.weight, 0, (self.num_heads, -1))
        return torch.einsum("rthn,hnc->rthc", q_nope_rthn, k_up_hnc)

    def _asked_of_shared(self, q_rope_rthd: Tensor) -> Tensor:
        """Queries as the shared key meets them, further channels as they are."""
        turning, others = q_rope_rthd.tensor_split([self._asked_dim], dim=-1)
        return torch.cat([torch.einsum("rthd,phd->rthp", turning, self._mixture()), others], dim=-1)

    def _heads(self, x_btw: Tensor) -> Tensor:
        return torch.unflatten(x_btw, -1, (self.num_heads, -1))

    def _of_head(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Dense keys, turned by their positions already, as queries here ask for them, and values."""
        still, turning = self._channels
        if self._keys_mix:
            keys = _gathered(parts["k"], [*still, *dict.fromkeys(turning)])
        else:
            turned_back = _turned(_gathered(parts["k"], turning), self._inverse())
            keys = torch.cat([_gathered(parts["k"], still), turned_back], dim=-1)
        if self.config.debias:
            keys = nn.functional.pad(keys, (0, num_groups(self.sizes.kv_rank)))
        return keys, parts["v"]

    def _mixed(self, x_bthp: Tensor) -> Tensor:
        """Of what stands for a head's pairs of channels the sums over the shared keys of each pair."""
        if max(self._keys_of_pairs) == 1:
            return x_bthp
        pairs = torch.split(torch.unflatten(x_bthp, -1, (-1, 2)), self._keys_of_pairs, dim=-2)
        return torch.cat([pair.sum(-2) for pair in pairs], dim=-1)

    def _inverse(self, *, conjugate: bool = False) -> Tensor:
        """What undoes the turns, bounded where they are nearly nothing: the mixture of the shared keys of a
        pair of channels, each times its turn, is the pair again where each is the pair times its own of
        these. `conjugate`: likewise of queries, which each shared key meets turned the other way.
        """
        squared_hp = self.turns.square().sum(-1)
        if max(self._keys_of_pairs) > 1:
            by_pair = torch.split(squared_hp, self._keys_of_pairs, dim=-1)
            squared_hp = torch.cat([own.sum(-1, keepdim=True).expand_as(own) for own in by_pair], dim=-1)
        real, imaginary = self.turns.unbind(-1)
        turned_back = torch.stack([real, imaginary if conjugate else -imaginary], dim=-1)
        return turned_back / squared_hp.unsqueeze(-1).clamp_min(LEAST_TURN**2)

    def _in_head_order(self, keys_bthd: Tensor) -> Tensor:
        """From the order of `_expand` to that of an original head, where that has as many channels."""
        if not self.config.splits(self.head_dim):
            return keys_bthd
        order = [channel for group in self._channels for channel in dict.fromkeys(group)]
        return _gathered(keys_bthd, sorted(range(len(order)), key=order.__getitem__))


class _Latents(NamedTuple):
    """Of some tokens the latents ``[b, t, c]`` and the shared keys, turned, ``[b, t, 1, p]``."""

    content: Tensor
    rope_key: Tensor


class _Past(NamedTuple):
    """Segments of the past: keys and values as they come, ``[b, t, h, d]`` each, and latents."""

    dense: list[tuple[Tensor, Tensor]]
    latents: list[_Latents]


def _joined(view: HistoryView, past: Sequence[_Latents], own: _Latents) -> _Latents:
    """Of all tokens."""
    return _Latents(
        view.joined([latents.content for latents in past], own.content),
        view.joined([latents.rope_key for latents in past], own.rope_key),
    )


def _gathered(x: Tensor, channels: Sequence[int]) -> Tensor:
    """Some of the last dimension, run by run: an index would first have to reach the device."""
    runs: list[list[int]] = []
    for channel in channels:
        if runs and channel == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([channel, channel + 1])
    return torch.cat([x[..., first:last] for first, last in runs], dim=-1)


def _turned(x_bthp: Tensor, turns_hp2: Tensor) -> Tensor:
    """Pairs of channels times complex numbers of their own head."""
    x_bthp2 = torch.unflatten(x_bthp, -1, (-1, 2))
    real, imaginary = x_bthp2.unbind(-1)
    a, b = turns_hp2.unbind(-1)
    return torch.stack([real * a - imaginary * b, real * b + imaginary * a], dim=-1).flatten(-2)


def _for_all_rows(base_b: Tensor, copies: int) -> Tensor:
    return base_b if copies == 1 else base_b.repeat(copies, *(1,) * (base_b.dim() - 1))

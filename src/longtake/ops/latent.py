"""Attention that stays in a shared latent space, and what it costs beside expanding keys and values first.

With keys ``k = W_k c + b_k`` and values ``v = W_v c + b_v`` of a latent ``c`` that all heads share, scores
are ``(W_k^T q) . c + q . b_k`` and outputs ``W_v (sum of weights times c) + (sum of weights) b_v``: neither
keys nor values of past tokens need to exist (*absorbed*). It pays where few queries read many keys; with a
chunk's thousands of queries making one layer's keys and values anew (*expand*) costs less.

Legend: r rows, t query tokens, k keys, m keys of another kind, h heads, c latent, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LatentPath = Literal["expand", "absorbed"]

_SCORES_AT_ONCE = 1 << 24
"""Bounds the memory that scores take: queries are taken in blocks."""


@dataclass(frozen=True)
class LatentCost:
    """FLOPs of one layer's attention, a product of [m,k] and [k,n] counting 2mkn.

    Args:
        expand: with keys and values of all tokens made first.
        absorbed: within the latent space.
        kept: as expand, in a pass that finds those of the past made.
    """

    expand: float
    absorbed: float
    kept: float

    @property
    def cheapest(self) -> LatentPath:
        """The path with fewer FLOPs; expanding where both take as many."""
        return "absorbed" if self.absorbed < self.expand else "expand"


@dataclass(frozen=True)
class LatentSizes:
    """Of one layer.

    Args:
        num_heads: h.
        kv_rank: of the latent.
        nope_dim, rope_dim: channels of a head's keys without and with positions.
        value_dim: channels of a head's values.
        mixed_dim: channels of the rotary key that each head mixes for itself of all that are shared; None
            where heads read the shared key as it is.
    """

    num_heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    mixed_dim: int | None = None

    @property
    def expansion(self) -> int:
        """FLOPs of making one token's keys and values."""
        mixed = self.rope_dim * (self.mixed_dim or 0)
        return 2 * self.num_heads * (self.kv_rank * (self.nope_dim + self.value_dim) + mixed)

    def cost(self, rows: int, queries: int, past: int, copies: int = 1, dense: int = 0) -> LatentCost:
        """Of one chunk.

        Args:
            rows: r.
            queries: own tokens of each row.
            past: latent keys that a row reads beside its own.
            copies: rows that read one and the same past, which is expanded once for all of them.
            dense: keys that come as they are, per head.
        """
        heads, rank = self.num_heads, self.kv_rank
        key_dim = self.nope_dim + (self.rope_dim if self.mixed_dim is None else self.mixed_dim)
        pairs = 2 * rows * queries * heads
        expansion = self.expansion
        read_dense = pairs * dense * (key_dim + self.value_dim)
        keys = past + queries
        attended = pairs * (keys + dense) * 2 * max(key_dim, self.value_dim)  # see `ops.attention`
        kept = expansion * rows * queries + attended
        expand = kept + expansion * rows * past / copies
        absorbed = expansion * rows * queries
        absorbed += pairs * keys * (2 * rank + self.rope_dim)
        return LatentCost(expand, absorbed + read_dense, kept)


class DenseKeys(NamedTuple):
    """Keys of another kind in the same softmax: queries ``[r, t, h, d]``, keys and values ``[r, m, h,
    d]``.
    """

    q_rthd: Tensor
    k_rmhd: Tensor
    v_rmhd: Tensor


class LatentOutput(NamedTuple):
    """Weighted sums of latents ``[r, t, h, c]``, the weight of all latents ``[r, t, h, 1]``, and weighted
    sums of dense values ``[r, t, h, d]`` or None.
    """

    content: Tensor
    weight: Tensor
    dense: Tensor | None


def absorbed_attention(
    q_rthc: Tensor,
    keys_rkc: Tensor,
    content_rkc: Tensor,
    scale: float,
    offset_rth1: Tensor,
    dense: DenseKeys | None = None,
    mask_r1tk: Tensor | None = None,
) -> LatentOutput:
    """One softmax over latents, after dense keys where there are any.

    Args:
        q_rthc: queries in the keys' space.
        keys_rkc: of the latents, one for all heads; their last channels may be rotary.
        content_rkc: what is summed up.
        scale: of all scores.
        offset_rth1: added to the latents' scores, after scaling.
        dense: keys before the latents.
        mask_r1tk: bool over dense keys and latents, True where visible.
    """
    num_dense = 0 if dense is None else dense.k_rmhd.shape[1]
    rows, queries, heads, _ = q_rthc.shape
    num_keys = num_dense + keys_rkc.shape[1]
    step = max(1, _SCORES_AT_ONCE // (rows * heads * num_keys))
    outputs = []
    for start in range(0, queries, step):
        block = slice(start, start + step)
        scores = torch.einsum("rthc,rkc->rhtk", q_rthc[:, block], keys_rkc) * scale
        scores = scores + offset_rth1[:, block].transpose(1, 2)
        if dense is not None:
            read = torch.einsum("rthd,rmhd->rhtm", dense.q_rthd[:, block], dense.k_rmhd) * scale
            scores = torch.cat([read, scores], dim=-1)
        if mask_r1tk is not None:
            mask = mask_r1tk if mask_r1tk.shape[2] == 1 else mask_r1tk[:, :, block]
            scores = scores.masked_fill(~mask, float("-inf"))
        weights = scores.float().softmax(-1).type_as(content_rkc)
        of_dense, of_latents = torch.split(weights, [num_dense, num_keys - num_dense], dim=-1)
        outputs.append(
            LatentOutput(
                torch.einsum("rhtk,rkc->rthc", of_latents, content_rkc),
                of_latents.sum(-1, keepdim=True).transpose(1, 2),
                None if dense is None else torch.einsum("rhtm,rmhd->rthd", of_dense, dense.v_rmhd),
            )
        )
    return LatentOutput(
        torch.cat([out.content for out in outputs], dim=1),
        torch.cat([out.weight for out in outputs], dim=1),
        None if dense is None else torch.cat([out.dense for out in outputs if out.dense is not None], dim=1),
    )

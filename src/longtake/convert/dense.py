"""A dense self-attention layer as conversion sees it: queries, keys and values as functions of the tokens.

Legend: n samples of tokens, w width, h heads, d head dim, m rows of stacked targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_NAMES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Linear:
    """``weight @ x + bias``, in float64."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x_nw: Tensor) -> Tensor:
        """``[n, m]``."""
        return torch.addmm(self.bias, x_nw, self.weight.T)


@dataclass(frozen=True)
class DenseLayer:
    """Weights of a layer's self-attention, in float64.

    Args:
        q, k, v, o: its products.
        q_gain, k_gain: of the norms over the full width of queries and keys; None where there are none.
        num_heads, eps: as of the network.
    """

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_gain: Tensor | None
    k_gain: Tensor | None
    num_heads: int
    eps: float

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], layer: int, num_heads: int, eps: float) -> DenseLayer:
        """Those of one layer among a network's weights under our names."""
        start = f"blocks.{layer}.self_attn."

        def linear(name: str) -> Linear:
            return Linear(weights[f"{start}{name}.weight"].double(), weights[f"{start}{name}.bias"].double())

        gains = [weights.get(f"{start}norm_{name}.weight") for name in ("q", "k")]
        q_gain, k_gain = (None if gain is None else gain.double() for gain in gains)
        q, k, v, o = (linear(name) for name in _NAMES)
        return cls(q, k, v, o, q_gain, k_gain, num_heads, eps)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.o.weight.shape[0]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads

    def queries(self, x_nw: Tensor) -> Tensor:
        """``[n, h, d]``, normed."""
        return self._heads(self._normed(self.q(x_nw), self.q_gain))

    def keys(self, x_nw: Tensor) -> Tensor:
        """``[n, h, d]``, normed, un-rotated."""
        return self._heads(self._normed(self.k(x_nw), self.k_gain))

    def values(self, x_nw: Tensor) -> Tensor:
        """``[n, h, d]``."""
        return self._heads(self.v(x_nw))

    def _normed(self, x_nw: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return x_nw
        return x_nw * torch.rsqrt(x_nw.square().mean(-1, keepdim=True) + self.eps) * gain

    def _heads(self, x_nw: Tensor) -> Tensor:
        return torch.unflatten(x_nw, -1, (self.num_heads, -1))

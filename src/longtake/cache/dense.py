"""The dense layout: per-head keys and values, as Wan's attention makes them."""

from __future__ import annotations

from longtake.cache.spec import CacheSpec, PartSpec
from longtake.ops.rope import wan_rope


def dense_layout(num_layers: int, num_heads: int, head_dim: int) -> CacheSpec:
    """Parts ``k`` (normalised, rotary) and ``v``, each ``[heads, head_dim]`` a token."""
    shape = (num_heads, head_dim)
    parts = (("k", PartSpec(shape, rotary=True)), ("v", PartSpec(shape)))
    return CacheSpec(num_layers=num_layers, parts=parts, rope=wan_rope(head_dim))

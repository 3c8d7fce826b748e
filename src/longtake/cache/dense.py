"""The dense layout: per-head keys and values, as Wan's attention makes them."""

from __future__ import annotations

from longtake.cache.spec import CacheSpec, PartSpec
from longtake.ops.rope import RopeSpec, wan_rope


def dense_layout(num_layers: int, num_heads: int, head_dim: int, rope: RopeSpec | None = None) -> CacheSpec:
    """Parts ``k`` (normalised, rotary) and ``v``, each ``[heads, head_dim]`` a token.

    Args:
        num_layers, num_heads, head_dim: sizes.
        rope: of the keys; None is Wan's.
    """
    shape = (num_heads, head_dim)
    parts = (("k", PartSpec(shape, rotary=True)), ("v", PartSpec(shape)))
    return CacheSpec((parts,) * num_layers, wan_rope(head_dim) if rope is None else rope)

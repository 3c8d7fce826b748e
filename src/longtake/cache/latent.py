"""The latent layout: a low-rank latent and a rotary key that all heads share (VideoMLA, arXiv 2605.30351)."""

from __future__ import annotations

from collections.abc import Sequence

from longtake.cache.spec import CacheSpec, PartSpec
from longtake.ops.rope import RopeSpec

CONTENT, ROPE_KEY = "c", "k_rope"
"""Names of the parts: the latent of keys and values, and the key that turns with position."""


def latent_layout(content_ranks: Sequence[int], rope: RopeSpec) -> CacheSpec:
    """Parts ``c`` (RMS-normalised, ``[rank]``) and ``k_rope`` (rotary, ``[1, 2 * rope pairs]``) a token.

    Args:
        content_ranks: of each layer the size of its latent.
        rope: of the shared key.
    """
    key = (ROPE_KEY, PartSpec((1, 2 * rope.num_pairs), rotary=True))
    return CacheSpec(tuple(((CONTENT, PartSpec((rank,))), key) for rank in content_ranks), rope)

"""The latent layout: a low-rank latent and a rotary key that all heads share (VideoMLA, arXiv 2605.30351)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from longtake.cache.quantized import FP8, KeyStorage, Storage, num_groups
from longtake.cache.spec import CacheSpec, Parts, PartSpec
from longtake.ops.rope import RopeSpec

CONTENT, ROPE_KEY = "c", "k_rope"
"""Names of the parts: the latent of keys and values, and the key that turns with position."""
SCALES = "c_scale"
"""Of a latent in int4."""


def latent_layout(
    content_ranks: Sequence[int],
    rope: RopeSpec,
    storage: Storage = "full",
    key_storage: KeyStorage = "full",
) -> CacheSpec:
    """Parts ``c`` (RMS-normalised, ``[rank]``) and ``k_rope`` (rotary, ``[1, 2 * rope pairs]``) a token.

    Args:
        content_ranks: of each layer the size of its latent.
        rope: of the shared key.
        storage: of the latent, see `cache.quantized`; int4 adds ``c_scale``.
        key_storage: of the shared key, which is rounded after it has turned.
    """
    dtype = FP8 if key_storage == "fp8" else None
    key = (ROPE_KEY, PartSpec((1, 2 * rope.num_pairs), rotary=True, dtype=dtype))
    return CacheSpec(tuple((*_content(rank, storage), key) for rank in content_ranks), rope)


def _content(rank: int, storage: Storage) -> Parts:
    if storage == "full":
        return ((CONTENT, PartSpec((rank,))),)
    if storage == "fp8":
        return ((CONTENT, PartSpec((rank,), dtype=torch.uint8)),)
    return (
        (CONTENT, PartSpec((-(-rank // 2),), dtype=torch.uint8)),
        (SCALES, PartSpec((num_groups(rank),), dtype=torch.uint8)),
    )

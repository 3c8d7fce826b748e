"""What a layout stores for one token of one layer, frozen and counting its own bytes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from longtake.ops.rope import RopeSpec


@dataclass(frozen=True)
class PartSpec:
    """One tensor that a token leaves behind in every layer.

    Args:
        shape: shape per token, e.g. ``(heads, head_dim)``; a rotary part must end in ``(heads, 2 * rope
            pairs)``.
        rotary: the part turns with the token's position when it is read. Entries hold it un-rotated.
    """

    shape: tuple[int, ...]
    rotary: bool = False


@dataclass(frozen=True)
class CacheSpec:
    """A layout: the parts one token leaves in each layer, and how its rotary parts turn.

    A new layout is a function that returns a ``CacheSpec`` (in a file of its own beside ``dense.py``) and
    an attention module that emits and reads its parts by name; buffers, histories and policies need no
    change.
    """

    num_layers: int
    parts: tuple[tuple[str, PartSpec], ...]
    rope: RopeSpec

    @property
    def rotary_parts(self) -> tuple[str, ...]:
        """Names of the parts that turn with position."""
        return tuple(name for name, part in self.parts if part.rotary)

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token occupies over all layers."""
        return self.num_layers * sum(prod(part.shape) for _, part in self.parts) * dtype.itemsize

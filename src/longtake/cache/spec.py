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
        dtype: in which it is kept; None for that of the buffers. Bytes are what an attention module packs and
            unpacks: nobody else calculates with them. An 8-bit float is a number like any other that is
            rounded when it is kept.
    """

    shape: tuple[int, ...]
    rotary: bool = False
    dtype: torch.dtype | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether it is kept with fewer bits than it is calculated with."""
        return self.dtype is not None and self.dtype.is_floating_point


Parts = tuple[tuple[str, PartSpec], ...]
"""What a token leaves in one layer, by name."""


@dataclass(frozen=True)
class CacheSpec:
    """A layout: the parts one token leaves in each layer, and how its rotary parts turn.

    A new layout is a function that returns a ``CacheSpec`` (in a file of its own beside ``dense.py``) and
    an attention module that emits and reads its parts by name; buffers, histories and policies need no
    change.

    Args:
        layers: of each layer its parts; names are the same in all, shapes may differ.
        rope: of all rotary parts.
    """

    layers: tuple[Parts, ...]
    rope: RopeSpec

    @property
    def num_layers(self) -> int:
        """Layers."""
        return len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(name for name, _ in self.layers[0])

    @property
    def rotary_parts(self) -> tuple[str, ...]:
        """Names of the parts that turn with position."""
        return tuple(name for name, part in self.layers[0] if part.rotary)

    def numbers_per_token(self, layer: int) -> int:
        """Numbers that one token leaves in a layer."""
        return sum(prod(part.shape) for _, part in self.layers[layer])

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes that one token occupies over all layers, in buffers of a type."""
        return sum(
            prod(part.shape) * (part.dtype or dtype).itemsize for parts in self.layers for _, part in parts
        )

    @property
    def is_packed(self) -> bool:
        """Whether some part is bytes that do not mean numbers to anybody else."""
        return any(part.dtype is not None and not part.is_rounded for _, part in self.layers[0])

    @property
    def rounded_parts(self) -> tuple[str, ...]:
        """Names of the parts that are kept as 8-bit floats."""
        return tuple(name for name, part in self.layers[0] if part.is_rounded)

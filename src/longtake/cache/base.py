"""Entries (what tokens leave behind) and the fixed buffers that keep them.

Legend: b batch, t tokens, s slots, c capacity in tokens, i index; ``...`` is a part's shape per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.spec import CacheSpec
from longtake.ops.rope import Phases, rotate, unrotate

Rows = slice | Sequence[int]
"""Rows of a batch: a slice is a view of the same memory, a list of indices is a copy."""


def take_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """Rows of the first dimension."""
    return tensor[rows] if isinstance(rows, slice) else tensor[list(rows)]


@dataclass(frozen=True)
class Entries:
    """What a run of tokens leaves behind: for every layer its parts by name, each ``[b, t, ...]``.

    Immutable; every method returns a new object, and autograd flows through all but :meth:`detach`. A
    forward pass returns entries with rotary parts un-rotated.
    """

    layers: tuple[Mapping[str, Tensor], ...]

    def map(self, change: Callable[[Tensor], Tensor], names: Sequence[str] | None = None) -> Entries:
        """Apply a function to every tensor, or to the named parts only."""
        return Entries(
            tuple(
                {
                    name: change(part) if names is None or name in names else part
                    for name, part in layer.items()
                }
                for layer in self.layers
            )
        )

    def select(self, rows: Rows) -> Entries:
        """Entries of some rows of the batch."""
        return self.map(lambda part: take_rows(part, rows))

    def tokens(self, start: int, stop: int) -> Entries:
        """Entries of the tokens ``start..stop-1`` (no copy)."""
        return self.map(lambda part: part[:, start:stop])

    def detach(self) -> Entries:
        """The same numbers, cut off from autograd."""
        return self.map(Tensor.detach)

    def rotated(self, phases: Phases, spec: CacheSpec) -> Entries:
        """Rotary parts turned by ``phases``, the others as they are."""
        return self.map(lambda part: rotate(part, phases), spec.rotary_parts)

    def unrotated(self, phases: Phases, spec: CacheSpec) -> Entries:
        """The inverse of :meth:`rotated`, equal to it within rounding."""
        return self.map(lambda part: unrotate(part, phases), spec.rotary_parts)

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self._any().shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens per row."""
        return self._any().shape[1]

    def _any(self) -> Tensor:
        return next(iter(self.layers[0].values()))

    @staticmethod
    def cat(pieces: Sequence[Entries]) -> Entries:
        """Join along tokens."""
        if len(pieces) == 1:
            return pieces[0]
        return Entries(
            tuple(
                {name: torch.cat([layer[name] for layer in layers], dim=1) for name in layers[0]}
                for layers in zip(*(piece.layers for piece in pieces), strict=True)
            )
        )


class Buffers:
    """Fixed storage for entries: per layer and part one tensor ``[s, c, ...]``, allocated once, zeroed.

    The owner of the buffers is the only one who writes; :meth:`read` hands out views of the same memory.
    Zeroed, so that a masked place holds a finite number.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_slots: int,
        capacity_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        names: Sequence[str] | None = None,
    ) -> None:
        self.capacity_tokens = capacity_tokens
        self.layers: tuple[dict[str, Tensor], ...] = tuple(
            {
                name: torch.zeros(num_slots, capacity_tokens, *part.shape, device=device, dtype=dtype)
                for name, part in spec.parts
                if names is None or name in names
            }
            for _ in range(spec.num_layers)
        )

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for layer in self.layers for part in layer.values())

    def read(self, slots: Rows, start: int, stop: int) -> Entries:
        """Tokens ``start..stop-1`` of some slots: a view for a slice of slots, else a copy."""
        return Entries(
            tuple(
                {name: take_rows(part, slots)[:, start:stop] for name, part in layer.items()}
                for layer in self.layers
            )
        )

    def gather_blocks(self, slots_i: Tensor, blocks_i: Tensor, start: int, block_tokens: int) -> Entries:
        """A copy of blocks of tokens, counted from token ``start``: ``[i, block_tokens, ...]``."""
        return Entries(
            tuple(
                {name: _blocks(part, start, block_tokens)[slots_i, blocks_i] for name, part in layer.items()}
                for layer in self.layers
            )
        )

    def write_blocks(
        self, entries: Entries, slots_i: Tensor, blocks_i: Tensor, start: int, block_tokens: int
    ) -> None:
        """Overwrite blocks, see :meth:`gather_blocks`; entries are ``[i, block_tokens, ...]``.

        Writes the parts that both these buffers and the entries have: buffers may keep rotary parts only,
        and entries that were merely turned again hold nothing else.
        """
        for layer, new in zip(self.layers, entries.layers, strict=True):
            for name in layer.keys() & new.keys():
                part = layer[name]
                _blocks(part, start, block_tokens)[slots_i, blocks_i] = new[name].to(part.dtype)

    def clear(self, slot: int) -> None:
        """Zero one slot."""
        for layer in self.layers:
            for part in layer.values():
                part[slot].zero_()


def _blocks(part_sc: Tensor, start: int, block_tokens: int) -> Tensor:
    """The tokens from ``start`` on as blocks, a view ``[s, blocks, block_tokens, ...]``."""
    num_blocks = (part_sc.shape[1] - start) // block_tokens
    tokens = part_sc[:, start : start + num_blocks * block_tokens]
    return torch.unflatten(tokens, 1, (num_blocks, block_tokens))

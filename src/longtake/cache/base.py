"""Entries (what tokens leave behind) and the fixed buffers that keep them.

Legend: b batch, t tokens, s slots, c capacity in tokens, i index; ``...`` is a part's shape per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.quantized import rounded, to_dtype
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
    forward pass returns entries with rotary parts un-rotated. Tokens that a layer does not read have an
    empty mapping there. Layers may share one mapping, and then share what is made of it.
    """

    layers: tuple[Mapping[str, Tensor], ...]

    def map(self, change: Callable[[Tensor], Tensor], names: Sequence[str] | None = None) -> Entries:
        """Apply a function to every tensor once, or to those of the named parts."""
        made: dict[int, Mapping[str, Tensor]] = {}
        for layer in self.layers:
            if id(layer) not in made:
                made[id(layer)] = {
                    name: change(part) if names is None or name in names else part
                    for name, part in layer.items()
                }
        return Entries(tuple(made[id(layer)] for layer in self.layers))

    def of_layers(self, layers: Sequence[int] | None) -> Entries:
        """Entries of some layers, the others empty; None for all."""
        if layers is None:
            return self
        return Entries(tuple(layer if i in layers else {} for i, layer in enumerate(self.layers)))

    def without(self, name: str) -> Entries:
        """Entries that lack one part."""
        return Entries(tuple({n: part for n, part in layer.items() if n != name} for layer in self.layers))

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

    def stored(self, spec: CacheSpec) -> Entries:
        """What comes back of numbers that are kept as 8-bit floats, with the gradients of what went in."""
        return self.map(lambda part: rounded(part, "fp8"), names) if (names := spec.rounded_parts) else self

    def numbers(self, spec: CacheSpec, dtype: torch.dtype) -> Entries:
        """Those that were kept as 8-bit floats, to calculate with."""
        return self.map(lambda part: part.to(dtype), names) if (names := spec.rounded_parts) else self

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self._any().shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens per row."""
        return self._any().shape[1]

    def _any(self) -> Tensor:
        return next(part for layer in self.layers for part in layer.values())

    @staticmethod
    def cat(pieces: Sequence[Entries]) -> Entries:
        """Join along tokens."""
        if len(pieces) == 1:
            return pieces[0]
        assert len({_kinds(piece) for piece in pieces}) == 1, "bytes beside numbers"
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

    Args:
        spec: the parts. ``names``: which of them are kept; None for all.
        num_slots, capacity_tokens: sizes.
        device, dtype: of the tensors.
        layers: that keep anything; None for all. ``shared``: they keep one and the same.
    """

    def __init__(
        self,
        spec: CacheSpec,
        num_slots: int,
        capacity_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        names: Sequence[str] | None = None,
        *,
        layers: Sequence[int] | None = None,
        shared: bool = False,
    ) -> None:
        def allocated(layer: int) -> dict[str, Tensor]:
            return {
                name: torch.zeros(
                    num_slots, capacity_tokens, *part.shape, device=device, dtype=part.dtype or dtype
                )
                for name, part in spec.layers[layer]
                if names is None or name in names
            }

        self.capacity_tokens = capacity_tokens
        kept = range(spec.num_layers) if layers is None else layers
        first = allocated(kept[0])
        self._layers: dict[int, dict[str, Tensor]] = {
            layer: first if shared or layer == kept[0] else allocated(layer) for layer in kept
        }
        self._entries = Entries(tuple(self._layers.get(layer, {}) for layer in range(spec.num_layers)))
        self._distinct = {kept[0]: first} if shared else self._layers

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for part in self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor once, as ``LAYER.PART``."""
        return {f"{i}.{name}": part for i, layer in self._distinct.items() for name, part in layer.items()}

    def read(self, slots: Rows, start: int, stop: int) -> Entries:
        """Tokens ``start..stop-1`` of some slots: a view for a slice of slots, else a copy."""
        return self._entries.map(lambda part: take_rows(part, slots)[:, start:stop])

    def gather_blocks(
        self,
        slots_i: Tensor,
        blocks_i: Tensor,
        start: int,
        block_tokens: int,
        layers: Sequence[int] | None = None,
    ) -> Entries:
        """A copy of blocks of tokens of some layers, counted from token ``start``: ``[i, block_tokens,
        ...]``."""
        kept = self._entries.of_layers(layers)
        return kept.map(lambda part: _blocks(part, start, block_tokens)[slots_i, blocks_i])

    def write_blocks(
        self, entries: Entries, slots_i: Tensor, blocks_i: Tensor, start: int, block_tokens: int
    ) -> None:
        """Overwrite blocks, see :meth:`gather_blocks`; entries are ``[i, block_tokens, ...]``.

        Writes the parts that both these buffers and the entries have: buffers may keep rotary parts only,
        and entries that were merely turned again hold nothing else.
        """
        for i, layer in self._distinct.items():
            new = entries.layers[i]
            for name in layer.keys() & new.keys():
                part = layer[name]
                assert part.is_floating_point() == new[name].is_floating_point(), "bytes beside numbers"
                _blocks(part, start, block_tokens)[slots_i, blocks_i] = to_dtype(new[name], part.dtype)

    def clear(self, slot: int) -> None:
        """Zero one slot."""
        for part in self.named_tensors().values():
            part[slot].zero_()


def _kinds(entries: Entries) -> tuple[tuple[str, bool], ...]:
    first = next((layer for layer in entries.layers if layer), {})
    return tuple((name, part.is_floating_point()) for name, part in sorted(first.items()))


def _blocks(part_sc: Tensor, start: int, block_tokens: int) -> Tensor:
    """The tokens from ``start`` on as blocks, a view ``[s, blocks, block_tokens, ...]``."""
    num_blocks = (part_sc.shape[1] - start) // block_tokens
    tokens = part_sc[:, start : start + num_blocks * block_tokens]
    return torch.unflatten(tokens, 1, (num_blocks, block_tokens))

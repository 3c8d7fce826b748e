"""The contract of policies: what becomes of frames that leave the window, and what chunks read of it.

A policy is one file: a `PolicyConfig` with the settings and a `Policy` that it makes; `policies.py` lists
all. Policies know nothing of layouts, slots or windows.

Legend: b rows, m memory tokens, k evicted tokens, h heads, d head dim, w width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.spec import CacheSpec
from longtake.config import Config
from longtake.ops.rope import Phases, RopeSpec, token_phases

PolicyState = dict[str, Tensor]
"""What a policy carries along, tensors with the batch first; empty for a policy without memory."""


@dataclass(frozen=True)
class Evicted:
    """Whole frames that leave the local window, oldest first.

    Args:
        frames: for each row of the batch the indices of its frames in the stream.
        entries: their entries ``[b, frames * tokens per frame, ...]``, keys un-rotated.
        queries: of the chunk whose commit evicts them, from its context pass, un-rotated ``[b, tokens, heads,
            head dim]`` for every layer; None where the policy does not need them.
    """

    frames: tuple[tuple[int, ...], ...]
    entries: Entries
    queries: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class MemoryGrid:
    """Where a policy's memory tokens stand, and which layers read them.

    Args:
        num_frames: temporal ids that the memory takes, directly before those of the local frames.
        places: for every token how many ids after the memory's first it stands (0 to ``num_frames - 1``),
            its row id and its column id; real numbers.
        layers: that read the memory; None for all. ``shared``: all of them read the same keys and values,
            which are then kept once.
        layout: of the memory's entries; None where it is that of the frames.
    """

    num_frames: int
    places: tuple[tuple[float, float, float], ...]
    layers: tuple[int, ...] | None = None
    shared: bool = False
    layout: CacheSpec | None = None

    @classmethod
    def regular(
        cls,
        num_frames: int,
        row_ids: Sequence[float],
        column_ids: Sequence[float],
        layers: tuple[int, ...] | None = None,
        *,
        shared: bool = False,
        layout: CacheSpec | None = None,
    ) -> MemoryGrid:
        """Whole frames of tokens, frame by frame, row by row."""
        places = tuple(product(range(num_frames), row_ids, column_ids))
        return cls(num_frames, places, layers, shared, layout)

    @property
    def num_tokens(self) -> int:
        """Memory tokens in all."""
        return len(self.places)

    def phases(self, first_ids: Sequence[float], rope: RopeSpec) -> Phases:
        """Phases of all tokens, one row for each temporal id at which a memory begins."""
        first_b13 = F.pad(torch.tensor(first_ids, dtype=torch.float64)[:, None, None], (0, 2))
        return token_phases(first_b13 + self._places_m3, rope)

    @cached_property
    def _places_m3(self) -> Tensor:
        return torch.tensor(self.places, dtype=torch.float64)


class Policy(ABC):
    """What becomes of evicted frames. One file per policy; it knows nothing of layouts, slots or positions.

    Policies hold no state of their own: a history passes it in and keeps what is returned, so autograd
    flows in the functional mode, and the in-place mode copies the result into its buffers.
    """

    @property
    @abstractmethod
    def memory_grid(self) -> MemoryGrid | None:
        """The policy's own segment; None where it keeps nothing: evicted entries are not even gathered."""

    @property
    def reads_late(self) -> bool:
        """Whether a chunk's first pass reads the memory as it was before the last eviction (the timing of
        Echo-Infinity's released code). False: every pass of a chunk reads the newest.
        """
        return False

    @property
    def source_layers(self) -> tuple[int, ...] | None:
        """Layers whose evicted entries :meth:`absorb` reads, the others' mappings being empty; None for all.
        With none of them evictions are not told at all.
        """
        return None

    @property
    def needs_queries(self) -> bool:
        """Whether :meth:`absorb` is to get the newest chunk's queries."""
        return False

    @abstractmethod
    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        """The state of streams that have evicted nothing yet."""

    @abstractmethod
    def readable(self, num_evicted: int) -> bool:
        """Whether a stream that has evicted this many frames reads the memory segment.

        Never turns back to False.
        """

    @abstractmethod
    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        """Take in evicted frames, once per commit that evicts. Pure; all rows evict equally many frames."""

    @abstractmethod
    def read(self, state: PolicyState) -> Entries:
        """The memory segment as un-rotated entries ``[b, memory_grid.num_tokens, ...]`` of the layers that
        read it; where the grid says ``shared``, one mapping for all of them.
        """


class MemoryNetwork(Protocol):
    """What updates and reads a learned memory; see `models.memory.MemoryEncoder`."""

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frame-equivalents, rows and columns of the memory tokens."""

    def initial(self, batch: int) -> Tensor:
        """The state of streams that have evicted nothing, ``[b, m, w]``."""

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ConfigError where frames of so many rows and columns of tokens cannot be taken in."""

    def __call__(self, state_bmw: Tensor, k_bkhd: Tensor, v_bkhd: Tensor, grid: tuple[int, int]) -> Tensor:
        """The state after evicted entries of the source layer, of frames of so many rows and columns."""

    @property
    def num_readings(self) -> int:
        """Sets of entries that `read` makes: one for all layers, or one for each that reads."""

    def read(self, state_bmw: Tensor) -> Sequence[Mapping[str, Tensor]]:
        """Each reading's un-rotated entries ``[b, m, ...]``."""


def as_stored(layer: int, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of the dense layout."""
    return parts["k"], parts["v"]


@dataclass(frozen=True)
class Surroundings:
    """What a policy is made for.

    Args:
        spec: the layout of entries.
        grid: tokens per frame as (rows, columns).
        memory: the DiT's learned memory, or None. ``memory_layout``: of what it reads as; None for `spec`.
        dense: makes un-rotated keys and values ``[b, tokens, h, d]`` of the parts ``[b, tokens, ...]`` of a
            layer's entries, whatever their layout.
    """

    spec: CacheSpec
    grid: tuple[int, int]
    memory: MemoryNetwork | None = None
    memory_layout: CacheSpec | None = None
    dense: Callable[[int, Mapping[str, Tensor]], tuple[Tensor, Tensor]] = as_stored


class PolicyConfig(Config, ABC):
    """Settings of a policy; a subclass adds ``kind``, by which files name it."""

    @abstractmethod
    def make(self, surroundings: Surroundings) -> Policy:
        """The policy.

        Raises:
            ConfigError: settings that do not fit the surroundings.
        """


def spread(count: int, size: int) -> list[float]:
    """Ids in the middle of equal shares of the ids ``0..size - 1``; these themselves where as many."""
    return [(i + 0.5) * size / count - 0.5 for i in range(count)]

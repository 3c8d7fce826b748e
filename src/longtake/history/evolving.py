"""Evolving memory: learned queries absorb the frames that leave the window (Echo-Infinity, arXiv 2606.04527).

The encoder's parameters live in `models/memory.py`; this file says what it is fed and when it is read.

Legend: b rows, m memory tokens, k evicted tokens, h heads, d head dim, w width.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.config import Config
from longtake.history.base import Evicted, MemoryGrid, Policy, PolicyState

_STATE = "memory"


class MemoryNetwork(Protocol):
    """What updates and reads a memory state; see `models.memory.MemoryEncoder`."""

    def initial(self, batch: int) -> Tensor:
        """The state of streams that have evicted nothing, ``[b, m, w]``."""
        ...

    def __call__(self, state_bmw: Tensor, k_bkhd: Tensor, v_bkhd: Tensor) -> Tensor:
        """The state after evicted entries of the source layer."""
        ...

    def read(self, state_bmw: Tensor) -> tuple[Tensor, Tensor]:
        """Un-rotated keys and values ``[b, m, h, d]`` for every layer."""
        ...


class EvolvingConfig(Config):
    """How a memory is used.

    Args:
        mode: "update" as published; "prior" reads the learned initial state and never updates it; "off" has
            no memory: the plain window.
        source_layer: layer of the DiT whose evicted entries are absorbed; negative numbers count from the
            last.
        read_initially: read the learned initial state before anything was evicted.
    """

    mode: Literal["update", "prior", "off"] = "update"
    source_layer: int = -1
    read_initially: bool = True


class EvolvingPolicy(Policy):
    """Frames that leave are absorbed by a memory that chunks read beside sink and window.

    Every pass of a chunk reads the memory as of its first pass. The sink never leaves, so it is never
    absorbed.

    Args:
        network: encoder and reader.
        grid: where the memory tokens stand.
        num_layers: of the DiT, all of which read the memory.
        config: mode and source.
    """

    def __init__(
        self,
        network: MemoryNetwork,
        grid: MemoryGrid,
        num_layers: int,
        config: EvolvingConfig | None = None,
    ) -> None:
        self.config = EvolvingConfig() if config is None else config
        self._network = network
        self._grid = grid
        self._num_layers = num_layers

    @property
    def memory_grid(self) -> MemoryGrid | None:
        """None in mode "off": then a history asks for nothing else."""
        return None if self.config.mode == "off" else self._grid

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        """The learned initial state."""
        return {_STATE: self._network.initial(batch).to(device, dtype)}

    def readable(self, num_evicted: int) -> bool:
        """From the start, or once something was absorbed."""
        return self.config.read_initially or (self.config.mode == "update" and num_evicted > 0)

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        """One gated update per commit that evicts."""
        if self.config.mode != "update":
            return state
        source = evicted.entries.layers[self.config.source_layer]
        return {_STATE: self._network(state[_STATE], source["k"], source["v"]).type_as(state[_STATE])}

    def read(self, state: PolicyState) -> Entries:
        """The same keys and values for every layer."""
        keys, values = self._network.read(state[_STATE])
        return Entries(({"k": keys, "v": values},) * self._num_layers)

"""Evolving memory: learned queries absorb the frames that leave the window (Echo-Infinity, arXiv 2606.04527).

The encoder's parameters live in `models/memory.py`; this file says what it is fed and when it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from longtake.cache.base import Entries
from longtake.errors import ConfigError
from longtake.history.policy import (
    Evicted,
    MemoryGrid,
    MemoryNetwork,
    Policy,
    PolicyConfig,
    PolicyState,
    Surroundings,
    spread,
)

STATE = "memory"
"""Name of the memory tokens `[b, m, w]` in the policy's state."""


class EvolvingConfig(PolicyConfig):
    """How a memory is used.

    Args:
        mode: "update" as published; "prior" reads the learned initial state and never updates it; "off" has
            no memory: the plain window.
        source_layer: layer of the DiT whose evicted entries are absorbed; negative numbers count from the
            last.
        read_layers: layers of the DiT that read the memory, in ascending order; "all" as published. Fewer
            cost less.
        read_initially: read the learned initial state before anything was evicted.
        timing: "chunk": every pass of a chunk reads the memory that holds all evicted frames, as in the
            paper's figure. "second_pass": the first pass of a chunk still reads the memory before the last
            eviction, as in the released code.
    """

    kind: Literal["evolving"] = "evolving"
    mode: Literal["update", "prior", "off"] = "update"
    source_layer: int = -1
    read_layers: Literal["all"] | tuple[int, ...] = "all"
    read_initially: bool = True
    timing: Literal["chunk", "second_pass"] = "chunk"

    def make(self, surroundings: Surroundings) -> EvolvingPolicy:
        """See the base class; the memory's rows and columns stand evenly spread over the video's grid."""
        if surroundings.memory is None:
            raise ConfigError(
                'the policy "evolving" needs a learned memory, which this model does not have',
                'use a model that was trained with one, or the policy "window"',
            )
        num_frames, rows, columns = surroundings.memory.grid
        height, width = surroundings.grid
        grid = (num_frames, spread(rows, height), spread(columns, width))
        return EvolvingPolicy(surroundings, grid, self)


class EvolvingPolicy(Policy):
    """Frames that leave are absorbed by a memory that chunks read beside sink and window.

    The sink never leaves, so it is never absorbed.

    Args:
        surroundings: encoder and reader, and what they read and are read as.
        grid: where the memory tokens stand: frames, row ids, column ids.
        config: mode, source, readers.

    Raises:
        ConfigError: layers that the DiT does not have, or no reader.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        grid: tuple[int, Sequence[float], Sequence[float]],
        config: EvolvingConfig | None = None,
    ) -> None:
        self.config = EvolvingConfig() if config is None else config
        num_layers = surroundings.spec.num_layers
        named = self.config.read_layers
        readers = tuple(range(num_layers)) if named == "all" else named
        if not readers or list(readers) != sorted({*readers} & {*range(num_layers)}):
            raise ConfigError(
                f"read_layers={named} are no ascending layers of a DiT that has {num_layers}",
                f'use "all" or some of 0..{num_layers - 1}',
            )
        if self.config.mode == "prior" and not self.config.read_initially:
            raise ConfigError(
                'mode="prior" with read_initially=False has a memory that nobody reads', 'use mode="off"'
            )
        if not -num_layers <= self.config.source_layer < num_layers:
            raise ConfigError(
                f"source_layer={self.config.source_layer}, but the DiT has {num_layers} layers",
                f"use {-num_layers}..{num_layers - 1}",
            )
        assert surroundings.memory is not None
        self._network: MemoryNetwork = surroundings.memory
        self._dense = surroundings.dense
        readings = self._network.num_readings
        if readings not in (1, len(readers)):
            raise ConfigError(
                f"read_layers={named} are {len(readers)} layers, and the memory has {readings} readings",
                f"use memory.num_readings=1 or {len(readers)}",
            )
        layout = surroundings.memory_layout
        self._grid = MemoryGrid.regular(*grid, layers=readers, shared=readings == 1, layout=layout)
        self._num_layers = num_layers
        self._frame_grid = surroundings.grid
        if self.config.mode == "update":
            self._network.check_grid(surroundings.grid)

    @property
    def memory_grid(self) -> MemoryGrid | None:
        """None in mode "off": then a history asks for nothing else."""
        return None if self.config.mode == "off" else self._grid

    @property
    def reads_late(self) -> bool:
        """See `EvolvingConfig.timing`."""
        return self.config.timing == "second_pass"

    @property
    def source_layers(self) -> tuple[int, ...]:
        """The one it is fed from; none in mode "prior"."""
        return (self.config.source_layer % self._num_layers,) if self.config.mode == "update" else ()

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        """The learned initial state, in single precision at least: where a gate keeps nearly all, half
        precision would lose what one update adds.
        """
        return {STATE: self._network.initial(batch).to(device, torch.promote_types(dtype, torch.float32))}

    def readable(self, num_evicted: int) -> bool:
        """From the start, or once something was absorbed."""
        return self.config.read_initially or (self.config.mode == "update" and num_evicted > 0)

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        """One gated update per commit that evicts."""
        if self.config.mode != "update":
            return state
        [layer] = self.source_layers
        keys, values = self._dense(layer, evicted.entries.layers[layer])
        state_bmw = state[STATE]
        return {STATE: self._network(state_bmw, keys, values, self._frame_grid).type_as(state_bmw)}

    def read(self, state: PolicyState) -> Entries:
        """The same entries for every layer that reads, or those of each."""
        readers = self._grid.layers
        assert readers is not None
        readings = list(self._network.read(state[STATE]))
        if len(readings) == 1:
            readings *= len(readers)
        by_layer = dict(zip(readers, readings, strict=True))
        return Entries(tuple(by_layer.get(i, {}) for i in range(self._num_layers)))

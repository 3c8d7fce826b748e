"""Where the in-place history keeps tokens: fixed buffers, one slot per stream, read and written by plain
integers.

Legend: i blocks (frames) written or read.

Each slot's frames lie as ``[sink | ring]`` in blocks, a policy's memory in tensors of its own, since some
layers may not read it. Rotary parts are stored turned: those of frames by their index in the stream, until
the sink is turned again. What is turned again (sink under relative ids, memory) is also kept as it was
committed. Policies, windows and ids are not decided here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.cache.base import Buffers, Entries, Rows
from longtake.cache.spec import CacheSpec
from longtake.history.base import frame_phases
from longtake.history.policy import MemoryGrid


class Write(NamedTuple):
    """One frame to store: which frame of which row of the entries, to which block of which slot."""

    row: int
    own: int
    slot: int
    block: int


class SlotStorage:
    """The buffers and their layout in tokens.

    Args:
        spec: parts of a token. ``grid``: tokens per frame as (rows, columns).
        sink_frames, ring_frames: blocks of a slot.
        memory: a policy's segment, or None.
        num_slots: streams held at most.
        sink_turns: sink keys will be turned again, so that they are kept as committed too.
        device, dtype: of the buffers.
    """

    def __init__(
        self,
        spec: CacheSpec,
        grid: tuple[int, int],
        sink_frames: int,
        ring_frames: int,
        memory: MemoryGrid | None,
        num_slots: int,
        *,
        sink_turns: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.spec, self.grid, self.device, self._dtype = spec, grid, device, dtype
        self.sink_frames = sink_frames
        self.frame_tokens = grid[0] * grid[1]
        self.memory_tokens = 0 if memory is None else memory.num_tokens
        self._memory_grid = memory
        self._sink_tokens = sink_frames * self.frame_tokens
        self._sink_turns = sink_turns

        def buffers(
            layout: CacheSpec, tokens: int, names: Sequence[str] | None = None, **kept: Any
        ) -> Buffers:
            return Buffers(layout, num_slots, tokens, device, dtype, names, **kept)

        self._buffers = {
            "past": buffers(spec, self._sink_tokens + ring_frames * self.frame_tokens),
            "sink": buffers(spec, self._sink_tokens, spec.rotary_parts if sink_turns else ()),
        }
        self._memory_layout = spec
        if memory is not None:
            layout = self._memory_layout = memory.layout or spec
            kept: dict[str, Any] = {"layers": memory.layers, "shared": memory.shared}
            self._buffers["memory"] = buffers(layout, memory.num_tokens, **kept)
            self._buffers["raw memory"] = buffers(layout, memory.num_tokens, layout.rotary_parts, **kept)

    def clear(self, slot: int) -> None:
        """Zero one slot."""
        for buffers in self._buffers.values():
            buffers.clear(slot)

    def ranges(self, num_sink: int, num_local: int) -> list[tuple[int, int]]:
        """Where a stream's frames lie that has so many; neighbouring ranges are one, empty ones none."""
        ring_start = self._sink_tokens
        ranges = [
            (0, num_sink * self.frame_tokens),
            (ring_start, ring_start + num_local * self.frame_tokens),
        ]
        merged: list[tuple[int, int]] = []
        for first, last in ranges:
            if last == first:
                continue
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        return merged

    def read(self, slots: Sequence[int], start: int, stop: int) -> Entries:
        """Frames as they are read, rotary parts turned; no copy where slots are ascending neighbours."""
        return self._buffers["past"].read(_rows(slots), start, stop)

    def read_memory(self, slots: Sequence[int]) -> Entries:
        """Memory segments as they are read, see :meth:`read`."""
        return self._buffers["memory"].read(_rows(slots), 0, self.memory_tokens)

    def write(self, entries: Entries, writes: Sequence[Write], frames: Sequence[Sequence[int]]) -> None:
        """Store frames.

        Args:
            entries: un-rotated, one row per stream.
            writes: which frames go where.
            frames: for each row of the entries the index in the stream of its frames.
        """
        phases = frame_phases(frames, self.grid, self.spec, self.device)
        rotated = entries.rotated(phases, self.spec)
        self._write(self._buffers["past"], rotated, writes)
        sink = [write for write in writes if write.block < self.sink_frames]
        self._write(self._buffers["sink"], entries, sink)
        if sink and self._sink_turns and self.spec.rounded_parts:  # as it will be whenever it is turned
            again = entries.stored(self.spec).rotated(phases, self.spec)
            self._write(self._buffers["past"], again, sink)

    def gather(
        self,
        where: Sequence[tuple[int, int]],
        frames: Sequence[Sequence[int]],
        layers: Sequence[int] | None = None,
    ) -> Entries:
        """Copies of stored frames, un-rotated.

        Args:
            where: (slot, block) of each, row by row.
            frames: for each row the index in the stream of its frames, all rows equally many.
            layers: that are wanted; None for all.
        """
        blocks = self._buffers["past"].gather_blocks(*self._index(where), 0, self.frame_tokens, layers)

        def regrouped(part: Tensor) -> Tensor:
            return part.flatten(0, 1).reshape(len(frames), -1, *part.shape[2:])

        phases = frame_phases(frames, self.grid, self.spec, self.device)
        return blocks.map(regrouped).numbers(self.spec, self._dtype).unrotated(phases, self.spec)

    def turn_sinks(self, slots: Sequence[int], ids: Sequence[Sequence[int]]) -> None:
        """Turn the sink keys of some slots by new ids; places that are still empty hold zeros."""
        padded = [[*turned, *[0] * (self.sink_frames - len(turned))] for turned in ids]
        raw = self._buffers["sink"].read(slots, 0, self._sink_tokens).numbers(self.spec, self._dtype)
        rotated = raw.rotated(frame_phases(padded, self.grid, self.spec, self.device), self.spec)
        self._buffers["past"].write_blocks(rotated, *self._first(slots), 0, self._sink_tokens)

    def write_memory(self, slots: Sequence[int], memory: Entries) -> None:
        """Store memory segments, un-rotated; :meth:`turn_memories` must follow before they are read."""
        for name in ("memory", "raw memory"):
            self._buffers[name].write_blocks(memory, *self._first(slots), 0, self.memory_tokens)

    def turn_memories(self, slots: Sequence[int], first_ids: Sequence[int]) -> None:
        """Turn the memory keys of some slots, each from its first temporal id on."""
        assert self._memory_grid is not None
        layout = self._memory_layout
        raw = self._buffers["raw memory"].read(slots, 0, self.memory_tokens).numbers(layout, self._dtype)
        rotated = raw.rotated(self._memory_grid.phases(first_ids, layout.rope).to(self.device), layout)
        self._buffers["memory"].write_blocks(rotated, *self._first(slots), 0, self.memory_tokens)

    def memory_tensors(self) -> list[Tensor]:
        """All that holds memory segments, slots first."""
        names = [name for name in ("memory", "raw memory") if name in self._buffers]
        return [part for name in names for part in self._buffers[name].named_tensors().values()]

    def named_tensors(self) -> dict[str, Tensor]:
        """Every buffer by a stable name, slots first."""
        return {
            f"{title}.{name}": part
            for title, buffers in self._buffers.items()
            for name, part in buffers.named_tensors().items()
        }

    def _first(self, slots: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self._index([(slot, 0) for slot in slots])

    def _write(self, buffers: Buffers, entries: Entries, writes: Sequence[Write]) -> None:
        if not writes:
            return
        source = self._index([(write.row, write.own) for write in writes])
        where = self._index([(write.slot, write.block) for write in writes])
        tokens = self.frame_tokens
        blocks = entries.map(lambda part: torch.unflatten(part, 1, (-1, tokens))[source[0], source[1]])
        buffers.write_blocks(blocks, *where, 0, tokens)

    def _index(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        index_2i = torch.tensor(pairs).T.to(self.device, non_blocking=True)
        return index_2i[0], index_2i[1]


def _rows(slots: Sequence[int]) -> Rows:
    """A slice where slots are ascending neighbours."""
    neighbours = list(slots) == list(range(slots[0], slots[0] + len(slots)))
    return slice(slots[0], slots[0] + len(slots)) if neighbours else slots

"""A policy's memory for the streams of an in-place history: its state in fixed tensors, one row per slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.history.policy import Evicted, Policy, PolicyState
from longtake.history.positions import SegmentIds
from longtake.history.records import CommitPlan, SlotRecord
from longtake.history.storage import SlotStorage


class SlotMemory:
    """Feeds a policy with what leaves, and puts what it answers where chunks read it.

    For a policy without memory every method returns at once.

    Args:
        policy: what becomes of evicted frames.
        storage: where frames are and memory segments go.
        num_slots: streams held at most. ``device``, ``dtype``: of the state.
    """

    def __init__(
        self, policy: Policy, storage: SlotStorage, num_slots: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._policy, self._storage = policy, storage
        self._grid = policy.memory_grid
        with torch.no_grad():
            self._state: PolicyState = policy.start(num_slots, device, dtype) if self._grid else {}
        self._start = {name: tensor[:1].clone() for name, tensor in self._state.items()}

    def num_frames(self, record: SlotRecord) -> int:
        """Frame-equivalents that the stream's next chunk reads: none before its first commit."""
        if self._grid is None or record.next_frame == 0 or not self._policy.readable(record.num_absorbed):
            return 0
        return self._grid.num_frames

    def named_tensors(self) -> dict[str, Tensor]:
        """The state by stable names, slots first."""
        return {f"policy.{name}": tensor for name, tensor in self._state.items()}

    def evict(
        self,
        entries: Entries,
        queries: tuple[Tensor, ...] | None,
        slots: Sequence[int],
        plans: Sequence[CommitPlan],
        records: Sequence[SlotRecord],
    ) -> None:
        """Hand over what a commit evicts, before it is overwritten; rows that evict alike go together.

        Args:
            entries: of the committed chunk, for frames that leave without ever having been stored.
            queries: of the committed chunk, see `Evicted`.
            slots, plans, records: one of each per row of the entries.
        """
        layers = self._policy.source_layers
        if self._grid is None or layers == ():
            return
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row, plan in enumerate(plans):
            if plan.evicted_frames:
                groups.setdefault((len(plan.evicted_blocks), plan.evicted_own), []).append(row)
        for (num_blocks, own), rows in groups.items():
            pieces = []
            if num_blocks:
                where = [(slots[row], block) for row in rows for block in plans[row].evicted_blocks]
                stored = [plans[row].evicted_frames[:num_blocks] for row in rows]
                pieces.append(self._storage.gather(where, stored, layers))
            if own:
                tokens = self._storage.frame_tokens
                chunk = entries.of_layers(layers).select(rows)
                pieces.append(chunk.tokens(own[0] * tokens, (own[-1] + 1) * tokens))
            evicted = Evicted(
                tuple(plans[row].evicted_frames for row in rows),
                Entries.cat(pieces),
                None if queries is None else tuple(layer[rows] for layer in queries),
            )
            self._absorb([slots[row] for row in rows], evicted)
            for row in rows:
                records[row].memory_pending = True
        if not self._policy.reads_late:
            self.publish_pending(slots, records)

    def publish_pending(self, slots: Sequence[int], records: Sequence[SlotRecord]) -> None:
        """Let chunks read what was absorbed since; views made before are stale then."""
        changed = [row for row, record in enumerate(records) if record.memory_pending]
        if changed:
            self._publish([slots[row] for row in changed], [records[row] for row in changed])

    def reset(self, slot: int, record: SlotRecord, taken_in: dict[int, int]) -> None:
        """Back to the start, as if nothing had been evicted.

        Args:
            slot, record: the stream.
            taken_in: frames that are then taken in once, oldest first, without being dropped, and their
                blocks.
        """
        if self._grid is None:
            return
        for name, tensor in self._state.items():
            tensor[slot : slot + 1] = self._start[name]
        frames = tuple(taken_in)
        if frames and self._policy.source_layers != ():
            where = [(slot, block) for block in taken_in.values()]
            stored = self._storage.gather(where, [frames], self._policy.source_layers)
            self._absorb([slot], Evicted((frames,), stored))
        record.num_evicted = len(frames)
        self._publish([slot], [record])

    def exchange(self, slot: int, other: int, record: SlotRecord, other_record: SlotRecord) -> None:
        """Swap the states of two streams, and what their chunks read."""
        if self._grid is None:
            return
        for tensor in (*self._state.values(), *self._storage.memory_tensors()):
            tensor[[slot, other]] = tensor[[other, slot]]
        for name in ("memory_ids", "memory_pending", "num_absorbed", "num_evicted"):
            mine, theirs = getattr(record, name), getattr(other_record, name)
            setattr(record, name, theirs)
            setattr(other_record, name, mine)
        for each in (record, other_record):
            each.version += 1

    def turn(self, slots: Sequence[int], records: Sequence[SlotRecord], ids: Sequence[SegmentIds]) -> None:
        """Turn the memory keys again of streams whose memory, or its ids, have changed."""
        moved = [
            (slot, record, row.memory)
            for slot, record, row in zip(slots, records, ids, strict=True)
            if row.memory and row.memory != record.memory_ids
        ]
        if not moved:
            return
        self._storage.turn_memories([slot for slot, _, _ in moved], [turned[0] for _, _, turned in moved])
        for _, record, turned in moved:
            record.memory_ids = turned
            record.version += 1

    def _absorb(self, slots: list[int], evicted: Evicted) -> None:
        state = {name: tensor[slots] for name, tensor in self._state.items()}
        for name, tensor in self._policy.absorb(state, evicted).items():
            self._state[name][slots] = tensor

    def _publish(self, slots: list[int], records: Sequence[SlotRecord]) -> None:
        """Put memories where chunks read them; they are turned when a view knows their ids."""
        memory = self._policy.read({name: tensor[slots] for name, tensor in self._state.items()})
        self._storage.write_memory(slots, memory)
        for record in records:
            record.memory_ids = ()
            record.memory_pending = False
            record.num_absorbed = record.num_evicted
            record.version += 1

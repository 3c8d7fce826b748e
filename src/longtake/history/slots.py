"""The in-place history: fixed buffers with one slot per stream, for serving.

Legend: b rows of a call, k keys read.

The ring overwrites its oldest frame, so nothing is ever moved: the order of keys does not matter to
attention. Keys are stored turned by their frame's index
(:func:`~longtake.history.positions.aligned_to_frames`); only sink and memory are turned again when the
recipe moves them. Host integers decide everything; no tensor is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.spec import CacheSpec
from longtake.errors import HistoryError
from longtake.history.base import (
    HistoryConfig,
    HistoryView,
    check_ids_fit,
    frame_phases,
    plan_reencoding,
    split_queries,
)
from longtake.history.policy import Policy, Surroundings
from longtake.history.positions import Relative, SegmentIds, aligned_to_frames, segment_ids
from longtake.history.records import EMPTY, CommitPlan, SlotRecord
from longtake.history.slot_memory import SlotMemory
from longtake.history.storage import SlotStorage, Write


class SlotHistory:
    """Histories of many streams in one set of buffers, each stream at a length of its own.

    Args:
        config: window, sink, chunk, positions.
        spec: the layout, from ``dit.cache_spec()``.
        grid: tokens per frame as (rows, columns).
        num_slots: streams held at most.
        max_frames: required where the window is unlimited: frames a stream may have in all.
        policy: what becomes of evicted frames; None makes the config's, which then must not be learned.
        device, dtype: of the buffers.

    Raises:
        HistoryError: an unlimited window without ``max_frames``.
        ConfigError: a policy that does not fit the network, or whose memory does not fit the ids.
    """

    def __init__(
        self,
        config: HistoryConfig,
        spec: CacheSpec,
        grid: tuple[int, int],
        num_slots: int,
        *,
        max_frames: int | None = None,
        policy: Policy | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.spec, self.grid = config, spec, grid
        self.num_slots = num_slots
        self.max_frames = max_frames
        if policy is None:
            policy = config.policy.make(Surroundings(spec, grid))
        self.policy = policy
        self.device, self.dtype = torch.device(device), dtype
        memory = self.policy.memory_grid
        check_ids_fit(config, 0 if memory is None else memory.num_frames)
        ring = config.local_frames
        if ring is None:
            if max_frames is None:
                raise HistoryError(
                    "an unlimited window needs its capacity declared", "give max_frames, or set window_frames"
                )
            ring = max(0, max_frames - config.sink_frames)
        self._ring_frames = ring
        self._storage = SlotStorage(
            spec,
            grid,
            config.sink_frames,
            ring,
            memory,
            num_slots,
            sink_turns=isinstance(config.positions, Relative),
            device=self.device,
            dtype=dtype,
        )
        self._memory = SlotMemory(self.policy, self._storage, num_slots, self.device, dtype)
        self.slots: list[SlotRecord | None] = [None] * num_slots
        self._versions = [0] * num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers and of what the policy keeps; constant."""
        return sum(tensor.nbytes for tensor in self._named_tensors().values())

    @property
    def num_blocks(self) -> int:
        """Frames a slot holds: the sink's places, then the ring's (see ``SlotRecord.places``)."""
        return self.config.sink_frames + self._ring_frames

    # ---- streams

    def join(self) -> int:
        """Take a free slot for a new stream, with an empty history.

        Raises:
            HistoryError: all slots are taken.
        """
        for slot, record in enumerate(self.slots):
            if record is None:
                self.join_at(slot)
                return slot
        raise HistoryError(
            f"all {self.num_slots} slots are taken", "let a stream leave, or create more slots"
        )

    def join_at(self, slot: int) -> None:
        """Take one free slot, see :meth:`join`."""
        assert self.slots[slot] is None, f"slot {slot} is taken"
        self._storage.clear(slot)
        self.slots[slot] = SlotRecord(ring=[EMPTY] * self._ring_frames, version=self._versions[slot] + 1)
        self.reset_memory(slot)

    def leave(self, slot: int) -> None:
        """Free a stream's slot."""
        self._versions[slot] = self.record(slot).version + 1
        self.slots[slot] = None

    def record(self, slot: int) -> SlotRecord:
        """Host side of a taken slot. Raises HistoryError for a free one."""
        record = self.slots[slot] if 0 <= slot < self.num_slots else None
        if record is None:
            taken = [i for i, other in enumerate(self.slots) if other is not None]
            raise HistoryError(f"slot {slot} holds no stream", f"join first; taken slots: {taken}")
        return record

    # ---- reading

    @torch.no_grad()
    def view(self, slots: Sequence[int], num_frames: int | None = None) -> HistoryView:
        """What the next frames of some streams may read; valid until one of them commits.

        Neighbouring ascending slots are read without a copy. Streams that show differently many tokens
        share one view with a mask.

        Raises:
            HistoryError: a free slot, more frames than a chunk, or an unlimited stream past ``max_frames``.
        """
        num_frames = self.config.chunk_frames if num_frames is None else num_frames
        if num_frames > self.config.chunk_frames:
            raise HistoryError(
                f"a chunk of {num_frames} frames exceeds chunk_frames={self.config.chunk_frames}",
                "generate at most chunk_frames at a time",
            )
        records = [self.record(slot) for slot in slots]
        for record in records:
            self._check_capacity(record, num_frames)
        currents = [range(record.next_frame, record.next_frame + num_frames) for record in records]
        ids = [self._ids(record, current) for record, current in zip(records, currents, strict=True)]
        self._turn_sinks(slots, ids)
        self._memory.turn(slots, records, ids)
        phases = frame_phases(currents, self.grid, self.spec, self.device)
        shown = [self._storage.ranges(len(row.sink), len(row.local)) for row in ids]
        start = min(first for ranges in shown for first, _ in ranges) if any(shown) else 0
        stop = max(last for ranges in shown for _, last in ranges) if any(shown) else 0
        segments = (self._storage.read(slots, start, stop),) if stop > start else ()
        see_memory = [bool(row.memory) for row in ids]
        if any(see_memory):
            segments = (self._storage.read_memory(slots), *segments)
        mask = self._mask(see_memory, shown, start, stop, num_frames)
        versions = [record.version for record in records]
        rows = list(zip(slots, versions, strict=True))

        def is_fresh() -> bool:
            return all(
                (record := self.slots[slot]) is not None and record.version == version
                for slot, version in rows
            )

        def later() -> HistoryView:
            if any(record.next_frame != now.start for record, now in zip(records, currents, strict=True)):
                raise HistoryError("this view is older than a commit", "ask the history for a new view")
            self._memory.publish_pending(slots, records)
            return self.view(slots, num_frames)

        pending = any(record.memory_pending for record in records)
        return HistoryView(
            segments,
            phases,
            num_frames,
            self.grid,
            mask,
            is_fresh=is_fresh,
            later=later if pending else None,
            wants_queries=self.policy.needs_queries,
        )

    @torch.no_grad()
    def reencode_view(
        self, slot: int, *, own_sink: bool, own_local: bool, read_sink: bool
    ) -> tuple[list[int], HistoryView]:
        """The view of a block-causal pass that encodes frames again which the history holds.

        Args:
            slot: the stream.
            own_sink, own_local: which segments are encoded again, one of them at least.
            read_sink: the sink is read as it is (and not encoded again).

        Returns:
            The indices in the stream of the frames to pass, and the view to pass them with. Frames see the
            chunks before their own and their own. The memory is not read: it is rebuilt from what this pass
            makes.
        """
        record = self.record(slot)
        plan = plan_reencoding(
            self.config,
            self._storage.frame_tokens,
            record.sink,
            record.local,
            own_sink=own_sink,
            own_local=own_local,
            read_sink=read_sink,
        )
        segments: tuple[Entries, ...] = ()
        if plan.sink_ids:
            self._turn_sinks([slot], [SegmentIds(plan.sink_ids, (), (), ())])
            [(start, stop)] = self._storage.ranges(len(plan.sink_ids), 0)
            segments = (self._storage.read([slot], start, stop),)
        return list(plan.frames), plan.view(segments, self.spec, self.grid, self.device)

    # ---- writing

    @torch.no_grad()
    def commit(self, entries: Entries, slots: Sequence[int]) -> list[CommitPlan]:
        """Append a finished chunk to some streams, evicting by frame where the window is full.

        Args:
            entries: from the chunk's context pass, one row per slot, rotary parts un-rotated.
            slots: where each row goes.

        Returns:
            What moved where, one plan per slot, for whoever keeps something beside the entries.

        Raises:
            HistoryError: a free slot, or an unlimited stream past ``max_frames``; then nothing has changed.
        """
        entries, queries = split_queries(entries)
        num_frames, rest = divmod(entries.num_tokens, self._storage.frame_tokens)
        assert rest == 0, "entries must be whole frames of this grid"
        assert num_frames > 0, "entries hold no frame"
        assert entries.num_rows == len(slots) == len(set(slots)), "one row per distinct slot"
        records = [self.record(slot) for slot in slots]
        for record in records:
            self._check_capacity(record, num_frames)
        frames = [range(record.next_frame, record.next_frame + num_frames) for record in records]
        plans = [record.append(num_frames, self.config.sink_frames) for record in records]
        self._memory.evict(entries, queries, slots, plans, records)
        self._move(slots, plans)
        writes = [
            Write(row, own, slot, block)
            for row, (slot, plan) in enumerate(zip(slots, plans, strict=True))
            for block, own in plan.writes.items()
        ]
        self._storage.write(entries, writes, frames)
        return plans

    @torch.no_grad()
    def rewrite(self, entries: Entries, slots: Sequence[int], frames: Sequence[Sequence[int]]) -> None:
        """Replace the entries of frames that are present (a prompt switch re-encodes them).

        Args:
            entries: one row per slot, un-rotated, ``len(frames[row])`` frames each.
            frames: for each row the indices in the stream of its frames.

        Raises:
            HistoryError: a frame that is not held any more.
        """
        writes = []
        for row, (slot, wanted) in enumerate(zip(slots, frames, strict=True)):
            record = self.record(slot)
            places = record.places(self.config.sink_frames)
            for own, frame in enumerate(wanted):
                if frame not in places:
                    raise HistoryError(
                        f"frame {frame} is not held any more",
                        f"held: sink {record.sink}, local {record.local}",
                    )
                writes.append(Write(row, own, slot, places[frame]))
            record.sink_ids = tuple(
                frame if frame in wanted else turned
                for frame, turned in zip(record.sink, record.sink_ids, strict=True)
            )
            record.version += 1
        self._storage.write(entries, writes, frames)

    def drop_sink(self, slot: int) -> None:
        """Forget a stream's sink; the frames that leave the window next become the new one."""
        record = self.record(slot)
        record.sink, record.sink_ids = [], ()
        record.version += 1

    @torch.no_grad()
    def reset_memory(self, slot: int, *, rebuild: bool = False) -> None:
        """Put a stream's policy state back to its start, as if nothing had been evicted.

        Args:
            slot: the stream.
            rebuild: then take in the local frames once, as if they had been evicted, without dropping them;
                but none that the sink waits for.
        """
        record, sink_frames = self.record(slot), self.config.sink_frames
        places = record.places(sink_frames)
        taken_in = record.local[sink_frames - len(record.sink) :] if rebuild else []
        self._memory.reset(slot, record, {frame: places[frame] for frame in taken_in})

    @torch.no_grad()
    def exchange_memories(self, slot: int, other: int) -> None:
        """Let two streams go on with each other's memory: a control of what a memory is good for."""
        self._memory.exchange(slot, other, self.record(slot), self.record(other))

    # ---- snapshots

    def export_slot(self, slot: int) -> tuple[SlotRecord, dict[str, Tensor]]:
        """Everything a stream's history consists of: host record and tensors (copies, by stable names)."""
        record = self.record(slot)
        return record, {name: tensor[slot].clone() for name, tensor in self._named_tensors().items()}

    @torch.no_grad()
    def import_slot(self, slot: int, record: SlotRecord, tensors: dict[str, Tensor]) -> None:
        """Put an exported history into a taken slot; bit-identical from then on."""
        own = self._named_tensors()
        assert own.keys() == tensors.keys(), "the config was compared before"
        for name, tensor in own.items():
            tensor[slot].copy_(tensors[name])
        version = self.record(slot).version + 1
        self.slots[slot] = replace(record, ring=list(record.ring), sink=list(record.sink), version=version)

    def check_integrity(self) -> None:
        """Assert what must hold between calls; for tests."""
        for record in self.slots:
            if record is not None:
                assert len(record.ring) == self._ring_frames
                record.check_integrity(self.config.sink_frames)

    def check_room(self, slot: int, num_frames: int) -> None:
        """Raises HistoryError where a stream has no room for so many frames more, or the slot is free."""
        self._check_capacity(self.record(slot), num_frames)

    # ---- inside

    def _check_capacity(self, record: SlotRecord, num_frames: int) -> None:
        if self.config.window_frames is not None or self.max_frames is None:
            return
        end = record.next_frame + num_frames
        if end > self.max_frames:
            raise HistoryError(
                f"{end} frames exceed max_frames={self.max_frames} of an unlimited window",
                "create the history with more max_frames, or set window_frames",
            )

    def _ids(self, record: SlotRecord, current: range) -> SegmentIds:
        num_memory = self._memory.num_frames(record)
        ids = segment_ids(self.config.positions, record.sink, num_memory, record.local, current)
        return aligned_to_frames(ids, current)

    def _turn_sinks(self, slots: Sequence[int], ids: Sequence[SegmentIds]) -> None:
        """Turn the sink keys again of streams whose sink ids have moved."""
        moved = [
            (slot, row.sink)
            for slot, row in zip(slots, ids, strict=True)
            if row.sink != self._of(slot).sink_ids
        ]
        if not moved:
            return
        self._storage.turn_sinks([slot for slot, _ in moved], [turned for _, turned in moved])
        for slot, turned in moved:
            self._of(slot).sink_ids = turned
            self._of(slot).version += 1

    def _mask(
        self,
        see_memory: list[bool],
        shown: list[list[tuple[int, int]]],
        start: int,
        stop: int,
        num_frames: int,
    ) -> Tensor | None:
        """True where a row shows the token; None where every row shows all memory and all of
        ``start..stop``.
        """
        memory_tokens = self._storage.memory_tokens if any(see_memory) else 0
        whole = [(start, stop)] if stop > start else []
        if all(see_memory) == any(see_memory) and all(ranges == whole for ranges in shown):
            return None
        own_tokens = num_frames * self._storage.frame_tokens
        mask_bk = torch.zeros(len(shown), memory_tokens + stop - start + own_tokens, dtype=torch.bool)
        mask_bk[:, memory_tokens + stop - start :] = True
        for row, ranges in enumerate(shown):
            mask_bk[row, :memory_tokens] = see_memory[row]
            for first, last in ranges:
                mask_bk[row, memory_tokens + first - start : memory_tokens + last - start] = True
        return mask_bk[:, None, None].to(self.device, non_blocking=True)

    def _move(self, slots: Sequence[int], plans: Sequence[CommitPlan]) -> None:
        """Move frames that leave the window into a sink that was dropped."""
        for slot, plan in zip(slots, plans, strict=True):
            if not plan.moves:
                continue
            record = self.record(slot)
            frames = [[record.sink[block]] for block in plan.moves]
            raw = self._storage.gather([(slot, block) for block in plan.moves.values()], frames)
            writes = [Write(i, 0, slot, block) for i, block in enumerate(plan.moves)]
            self._storage.write(raw, writes, frames)

    def _of(self, slot: int) -> SlotRecord:
        record = self.slots[slot]
        assert record is not None
        return record

    def _named_tensors(self) -> dict[str, Tensor]:
        """Every tensor a slot owns a row of, by a stable name."""
        return self._storage.named_tensors() | self._memory.named_tensors()

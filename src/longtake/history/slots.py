"""The in-place history: fixed buffers with one slot per stream, for serving.

Legend: s slots, b rows of a call, i blocks (frames) written or read.

Each slot's tokens lie as ``[memory | sink | ring]``. The ring overwrites its oldest frame, so nothing is
ever moved: the order of keys does not matter to attention. Keys are stored turned by their frame's index
(:func:`~longtake.history.positions.aligned_to_frames`); sink and memory also as committed, to be turned
again when the recipe moves them. Host integers decide where everything goes; no tensor is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longtake.cache.base import Buffers, Entries, Rows
from longtake.cache.spec import CacheSpec
from longtake.errors import HistoryError
from longtake.history.base import (
    Evicted,
    HistoryConfig,
    HistoryView,
    Policy,
    PolicyState,
    check_ids_fit,
    frame_phases,
)
from longtake.history.positions import Relative, SegmentIds, aligned_to_frames, segment_ids
from longtake.history.window import WindowPolicy
from longtake.ops.rope import grid_phases

EMPTY = -1


@dataclass
class SlotRecord:
    """Host side of one slot: which frame lies where.

    Args:
        ring: frame index at each place of the ring, ``EMPTY`` where none was written yet.
        sink: frame index at each sink place. ``sink_ids``: the ids its keys are turned by at the moment.
        memory_ids: the ids the memory segment is turned by at the moment.
        ring_writes: frames ever written to the ring; the next goes to ``ring_writes % len(ring)``.
        version: rises whenever something that a view may show is overwritten.
    """

    ring: list[int]
    sink: list[int] = field(default_factory=list)
    sink_ids: tuple[int, ...] = ()
    memory_ids: tuple[int, ...] = ()
    next_frame: int = 0
    ring_writes: int = 0
    num_evicted: int = 0
    version: int = 0

    @property
    def local(self) -> list[int]:
        """Local frames present, oldest first."""
        return sorted(frame for frame in self.ring if frame != EMPTY)


@dataclass(frozen=True)
class _Plan:
    """Where a commit of one row goes: (frame of the chunk, block) pairs, and what leaves."""

    writes: dict[int, int]
    evicted_blocks: tuple[int, ...]
    evicted_frames: tuple[int, ...]
    evicted_own: tuple[int, ...]


class SlotHistory:
    """Histories of many streams in one set of buffers, each stream at a length of its own.

    Args:
        config: window, sink, chunk, positions.
        spec: the layout, from ``dit.cache_spec()``.
        grid: tokens per frame as (rows, columns).
        num_slots: streams held at most.
        max_frames: required where the window is unlimited: frames a stream may have in all.
        policy: what becomes of evicted frames.
        device, dtype: of the buffers.

    Raises:
        HistoryError: an unlimited window without ``max_frames``.
        ConfigError: the policy's memory does not fit the ids.
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
        self.policy: Policy = WindowPolicy() if policy is None else policy
        self.device, self.dtype = torch.device(device), dtype
        self._memory = self.policy.memory_grid
        check_ids_fit(config, 0 if self._memory is None else self._memory.num_frames)
        ring = config.local_frames
        if ring is None:
            if max_frames is None:
                raise HistoryError(
                    "an unlimited window needs its capacity declared", "give max_frames, or set window_frames"
                )
            ring = max(0, max_frames - config.sink_frames)
        self._ring_frames = ring
        self._frame_tokens = grid[0] * grid[1]
        self._memory_tokens = 0 if self._memory is None else self._memory.num_tokens
        sink_tokens = config.sink_frames * self._frame_tokens
        capacity = self._memory_tokens + sink_tokens + ring * self._frame_tokens
        self._buffers = Buffers(spec, num_slots, capacity, self.device, dtype)
        rotary = spec.rotary_parts
        sink_rotary = rotary if isinstance(config.positions, Relative) else ()  # absolute ids never move
        self._raw_sink = Buffers(spec, num_slots, sink_tokens, self.device, dtype, sink_rotary)
        self._raw_memory = Buffers(spec, num_slots, self._memory_tokens, self.device, dtype, rotary)
        self._state: PolicyState = self.policy.start(num_slots, self.device, dtype) if self._memory else {}
        self._start = {name: tensor[:1].clone() for name, tensor in self._state.items()}
        self.slots: list[SlotRecord | None] = [None] * num_slots
        self._versions = [0] * num_slots

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers; constant."""
        return self._buffers.num_bytes + self._raw_sink.num_bytes + self._raw_memory.num_bytes

    # ---- streams

    def join(self) -> int:
        """Take a free slot for a new stream, with an empty history.

        Raises:
            HistoryError: all slots are taken.
        """
        for slot, record in enumerate(self.slots):
            if record is None:
                self._reset(slot)
                return slot
        raise HistoryError(
            f"all {self.num_slots} slots are taken", "let a stream leave, or create more slots"
        )

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
        self._turn_memories(slots, ids)
        phases = frame_phases(currents, self.grid, self.spec, self.device)
        shown = [self._shown(record) for record in records]
        start = min(first for ranges in shown for first, _ in ranges) if any(shown) else 0
        stop = max(last for ranges in shown for _, last in ranges) if any(shown) else 0
        segments = (self._buffers.read(_as_rows(slots), start, stop),) if stop > start else ()
        mask = self._mask(shown, start, stop, num_frames)
        versions = [record.version for record in records]
        rows = list(zip(slots, versions, strict=True))

        def is_fresh() -> bool:
            return all(
                (record := self.slots[slot]) is not None and record.version == version
                for slot, version in rows
            )

        return HistoryView(segments, phases, num_frames, self.grid, mask, is_fresh=is_fresh)

    # ---- writing

    @torch.no_grad()
    def commit(self, entries: Entries, slots: Sequence[int]) -> None:
        """Append a finished chunk to some streams, evicting by frame where the window is full.

        Args:
            entries: from the chunk's context pass, one row per slot, rotary parts un-rotated.
            slots: where each row goes.

        Raises:
            HistoryError: a free slot, or an unlimited stream past ``max_frames``; then nothing has changed.
        """
        num_frames, rest = divmod(entries.num_tokens, self._frame_tokens)
        assert rest == 0, "entries must be whole frames of this grid"
        assert num_frames > 0, "entries hold no frame"
        assert entries.num_rows == len(slots) == len(set(slots)), "one row per distinct slot"
        records = [self.record(slot) for slot in slots]
        for record in records:
            self._check_capacity(record, num_frames)
        frames = [range(record.next_frame, record.next_frame + num_frames) for record in records]
        plans = [self._plan(record, num_frames) for record in records]
        if self._memory is not None:
            self._evict(entries, slots, plans)
        rows = [
            (row, own, slot, block)
            for row, (slot, plan) in enumerate(zip(slots, plans, strict=True))
            for block, own in plan.writes.items()
        ]
        self._write(entries, rows, frames)

    @torch.no_grad()
    def rewrite(self, entries: Entries, slots: Sequence[int], frames: Sequence[Sequence[int]]) -> None:
        """Replace the entries of frames that are present (a prompt switch re-encodes them).

        Args:
            entries: one row per slot, un-rotated, ``len(frames[row])`` frames each.
            frames: for each row the indices in the stream of its frames.

        Raises:
            HistoryError: a frame that is not held any more.
        """
        rows = []
        for row, (slot, wanted) in enumerate(zip(slots, frames, strict=True)):
            record = self.record(slot)
            places = {frame: block for block, frame in enumerate(record.sink)}
            places |= {
                frame: self.config.sink_frames + place
                for place, frame in enumerate(record.ring)
                if frame != EMPTY
            }
            for own, frame in enumerate(wanted):
                if frame not in places:
                    raise HistoryError(
                        f"frame {frame} is not held any more",
                        f"held: sink {record.sink}, local {record.local}",
                    )
                rows.append((row, own, slot, places[frame]))
            record.sink_ids = tuple(
                frame if frame in wanted else turned
                for frame, turned in zip(record.sink, record.sink_ids, strict=True)
            )
            record.version += 1
        self._write(entries, rows, frames)

    def drop_sink(self, slot: int) -> None:
        """Forget a stream's sink; the frames committed next become the new one."""
        record = self.record(slot)
        record.sink, record.sink_ids = [], ()
        record.version += 1

    @torch.no_grad()
    def reset_memory(self, slot: int) -> None:
        """Put a stream's policy state back to its start, as if nothing had been evicted."""
        record = self.record(slot)
        record.num_evicted = 0
        record.version += 1
        for name, tensor in self._state.items():
            tensor[slot : slot + 1] = self._start[name]
        if self._memory is not None:
            self._store_memory([slot])

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
        self.slots[slot] = SlotRecord(
            ring=list(record.ring),
            sink=list(record.sink),
            sink_ids=tuple(record.sink_ids),
            memory_ids=tuple(record.memory_ids),
            next_frame=record.next_frame,
            ring_writes=record.ring_writes,
            num_evicted=record.num_evicted,
            version=version,
        )

    def check_integrity(self) -> None:
        """Assert what must hold between calls; for tests."""
        for record in self.slots:
            if record is None:
                continue
            local = record.local
            assert len(record.ring) == self._ring_frames
            assert len(record.sink) == len(record.sink_ids) <= self.config.sink_frames
            assert not local or local == list(range(record.next_frame - len(local), record.next_frame))
            assert not set(local) & set(record.sink)
            filled = [frame != EMPTY for frame in record.ring]
            assert filled == sorted(filled, reverse=True), "the ring fills from its first place"

    # ---- inside

    def _reset(self, slot: int) -> None:
        for buffers in (self._buffers, self._raw_sink, self._raw_memory):
            buffers.clear(slot)
        self.slots[slot] = SlotRecord(ring=[EMPTY] * self._ring_frames, version=self._versions[slot] + 1)
        self.reset_memory(slot)

    def _check_capacity(self, record: SlotRecord, num_frames: int) -> None:
        if self.config.window_frames is not None or self.max_frames is None:
            return
        end = record.next_frame + num_frames
        if end > self.max_frames:
            raise HistoryError(
                f"{end} frames exceed max_frames={self.max_frames} of an unlimited window",
                "create the history with more max_frames, or set window_frames",
            )

    def _reads_memory(self, record: SlotRecord) -> bool:
        return self._memory is not None and record.next_frame > 0 and self.policy.readable(record.num_evicted)

    def _ids(self, record: SlotRecord, current: range) -> SegmentIds:
        num_memory = self._memory.num_frames if self._memory and self._reads_memory(record) else 0
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
        sink = self.config.sink_frames
        # Places of a sink that is still filling turn by 0: they hold zeros.
        frame_ids = [[*turned, *[0] * (sink - len(turned))] for _, turned in moved]
        raw = self._raw_sink.read([slot for slot, _ in moved], 0, sink * self._frame_tokens)
        rotated = raw.rotated(frame_phases(frame_ids, self.grid, self.spec, self.device), self.spec)
        where = self._index([(slot, 0) for slot, _ in moved])
        self._buffers.write_blocks(rotated, *where, self._memory_tokens, sink * self._frame_tokens)
        for slot, turned in moved:
            self._of(slot).sink_ids = turned
            self._of(slot).version += 1

    def _turn_memories(self, slots: Sequence[int], ids: Sequence[SegmentIds]) -> None:
        """Turn the memory keys again of streams whose memory, or its ids, have changed."""
        pairs = zip(slots, ids, strict=True)
        moved = [
            (slot, row.memory)
            for slot, row in pairs
            if row.memory and row.memory != self._of(slot).memory_ids
        ]
        if not moved or self._memory is None:
            return
        raw = self._raw_memory.read([slot for slot, _ in moved], 0, self._memory_tokens)
        frame_ids = [turned for _, turned in moved]
        phases = grid_phases(frame_ids, self._memory.row_ids, self._memory.column_ids, self.spec.rope)
        where = self._index([(slot, 0) for slot, _ in moved])
        rotated = raw.rotated(phases.to(self.device), self.spec)
        self._buffers.write_blocks(rotated, *where, 0, self._memory_tokens)
        for slot, turned in moved:
            self._of(slot).memory_ids = turned
            self._of(slot).version += 1

    def _shown(self, record: SlotRecord) -> list[tuple[int, int]]:
        """Ranges of tokens of the buffer that a stream shows; neighbouring ranges are one."""
        sink_start = self._memory_tokens
        ring_start = sink_start + self.config.sink_frames * self._frame_tokens
        ranges = [
            (0, self._memory_tokens if self._reads_memory(record) else 0),
            (sink_start, sink_start + len(record.sink) * self._frame_tokens),
            (ring_start, ring_start + len(record.local) * self._frame_tokens),
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

    def _mask(
        self, shown: list[list[tuple[int, int]]], start: int, stop: int, num_frames: int
    ) -> Tensor | None:
        """True where a row shows the token; None where every row shows all of ``start..stop``."""
        if all(ranges == [(start, stop)] for ranges in shown) or stop == start:
            return None
        mask_bk = torch.zeros(len(shown), stop - start + num_frames * self._frame_tokens, dtype=torch.bool)
        mask_bk[:, stop - start :] = True
        for row, ranges in enumerate(shown):
            for first, last in ranges:
                mask_bk[row, first - start : last - start] = True
        return mask_bk[:, None, None].to(self.device, non_blocking=True)

    def _plan(self, record: SlotRecord, num_frames: int) -> _Plan:
        """Advance the host record by a chunk: which block each frame goes to, and what leaves."""
        first = record.next_frame
        sink = self.config.sink_frames
        writes: dict[int, int] = {}
        blocks, gone, own = [], [], []
        for i in range(num_frames):
            frame = first + i
            if len(record.sink) < sink:
                writes[len(record.sink)] = i
                record.sink.append(frame)
                record.sink_ids = (*record.sink_ids, frame)
                continue
            if self._ring_frames == 0:
                own.append(i)
                gone.append(frame)
                continue
            place = record.ring_writes % self._ring_frames
            leaving = record.ring[place]
            if leaving >= first:
                own.append(leaving - first)
            elif leaving != EMPTY:
                blocks.append(sink + place)
            if leaving != EMPTY:
                gone.append(leaving)
            record.ring[place] = frame
            record.ring_writes += 1
            writes[sink + place] = i
        record.next_frame += num_frames
        record.num_evicted += len(gone)
        record.version += 1
        return _Plan(writes, tuple(blocks), tuple(gone), tuple(own))

    def _evict(self, entries: Entries, slots: Sequence[int], plans: Sequence[_Plan]) -> None:
        """Hand evicted frames to the policy before they are overwritten, rows that evict alike together."""
        groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for row, plan in enumerate(plans):
            if plan.evicted_frames:
                groups.setdefault((len(plan.evicted_blocks), plan.evicted_own), []).append(row)
        for (num_blocks, own), rows in groups.items():
            pieces = []
            if num_blocks:
                where = self._index(
                    [(slots[row], block) for row in rows for block in plans[row].evicted_blocks]
                )
                blocks = self._buffers.gather_blocks(*where, self._memory_tokens, self._frame_tokens)
                stored = _regrouped(blocks, len(rows))
                frame_ids = [plans[row].evicted_frames[:num_blocks] for row in rows]
                pieces.append(
                    stored.unrotated(frame_phases(frame_ids, self.grid, self.spec, self.device), self.spec)
                )
            if own:
                first = own[0] * self._frame_tokens
                pieces.append(entries.select(rows).tokens(first, first + len(own) * self._frame_tokens))
            taken = [slots[row] for row in rows]
            state = {name: tensor[taken] for name, tensor in self._state.items()}
            evicted = Evicted(tuple(plans[row].evicted_frames for row in rows), Entries.cat(pieces))
            for name, tensor in self.policy.absorb(state, evicted).items():
                self._state[name][taken] = tensor
            self._store_memory(taken)

    def _store_memory(self, slots: Sequence[int]) -> None:
        memory = self.policy.read({name: tensor[list(slots)] for name, tensor in self._state.items()})
        where = self._index([(slot, 0) for slot in slots])
        self._raw_memory.write_blocks(memory, *where, 0, self._memory_tokens)
        self._buffers.write_blocks(memory, *where, 0, self._memory_tokens)
        for slot in slots:
            self._of(slot).memory_ids = ()

    def _write(
        self, entries: Entries, rows: list[tuple[int, int, int, int]], frames: Sequence[Sequence[int]]
    ) -> None:
        """Write frames, given as (row, frame of the row, slot, block), turned by their index."""
        rotated = entries.rotated(frame_phases(frames, self.grid, self.spec, self.device), self.spec)
        self._write_blocks(self._buffers, rotated, rows, self._memory_tokens)
        to_sink = [entry for entry in rows if entry[3] < self.config.sink_frames]
        if to_sink:
            self._write_blocks(self._raw_sink, entries, to_sink, 0)

    def _write_blocks(
        self, buffers: Buffers, entries: Entries, rows: list[tuple[int, int, int, int]], start: int
    ) -> None:
        if not rows:
            return
        source = self._index([(row, own) for row, own, _, _ in rows])
        where = self._index([(slot, block) for _, _, slot, block in rows])
        tokens = self._frame_tokens
        blocks = entries.map(lambda part: torch.unflatten(part, 1, (-1, tokens))[source[0], source[1]])
        buffers.write_blocks(blocks, *where, start, tokens)

    def _index(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        index_2i = torch.tensor(pairs).T.to(self.device, non_blocking=True)
        return index_2i[0], index_2i[1]

    def _of(self, slot: int) -> SlotRecord:
        record = self.slots[slot]
        assert record is not None
        return record

    def _named_tensors(self) -> dict[str, Tensor]:
        """Every tensor a slot owns a row of, by a stable name."""
        named = {f"policy.{name}": tensor for name, tensor in self._state.items()}
        for title, buffers in (
            ("past", self._buffers),
            ("sink", self._raw_sink),
            ("memory", self._raw_memory),
        ):
            for i, layer in enumerate(buffers.layers):
                named |= {f"{title}.{i}.{name}": part for name, part in layer.items()}
        return named


def _as_rows(slots: Sequence[int]) -> Rows:
    """A slice where slots are neighbours in ascending order, so that reading them copies nothing."""
    if list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return slots


def _regrouped(blocks: Entries, num_rows: int) -> Entries:
    """Blocks ``[rows * m, tokens, ...]`` as rows ``[rows, m * tokens, ...]``."""

    def regrouped(part: Tensor) -> Tensor:
        return part.flatten(0, 1).reshape(num_rows, -1, *part.shape[2:])

    return blocks.map(regrouped)

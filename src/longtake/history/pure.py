"""The functional history: commits return a new object, autograd flows through them. For training.

All rows of the batch are at the same frame. Nothing is ever written in place, so activation recomputation
is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

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
from longtake.history.policy import Evicted, Policy, PolicyState
from longtake.history.positions import Relative, aligned_to_frames, segment_ids
from longtake.history.window import WindowPolicy
from longtake.ops.rope import Phases


@dataclass(frozen=True)
class Piece:
    """Consecutive past frames: entries as committed, and turned by their frame index, ready to read."""

    frames: tuple[int, ...]
    raw: Entries
    rotated: Entries

    def split(self, num_frames: int) -> tuple[Piece, Piece]:
        """The first frames and the rest."""
        cut = self.raw.num_tokens // len(self.frames) * num_frames
        end = self.raw.num_tokens
        head = Piece(self.frames[:num_frames], self.raw.tokens(0, cut), self.rotated.tokens(0, cut))
        tail = Piece(self.frames[num_frames:], self.raw.tokens(cut, end), self.rotated.tokens(cut, end))
        return head, tail

    def detach(self) -> Piece:
        """Cut off from autograd."""
        return replace(self, raw=self.raw.detach(), rotated=self.rotated.detach())


@dataclass(frozen=True)
class PureHistory:
    """An immutable history of a uniform batch.

    Args:
        config: window, sink, chunk, positions.
        spec: the layout, from ``dit.cache_spec()``.
        grid: tokens per frame as (rows, columns), from ``dit.token_grid(height, width)``.
        policy: what becomes of evicted frames; see `DiT.policy` for the config's.
        device: where views are made for.
        packs: see `HistoryView`; False for training.
        sink, local, next_frame, num_evicted, state: the content; leave at their defaults for an empty
            history.
        before: the memory as the last commit found it, with the frames evicted until then.
        example: rows, device and dtype of what was committed, for starting a memory again.
    """

    config: HistoryConfig
    spec: CacheSpec
    grid: tuple[int, int]
    policy: Policy = field(default_factory=WindowPolicy)
    device: torch.device | str = "cpu"
    packs: bool = True
    sink: tuple[Piece, ...] = ()
    local: tuple[Piece, ...] = ()
    next_frame: int = 0
    num_evicted: int = 0
    state: PolicyState | None = None
    before: tuple[PolicyState, int] | None = None
    example: tuple[int, torch.device, torch.dtype] | None = None

    def __post_init__(self) -> None:
        memory = self.policy.memory_grid
        check_ids_fit(self.config, 0 if memory is None else memory.num_frames)

    @property
    def sink_frames(self) -> tuple[int, ...]:
        """Indices in the stream of the sink frames present."""
        return tuple(frame for piece in self.sink for frame in piece.frames)

    @property
    def local_frames(self) -> tuple[int, ...]:
        """Indices in the stream of the local frames present, oldest first."""
        return tuple(frame for piece in self.local for frame in piece.frames)

    def view(self, num_frames: int | None = None) -> HistoryView:
        """What the next frames may read.

        Args:
            num_frames: how many frames come next; the config's chunk where None.

        Raises:
            HistoryError: more frames than a chunk, for which the window leaves no room.
        """
        num_frames = self.config.chunk_frames if num_frames is None else num_frames
        if self.config.window_frames is not None and num_frames > self.config.chunk_frames:
            raise HistoryError(
                f"a chunk of {num_frames} frames exceeds chunk_frames={self.config.chunk_frames}",
                "generate at most chunk_frames at a time",
            )
        if self.policy.reads_late and self.before is not None:
            state, num_evicted = self.before
            return replace(
                self._view(num_frames, state, num_evicted),
                later=lambda: self._view(num_frames, self.state, self.num_evicted),
            )
        return self._view(num_frames, self.state, self.num_evicted)

    def _view(self, num_frames: int, state: PolicyState | None, num_evicted: int) -> HistoryView:
        current = range(self.next_frame, self.next_frame + num_frames)
        memory = self.policy.memory_grid
        reads_memory = memory is not None and self.next_frame > 0 and self.policy.readable(num_evicted)
        ids = segment_ids(
            self.config.positions,
            self.sink_frames,
            memory.num_frames if memory is not None and reads_memory else 0,
            self.local_frames,
            current,
        )
        ids = aligned_to_frames(ids, current)
        segments: list[Entries] = []
        if memory is not None and reads_memory:
            assert state is not None
            layout = memory.layout or self.spec
            phases = memory.phases([ids.memory[0]], layout.rope).to(self.device)
            segments.append(_turned(self.policy.read(state), phases, layout))
        segments += self._read_sink(ids.sink)
        segments += [piece.rotated for piece in self.local]
        return HistoryView(
            tuple(segments),
            self._phases(current),
            num_frames,
            self.grid,
            wants_queries=self.policy.needs_queries,
            packs=self.packs,
        )

    def commit(self, entries: Entries) -> PureHistory:
        """The history after a finished chunk, whose entries come from its context pass."""
        entries, queries = split_queries(entries)
        num_frames, rest_tokens = divmod(entries.num_tokens, self.grid[0] * self.grid[1])
        assert rest_tokens == 0, "entries must be whole frames of this grid"
        assert num_frames > 0, "entries hold no frame"
        frames = tuple(range(self.next_frame, self.next_frame + num_frames))
        new = self._piece(frames, entries)
        sink, local = self.sink, self.local
        to_sink = min(num_frames, self.config.sink_frames - len(self.sink_frames))
        if local:  # a sink that was dropped fills with what leaves the window
            local = (*local, new)
        elif to_sink == num_frames:
            sink = (*sink, new)
        elif to_sink > 0:
            head, tail = new.split(to_sink)
            sink, local = (*sink, head), (*local, tail)
        else:
            local = (*local, new)
        kept, evicted = self._evict(local)
        while evicted and self.config.sink_frames > (have := sum(len(piece.frames) for piece in sink)):
            moved, *others = evicted
            if len(moved.frames) > self.config.sink_frames - have:
                moved, rest = moved.split(self.config.sink_frames - have)
                others = [rest, *others]
            sink, evicted = (*sink, replace(moved, raw=self._left(moved))), tuple(others)
        num_evicted = self.num_evicted + sum(len(piece.frames) for piece in evicted)
        state, before = self.state, None
        if self.policy.memory_grid is not None:
            before = (self._started(entries), self.num_evicted)
            state = self._absorb(before[0], evicted, queries)
        return replace(
            self,
            sink=sink,
            local=kept,
            next_frame=self.next_frame + num_frames,
            num_evicted=num_evicted,
            state=state,
            before=before if self.policy.reads_late else None,
            example=_example(entries),
        )

    def reencode_view(
        self, *, own_sink: bool, own_local: bool, read_sink: bool
    ) -> tuple[tuple[int, ...], HistoryView]:
        """Frames to encode again and the view to pass them with; see `base.plan_reencoding`."""
        plan = plan_reencoding(
            self.config,
            self.grid[0] * self.grid[1],
            self.sink_frames,
            self.local_frames,
            own_sink=own_sink,
            own_local=own_local,
            read_sink=read_sink,
        )
        segments = tuple(self._read_sink(plan.sink_ids))
        return plan.frames, plan.view(segments, self.spec, self.grid, self.device, packs=self.packs)

    def rewrite(
        self, entries: Entries, frames: Sequence[int], rows: Sequence[int] | None = None
    ) -> PureHistory:
        """The history with other entries for all of its local frames, and for its sink where it is among the
        frames; in some rows of the batch, or (None) in all.
        """
        entries, _ = split_queries(entries)
        tokens, first = self.grid[0] * self.grid[1], 0
        segments = [self.sink, self.local]
        for i, held in enumerate((self.sink_frames, self.local_frames)):
            given = tuple(frame for frame in frames if frame in held)
            if not given:
                continue
            assert given == held, "whole segments are encoded again"
            raw = entries.tokens(first * tokens, (first + len(given)) * tokens)
            if rows is not None:
                raw = _merged(raw, Entries.cat([piece.raw for piece in segments[i]]), rows)
            segments[i] = (self._piece(given, raw),)
            first += len(given)
        sink, local = segments
        return replace(self, sink=sink, local=local)

    def with_memory(self, do: Literal["rebuild", "reset"], rows: Sequence[int] | None = None) -> PureHistory:
        """The memory as at the start, or as if the local frames had left once, without being dropped; in some
        rows of the batch, or (None) in all. Local frames that the sink waits for are none of them.

        Raises:
            HistoryError: some rows would read the memory and others not.
        """
        if self.state is None or self.example is None:
            return self
        state = self.policy.start(*self.example)
        num_evicted = 0
        if do == "rebuild":
            missing = self.config.sink_frames - len(self.sink_frames)
            taken_in = _without_first(self.local, missing)
            state = self._absorb(state, taken_in, None)
            num_evicted = sum(len(piece.frames) for piece in taken_in)
        if rows is not None:
            if self.policy.readable(num_evicted) != self.policy.readable(self.num_evicted):
                raise HistoryError(
                    f"memory={do!r} of some rows alone leaves them without a memory beside others with one",
                    'use memory="keep"',
                )
            state = {name: _chosen(new, self.state[name], rows) for name, new in state.items()}
            num_evicted = max(num_evicted, self.num_evicted)
        return replace(self, state=state, before=None, num_evicted=num_evicted)

    def without_sink(self) -> PureHistory:
        """The sink forgotten; the frames that leave the window next become the new one."""
        return replace(self, sink=())

    def detach(self) -> PureHistory:
        """The same content, cut off from autograd."""

        def cut(state: PolicyState) -> PolicyState:
            return {name: tensor.detach() for name, tensor in state.items()}

        return replace(
            self,
            sink=tuple(piece.detach() for piece in self.sink),
            local=tuple(piece.detach() for piece in self.local),
            state=None if self.state is None else cut(self.state),
            before=None if self.before is None else (cut(self.before[0]), self.before[1]),
        )

    def check_integrity(self) -> None:
        """Assert what must hold between calls; for tests."""
        limit = self.config.local_frames
        local = self.local_frames
        assert len(self.sink_frames) <= self.config.sink_frames
        assert limit is None or len(local) <= limit
        assert local == tuple(range(self.next_frame - len(local), self.next_frame)) or not local
        tokens = self.grid[0] * self.grid[1]
        assert all(piece.raw.num_tokens == len(piece.frames) * tokens for piece in self.sink + self.local)

    def _evict(self, local: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Split local frames into those that stay and those that leave, oldest first."""
        if self.config.local_frames is None:
            return local, ()
        excess = sum(len(piece.frames) for piece in local) - self.config.local_frames
        kept: list[Piece] = []
        evicted: list[Piece] = []
        for piece in local:
            leaving = min(max(excess, 0), len(piece.frames))
            excess -= leaving
            if leaving == len(piece.frames):
                evicted.append(piece)
            elif leaving == 0:
                kept.append(piece)
            else:
                head, tail = piece.split(leaving)
                evicted.append(head)
                kept.append(tail)
        return tuple(kept), tuple(evicted)

    def _started(self, entries: Entries) -> PolicyState:
        """The policy's state, at its start before the first commit."""
        return self.policy.start(*_example(entries)) if self.state is None else self.state

    def _absorb(
        self, state: PolicyState, evicted: tuple[Piece, ...], queries: tuple[Tensor, ...] | None
    ) -> PolicyState:
        if not evicted:
            return state
        frames = tuple(frame for piece in evicted for frame in piece.frames)
        raw = Entries.cat([self._left(piece) for piece in evicted])
        return self.policy.absorb(state, Evicted((frames,) * raw.num_rows, raw, queries))

    def _read_sink(self, ids: tuple[int, ...]) -> list[Entries]:
        """The sink as read with some ids, none for no sink. Where it turns with the stream, a cache turns it
        from a copy, which is rounded where keys are.
        """
        if not ids:
            return []
        turns = isinstance(self.config.positions, Relative) and bool(self.spec.rounded_parts)
        if ids == self.sink_frames and not turns:
            return [piece.rotated for piece in self.sink]
        raw = Entries.cat([piece.raw for piece in self.sink])
        return [_turned(raw, self._phases(ids), self.spec)]

    def _piece(self, frames: tuple[int, ...], entries: Entries) -> Piece:
        """Frames as they are read by their index in the stream, rounded as a cache would have them."""
        return Piece(frames, entries, entries.rotated(self._phases(frames), self.spec).stored(self.spec))

    def _left(self, piece: Piece) -> Entries:
        """What a cache knows of frames that leave: turned back, where turned ones were rounded; of those that
        leave with the commit that they came with, it never kept any.
        """
        if not self.spec.rounded_parts or piece.frames[0] >= self.next_frame:
            return piece.raw
        return piece.rotated.unrotated(self._phases(piece.frames), self.spec)

    def _phases(self, frame_ids: Sequence[int]) -> Phases:
        return frame_phases([frame_ids], self.grid, self.spec, self.device)


def _turned(raw: Entries, phases: Phases, spec: CacheSpec) -> Entries:
    """What is kept as it was committed, turned to be read, rounded each time as a cache would have it."""
    return raw.stored(spec).rotated(phases, spec).stored(spec)


def _without_first(pieces: tuple[Piece, ...], num_frames: int) -> tuple[Piece, ...]:
    """What is left when so many frames are not counted in."""
    left = []
    for piece in pieces:
        skipped = min(num_frames, len(piece.frames))
        num_frames -= skipped
        if skipped < len(piece.frames):
            left.append(piece.split(skipped)[1] if skipped else piece)
    return tuple(left)


def _example(entries: Entries) -> tuple[int, torch.device, torch.dtype]:
    part = next(part for part in entries.layers[0].values() if part.is_floating_point())
    return entries.num_rows, part.device, part.dtype


def _chosen(new_b: Tensor, old_b: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of the new, the others of the old."""
    mask_b = torch.zeros(len(old_b), dtype=torch.bool, device=old_b.device)
    mask_b[list(rows)] = True
    return torch.where(mask_b.view(-1, *(1,) * (old_b.dim() - 1)), new_b, old_b)


def _merged(new: Entries, old: Entries, rows: Sequence[int]) -> Entries:
    pairs = zip(new.layers, old.layers, strict=True)
    return Entries(
        tuple(
            {name: _chosen(part, before[name], rows) for name, part in layer.items()}
            for layer, before in pairs
        )
    )

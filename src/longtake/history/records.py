"""Host side of the in-place history: which frame of a stream lies at which place of its slot.

A slot holds blocks of one frame: the sink's places first, then the ring's. Everything here is integers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

EMPTY = -1


@dataclass(frozen=True)
class CommitPlan:
    """Where a commit of one stream goes, and what leaves.

    Args:
        moves: by block of the sink the block of the ring whose frame moves there, before anything is written.
        writes: by block the frame of the chunk that goes there.
        evicted_frames: indices in the stream of what leaves, oldest first: first the frames at
            ``evicted_blocks``, then the chunk's own frames ``evicted_own`` (of a chunk longer than the ring).
    """

    moves: dict[int, int]
    writes: dict[int, int]
    evicted_frames: tuple[int, ...]
    evicted_blocks: tuple[int, ...]
    evicted_own: tuple[int, ...]


@dataclass
class SlotRecord:
    """Where a stream's frames lie.

    Args:
        ring: frame index at each place of the ring, ``EMPTY`` where none was written yet.
        sink: frame index at each sink place. ``sink_ids``: the ids its keys are turned by at the moment.
        memory_ids: the ids the memory segment is turned by at the moment. ``memory_pending``: something was
            absorbed that no chunk has read yet.
        num_evicted: frames that have left, of which the memory that chunks read holds ``num_absorbed``.
        ring_writes: frames ever written to the ring; the next goes to ``ring_writes % len(ring)``.
        version: rises whenever something that a view may show is overwritten.
    """

    ring: list[int]
    sink: list[int] = field(default_factory=list)
    sink_ids: tuple[int, ...] = ()
    memory_ids: tuple[int, ...] = ()
    memory_pending: bool = False
    num_absorbed: int = 0
    next_frame: int = 0
    ring_writes: int = 0
    num_evicted: int = 0
    version: int = 0

    @property
    def local(self) -> list[int]:
        """Local frames present, oldest first."""
        return sorted(frame for frame in self.ring if frame != EMPTY)

    def places(self, sink_frames: int) -> dict[int, int]:
        """The block of every frame present."""
        ring = {frame: sink_frames + place for place, frame in enumerate(self.ring) if frame != EMPTY}
        return {frame: block for block, frame in enumerate(self.sink)} | ring

    def append(self, num_frames: int, sink_frames: int) -> CommitPlan:
        """Advance by a chunk: the sink fills first, then the ring, which overwrites its oldest frame.

        A sink that was dropped while local frames were there fills with the next frames that leave the
        window, so that local frames always lie right before the current ones.
        """
        first = self.next_frame
        moves: dict[int, int] = {}
        writes: dict[int, int] = {}
        blocks: list[int] = []
        own: list[int] = []
        gone: list[int] = []
        for frame in range(first, first + num_frames):
            leaving, place = frame, EMPTY
            if self.ring and (self.ring_writes > 0 or len(self.sink) == sink_frames):
                place = self.ring_writes % len(self.ring)
                leaving = self.ring[place]
                self.ring[place] = frame
                self.ring_writes += 1
            block = sink_frames + place
            if leaving != EMPTY and len(self.sink) < sink_frames:
                if leaving >= first:
                    writes[len(self.sink)] = leaving - first
                else:
                    moves[len(self.sink)] = block
                self.sink.append(leaving)
                self.sink_ids = (*self.sink_ids, leaving)
            elif leaving != EMPTY:
                gone.append(leaving)
                if leaving >= first:
                    own.append(leaving - first)
                else:
                    blocks.append(block)
            if place != EMPTY:
                writes[block] = frame - first
        self.next_frame += num_frames
        self.num_evicted += len(gone)
        self.version += 1
        return CommitPlan(moves, writes, tuple(gone), tuple(blocks), tuple(own))

    def check_integrity(self, sink_frames: int) -> None:
        """Assert what must hold between calls; for tests."""
        local = self.local
        assert len(self.sink) == len(self.sink_ids) <= sink_frames
        assert not local or local == list(range(self.next_frame - len(local), self.next_frame))
        assert not set(local) & set(self.sink)
        filled = [frame != EMPTY for frame in self.ring]
        assert filled == sorted(filled, reverse=True), "the ring fills from its first place"

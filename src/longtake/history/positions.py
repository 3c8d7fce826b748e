"""Which temporal id each segment of a chunk's reading gets, as pure functions of host numbers.

A chunk reads ``[sink | memory | local | current]``. Rows, columns and the rotation itself are not decided
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from longtake.config import Config


class Absolute(Config):
    """Every frame keeps its index in the stream for ever (Self-Forcing-style checkpoints)."""

    kind: Literal["absolute"] = "absolute"


class Relative(Config):
    """Ids bounded by ``f_max``, the same in training and inference (Echo-Infinity, arXiv 2606.04527).

    ``f_max = window_frames - 1`` without memory is the window-local recipe of Infinity-RoPE and LongLive's
    relative mode: no gap between sink and local frames.
    """

    kind: Literal["relative"] = "relative"
    f_max: int = Field(ge=0)


Positions = Annotated[Absolute | Relative, Field(discriminator="kind")]


@dataclass(frozen=True)
class SegmentIds:
    """Temporal ids, one per frame, of each segment that a chunk reads."""

    sink: tuple[int, ...]
    memory: tuple[int, ...]
    local: tuple[int, ...]
    current: tuple[int, ...]


def absolute(
    sink_frames: Sequence[int], num_memory: int, local_frames: Sequence[int], current_frames: Sequence[int]
) -> SegmentIds:
    """Every frame keeps its index; memory frames stand directly before the first local (or current) frame."""
    first = (*local_frames, *current_frames)[0]
    return SegmentIds(
        sink=tuple(sink_frames),
        memory=tuple(range(first - num_memory, first)),
        local=tuple(local_frames),
        current=tuple(current_frames),
    )


def relative(
    num_sink: int, num_memory: int, num_local: int, num_current: int, *, last_frame: int, f_max: int
) -> SegmentIds:
    """Echo's recipe: the newest id grows until ``f_max`` and stays; everything but the sink stands right
    before it.

    Args:
        num_sink: sink frames present, which keep the ids ``0..num_sink - 1``.
        num_memory: memory frames present (they count as frames). ``num_local``: past frames present.
        num_current: frames of the chunk being generated.
        last_frame: index in the stream of the newest current frame.
        f_max: the largest id; segments must fit, ``num_sink + ... + num_current <= f_max + 1``.
    """
    assert num_sink + num_memory + num_local + num_current <= f_max + 1, "config lets no such setting pass"
    end = min(last_frame + num_memory, f_max) + 1
    current = end - num_current
    local = current - num_local
    return SegmentIds(
        sink=tuple(range(num_sink)),
        memory=tuple(range(local - num_memory, local)),
        local=tuple(range(local, current)),
        current=tuple(range(current, end)),
    )


def segment_ids(
    positions: Absolute | Relative,
    sink_frames: Sequence[int],
    num_memory: int,
    local_frames: Sequence[int],
    current_frames: Sequence[int],
) -> SegmentIds:
    """Ids under a configured recipe; frames are given by their index in the stream."""
    if isinstance(positions, Absolute):
        return absolute(sink_frames, num_memory, local_frames, current_frames)
    return relative(
        len(sink_frames),
        num_memory,
        len(local_frames),
        len(current_frames),
        last_frame=current_frames[-1],
        f_max=positions.f_max,
    )


def aligned_to_frames(ids: SegmentIds, current_frames: Sequence[int]) -> SegmentIds:
    """The same ids, all shifted by one number so that the current frames get their index in the stream.

    Attention sees only differences of ids. Local frames keep their distance to the current ones under every
    recipe, so after the shift their id is their index too: their keys are rotated once, when they are
    committed, and only sink and memory are rotated again as the stream goes on.
    """
    shift = current_frames[-1] - ids.current[-1]

    def shifted(segment: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(i + shift for i in segment)

    return SegmentIds(shifted(ids.sink), shifted(ids.memory), shifted(ids.local), shifted(ids.current))

"""The contract of histories: what a chunk reads (view) and what it leaves (commit); what happens to evicted
frames is said in `policy.py`.

Legend: b batch (base rows), r rows = copies * b, t own tokens, k keys read, h heads, p rotated pairs.

A history is ``[sink | memory | local]`` of past frames. Every pass of a chunk sees the same view; a chunk
commits once. Two implementations share everything but storage: :class:`~longtake.history.slots.SlotHistory`
(in place, fixed buffers, for serving) and :class:`~longtake.history.pure.PureHistory` (functional, for
training).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from longtake.cache.base import Entries, Rows, take_rows
from longtake.cache.spec import CacheSpec
from longtake.config import Config
from longtake.errors import ConfigError, HistoryError
from longtake.history.policies import AnyPolicy
from longtake.history.positions import Absolute, Positions, Relative, aligned_to_frames, segment_ids
from longtake.history.window import WindowConfig
from longtake.ops.rope import Phases, grid_phases, rotate


class HistoryConfig(Config):
    """How far a chunk looks back. Lengths are latent frames.

    Args:
        window_frames: frames a chunk attends to in all, sink and current chunk included; None for no limit.
            Need not be a multiple of the chunk: eviction is by frame.
        sink_frames: the first frames of a stream, kept for ever.
        chunk_frames: frames generated together.
        positions: temporal ids.
        policy: what becomes of frames that leave the window.
    """

    window_frames: int | None = Field(default=12, ge=1)
    sink_frames: int = Field(default=3, ge=0)
    chunk_frames: int = Field(default=3, ge=1)
    positions: Positions = Absolute()
    policy: AnyPolicy = WindowConfig()

    @model_validator(mode="after")
    def _fits(self) -> HistoryConfig:
        least = self.sink_frames + self.chunk_frames
        if self.window_frames is not None and self.window_frames < least:
            raise ConfigError(
                f"window_frames={self.window_frames} does not hold sink {self.sink_frames} "
                f"+ chunk {self.chunk_frames}",
                f"use window_frames >= {least}",
            )
        if isinstance(self.positions, Relative):
            if self.window_frames is None:
                raise ConfigError(
                    "an unlimited window does not fit relative positions, which are bounded",
                    'set window_frames or use positions {"kind": "absolute"}',
                )
            check_ids_fit(self, num_memory=0)
        return self

    @property
    def local_frames(self) -> int | None:
        """Past frames kept beside the sink, ``window - sink - chunk``; None for no limit."""
        if self.window_frames is None:
            return None
        return self.window_frames - self.sink_frames - self.chunk_frames


def check_ids_fit(config: HistoryConfig, num_memory: int) -> None:
    """Raise ConfigError where sink + memory + local + chunk need more ids than ``f_max`` allows."""
    if not isinstance(config.positions, Relative) or config.window_frames is None:
        return
    need, ids = config.window_frames + num_memory, config.positions.f_max + 1
    if need > ids:
        raise ConfigError(
            f"window {config.window_frames} + memory {num_memory} = {need} frames do not fit "
            f"f_max={config.positions.f_max} ({ids} ids)",
            f'use positions.f_max >= {need - 1}, a shorter window or positions {{"kind": "absolute"}}',
        )


QUERIES = "q"
"""The part of a chunk's entries that no history keeps but some policies ask for."""


@dataclass(frozen=True)
class HistoryView:
    """Everything a chunk may read: past entries, positions of its own tokens, masks where needed. Never
    written.

    Args:
        segments: past entries, rotary parts already turned; each ``[b, tokens, ...]``. No segments at a
            stream's start. A segment that some layers do not read comes first.
        phases: of the own tokens, ``[b or 1, t, 1, p]``.
        num_frames: own frames. ``grid``: tokens per frame as (rows, columns).
        mask_b1tk: bool over past and own keys, broadcastable to ``[b, 1, t, k]``, True where visible; None:
            all visible.
        copies: forward rows per base row; row ``copy * b + i`` reads what base row ``i`` reads.
        is_fresh: False once a commit has overwritten what this view shows.
        later: makes the view of a chunk's passes after its first one; None where they read the same.
        wants_queries: entries shall have the tokens' un-rotated queries too, as part `QUERIES`.
        packs: entries shall be as buffers keep them; else as numbers, rounded alike, for training, whose
            gradients flow through numbers alone.
        made: a memo that follows from the rest: of each layer what it made of the past and wants again in
            other passes over this view.
    """

    segments: tuple[Entries, ...]
    phases: Phases
    num_frames: int
    grid: tuple[int, int]
    mask_b1tk: Tensor | None = None
    copies: int = 1
    is_fresh: Callable[[], bool] | None = None
    later: Callable[[], HistoryView] | None = None
    wants_queries: bool = False
    packs: bool = True
    made: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def check_fresh(self) -> None:
        """Raise HistoryError where a commit has overwritten this view (host integers only, no sync)."""
        if self.is_fresh is not None and not self.is_fresh():
            raise HistoryError(
                "this view is older than a commit to its streams", "ask the history for a new view"
            )

    def after_first_pass(self) -> HistoryView:
        """What the passes of the same chunk after its first one read."""
        return self if self.later is None else self.later()

    def repeat(self, copies: int) -> HistoryView:
        """The same view for ``copies`` times as many rows, copy-major, without copying past entries."""
        later = self.later
        return replace(
            self,
            copies=self.copies * copies,
            later=None if later is None else lambda: later().repeat(copies),
        )

    def select(self, rows: Rows) -> HistoryView:
        """The view of some base rows."""
        assert self.copies == 1, "select base rows before repeating"
        phases, mask = self.phases, self.mask_b1tk
        if phases.cos.shape[0] > 1:
            phases = Phases(take_rows(phases.cos, rows), take_rows(phases.sin, rows))
        if mask is not None and mask.shape[0] > 1:
            mask = take_rows(mask, rows)
        segments = tuple(segment.select(rows) for segment in self.segments)
        later = self.later
        return replace(
            self,
            segments=segments,
            phases=phases,
            mask_b1tk=mask,
            later=None if later is None else lambda: later().select(rows),
            made={},
        )

    def rotate(self, x_rthd: Tensor, pairs: Sequence[int] | None = None) -> Tensor:
        """Turn own queries or keys by their positions; `pairs` says which they have of the layout's pairs of
        channels, all by default.
        """
        phases = self.phases if pairs is None else self.phases.of_pairs(pairs)
        if self.copies == 1 or phases.cos.shape[0] == 1:
            return rotate(x_rthd, phases)
        return rotate(torch.unflatten(x_rthd, 0, (self.copies, -1)), phases).flatten(0, 1)

    def past(self, layer: int) -> list[Mapping[str, Tensor]]:
        """What a layer reads of the past, segment by segment, one row per base row. Segments may differ in
        layout.
        """
        return [parts for segment in self.segments if (parts := segment.layers[layer])]

    def with_own(self, layer: int, name: str, own_rt: Tensor) -> Tensor:
        """Past and own tokens of one part, ``[r, k, ...]``: the one copy an attention layer makes."""
        return self.joined([parts[name] for parts in self.past(layer)], own_rt)

    def joined(self, past: Sequence[Tensor], own_rt: Tensor) -> Tensor:
        """Tensors ``[b, tokens, ...]`` that follow from the past, then one of the own tokens: ``[r, k,
        ...]``.
        """
        if not past:
            return own_rt
        if self.copies == 1:
            return torch.cat([*past, own_rt], dim=1)
        own = torch.unflatten(own_rt, 0, (self.copies, -1))
        return torch.cat([*(part.expand(self.copies, *part.shape) for part in past), own], dim=2).flatten(
            0, 1
        )

    def mask(self, layer: int) -> Tensor | None:
        """The mask of a layer's keys for all rows, or None."""
        if self.mask_b1tk is None:
            return None
        unread = sum(segment.num_tokens for segment in self.segments if not segment.layers[layer])
        mask_b1tk = self.mask_b1tk[..., unread:]
        if self.copies == 1 or mask_b1tk.shape[0] == 1:
            return mask_b1tk
        return mask_b1tk.expand(self.copies, *mask_b1tk.shape).flatten(0, 1)


def split_queries(entries: Entries) -> tuple[Entries, tuple[Tensor, ...] | None]:
    """What a history keeps of a committed chunk's entries, and the queries where there are any."""
    if QUERIES not in entries.layers[0]:
        return entries, None
    return entries.without(QUERIES), tuple(layer[QUERIES] for layer in entries.layers)


def frame_mask(mask_ff: Tensor, tokens_per_frame: int) -> Tensor:
    """Spread a bool mask between frames to their tokens, ``[1, 1, t, t]``."""
    return mask_ff.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)[None, None]


@dataclass(frozen=True)
class Reencoding:
    """A block-causal pass over frames that a history holds: they see the chunks before their own and their
    own. The memory is not read: it is rebuilt from what such a pass makes.

    Args:
        frames: indices in the stream of the frames to pass, oldest first.
        own_ids: their temporal ids. ``sink_ids``: of the sink that they read, empty where it is not read.
        mask_tt: between their tokens.
    """

    frames: tuple[int, ...]
    own_ids: tuple[int, ...]
    sink_ids: tuple[int, ...]
    mask_tt: Tensor

    def view(
        self,
        segments: tuple[Entries, ...],
        spec: CacheSpec,
        grid: tuple[int, int],
        device: torch.device | str,
        *,
        packs: bool = True,
    ) -> HistoryView:
        """What the frames read, beside themselves these segments whole."""
        past_tokens = sum(segment.num_tokens for segment in segments)
        mask_tk = F.pad(self.mask_tt, (past_tokens, 0), value=True).to(device)
        phases = frame_phases([self.own_ids], grid, spec, device)
        return HistoryView(segments, phases, len(self.frames), grid, mask_tk, packs=packs)


def plan_reencoding(
    config: HistoryConfig,
    frame_tokens: int,
    sink: Sequence[int],
    local: Sequence[int],
    *,
    own_sink: bool,
    own_local: bool,
    read_sink: bool,
) -> Reencoding:
    """Which frames a pass encodes again, and with which ids.

    Args:
        config: chunks and positions.
        frame_tokens: tokens of a frame.
        sink, local: indices of the frames held.
        own_sink, own_local: which segments are encoded again, one of them at least.
        read_sink: the sink is read as it is (and not encoded again).
    """
    assert own_sink or own_local
    assert not (own_sink and read_sink)
    sink = sink if own_sink or read_sink else ()
    local = local if own_local else ()
    last = local or sink
    ids = aligned_to_frames(segment_ids(config.positions, sink if local else (), 0, (), last), last)
    frames = (*(sink if own_sink else ()), *local)
    own_ids = (*(ids.sink if own_sink and local else ()), *ids.current)
    chunk_f = torch.tensor(frames) // config.chunk_frames
    mask_tt = frame_mask(chunk_f[:, None] >= chunk_f[None], frame_tokens)
    return Reencoding(frames, own_ids, ids.sink if read_sink and local else (), mask_tt)


def full_view(
    spec: CacheSpec,
    frame_ids: Sequence[float],
    grid: tuple[int, int],
    mask_ff: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> HistoryView:
    """A view without a past, for whole sequences in one pass: bidirectional, or with any mask between frames.

    Args:
        spec: the layout, for its rotary frequencies.
        frame_ids: temporal id of every frame; ids may repeat (a clean and a noisy copy of the same frame).
        grid: tokens per frame as (rows, columns).
        mask_ff: bool, True where the row's frame may see the column's frame; every frame must see one at
            least.
        device: where the forward pass runs.
    """
    phases = frame_phases([frame_ids], grid, spec, device)
    mask = None if mask_ff is None else frame_mask(mask_ff.to(device), grid[0] * grid[1])
    return HistoryView((), phases, len(frame_ids), grid, mask)


def frame_phases(
    frame_ids: Sequence[Sequence[float]], grid: tuple[int, int], spec: CacheSpec, device: torch.device | str
) -> Phases:
    """Phases of whole frames on the video's own token grid; one row for all where the rows' ids are equal."""
    if all(row == frame_ids[0] for row in frame_ids):
        frame_ids = frame_ids[:1]
    return grid_phases(frame_ids, range(grid[0]), range(grid[1]), spec.rope).to(device)

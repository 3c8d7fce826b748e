"""Both histories against a list that forgets nothing: contents, ids, evictions, memory, slots, buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake.cache.base import Buffers, Entries
from longtake.cache.dense import dense_layout
from longtake.cache.spec import CacheSpec
from longtake.errors import ConfigError, HistoryError
from longtake.history.base import HistoryConfig, HistoryView
from longtake.history.policy import Evicted, MemoryGrid, Policy, PolicyState
from longtake.history.positions import Absolute, Relative, segment_ids
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.ops.rope import token_phases, unrotate

GRID = (1, 2)
TOKENS = 2
SPEC = dense_layout(num_layers=2, num_heads=2, head_dim=6)


def entries_of(rows: list[list[int]]) -> Entries:
    """Recognisable entries: the value of frame i is i, keys are a fixed function of i."""
    frame_bf = torch.tensor(rows, dtype=torch.float32)
    token_bt = frame_bf.repeat_interleave(TOKENS, 1) + 0.25 * torch.arange(TOKENS).repeat(frame_bf.shape[1])

    def part(layer: int, turn: float) -> Tensor:
        wave = torch.arange(1, 13, dtype=torch.float32).reshape(2, 6) * turn + layer
        return torch.sin(token_bt[..., None, None] * 0.37 + wave)

    def value(layer: int) -> Tensor:
        return (token_bt[..., None, None] + 1000.0 * layer).expand(-1, -1, 2, 6).clone()

    return Entries(tuple({"k": part(layer, 0.7), "v": value(layer)} for layer in range(SPEC.num_layers)))


def shown(view: HistoryView, row: int) -> list[tuple[float, Tensor]]:
    """What a row of a view shows, in the order of frames: (value, turned key)."""
    tokens: list[tuple[float, Tensor]] = []
    for segment in view.segments:
        v, k = segment.layers[1]["v"][row, :, 0, 0], segment.layers[1]["k"][row]
        tokens += [(float(v[i]) - 1000, k[i]) for i in range(len(v))]
    if view.mask_b1tk is not None:
        visible = view.mask_b1tk[row, 0, 0]
        assert visible[len(tokens) :].all(), "own tokens are always visible"
        tokens = [token for token, see in zip(tokens, visible.tolist(), strict=False) if see]
    return sorted(tokens, key=lambda token: token[0])


def check_view(view: HistoryView, row: int, config: HistoryConfig, past: int) -> None:
    """A row shows exactly the frames of the definition, each key turned as it should be."""
    sink = [frame for frame in range(past) if frame < config.sink_frames]
    others = [frame for frame in range(past) if frame >= config.sink_frames]
    if config.local_frames is not None:
        others = others[len(others) - min(len(others), config.local_frames) :]
    current = range(past, past + view.num_frames)
    ids = segment_ids(config.positions, sink, 0, others, current)
    expected = dict(zip([*sink, *others], [*ids.sink, *ids.local], strict=True))
    tokens = shown(view, row)
    assert [value for value, _ in tokens] == [frame + 0.25 * i for frame in expected for i in range(TOKENS)]
    # Only differences of ids matter: what a query of the newest own token sees of each key.
    phases = view.phases
    own = row if phases.cos.shape[0] > 1 else 0
    for value, key in tokens:
        frame, place = int(value), round((value - int(value)) * 4)
        raw = entries_of([[frame]]).layers[1]["k"][0, place]
        newest = torch.complex(
            phases.cos[own, -TOKENS, 0], phases.sin[own, -TOKENS, 0]
        )  # place 0 of the last frame
        turned = torch.view_as_complex(key.reshape(2, 3, 2)) * newest.conj()
        offset = torch.tensor([[[float(expected[frame] - ids.current[-1]), 0.0, float(place)]]])
        there = token_phases(offset, SPEC.rope)
        wanted = torch.view_as_complex(raw.reshape(2, 3, 2)) * torch.complex(there.cos, there.sin)[0, 0]
        torch.testing.assert_close(turned, wanted, atol=2e-5, rtol=0)


def make_config(chunk: int, sink: int, local: int | None, relative: bool, slack: int) -> HistoryConfig:
    window = None if local is None else sink + local + chunk
    positions = Relative(f_max=window - 1 + slack) if relative and window is not None else Absolute()
    return HistoryConfig(window_frames=window, sink_frames=sink, chunk_frames=chunk, positions=positions)


configs = st.builds(
    make_config,
    chunk=st.integers(1, 4),
    sink=st.integers(0, 5),
    local=st.one_of(st.none(), st.integers(0, 7)),
    relative=st.booleans(),
    slack=st.integers(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(config=configs, sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_both_histories_show_what_the_definition_says(config: HistoryConfig, sizes: list[int]) -> None:
    pure = PureHistory(config, SPEC, GRID)
    fixed = SlotHistory(config, SPEC, GRID, 2, max_frames=40)
    slots = [fixed.join(), fixed.join()]
    past = 0
    for size in sizes:
        size = min(size, config.chunk_frames)
        for view in (pure.view(size), fixed.view(slots, size)):
            check_view(view, 0, config, past)
            check_view(
                view, len(slots) - 1 if view.segments and view.segments[0].num_rows > 1 else 0, config, past
            )
        entries = entries_of([list(range(past, past + size))] * 2)
        pure = pure.commit(entries)
        fixed.commit(entries, slots)
        pure.check_integrity()
        fixed.check_integrity()
        past += size


@settings(max_examples=40, deadline=None)
@given(config=configs, data=st.data())
def test_slots_at_different_lengths_share_a_view(config: HistoryConfig, data: st.DataObject) -> None:
    fixed = SlotHistory(config, SPEC, GRID, 3, max_frames=60)
    past: dict[int, int] = {}
    for _ in range(data.draw(st.integers(4, 14))):
        action = data.draw(st.sampled_from(["step", "step", "step", "join", "leave"]))
        if action == "join" and len(past) < 3:
            past[fixed.join()] = 0
        elif action == "leave" and past:
            slot = data.draw(st.sampled_from(sorted(past)))
            fixed.leave(slot)
            del past[slot]
        elif past:
            slots = data.draw(st.lists(st.sampled_from(sorted(past)), min_size=1, unique=True))
            size = config.chunk_frames
            if any(past[slot] + size > 60 for slot in slots):
                continue
            view = fixed.view(slots)
            for row, slot in enumerate(slots):
                check_view(view, row, config, past[slot])
            rows = [list(range(past[slot], past[slot] + size)) for slot in slots]
            fixed.commit(entries_of(rows), slots)
            for slot in slots:
                past[slot] += size
        fixed.check_integrity()


@dataclass(frozen=True)
class MeanPolicy(Policy):
    """Remembers a running sum of what was evicted, as a memory of one frame; checks what it is given."""

    prior: bool = False

    @property
    def memory_grid(self) -> MemoryGrid:
        return MemoryGrid.regular(1, (0.5,), (0.0, 1.0))

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        return {
            "sum": torch.ones(batch, 2, TOKENS, 2, 2, 6, device=device, dtype=dtype),
            "count": torch.zeros(batch),
        }

    def readable(self, num_evicted: int) -> bool:
        return self.prior or num_evicted > 0

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        wanted = entries_of([list(frames) for frames in evicted.frames])
        for ours, theirs in zip(evicted.entries.layers, wanted.layers, strict=True):
            for name in ("k", "v"):
                torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-6)
        sums = [
            torch.stack([layer[name].unflatten(1, (-1, TOKENS)).sum(1) for name in ("k", "v")], dim=2)
            for layer in evicted.entries.layers
        ]
        return {
            "sum": 0.5 * state["sum"] + torch.stack(sums, 1),
            "count": state["count"] + len(evicted.frames[0]),
        }

    def read(self, state: PolicyState) -> Entries:
        total = state["sum"]
        return Entries(tuple({"k": total[:, i, :, 0], "v": total[:, i, :, 1]} for i in range(2)))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("chunk", "sink", "local"), [(2, 1, 3), (3, 3, 0), (2, 3, 1), (3, 0, 4)])
def test_policies_get_whole_frames_unrotated_and_are_read_alike(
    prior: bool, relative: bool, chunk: int, sink: int, local: int
) -> None:
    window = chunk + sink + local
    positions = Relative(f_max=window + 2) if relative else Absolute()
    config = HistoryConfig(window_frames=window, sink_frames=sink, chunk_frames=chunk, positions=positions)
    policy = MeanPolicy(prior)
    pure = PureHistory(config, SPEC, GRID, policy)
    fixed = SlotHistory(config, SPEC, GRID, 2, policy=policy)
    late = fixed.join()
    slot = fixed.join()
    for c in range(7):
        view, fixed_view = pure.view(), fixed.view([slot])
        ours, theirs = shown(fixed_view, 0), shown(view, 0)
        assert len(ours) == len(theirs) == sum(segment.num_tokens for segment in view.segments)
        for (value, key), (other_value, other_key) in zip(ours, theirs, strict=True):
            assert value == pytest.approx(other_value, abs=1e-3)
            torch.testing.assert_close(key, other_key, atol=1e-4, rtol=0)
        entries = entries_of([list(range(c * chunk, (c + 1) * chunk))])
        pure = pure.commit(entries)
        fixed.commit(entries, [slot])
        if c >= 2:  # another stream, two chunks behind: rows that evict differently share a commit
            fixed.commit(entries_of([list(range((c - 2) * chunk, (c - 1) * chunk))]), [late])
        fixed.check_integrity()
        pure.check_integrity()
    assert pure.state is not None
    assert (
        int(pure.state["count"])
        == pure.num_evicted
        == 7 * chunk - sink - local
        == fixed.record(slot).num_evicted
    )
    assert len(shown(fixed.view([late, slot]), 1)) == (1 + sink + local) * TOKENS


def test_memory_can_be_reset_and_rebuilt() -> None:
    config = HistoryConfig(window_frames=6, sink_frames=1, chunk_frames=2)
    fixed = SlotHistory(config, SPEC, GRID, 1, policy=MeanPolicy())
    slot = fixed.join()
    for c in range(4):
        fixed.commit(entries_of([[2 * c, 2 * c + 1]]), [slot])
    assert len(shown(fixed.view([slot]), 0)) == 5 * TOKENS
    fixed.reset_memory(slot)
    assert len(shown(fixed.view([slot]), 0)) == 4 * TOKENS
    fixed.reset_memory(slot, rebuild=True)
    memory = fixed.view([slot]).segments[0].layers[1]["v"][0, :TOKENS, 0, 0]
    wanted = entries_of([[5, 6, 7]]).layers[1]["v"][0, :, 0, 0].unflatten(0, (3, TOKENS)).sum(0) + 0.5
    torch.testing.assert_close(memory, wanted)


def test_memory_that_does_not_fit_the_ids_is_refused() -> None:
    config = HistoryConfig(window_frames=6, sink_frames=1, chunk_frames=2, positions=Relative(f_max=5))
    with pytest.raises(ConfigError, match="memory 1 = 7 frames"):
        SlotHistory(config, SPEC, GRID, 1, policy=MeanPolicy())
    with pytest.raises(ConfigError, match="memory 1 = 7 frames"):
        PureHistory(config, SPEC, GRID, MeanPolicy())


def test_a_dropped_sink_fills_with_what_leaves_the_window() -> None:
    config = HistoryConfig(window_frames=7, sink_frames=2, chunk_frames=2, positions=Relative(f_max=8))
    fixed = SlotHistory(config, SPEC, GRID, 1)
    slot = fixed.join()

    def frames() -> list[int]:
        return [int(value) for value, _ in shown(fixed.view([slot]), 0)][::TOKENS]

    for c in range(4):
        fixed.commit(entries_of([[2 * c, 2 * c + 1]]), [slot])
    assert frames() == [0, 1, 5, 6, 7]
    fixed.drop_sink(slot)
    assert frames() == [5, 6, 7]
    fixed.commit(entries_of([[8, 9]]), [slot])
    assert frames() == [5, 6, 7, 8, 9]
    assert fixed.record(slot).sink == [5, 6]
    fixed.commit(entries_of([[10, 11]]), [slot])
    assert frames() == [5, 6, 9, 10, 11]
    fixed.check_integrity()
    key = fixed.view([slot]).segments[0].layers[0]["k"][0, :TOKENS]
    ids = torch.tensor(
        [[[11.0 + 2 - 8, 0.0, float(i)] for i in range(TOKENS)]]
    )  # relative id 0, aligned to frames
    ids[..., 0] = 13 - 8
    torch.testing.assert_close(
        unrotate(key[None], token_phases(ids, SPEC.rope)), entries_of([[5]]).layers[0]["k"], atol=1e-5, rtol=0
    )


def test_misuse_is_told() -> None:
    config = HistoryConfig(window_frames=6, sink_frames=1, chunk_frames=2)
    fixed = SlotHistory(config, SPEC, GRID, 1)
    with pytest.raises(HistoryError, match="slot 0 holds no stream"):
        fixed.view([0])
    slot = fixed.join()
    with pytest.raises(HistoryError, match="all 1 slots are taken"):
        fixed.join()
    with pytest.raises(HistoryError, match="chunk of 3 frames exceeds chunk_frames=2"):
        fixed.view([slot], 3)
    with pytest.raises(HistoryError, match="chunk of 3 frames"):
        PureHistory(config, SPEC, GRID).view(3)
    with pytest.raises(HistoryError, match="max_frames"):
        SlotHistory(HistoryConfig(window_frames=None), SPEC, GRID, 1)
    view = fixed.view([slot])
    view.check_fresh()
    fixed.commit(entries_of([[0, 1]]), [slot])
    with pytest.raises(HistoryError, match="older than a commit"):
        view.check_fresh()
    with pytest.raises(HistoryError, match="frame 7 is not held"):
        fixed.rewrite(entries_of([[7]]), [slot], [[7]])
    stale = fixed.view([slot])
    fixed.leave(slot)
    fixed.join()
    with pytest.raises(HistoryError, match="older"):
        stale.check_fresh()


@pytest.mark.parametrize("relative", [False, True])
def test_declared_bytes_are_the_bytes_allocated(relative: bool) -> None:
    config = make_config(chunk=2, sink=2, local=5, relative=relative, slack=0)
    fixed = SlotHistory(config, SPEC, GRID, 3, dtype=torch.bfloat16)
    per_token = SPEC.bytes_per_token(torch.bfloat16)
    assert per_token == 2 * 2 * (2 * 6) * 2
    sinks_again = 3 * 2 * TOKENS * per_token // 2 if relative else 0  # un-rotated keys of the sink
    assert fixed.num_bytes == 3 * 7 * TOKENS * per_token + sinks_again


def test_buffers_read_and_write_blocks() -> None:
    spec: CacheSpec = SPEC
    buffers = Buffers(spec, 2, 5, torch.device("cpu"), torch.float32)
    blocks = entries_of([[3], [4]])
    buffers.write_blocks(blocks, torch.tensor([0, 1]), torch.tensor([1, 0]), start=1, block_tokens=TOKENS)
    read: list[Any] = [buffers.read([slot], 0, 5).layers[0]["v"][0, :, 0, 0].tolist() for slot in (0, 1)]
    assert read == [[0, 0, 0, 3, 3.25], [0, 4, 4.25, 0, 0]]
    again = buffers.gather_blocks(torch.tensor([1]), torch.tensor([0]), 1, TOKENS)
    assert torch.equal(again.layers[1]["k"], blocks.layers[1]["k"][1:])
    view = buffers.read(slice(0, 1), 3, 5)
    buffers.clear(0)
    assert float(view.layers[0]["v"].abs().max()) == 0, "a slice of slots is a view of the same memory"

"""The evolving memory: equal in both histories, learned through evictions, the plain window where off."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.dense import dense_layout
from longtake.diffusion.sampler import context_pass
from longtake.errors import ConfigError, HistoryError
from longtake.history.base import HistoryView
from longtake.history.evolving import EvolvingConfig, EvolvingPolicy
from longtake.history.policy import Evicted, Policy, Surroundings
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.models.dit import TextContext
from longtake.models.memory import MemoryEncoder
from memory_rollouts import (
    CONFIG,
    encoder,
    functional,
    in_place,
    policy,
    rollout,
    text_of,
)
from tiny_parts import GRID, small_dit


def test_a_cell_takes_in_its_own_part_of_the_picture() -> None:
    """As the published update of every cell alone, which knows no places."""
    whole = encoder()
    torch.manual_seed(1)
    cells = MemoryEncoder(whole.config.replace(attends="cell"))
    cells.load_state_dict(whole.state_dict())
    generator = torch.Generator().manual_seed(2)
    state = torch.randn(2, 12, 24, generator=generator)
    keys, values = torch.randn(2, 2, 3 * 4 * 6, 2, 12, generator=generator)
    updated = cells(state, keys, values, (4, 6)).unflatten(1, (2, 2, 3))
    frames = [x.unflatten(1, (3, 4, 6)) for x in (keys, values)]
    for row in range(2):
        for column in range(3):
            own = [x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1, 3) for x in frames]
            expected = whole(state.unflatten(1, (2, 2, 3))[:, :, row, column], *own)
            torch.testing.assert_close(updated[:, :, row, column], expected)
    # Nothing goes from one part of the picture to another.
    frames[1][:, :, 0, 0] += 1
    moved = cells(state, keys, frames[1].flatten(1, 3), (4, 6)).unflatten(1, (2, 2, 3))
    same = (moved == updated).all(-1)
    assert not same[:, :, 0, 0].any()
    same[:, :, 0, 0] = True
    assert same.all()


def test_cells_that_do_not_divide_a_frame_are_refused() -> None:
    network = MemoryEncoder(encoder().config.replace(rows=3, attends="cell"))
    surroundings = Surroundings(dense_layout(2, 2, 12), (4, 6), network)
    with pytest.raises(ConfigError, match="3 x 3 cells does not divide frames of 4 x 6"):
        EvolvingConfig().make(surroundings)
    EvolvingConfig(mode="prior").make(surroundings)  # takes nothing in


@pytest.mark.parametrize("mode", ["update", "prior"])
@pytest.mark.parametrize("initially", [True, False])
@pytest.mark.parametrize("readers", ["all", (1,)])
@pytest.mark.parametrize("timing", ["chunk", "second_pass"])
def test_both_histories_give_the_same(
    mode: Literal["update", "prior"], initially: bool, readers: object, timing: str
) -> None:
    if mode == "prior" and not initially:
        with pytest.raises(ConfigError, match="a memory that nobody reads"):
            policy(mode, read_initially=initially)
        return
    dit = small_dit()
    used = policy(mode, read_initially=initially, read_layers=readers, timing=timing)
    with torch.no_grad():
        expected = functional(dit, used)
    for ours, wanted in zip(in_place(dit, used), expected, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("rows", "row_ids"), [(2, (0.0, 1.0)), (1, (0.5,))])
def test_memory_keys_are_turned_by_the_ids_of_the_design(rows: int, row_ids: tuple[float, ...]) -> None:
    """Window 5, sink 1, two frames of memory, f_max 6: the sink has id 0, the memory 1 and 2, local frames 3
    and 4, the chunk 5 and 6; memory rows stand evenly spread over the grid's two. Only differences matter:
    the chunk's frames are turned by their indices 8 and 9, and all else with them.
    """
    torch.manual_seed(0)
    network = MemoryEncoder(encoder().config.replace(rows=rows))
    used = EvolvingConfig().make(Surroundings(dense_layout(2, 2, 12), GRID, network))
    dit = small_dit()
    kept = PureHistory(CONFIG, dit.cache_spec(), GRID, policy=used)
    with torch.no_grad():
        for x in torch.randn(4, 1, 2, 3, *GRID):
            _, entries = dit(x, x.new_zeros(1, 2), text_of(dit).select([0]), kept.view())
            kept = kept.commit(entries)
        raw = used.read(kept.state or {}).layers[1]
    view = kept.view()
    (parts,) = (
        parts
        for parts in view.past(1)
        if parts["v"].shape == raw["v"].shape and torch.equal(parts["v"], raw["v"])
    )
    places = [(time, row, column) for time in (4.0, 5.0) for row in row_ids for column in (0.0, 1.0, 2.0)]
    axes = [[place * 10000 ** (-i / 2) for place in axis for i in range(2)] for axis in places]
    spin = torch.polar(torch.ones(len(places), 6).double(), torch.tensor(axes).double())
    wanted = torch.view_as_complex(raw["k"].double().unflatten(-1, (6, 2))) * spin[None, :, None]
    torch.testing.assert_close(parts["k"], torch.view_as_real(wanted).flatten(-2).float())
    newest = torch.complex(view.phases.cos, view.phases.sin)[0, -GRID[0] * GRID[1], 0]
    angle = torch.tensor([9.0, 9.0 / 100, 0.0, 0.0, 0.0, 0.0])  # of the last frame's first token
    torch.testing.assert_close(newest, torch.polar(torch.ones(6), angle))


def test_a_state_in_half_precision_would_stand_still() -> None:
    """Where a gate keeps nearly all of it, what an update adds is less than a half number's step."""
    network = encoder()
    torch.nn.init.constant_(network.gate_linear.bias, 5.0)
    torch.nn.init.zeros_(network.gate_linear.weight)
    torch.manual_seed(0)
    layer = {"k": torch.randn(1, 6, 2, 12), "v": torch.randn(1, 6, 2, 12)}
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        used = policy(network=network.to(dtype))
        entries = Entries(({}, {name: part.to(dtype) for name, part in layer.items()}))
        state = used.start(1, torch.device("cpu"), dtype)
        with torch.no_grad():
            for frame in range(300):
                state = used.absorb(state, Evicted(((frame,),), entries))
            assert all(part.dtype == dtype for part in used.read(state).layers[1].values())
        states.append(state["memory"].float())
    away = (states[0] - network.query_init.detach().float()).norm()
    assert float((states[1] - states[0]).norm() / away) < 0.05


@pytest.mark.parametrize("chunks", [1, 2, 5])
def test_what_becomes_the_sink_is_taken_in_by_no_memory(chunks: int) -> None:
    """After the sink was dropped, and the memory built anew of what the window still holds."""
    dit, used = small_dit(), policy()
    config = CONFIG.replace(window_frames=6, sink_frames=2, positions=Relative(f_max=7))
    taken_in: list[tuple[int, ...]] = []
    absorb = EvolvingPolicy.absorb

    def noted(self: EvolvingPolicy, state: dict[str, Tensor], evicted: Evicted) -> dict[str, Tensor]:
        taken_in.append(evicted.frames[0])
        return absorb(self, state, evicted)

    pure, fixed = PureHistory(config, dit.cache_spec(), GRID, policy=used), None
    fixed = SlotHistory(config, dit.cache_spec(), GRID, 1, policy=used)
    slot = fixed.join()
    x = torch.randn(12, 1, 2, 3, *GRID)
    text = text_of(dit).select([0])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(EvolvingPolicy, "absorb", noted)
        for index, chunk in enumerate(x):
            if index == chunks:
                taken_in.clear()
                pure = pure.without_sink().with_memory("rebuild")
                fixed.drop_sink(slot)
                fixed.reset_memory(slot, rebuild=True)
            view = pure.view()
            flow, entries = dit(chunk, chunk.new_zeros(1, 2), text, view)
            same, _ = dit(chunk, chunk.new_zeros(1, 2), text, fixed.view([slot]))
            torch.testing.assert_close(flow, same, atol=2e-5, rtol=1e-4)
            pure = pure.commit(entries)
            fixed.commit(entries, [slot])
    assert len(pure.sink_frames) == 2
    assert taken_in
    assert not {frame for frames in taken_in for frame in frames} & set(pure.sink_frames)


def test_exchanged_memories_are_those_of_the_other_stream() -> None:
    """In state and in what chunks read; twice is as before, and other streams keep theirs."""
    dit, used = small_dit(), policy()
    history = SlotHistory(CONFIG, dit.cache_spec(), GRID, 3, policy=used)
    slots = [history.join() for _ in range(3)]

    def memories() -> list[dict[str, Tensor]]:
        made = []
        for slot in slots:
            _, tensors = history.export_slot(slot)
            made.append({name: part for name, part in tensors.items() if "past" not in name})
        return made

    def read(slot: int) -> Tensor:
        with torch.no_grad():
            return dit(x[:1], x.new_zeros(1, 2), text_of(dit).select([0]), history.view([slot]))[0]

    generator = torch.Generator().manual_seed(0)
    text = TextContext.stack([text_of(dit).select([0])] * 3)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(3, 2, 3, *GRID, generator=generator)
            view = history.view(slots)
            history.commit(context_pass(dit, text, view, x), slots)
    flows = [read(slot) for slot in slots]  # memories are turned when they are first read
    before = memories()
    history.exchange_memories(slots[0], slots[1])
    after = memories()
    names = [name for name in before[0] if "memory" in name]
    assert len(names) > 2
    for name in names:
        for now, then in ((0, 1), (1, 0), (2, 2)):
            assert torch.equal(after[now][name], before[then][name]), name
        assert not torch.equal(before[0][name], before[1][name]), name
    assert not torch.allclose(read(slots[0]), flows[0])
    assert torch.equal(read(slots[2]), flows[2])
    history.exchange_memories(slots[0], slots[1])
    for slot, flow in zip(slots, flows, strict=True):
        torch.testing.assert_close(read(slot), flow)


def test_off_is_the_plain_window_exactly() -> None:
    dit = small_dit()
    for run in (in_place, functional):
        with torch.no_grad():
            plain, off = run(dit, None), run(dit, policy("off"))
        assert all(torch.equal(one, other) for one, other in zip(plain, off, strict=True))


def test_what_left_the_window_is_still_felt_with_memory_only() -> None:
    """The second chunk is changed; far beyond the window nothing is left of it but in memory."""
    dit = small_dit()
    text = text_of(dit)

    def far(used: Policy | None, change: float) -> Tensor:
        # The changed frame's entries are committed alone, so that no other chunk has read them.
        kept = PureHistory(CONFIG, dit.cache_spec(), GRID, **({} if used is None else {"policy": used}))
        generator = torch.Generator().manual_seed(3)
        for chunk in range(4):
            x = torch.randn(2, 2, 3, *GRID, generator=generator)
            own = PureHistory(CONFIG, dit.cache_spec(), GRID).view()
            entries = context_pass(dit, text, own, x)
            if chunk == 1:
                entries = entries.map(lambda part: part + change)
            kept = kept.commit(entries)
        x = torch.randn(2, 2, 3, *GRID, generator=generator)
        return dit(x, x.new_full((2, 2), 600.0), text, kept.view())[0]

    with torch.no_grad():
        for used, felt in ((None, False), (policy("prior"), False), (policy("update"), True)):
            assert torch.equal(far(used, 0.0), far(used, 0.5)) != felt


def test_a_rollout_teaches_every_parameter_of_the_memory() -> None:
    dit, network = small_dit(), encoder()
    flows = functional(dit, policy(network=network))
    flows[-1].square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_the_source_layer_is_what_is_absorbed() -> None:
    network = encoder()
    torch.manual_seed(0)
    layers = tuple({"k": torch.randn(1, 6, 2, 12), "v": torch.randn(1, 6, 2, 12)} for _ in range(2))
    evicted = Evicted(((1,),), Entries(layers))
    state = {"memory": network.initial(1)}
    for layer in (0, 1, -1):
        [(_, after)] = policy(network=network, source_layer=layer).absorb(state, evicted).items()
        assert torch.equal(after, network(state["memory"], layers[layer]["k"], layers[layer]["v"]))


@pytest.mark.parametrize("mode", ["update", "prior"])
def test_only_the_source_layer_is_gathered(
    mode: Literal["update", "prior"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At Wan's size the other layers of every evicted frame would be copied for nothing."""
    dit, used = small_dit(), policy(mode, source_layer=-1)
    seen: list[list[bool]] = []
    absorb = EvolvingPolicy.absorb

    def noted(self: EvolvingPolicy, state: dict[str, Tensor], evicted: Evicted) -> dict[str, Tensor]:
        seen.append([bool(layer) for layer in evicted.entries.layers])
        return absorb(self, state, evicted)

    monkeypatch.setattr(EvolvingPolicy, "absorb", noted)
    in_place(dit, used)
    assert all(held == [False, True] for held in seen)
    assert bool(seen) == (mode == "update")


def test_a_memory_that_the_ids_have_no_room_for_is_refused() -> None:
    dit = small_dit()
    tight = CONFIG.replace(positions=Relative(f_max=5))
    with pytest.raises(ConfigError, match=r"window 5 \+ memory 2 = 7 frames do not fit f_max=5"):
        PureHistory(tight, dit.cache_spec(), GRID, policy=policy())
    PureHistory(tight, dit.cache_spec(), GRID, policy=policy("off"))


def test_a_stream_starts_from_the_learned_state_whatever_was_in_its_slot() -> None:
    dit, used = small_dit(), policy()
    history = SlotHistory(CONFIG, dit.cache_spec(), GRID, 2, policy=used)
    slots = [history.join(), history.join()]
    with torch.no_grad():
        first = rollout(dit, lambda: history.view(slots), lambda entries: history.commit(entries, slots))
        for slot in slots:
            history.leave(slot)
        slots = [history.join(), history.join()]
        again = rollout(dit, lambda: history.view(slots), lambda entries: history.commit(entries, slots))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_detaching_cuts_the_memory_off() -> None:
    dit, network = small_dit(), encoder()
    kept = PureHistory(CONFIG, dit.cache_spec(), GRID, policy=policy(network=network))
    text = text_of(dit)
    for _ in range(4):
        x = torch.randn(2, 2, 3, *GRID)
        kept = kept.commit(context_pass(dit, text, kept.view(), x))
    assert kept.state is not None
    assert kept.state["memory"].requires_grad
    cut = kept.detach()
    assert cut.state is not None
    assert not cut.state["memory"].requires_grad
    assert dataclasses.replace(cut, state=kept.state).state is kept.state


def test_with_the_released_timing_the_first_pass_reads_the_memory_before_the_last_eviction() -> None:
    dit, text = small_dit(), text_of(small_dit())
    network = encoder()
    newest, late = (policy(network=network, timing=timing) for timing in ("chunk", "second_pass"))
    histories = [SlotHistory(CONFIG, dit.cache_spec(), GRID, 2, policy=used) for used in (newest, late)]
    slots = [[history.join(), history.join()] for history in histories]

    def memory(view: HistoryView) -> Tensor:
        return view.segments[0].layers[0]["v"]

    before: Tensor | None = None
    for chunk in range(5):
        views = [history.view(taken) for history, taken in zip(histories, slots, strict=True)]
        if chunk > 0:
            expected = memory(views[0]).clone()
            first = memory(views[1]).clone()
            assert torch.equal(first, expected if before is None else before)
            later = views[1].after_first_pass()
            assert torch.equal(memory(later), expected)
            assert torch.equal(memory(views[1].after_first_pass()), expected)
            before = expected
        entries = context_pass(dit, text, views[0], torch.randn(2, 2, 3, *GRID))
        for history, taken in zip(histories, slots, strict=True):
            history.commit(entries, taken)
    with pytest.raises(HistoryError, match="older than a commit"):
        views[1].after_first_pass()


@pytest.mark.parametrize("layer", [2, -3])
def test_a_source_that_the_network_does_not_have_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"source_layer={layer}, but the DiT has 2 layers"):
        policy(source_layer=layer)

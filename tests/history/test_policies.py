"""Every policy under the one contract, and the rules of those that keep or average what leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.dense import dense_layout
from longtake.diffusion.sampler import context_pass
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig, HistoryView
from longtake.history.compression import AverageConfig, Band, PooledConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import Evicted, Policy, PolicyConfig, Surroundings
from longtake.history.positions import Absolute, Relative
from longtake.history.pure import PureHistory
from longtake.history.retention import KeyFramesConfig, MostAttendedConfig
from longtake.history.slots import SlotHistory
from longtake.history.window import WindowConfig
from tiny_parts import GRID, LATENT, MEMORY, small_dit

POLICIES: dict[str, Any] = {
    "window": WindowConfig(),
    "evolving": EvolvingConfig(),
    "evolving late": EvolvingConfig(timing="second_pass", read_layers=(1,), read_initially=False),
    "prior": EvolvingConfig(mode="prior"),
    "off": EvolvingConfig(mode="off"),
    "key frames": KeyFramesConfig(num_frames=2, stride=3),
    "most attended frames": MostAttendedConfig(num_frames=2),
    "most attended tokens": MostAttendedConfig(num_frames=2, unit="token", decay=0.5),
    "average": AverageConfig(decays=(0.9, 0.5)),
    "pooled": PooledConfig(
        bands=(Band(num_entries=1), Band(num_entries=2, num_frames=2, pool=(2, 1))), num_ids=2
    ),
}
TOKENS = GRID[0] * GRID[1]
SPEC = dense_layout(num_layers=2, num_heads=1, head_dim=2)


LAYOUTS = {"dense": None} | {
    f"{path} {storage}": LATENT.replace(path=path, storage=storage)
    for path, storage in (("expand", "full"), ("absorbed", "full"), ("expand", "int4"), ("absorbed", "fp8"))
}
LAYOUTS["absorbed int4"] = LATENT.replace(path="absorbed", storage="int4", debias=True)
MIXED = LATENT.replace(rope_bands=((0, 0), (0, 0, 0), (1, 1)), heads_mix="keys")
LAYOUTS |= {f"mixed keys, {path}": MIXED.replace(path=path) for path in ("expand", "absorbed", "kept")}
ROUNDED_KEYS = "keys in 8 bits, "
LAYOUTS |= {
    f"{ROUNDED_KEYS}{path}": LATENT.replace(path=path, key_storage="fp8") for path in ("expand", "absorbed")
}
AS_LATENTS = "memory as latents, "
LAYOUTS |= {
    f"{AS_LATENTS}{path} {storage}": LATENT.replace(path=path, storage=storage, kv_rank=8)
    for path, storage in (("expand", "full"), ("absorbed", "full"), ("expand", "fp8"))
}
LAYOUTS[f"{AS_LATENTS}keys in 8 bits"] = LATENT.replace(kv_rank=8, key_storage="fp8")
POSITIONS: tuple[Any, ...] = (Relative(f_max=8), Relative(f_max=6), Absolute())
PRODUCT = [
    (layout, positions)
    for layout in LAYOUTS
    # Packing is below positions, and how a memory is read beside them.
    for positions in (
        POSITIONS[:1] if layout.endswith(("fp8", "int4")) or layout.startswith(AS_LATENTS) else POSITIONS
    )
]


@pytest.mark.parametrize(
    ("layout", "positions", "name"),
    [
        (layout, positions, name)
        for layout, positions in PRODUCT
        for name in POLICIES
        if not layout.startswith(AS_LATENTS) or isinstance(POLICIES[name], EvolvingConfig)
    ],
)
@pytest.mark.parametrize(("sink", "window"), [(1, 5), (0, 4), (3, 5), (1, None)])
def test_both_histories_agree_for_streams_at_different_lengths(
    name: str, positions: Any, sink: int, window: int | None, layout: str
) -> None:
    """The full product of layouts, policies, positions and windows, or a refusal that says why."""
    memory = MEMORY.replace(read_as_latent=(8, 6)) if layout.startswith(AS_LATENTS) else MEMORY
    network = small_dit(memory=memory, latent=LAYOUTS[layout])

    def both() -> tuple[PureHistory, SlotHistory]:
        config = HistoryConfig(
            window_frames=window, sink_frames=sink, chunk_frames=2, positions=positions, policy=POLICIES[name]
        )
        policy = network.policy(config.policy, GRID)
        spec = network.cache_spec()
        return PureHistory(config, spec, GRID, policy), SlotHistory(
            config, spec, GRID, 2, policy=policy, max_frames=20
        )

    num_memory = 0 if name in ("window", "off") else 2
    if isinstance(positions, Relative) and (window is None or window + num_memory > positions.f_max + 1):
        with pytest.raises(ConfigError, match="unlimited window" if window is None else "do not fit f_max"):
            both()
        return
    if name in ("average", "pooled") and layout.endswith(("int4", "fp8")):
        with pytest.raises(ConfigError, match="cannot calculate with packed latents"):
            both()
        return
    pure, fixed = both()
    size = fixed.num_bytes
    late, slot = fixed.join(), fixed.join()
    text = network.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
    generator = torch.Generator().manual_seed(3)
    chunks = [torch.randn(1, 2, 3, *GRID, generator=generator) for _ in range(6)]
    flows: list[Tensor] = []
    with torch.no_grad():
        for x in chunks:  # the definition: functional, one stream
            view = pure.view()
            time = x.new_full((1, 2), 600.0)
            flows += [network(x, time, text, each)[0] for each in (view, view.after_first_pass())]
            pure = pure.commit(context_pass(network, text, view, x))
            pure.check_integrity()
        for step in range(len(chunks) + 2):  # a stream, and from the third step on another one
            rows = [(slot, step)] if step < len(chunks) else []
            rows += [(late, step - 2)] if step >= 2 else []
            slots = [taken for taken, _ in rows]
            x = torch.cat([chunks[index] for _, index in rows])
            texts = text.repeat(len(rows))
            seen = fixed.view(slots)
            for later in (0, 1):
                each = seen.after_first_pass() if later else seen
                flow, _ = network(x, x.new_full((len(rows), 2), 600.0), texts, each)
                for row, (_, index) in enumerate(rows):
                    torch.testing.assert_close(flow[row], flows[2 * index + later][0], atol=3e-5, rtol=1e-4)
            fixed.commit(context_pass(network, texts, seen, x), slots)
            fixed.check_integrity()
    assert fixed.num_bytes == size


@pytest.mark.parametrize("name", ["window", "evolving"])
@pytest.mark.parametrize(
    ("positions", "chunk"),
    [(Absolute(), 2), (Relative(f_max=8), 2), (Relative(f_max=7), 2), (Relative(f_max=8), 3)],
)
def test_rounded_keys_are_the_same_numbers_in_both_histories(name: str, positions: Any, chunk: int) -> None:
    """As read by every chunk and by a pass that encodes the window again: a sink is read with the ids that it
    was committed with, with smaller ones beside a memory, and with larger ones.
    """
    network = small_dit(memory=MEMORY, latent=LAYOUTS[f"{ROUNDED_KEYS}expand"])
    config = HistoryConfig(
        window_frames=6, sink_frames=1, chunk_frames=chunk, positions=positions, policy=POLICIES[name]
    )
    policy, spec = network.policy(config.policy, GRID), network.cache_spec()
    pure = PureHistory(config, spec, GRID, policy)
    fixed = SlotHistory(config, spec, GRID, 1, policy=policy)
    slot, generator = fixed.join(), torch.Generator().manual_seed(5)

    def keys(view: HistoryView, tokens: int) -> Tensor:
        rotary = [parts["k_rope"].float() for parts in view.past(0) if "k_rope" in parts]
        return torch.cat(rotary, dim=1)[:, -tokens:].flatten().sort().values  # a ring has an order of its own

    for _ in range(7):
        layers = tuple(
            {
                part: 3 * torch.randn(1, chunk * TOKENS, *of_part.shape, generator=generator)
                for part, of_part in parts
            }
            for parts in spec.layers
        )
        pure = pure.commit(Entries(layers))
        fixed.commit(Entries(layers), [slot])
        held = len(pure.sink_frames) + len(pure.local_frames)
        assert torch.equal(keys(pure.view(), held * TOKENS), keys(fixed.view([slot]), held * TOKENS))
        if pure.local_frames:
            own = {"own_sink": False, "own_local": True, "read_sink": True}
            one, other = pure.reencode_view(**own)[1], fixed.reencode_view(slot, **own)[1]
            assert torch.equal(keys(one, TOKENS), keys(other, TOKENS))


def test_averages_are_kept_in_single_precision() -> None:
    """In half precision a slow average would stand still beside a change that is small."""
    policy = made(AverageConfig(decays=(0.99,)))
    state = policy.start(1, torch.device("cpu"), torch.bfloat16)
    for step in range(600):
        part = torch.full((1, 1, 1, 2), 1.0 if step == 0 else 1.3, dtype=torch.bfloat16)
        layer = {"k": part, "v": part}
        state = policy.absorb(state, Evicted(((step,),), Entries((layer, layer))))
    read = policy.read(state).layers[0]["v"]
    assert read.dtype == torch.bfloat16
    assert float(read[0, 0, 0, 0]) == pytest.approx(1.3, abs=0.01)


def made(config: PolicyConfig, grid: tuple[int, int] = (1, 1)) -> Policy:
    return config.make(Surroundings(SPEC, grid))


def frames_of(values: list[list[float]], tokens: int = 1) -> Entries:
    """Entries whose frames are constant numbers; token j of a frame is larger by j / 100."""
    frame_bf = torch.tensor(values, dtype=torch.float32)
    token_bt = frame_bf.repeat_interleave(tokens, 1) + torch.arange(tokens).repeat(frame_bf.shape[1]) / 100
    part = token_bt[..., None, None].expand(-1, -1, 1, 2)
    return Entries(tuple({"k": part + layer, "v": part - layer} for layer in range(2)))


def run(policy: Policy, chunks: list[list[list[int]]], tokens: int = 1) -> Tensor:
    """The values of layer 0 that chunks read after some evictions, ``[b, m]``."""
    state = policy.start(len(chunks[0]), torch.device("cpu"), torch.float32)
    for rows in chunks:
        frames = tuple(tuple(row) for row in rows)
        state = policy.absorb(
            state, Evicted(frames, frames_of([[float(f) for f in row] for row in rows], tokens))
        )
    read = policy.read(state)
    assert policy.memory_grid is not None
    assert read.num_tokens == policy.memory_grid.num_tokens
    for layer in range(2):
        torch.testing.assert_close(read.layers[layer]["k"] - layer, read.layers[0]["k"])
        torch.testing.assert_close(read.layers[layer]["v"] + layer, read.layers[0]["k"])
    return read.layers[0]["k"][:, :, 0, 0]


evictions = st.lists(st.integers(1, 4), min_size=1, max_size=12)


def consecutive(sizes: list[int], starts: tuple[int, ...]) -> list[list[list[int]]]:
    chunks, offset = [], 0
    for size in sizes:
        chunks.append([[start + offset + i for i in range(size)] for start in starts])
        offset += size
    return chunks


@settings(max_examples=40, deadline=None)
@given(sizes=evictions, num_frames=st.integers(1, 4), stride=st.integers(1, 5), start=st.integers(0, 9))
def test_the_bank_holds_the_newest_key_frames(
    sizes: list[int], num_frames: int, stride: int, start: int
) -> None:
    starts = (start, start + 3)
    shown = run(made(KeyFramesConfig(num_frames=num_frames, stride=stride)), consecutive(sizes, starts))
    for row, first in enumerate(starts):
        keys = [f for f in range(first, first + sum(sizes)) if f % stride == 0]
        wanted = ([first] * num_frames + keys)[-num_frames:]
        assert shown[row].tolist() == wanted


@settings(max_examples=20, deadline=None)
@given(sizes=evictions, start=st.integers(0, 9))
def test_averages_run_at_their_own_speeds(sizes: list[int], start: int) -> None:
    decays = (0.9, 0.5, 0.0)
    shown = run(made(AverageConfig(decays=decays)), consecutive(sizes, (start,)))
    for decay, value in zip(decays, shown[0].tolist(), strict=True):
        wanted = float(start)
        for frame in range(start, start + sum(sizes)):
            wanted = decay * wanted + (1 - decay) * frame
        assert value == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=20), start=st.integers(0, 9))
def test_bands_average_what_the_band_before_let_go(sizes: list[int], start: int) -> None:
    bands = (Band(num_entries=2), Band(num_entries=2, num_frames=2), Band(num_entries=1, num_frames=4))
    shown = run(made(PooledConfig(bands=bands)), consecutive(sizes, (start,)))
    # The definition: a stream that had always been its first frame, then every frame through plain lists.
    held = [[float(start)] * band.num_entries for band in bands]
    collected: list[list[float]] = [[] for _ in bands]
    for number, frame in enumerate(range(start, start + sum(sizes)), start=1):
        arriving: float | None = float(frame)
        for i, band in enumerate(bands):
            if arriving is None:
                break
            ratio = band.num_frames // (bands[i - 1].num_frames if i else 1)
            collected[i].append(arriving)
            arriving = None
            if number % band.num_frames == 0:
                assert len(collected[i]) == ratio
                held[i].append(sum(collected[i]) / ratio)
                collected[i] = []
                arriving = held[i].pop(0)
    assert shown[0].tolist() == pytest.approx(held[2] + held[1] + held[0], rel=1e-5)


def test_pools_average_neighbouring_tokens_and_stand_in_their_middle() -> None:
    policy = made(PooledConfig(bands=(Band(num_entries=1, pool=(1, 2)),), num_ids=3), grid=(2, 4))
    assert policy.memory_grid is not None
    assert policy.memory_grid.places == ((0, 0, 0.5), (0, 0, 2.5), (0, 1, 0.5), (0, 1, 2.5))
    shown = run(policy, [[[5]]], tokens=8)
    torch.testing.assert_close(shown[0], 5 + torch.tensor([0.005, 0.025, 0.045, 0.065]))


@pytest.mark.parametrize("unit", ["frame", "token"])
def test_what_is_attended_to_most_stays(unit: Any) -> None:
    """Two places on the grid: the queries want one frame's first token and another frame's second."""
    policy = made(MostAttendedConfig(num_frames=1, unit=unit, decay=0.0), grid=(1, 2))
    keys = torch.tensor([[0.0, 9.0], [6.0, 0.0], [0.0, 0.0]])  # frames, tokens
    part = keys.reshape(1, 6, 1, 1).expand(-1, -1, 1, 2)
    values = torch.arange(6.0).reshape(1, 6, 1, 1).expand(-1, -1, 1, 2)
    layer = {"k": part, "v": values}
    queries = (torch.ones(1, 3, 1, 2),) * 2
    state = policy.start(1, torch.device("cpu"), torch.float32)
    after = policy.absorb(state, Evicted(((3, 4, 5),), Entries((layer, layer)), queries))
    kept = policy.read(after).layers[1]["v"][0, :, 0, 0].tolist()
    assert kept == ([0, 1] if unit == "frame" else [2, 1])


def test_scores_fade() -> None:
    """A frame once attended to leaves when others are, the sooner the less of its score it retains."""
    left = []
    for decay in (0.0, 0.6):
        policy = made(MostAttendedConfig(num_frames=1, decay=decay))
        state = policy.start(1, torch.device("cpu"), torch.float32)
        for frame, key, query in ((0, 2.0, 1.0), (1, 0.0, 1.0), (2, -0.5, -0.05)):
            state = policy.absorb(state, one_token(frame, key, query))
        left.append(float(policy.read(state).layers[0]["v"][0, 0, 0, 0]))
    assert left == [2.0, 0.0]


def one_token(frame: int, key: float, query: float) -> Evicted:
    """A frame of one token with all its channels alike, and what asks for it."""
    part = torch.full((1, 1, 1, 2), key)
    layer = {"k": part, "v": torch.full_like(part, frame)}
    return Evicted(((frame,),), Entries((layer, layer)), (torch.full((1, 1, 1, 2), query),) * 2)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_came_first_has_no_right_to_stay(decay: float) -> None:
    """Under queries that want nothing in particular frames come and go: no sum of old scores, and no copy
    that merely fills a place, keeps new ones out.
    """
    policy = made(MostAttendedConfig(num_frames=3, decay=decay))
    state = policy.start(1, torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    for frame in range(60):
        key, query = torch.randn(2, generator=generator).tolist()
        state = policy.absorb(state, one_token(frame, key, query))
        kept = policy.read(state).layers[0]["v"][0, :, 0, 0].tolist()
        assert len(set(kept)) == min(frame + 1, 3)
        assert kept == sorted(kept)
    assert min(kept) > 5


@pytest.mark.parametrize(
    ("config", "grid", "message"),
    [
        (lambda: AverageConfig(decays=(1.0,)), (1, 1), "leave 0..1"),
        (lambda: AverageConfig(decays=()), (1, 1), "leave 0..1"),
        (lambda: PooledConfig(bands=()), (1, 1), "keeps nothing"),
        (
            lambda: PooledConfig(
                bands=(Band(num_entries=1, num_frames=2), Band(num_entries=1, num_frames=3))
            ),
            (1, 1),
            "3 frames and pool .* does not follow one of 2 frames",
        ),
        (lambda: PooledConfig(bands=(Band(num_entries=1, pool=(2, 2)),)), (4, 3), "does not divide a grid"),
        (lambda: EvolvingConfig(), (2, 2), "needs a learned memory"),
    ],
)
def test_settings_that_make_no_policy_are_refused(config: Any, grid: tuple[int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(config(), grid)

"""Latent attention: equal to its definition on both paths, memories, masks and storages included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latent_parts import HEAD, HEADS, TOKENS, WIDTH, attention
from longtake.cache.base import Entries
from longtake.cache.latent import latent_layout
from longtake.history.base import HistoryConfig, HistoryView, frame_phases, full_view
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from tiny_parts import GRID, LATENT, MEMORY, small_dit


def turned(x_f: list[Tensor], bands: Any, ids: list[float]) -> list[Tensor]:
    """Rotate frames of tokens ``[tokens, channels]`` by complex numbers, from the definition."""
    space, time = HEAD // 6, HEAD // 2 - 2 * (HEAD // 6)
    out = []
    for frame, moment in zip(x_f, ids, strict=True):
        rows = []
        for token in range(TOKENS):
            place = (moment, token // GRID[1], token % GRID[1])
            angles = []
            for position, count, wanted in zip(place, (time, space, space), bands, strict=True):
                chosen = range(wanted) if isinstance(wanted, int) else wanted
                angles += [position * 10000.0 ** (-band / count) for band in chosen]
            spin = torch.polar(torch.ones(len(angles)).double(), torch.tensor(angles, dtype=torch.float64))
            pairs = torch.view_as_complex(frame[token].double().reshape(-1, 2)) * spin
            rows.append(torch.view_as_real(pairs).flatten().float())
        out.append(torch.stack(rows))
    return out


def reference(layer: LatentAttention, x_ftw: list[Tensor], own: int, ids: list[float]) -> Tensor:
    """What the last `own` frames read of all frames, head by head, from the paper's formulas."""
    w = dict(layer.named_parameters())

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def rms(name: str, x: Tensor) -> Tensor:
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6) * w[name + ".weight"]

    nope, rope = layer.config.nope_dim, layer.config.head_rope_dim(HEAD)
    c_f = [rms("norm_kv", linear("kv_down", x)) for x in x_ftw]
    k_rope = torch.cat(turned([linear("k_rope", x) for x in x_ftw], layer.config.rope_bands, ids))
    k_nope, v = (torch.cat([linear(name, c) for c in c_f]) for name in ("k_up", "v_up"))
    query_f = x_ftw[-own:]
    if layer.config.query_rank is not None:
        query_f = [rms("norm_q", linear("q_down", x)) for x in query_f]
    heads = []
    for h in range(HEADS):
        q_nope = torch.cat([linear("q_nope", x)[:, h * nope : (h + 1) * nope] for x in query_f])
        mine = [linear("q_rope", x)[:, h * rope : (h + 1) * rope] for x in query_f]
        bands, key = layer.config.rope_bands, k_rope
        if layer.config.heads_mix == "keys":
            key = mixed(layer, h, k_rope)
            bands = tuple(b if isinstance(b, int) else tuple(sorted(set(b))) for b in bands)
        q_rope = torch.cat(turned(mine, bands, ids[-own:]))
        scores = q_nope @ k_nope[:, h * nope : (h + 1) * nope].T + q_rope @ key.T
        weights = (scores / math.sqrt(nope + rope)).softmax(-1)
        heads.append(weights @ v[:, h * HEAD : (h + 1) * HEAD])
    return linear("o", torch.cat(heads, -1))


def mixed(layer: LatentAttention, head: int, key_tp: Tensor) -> Tensor:
    """Of every pair of channels the sum over its shared keys, each times the head's number."""
    turns_p = torch.view_as_complex(layer.turns.detach()[head])
    products = (torch.view_as_complex(key_tp.reshape(len(key_tp), -1, 2).contiguous()) * turns_p).split(1, 1)
    rows, first = [], 0
    for count in layer.config.keys_of_pairs(HEAD):
        total = sum(products[first : first + count], torch.zeros(()))
        rows.append(torch.view_as_real(total.squeeze(1)))
        first += count
    return torch.cat(rows, -1)


@pytest.mark.parametrize("path", ["expand", "absorbed", "auto", "kept"])
@pytest.mark.parametrize("query_rank", [None, 5])
@pytest.mark.parametrize(
    ("bands", "heads_mix"),
    [
        ((1, 1, 1), "queries"),
        (((1,), 0, (0, 1)), "queries"),
        ((2, 2, 2), "queries"),
        (((0, 0, 1), (0, 0), 1), "queries"),
        (((0, 0, 1), (0, 0), 1), "keys"),
        (((0, 0, 1, 1), (), (0, 0)), "keys"),
    ],
)
def test_both_paths_are_what_the_definition_says(
    path: str, query_rank: int | None, bands: Any, heads_mix: str
) -> None:
    layer = attention(path=path, query_rank=query_rank, rope_bands=bands, heads_mix=heads_mix)
    spec = latent_layout((8,), layer.config.rope(HEAD))
    x_ftw = [torch.randn(TOKENS, WIDTH) for _ in range(5)]
    ids = [3.0, 4.0, 5.0, 6.0, 7.0]
    with torch.no_grad():
        segments = []
        for first, last in ((0, 1), (1, 3)):  # two segments of the past
            x = torch.cat(x_ftw[first:last])[None]
            view = HistoryView((), frame_phases([ids[first:last]], GRID, spec, "cpu"), last - first, GRID)
            _, entries = layer(x, view, 0)
            segments.append(Entries((entries,)).rotated(view.phases, spec))
        own = HistoryView(tuple(segments), frame_phases([ids[3:]], GRID, spec, "cpu"), 2, GRID)
        read, _ = layer(torch.cat(x_ftw[3:])[None], own, 0)
        expected = reference(layer, x_ftw, 2, ids)
        torch.testing.assert_close(read[0], expected, atol=1e-4, rtol=1e-4)
        copies = own.repeat(3)
        many = torch.stack([torch.cat(x_ftw[3:]), torch.randn(2 * TOKENS, WIDTH), torch.cat(x_ftw[3:])])
        again, _ = layer(many, copies, 0)
        torch.testing.assert_close(again[0], expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again[2], expected, atol=1e-4, rtol=1e-4)


def test_what_is_kept_is_of_one_view_and_of_no_gradient() -> None:
    """The second pass over a view expands nothing of the past again; another view begins anew."""
    network = small_dit(latent=LATENT.replace(path="kept"))
    config = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=6))
    history = PureHistory(config, network.cache_spec(), GRID, network.policy(config.policy, GRID))
    text = network.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
    expanded: list[int] = []
    layer = network.blocks[1].self_attn
    assert isinstance(layer, LatentAttention)
    layer.k_up.register_forward_hook(lambda module, inputs, output: expanded.append(inputs[0].shape[1]))

    def read(view: HistoryView) -> Entries:
        return network(torch.randn(1, 2, 3, *GRID), torch.zeros(1, 2), text, view)[1]

    own, past = 2 * TOKENS, 3 * TOKENS
    with torch.no_grad():
        for _ in range(2):
            history = history.commit(read(history.view()))
        expanded.clear()
        view = history.view()
        read(view)
        assert sum(expanded) == own + past
        expanded.clear()
        read(view)
        assert expanded == [own]
        read(view.select([0]))
        assert sum(expanded) == own + own + past
    expanded.clear()
    assert all(entries.requires_grad for entries in read(view).layers[0].values())
    assert sum(expanded) == own + past


def both_paths(**changes: Any) -> tuple[DiT, DiT]:
    """One network twice, on either path."""
    one = small_dit(latent=LATENT.replace(path="expand"), **changes)
    other = small_dit(latent=LATENT.replace(path="absorbed"), **changes)
    other.load_state_dict(one.state_dict())
    return one, other


@pytest.mark.parametrize("copies", [1, 2])
def test_paths_agree_beside_a_memory_with_gradients_through_commits(copies: int) -> None:
    networks = both_paths(memory=MEMORY)
    config = HistoryConfig(
        window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=6), policy=EvolvingConfig()
    )
    x = torch.randn(8, 1, 2, 3, *GRID)
    results = []
    for network in networks:
        policy = network.policy(config.policy, GRID)
        history = PureHistory(config, network.cache_spec(), GRID, policy)
        text = network.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
        flows = []
        for chunk in x:
            rows = chunk.repeat(copies, 1, 1, 1, 1)
            view = history.view().repeat(copies)
            flow, entries = network(rows, torch.full((copies, 2), 500.0), text.repeat(copies), view)
            history = history.commit(entries.select([copies - 1]))
            flows.append(flow)
        loss = torch.stack(flows).square().sum()
        results.append((torch.stack(flows).detach(), torch.autograd.grad(loss, list(network.parameters()))))
    (one, grads), (other, others) = results
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for name, grad, same in zip(dict(networks[0].named_parameters()), grads, others, strict=True):
        torch.testing.assert_close(grad, same, atol=2e-4, rtol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
        assert grad.any() or name == "memory.to_k.bias", name  # a constant of all memory keys alone


@pytest.mark.parametrize("path", ["expand", "absorbed"])
def test_a_memory_may_be_read_as_latents(path: Any) -> None:
    """In both storages, with gradients through several evictions."""
    memory = MEMORY.replace(read_as_latent=(8, 6))
    network = small_dit(memory=memory, latent=LATENT.replace(path=path, kv_rank=8))
    config = HistoryConfig(
        window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=6), policy=EvolvingConfig()
    )
    policy, spec = network.policy(config.policy, GRID), network.cache_spec()
    pure, fixed = PureHistory(config, spec, GRID, policy), SlotHistory(config, spec, GRID, 1, policy=policy)
    slot = fixed.join()
    text = network.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
    for x in torch.randn(6, 1, 2, 3, *GRID):
        flow, entries = network(x, torch.zeros(1, 2), text, pure.view())
        with torch.no_grad():
            same, _ = network(x, torch.zeros(1, 2), text, fixed.view([slot]))
            fixed.commit(entries.detach(), [slot])
        pure = pure.commit(entries)
        torch.testing.assert_close(flow, same, atol=2e-5, rtol=1e-4)
    flow.square().sum().backward()
    assert network.memory is not None
    for name, parameter in network.memory.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_masks_hide_the_same_on_both_paths() -> None:
    one, other = both_paths()
    x = torch.randn(2, 6, 3, *GRID)
    mask = torch.rand(6, 6) < 0.6
    mask.fill_diagonal_(True)
    view = full_view(one.cache_spec(), range(6), GRID, mask)
    text = one.encode_text(torch.randn(2, 4, 8))
    with torch.no_grad():
        flows = [network(x, torch.zeros(2, 6), text, view)[0] for network in (one, other)]
        seen = one(x, torch.zeros(2, 6), text, full_view(one.cache_spec(), range(6), GRID))[0]
    torch.testing.assert_close(*flows, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(flows[0], seen, atol=1e-2)


def test_large_scores_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    network = both_paths()[1]
    x, text = torch.randn(2, 4, 3, *GRID), network.encode_text(torch.randn(2, 4, 8))
    for mask in (None, torch.ones(4, 4).tril().bool()):
        view = full_view(network.cache_spec(), range(4), GRID, mask)
        with torch.no_grad():
            whole, _ = network(x, torch.zeros(2, 4), text, view)
            monkeypatch.setattr("longtake.ops.latent._SCORES_AT_ONCE", 700)
            blocks, _ = network(x, torch.zeros(2, 4), text, view)
            monkeypatch.undo()
        torch.testing.assert_close(blocks, whole, atol=1e-5, rtol=1e-5)

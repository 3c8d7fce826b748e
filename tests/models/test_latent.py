"""Latent attention: equal to its definition on both paths, memories, masks and storages included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.latent import latent_layout
from longtake.history.base import HistoryConfig, HistoryView, frame_phases, full_view
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.retention import MostAttendedConfig
from longtake.history.slots import SlotHistory
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from longtake.stream.state import PromptSwitch
from longtake.train.walk import Walk
from tiny_parts import GRID, LATENT, MEMORY, small_dit

HEADS, WIDTH, HEAD = 2, 24, 12
TOKENS = GRID[0] * GRID[1]


def attention(seed: int = 0, **changes: Any) -> LatentAttention:
    torch.manual_seed(seed)
    config = LATENT.replace(kv_rank=8, **changes)
    made = LatentAttention(WIDTH, HEADS, 1e-6, config, 8)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm_kv.weight") else 0.0, std=0.4)
    return made


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

    nope, rope = layer.config.nope_dim, layer.config.rope_dim
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
        q_rope = torch.cat(turned(mine, layer.config.rope_bands, ids[-own:]))
        scores = q_nope @ k_nope[:, h * nope : (h + 1) * nope].T + q_rope @ k_rope.T
        weights = (scores / math.sqrt(nope + rope)).softmax(-1)
        heads.append(weights @ v[:, h * HEAD : (h + 1) * HEAD])
    return linear("o", torch.cat(heads, -1))


@pytest.mark.parametrize("path", ["expand", "absorbed", "auto", "kept"])
@pytest.mark.parametrize("query_rank", [None, 5])
@pytest.mark.parametrize("bands", [(1, 1, 1), ((1,), 0, (0, 1)), (2, 2, 2), ((0, 0, 1), (0, 0), 1)])
def test_both_paths_are_what_the_definition_says(path: str, query_rank: int | None, bands: Any) -> None:
    layer = attention(path=path, query_rank=query_rank, rope_bands=bands)
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


def test_debiasing_takes_half_the_variance_of_the_rounding_from_scores() -> None:
    """From the words of the definition: sum over latents of q^2 step^2 / 24, in scaled scores."""
    layers = {
        (path, debias): attention(path=path, storage="int4", debias=debias, query_rank=None)
        for path in ("expand", "absorbed")
        for debias in (False, True)
    }
    layer = layers["expand", True]
    spec = latent_layout((8,), layer.config.rope(HEAD), "int4")
    with torch.no_grad():
        past, own_x = torch.randn(1, 2 * TOKENS, WIDTH), torch.randn(1, TOKENS, WIDTH)
        phases = frame_phases([(0.0, 1.0)], GRID, spec, "cpu")
        _, entries = layer(past, HistoryView((), phases, 2, GRID), 0)
        segment = Entries((entries,)).rotated(phases, spec)
        view = HistoryView((segment,), frame_phases([(2.0,)], GRID, spec, "cpu"), 1, GRID)
        outputs = {key: each(own_x, view, 0)[0] for key, each in layers.items()}
        torch.testing.assert_close(outputs["expand", True], outputs["absorbed", True], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(outputs["expand", True], outputs["expand", False], atol=1e-4)
        q_rthn = layer.q_nope(own_x).unflatten(-1, (HEADS, -1))
        asked = torch.einsum("rthn,hnc->rthc", q_rthn, layer.k_up.weight.unflatten(0, (HEADS, -1)))
        asked = asked / math.sqrt(layer.config.nope_dim + layer.config.rope_dim)
        step_k = entries["c_scale"].view(torch.float8_e4m3fn).float()[0, :, 0]
        extra_htk = asked.square().sum(-1)[0].T[..., None] * step_k**2 / 24
        keys, values = layers["expand", False]._expand(layers["expand", False]._numbers(segment.layers[0]))
        q_rope = view.rotate(layer.q_rope(own_x).unflatten(-1, (HEADS, -1)))
        own_latents = layers["expand", False]._numbers(
            {
                "c": layer.norm_kv(layer.kv_down(own_x)),
                "k_rope": view.rotate(layer.k_rope(own_x).unsqueeze(2)),
            }
        )
        own_k, own_v = layers["expand", False]._expand(own_latents)
        k, v = torch.cat([keys, own_k], 1)[0], torch.cat([values, own_v], 1)[0]
        q = torch.cat([q_rthn, q_rope], -1)[0]
        scores = torch.einsum("thd,khd->htk", q, k) / math.sqrt(q.shape[-1])
        scores[..., : 2 * TOKENS] -= extra_htk
        expected = layer.o(torch.einsum("htk,khd->thd", scores.softmax(-1), v).flatten(1))
    torch.testing.assert_close(outputs["expand", True][0], expected, atol=1e-5, rtol=1e-4)


def test_what_heads_make_of_the_shared_key_is_a_choice_of_words() -> None:
    """One network written down twice, the second time with a key of other turns and sizes."""
    one = small_dit(memory=MEMORY, latent=LATENT)
    other = small_dit(memory=MEMORY, latent=LATENT)
    other.load_state_dict(one.state_dict())
    generator = torch.Generator().manual_seed(0)
    for block in other.blocks:
        layer = block.self_attn
        assert isinstance(layer, LatentAttention)
        stretch_p2 = torch.randn(LATENT.rope_dim // 2, 2, generator=generator) + 0.5
        as_complex = torch.view_as_complex(stretch_p2)
        with torch.no_grad():
            for name, factor in (("k_rope", as_complex), ("q_rope", (1 / as_complex).conj())):
                linear = getattr(layer, name)
                for tensor in (linear.weight, linear.bias):
                    rows = tensor.reshape(-1, len(as_complex), 2, *tensor.shape[1:]).movedim(2, -1)
                    factors = factor.view(1, -1, *(1,) * (tensor.dim() - 1))
                    turned = torch.view_as_real(torch.view_as_complex(rows.contiguous()) * factors)
                    tensor.copy_(turned.movedim(-1, 2).reshape(tensor.shape))
            layer.turns.copy_(torch.view_as_real(1 / as_complex).expand_as(layer.turns))
    assert_all_see_the_same(one, other)


def test_several_shared_keys_that_add_up_to_one_are_that_one() -> None:
    """One network written down twice, the second time with two shared keys of each band, of which heads make
    the one that they had.
    """
    one = small_dit(memory=MEMORY, latent=LATENT)
    bands = ((0, 0), (0, 0), (1, 1))
    other = small_dit(memory=MEMORY, latent=LATENT.replace(rope_bands=bands))
    pairs, generator = LATENT.rope_dim // 2, torch.Generator().manual_seed(0)
    same = {name: tensor for name, tensor in one.state_dict().items() if not name.endswith("turns")}
    replaced = {name for name in same if ".k_rope." in name or ".q_rope." in name}
    other.load_state_dict({name: same[name] for name in same.keys() - replaced}, strict=False)
    sharpness = ((LATENT.nope_dim + 2 * LATENT.rope_dim) / (LATENT.nope_dim + LATENT.rope_dim)) ** 0.5
    for before, after in zip(one.blocks, other.blocks, strict=True):
        layer, plain = after.self_attn, before.self_attn
        assert isinstance(layer, LatentAttention)
        assert isinstance(plain, LatentAttention)
        turns_p2 = torch.view_as_complex(torch.randn(pairs, 2, 2, generator=generator) + 0.5)
        keys_p2 = torch.view_as_complex(torch.randn(pairs, 2, 2, generator=generator))
        keys_p2[:, 1] = (1 - turns_p2[:, 0] * keys_p2[:, 0]) / turns_p2[:, 1]
        with torch.no_grad():
            for name, factors_p2 in (("k_rope", keys_p2), ("q_rope", sharpness * turns_p2.conj())):
                for part in ("weight", "bias"):
                    given = getattr(getattr(plain, name), part)
                    rows = given.reshape(-1, pairs, 2, *given.shape[1:]).movedim(2, -1)  # heads, pairs
                    as_complex = torch.view_as_complex(rows.contiguous()).unsqueeze(2)
                    made = as_complex * factors_p2.view(1, pairs, 2, *(1,) * (given.dim() - 1))
                    target = getattr(getattr(layer, name), part)
                    target.copy_(torch.view_as_real(made).movedim(-1, 3).reshape(target.shape))
            layer.q_nope.weight.mul_(sharpness)
            layer.q_nope.bias.mul_(sharpness)
            layer.turns.copy_(torch.view_as_real(turns_p2.flatten()).expand_as(layer.turns))
    for path in ("expand", "absorbed"):
        for block in other.blocks:
            assert isinstance(block.self_attn, LatentAttention)
            block.self_attn.config = block.self_attn.config.replace(path=path)
        assert_all_see_the_same(one, other)


def assert_all_see_the_same(one: DiT, other: DiT) -> None:
    """Heads, memories and policies."""
    config = HistoryConfig(
        window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=6), policy=EvolvingConfig()
    )
    for policy in (EvolvingConfig(), MostAttendedConfig(num_frames=2, unit="token")):
        outputs = []
        for network in (one, other):
            used = network.policy(policy, GRID)
            history = PureHistory(config.replace(policy=policy), network.cache_spec(), GRID, used)
            text = network.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8))
            with torch.no_grad():
                for seed in range(6):
                    x = torch.randn(1, 2, 3, *GRID, generator=torch.Generator().manual_seed(seed))
                    flow, entries = network(x, torch.zeros(1, 2), text, history.view())
                    history = history.commit(entries)
            outputs.append(flow)
        torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-3)


def test_keys_in_8_bits_are_a_little_off_and_cut_off_where_they_do_not_fit() -> None:
    """What is read of the past, over what it was: three bits of every number."""
    spec = latent_layout((4,), LATENT.rope(HEAD), key_storage="fp8")
    config = HistoryConfig(window_frames=5, sink_frames=0, chunk_frames=2, positions=Relative(f_max=4))
    pure, fixed = PureHistory(config, spec, GRID), SlotHistory(config, spec, GRID, 1)
    slot = fixed.join()
    key = 3 * torch.randn(1, 2 * GRID[0] * GRID[1], 1, 2 * spec.rope.num_pairs)
    key[0, 0] = 1e4
    entries = Entries(({"c": torch.randn(1, key.shape[1], 4), "k_rope": key},))
    pure = pure.commit(entries)
    fixed.commit(entries, [slot])
    exact = entries.rotated(pure._phases((0, 1)), spec).layers[0]["k_rope"]
    [stored] = fixed.view([slot]).segments
    read = stored.layers[0]["k_rope"]
    assert read.dtype == torch.float8_e4m3fn
    kept = torch.cat([segment.layers[0]["k_rope"] for segment in pure.view().segments], dim=1)
    assert torch.equal(read.float(), kept)
    fits = exact.abs() < 448
    assert bool(((kept - exact).abs() <= exact.abs() / 16 + 2.0**-10)[fits].all())
    assert not torch.equal(kept, exact)
    assert set(kept[~fits].abs().tolist()) == {448.0}


@pytest.mark.parametrize("storage", ["fp8", "int4", "keys"])
def test_training_reads_the_numbers_that_serving_unpacks(storage: Any) -> None:
    """Also where some chunks are committed without gradients, or some rows' prompts switch."""
    kept = {"key_storage": "fp8"} if storage == "keys" else {"storage": storage, "debias": storage == "int4"}
    network = small_dit(memory=MEMORY, latent=LATENT.replace(**kept))
    config = HistoryConfig(
        window_frames=7, sink_frames=2, chunk_frames=2, positions=Relative(f_max=8), policy=EvolvingConfig()
    )
    text = network.encode_text(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)))
    policy, spec = network.policy(config.policy, GRID), network.cache_spec()
    served = SlotHistory(config, spec, GRID, 2, policy=policy)
    slots = [served.join(), served.join()]
    walk = Walk(network, config, text, 2, *GRID)
    for chunk, x in enumerate(torch.randn(6, 2, 2, 3, *GRID, generator=torch.Generator().manual_seed(2))):
        with torch.no_grad():
            _, entries = network(x, torch.zeros(2, 2), text, served.view(slots))
            served.commit(entries, slots)
        if chunk % 2:
            walk.commit(x, learns=False)
        else:
            clean = walk.advance(x, torch.ones(2) * 1e-9, x)
            assert clean.requires_grad
    sigma = torch.full((2,), 0.5)
    with torch.no_grad():
        flow, _ = network(x, 1000 * sigma[:, None].expand(2, 2), text, served.view(slots))
    learned = walk.predict(x, sigma)
    torch.testing.assert_close(learned, x - 0.5 * flow, atol=2e-5, rtol=1e-4)
    walk.switch(text, PromptSwitch(text="", memory="keep"), rows=[0])
    walk.predict(x, sigma).square().sum().backward()
    assert network.memory is not None
    assert network.memory.query_init.grad is not None
    assert all(
        parameter.grad is not None
        for name, parameter in network.named_parameters()
        if name.endswith("self_attn.k_rope.weight")
    )


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


def test_dense_keys_stand_in_the_channels_of_an_original_head() -> None:
    """So a memory that was trained on per-head keys reads the same channels here."""
    layer = attention(rope_bands=(1, (1,), (0,)))
    still, turning = layer.config.channels(HEAD)
    assert turning == (0, 1, 6, 7, 8, 9)
    assert sorted((*still, *turning)) == list(range(HEAD))
    parts = {"c": torch.randn(1, 3, 8), "k_rope": torch.randn(1, 3, 1, 6)}
    keys, values = layer.dense(parts)
    assert values.shape == keys.shape == (1, 3, HEADS, HEAD)
    assert torch.equal(keys[0, :, 1, list(turning)], parts["k_rope"][0, :, 0])
    assert torch.equal(keys[0, :, 1, list(still)], layer.k_up(parts["c"])[0, :, layer.config.nope_dim :])
    rope = layer.config.dense_rope(HEAD)
    assert [[bool(frequency) for frequency in axis] for axis in rope.frequencies] == [
        [True, False],
        [False, True],
        [True, False],
    ]

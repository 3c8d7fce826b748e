"""Shared rotary keys: what heads make of them, and what memories and policies see instead."""

from __future__ import annotations

import pytest
import torch

from latent_parts import HEAD, HEADS, attention
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.retention import MostAttendedConfig
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from longtake.models.latent_config import AttentionPath, HeadsMix
from tiny_parts import GRID, LATENT, MEMORY, small_dit


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


@pytest.mark.parametrize("heads_mix", ["queries", "keys"])
def test_several_shared_keys_that_add_up_to_one_are_that_one(heads_mix: HeadsMix) -> None:
    """One network written down twice, the second time with several shared keys of some bands, of which every
    head makes the one that it had, in a way of its own.
    """
    one = small_dit(memory=MEMORY, latent=LATENT)
    bands, counts = ((0, 0), (0,), (1, 1, 1)), (2, 1, 3)
    latent = LATENT.replace(rope_bands=bands, heads_mix=heads_mix)
    other = small_dit(memory=MEMORY, latent=latent)
    assert latent.keys_of_pairs(HEAD) == counts
    of_pair = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    generator = torch.Generator().manual_seed(0)
    same = {name: tensor for name, tensor in one.state_dict().items() if not name.endswith("turns")}
    own_queries = {"queries": ".q_rope.", "keys": ".k_rope."}[heads_mix]
    replaced = {name for name in same if ".k_rope." in name or own_queries in name}
    other.load_state_dict({name: same[name] for name in same.keys() - replaced}, strict=False)
    sharpness = (latent.head_query_dim(HEAD) / LATENT.head_query_dim(HEAD)) ** 0.5
    for before, after in zip(one.blocks, other.blocks, strict=True):
        layer, plain = after.self_attn, before.self_attn
        assert isinstance(layer, LatentAttention)
        assert isinstance(plain, LatentAttention)
        keys_p = torch.view_as_complex(torch.randn(len(of_pair), 2, generator=generator) + 0.5)
        turns_hp = torch.view_as_complex(torch.randn(HEADS, len(of_pair), 2, generator=generator) + 0.5)
        for pair in range(3):  # the last of each pair's turns makes the sum one
            *others, last = torch.nonzero(of_pair == pair).flatten().tolist()
            turns_hp[:, last] = (1 - (turns_hp[:, others] * keys_p[others]).sum(-1)) / keys_p[last]
        with torch.no_grad():
            made = [("k_rope", keys_p[None])]
            made += [("q_rope", sharpness * turns_hp.conj())] if heads_mix == "queries" else []
            for name, factors_hp in made:
                for part in ("weight", "bias"):
                    given = getattr(getattr(plain, name), part)
                    rows = given.reshape(-1, 3, 2, *given.shape[1:]).movedim(2, -1)  # heads, pairs
                    as_complex = torch.view_as_complex(rows.contiguous())[:, of_pair]
                    turned = as_complex * factors_hp.view(*factors_hp.shape, *(1,) * (given.dim() - 1))
                    target = getattr(getattr(layer, name), part)
                    target.copy_(torch.view_as_real(turned).movedim(-1, 2).reshape(target.shape))
            layer.q_nope.weight.mul_(sharpness)
            layer.q_nope.bias.mul_(sharpness)
            layer.turns.copy_(torch.view_as_real(turns_hp))
    paths: tuple[AttentionPath, ...] = ("expand", "absorbed", "kept")
    for path in paths:
        for block in other.blocks:
            assert isinstance(block.self_attn, LatentAttention)
            block.self_attn.config = block.self_attn.config.replace(path=path)
        assert_all_see_the_same(one, other)


def test_heads_that_mix_keys_attend_as_wide_as_before() -> None:
    """However many keys they share; and learn their mixtures."""
    bands = ((0, 0, 0), (0, 0, 0), (1, 1, 1))
    layer = attention(rope_bands=bands, heads_mix="keys")
    plain = attention(rope_bands=((0,), (0,), (1,)))
    keys, _ = layer.dense({"c": torch.randn(1, 3, 8), "k_rope": torch.randn(1, 3, 1, 18)})
    assert keys.shape == (1, 3, HEADS, layer.config.nope_dim + 6)
    assert layer.q_rope.weight.shape == plain.q_rope.weight.shape
    keys.square().sum().backward()
    assert layer.turns.grad is not None
    assert bool(layer.turns.grad.abs().min() > 0)
    assert "turns" not in dict(plain.named_parameters())


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

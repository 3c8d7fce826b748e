"""Shared rotary keys: what heads make of them, and what memories and policies see instead."""

from __future__ import annotations

import torch

from latent_parts import HEAD, HEADS, attention
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.retention import MostAttendedConfig
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
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

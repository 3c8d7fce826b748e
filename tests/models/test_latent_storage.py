"""What latents and shared keys are kept as: in fewer bits, alike in training and serving."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from latent_parts import HEAD, HEADS, TOKENS, WIDTH, attention
from longtake.cache.base import Entries
from longtake.cache.latent import latent_layout
from longtake.history.base import HistoryConfig, HistoryView, frame_phases
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.stream.state import PromptSwitch
from longtake.train.walk import Walk
from tiny_parts import GRID, LATENT, MEMORY, small_dit


@pytest.mark.parametrize("changes", [{}, {"rope_bands": ((0, 0), (0, 0), (1, 1)), "heads_mix": "keys"}])
def test_debiasing_takes_half_the_variance_of_the_rounding_from_scores(changes: dict[str, Any]) -> None:
    """From the words of the definition: sum over latents of q^2 step^2 / 24, in scaled scores."""
    layers = {
        (path, debias): attention(path=path, storage="int4", debias=debias, query_rank=None, **changes)
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
        asked = asked / math.sqrt(layer.config.head_query_dim(HEAD))
        step_k = entries["c_scale"].view(torch.float8_e4m3fn).float()[0, :, 0]
        extra_htk = asked.square().sum(-1)[0].T[..., None] * step_k**2 / 24
        keys, values = layers["expand", False]._expand(layers["expand", False]._numbers(segment.layers[0]))
        pairs = [0, 2, 4] if changes else None
        q_rope = view.rotate(layer.q_rope(own_x).unflatten(-1, (HEADS, -1)), pairs)
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

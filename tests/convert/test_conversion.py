"""Conversion to latent attention: factors are the best of their rank, layers come close to what they were."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.latent import latent_layout
from longtake.convert.calibrate import sample_tokens
from longtake.convert.dense import DenseLayer, Linear
from longtake.convert.factor import LowRank, Samples, Target, Tokens, effective_ranks
from longtake.convert.layer import Converted, convert_layer
from longtake.convert.network import Plan, convert_layers
from longtake.convert.settings import ConvertConfig
from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig, HistoryView, frame_phases, full_view
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from longtake.models.latent_config import LatentConfig
from tiny_parts import GRID, small_dit

LATENT = LatentConfig(kv_rank=12, query_rank=None, nope_dim=6, rope_bands=(1, 1, 1))
WIDTH, HEADS = 24, 2


def tokens_like_a_networks(seed: int = 0, count: int = 3000) -> Tensor:
    """Correlated, off centre, some directions far larger than others."""
    torch.manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH) * torch.logspace(0.5, -1.5, WIDTH)
    return torch.randn(count, WIDTH) @ mix.T + 0.5 * torch.randn(WIDTH)


def sampled(seed: int = 0, fitted: int = 2000, held_out: int = 1000) -> Samples:
    return Samples(*tokens_like_a_networks(seed, fitted + held_out).split([fitted, held_out]))


def dense_layer(seed: int = 0, heads: int = HEADS) -> DenseLayer:
    dit = small_dit(seed, num_heads=heads)
    with torch.no_grad():
        dit.blocks[0].self_attn.norm_k.weight.uniform_(0.5, 1.5)
    return DenseLayer.of(dit.state_dict(), 0, heads, 1e-6)


def attended(layer: Any, spec: Any, tokens_nw: Tensor, frames: int = 4) -> Tensor:
    """What a layer makes of tokens as clips of some frames."""
    per_clip = frames * GRID[0] * GRID[1]
    clips = tokens_nw[: len(tokens_nw) // per_clip * per_clip].view(-1, per_clip, WIDTH)
    with torch.no_grad():
        out: Tensor = layer(clips, full_view(spec, range(frames), GRID), 0)[0]
    return out


def converted_error(samples: Samples, method: Any, rank: int) -> float:
    """Share of a layer's output that conversion loses on tokens that it has not seen."""
    dit = small_dit(0)
    made = next(
        convert_layers(
            Plan(dit.config.replace(num_layers=1), LATENT.replace(kv_rank=rank), method),
            dit.state_dict(),
            [samples],
        )
    )[1]
    layer = LatentAttention(WIDTH, HEADS, 1e-6, LATENT, rank)
    layer.load_state_dict(made.weights)
    expected = attended(dit.blocks[0].self_attn, dit.cache_spec(), samples.held_out_nw)
    found = attended(layer, latent_layout((rank,), LATENT.rope(WIDTH // HEADS)), samples.held_out_nw)
    return float((found - expected).square().mean() / expected.var())


def test_what_is_fitted_to_tokens_beats_the_weights_alone_and_both_beat_chance() -> None:
    errors = {method: converted_error(sampled(), method, 12) for method in ("covariance", "svd", "random")}
    assert errors["covariance"] < 0.9 * errors["svd"]
    assert errors["svd"] < 0.5 * errors["random"]


def test_more_rank_loses_less() -> None:
    ranks = (2, 5, 10)
    outputs = [converted_error(sampled(), "covariance", rank) for rank in ranks]
    assert outputs[-1] < 0.7 * outputs[0]  # what heads lose of their positions is lost at any rank
    tokens, dense = Tokens.sampled(sampled()), dense_layer()
    errors = [convert_layer(dense, LATENT, rank, tokens, "covariance").kv_error or 0.0 for rank in ranks]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_more_shared_keys_lose_less_and_one_for_each_head_nothing() -> None:
    """Of two heads here, without norms, which are no linear maps."""
    weights = small_dit(0, qk_norm=False).state_dict()
    dense, tokens = DenseLayer.of(weights, 0, HEADS, 1e-6), Tokens.sampled(sampled())

    def made(*bands: int) -> Converted:
        one = tuple(bands)
        return convert_layer(dense, LATENT.replace(rope_bands=(one, one, one)), 10, tokens, "covariance")

    one, two = made(0), made(0, 0)
    assert one.rope_error is not None
    assert two.rope_error is not None
    assert one.rope_error > 0.1
    assert two.rope_error == pytest.approx(0, abs=1e-4)
    assert two.kv_error == one.kv_error
    with pytest.raises(ConfigError, match="name a band 3 times for 2 heads"):
        Plan(small_dit(0).config, LATENT.replace(rope_bands=((0, 0, 0), 1, 1)), "svd")


def test_keys_are_counted_for_all_bands() -> None:
    config = ConvertConfig(rope_bands=(2, (1,), 1), rope_keys=2)
    made = config.latent(small_dit().config)
    assert made.rope_bands == ((0, 0, 1, 1), (1, 1), (0, 0))
    assert (made.rope_dim, made.nope_dim) == (16, 4)
    assert (made.heads_mix, made.head_rope_dim(12)) == ("keys", 8)
    asked = config.replace(heads_mix="queries").latent(small_dit().config)
    assert (asked.heads_mix, asked.head_rope_dim(12)) == ("queries", 16)
    assert config.replace(rope_keys=1).latent(small_dit().config).heads_mix == "queries"


def test_it_is_the_same_whether_queries_or_keys_are_mixed() -> None:
    """One conversion written down in two ways, of which attention over a past sees nothing."""
    dense, tokens = DenseLayer.of(small_dit(0).state_dict(), 0, HEADS, 1e-6), Tokens.sampled(sampled())
    bands = ((0, 0), (0,), (1, 1))
    outputs = []
    for heads_mix in ("queries", "keys"):
        config = LATENT.replace(rope_bands=bands, heads_mix=heads_mix)
        made = convert_layer(dense, config, 12, tokens, "covariance")
        layer = LatentAttention(WIDTH, HEADS, 1e-6, config, 12)
        layer.load_state_dict(made.weights)
        spec = latent_layout((12,), config.rope(WIDTH // HEADS))
        with torch.no_grad():
            past = HistoryView((), frame_phases([(3.0, 4.0)], GRID, spec, "cpu"), 2, GRID)
            x = sampled().held_out_nw[: 3 * GRID[0] * GRID[1]].view(1, -1, WIDTH)
            split = 2 * GRID[0] * GRID[1]
            segment = Entries((layer(x[:, :split], past, 0)[1],)).rotated(past.phases, spec)
            view = HistoryView((segment,), frame_phases([(5.0,)], GRID, spec, "cpu"), 1, GRID)
            outputs.append(layer(x[:, split:], view, 0)[0])
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)


def test_one_head_at_one_place_is_what_it_was() -> None:
    """Nothing is shared between heads and nothing turns, so all that is left is the norms' doing."""
    dit = small_dit(0, num_heads=1, qk_norm=False)
    weights = dit.state_dict()
    samples = sampled()
    config = LatentConfig(kv_rank=24, query_rank=24, nope_dim=18, rope_bands=(1, 1, 1))
    dense = DenseLayer.of(weights, 0, 1, 1e-6)
    made = convert_layer(dense, config, 24, Tokens.sampled(samples), "covariance")
    assert made.rope_error == pytest.approx(0, abs=1e-4)
    layer = LatentAttention(WIDTH, 1, 1e-6, config, 24)
    layer.load_state_dict(made.weights)
    spec = latent_layout((24,), config.rope(WIDTH))
    views = [
        HistoryView((), frame_phases([(2.0,)], (1, 1), s, "cpu"), 1, (1, 1)) for s in (dit.cache_spec(), spec)
    ]
    x = samples.fitted_nw[:300].view(300, 1, WIDTH)
    with torch.no_grad():
        queries = [dense.queries(x[:, 0].double()).flatten(1).float()]
        keys, values = layer.dense(dict(layer(x, views[1], 0)[1]))
        torch.testing.assert_close(
            values[:, 0, 0], dense.values(x[:, 0].double())[:, 0].float(), atol=0.1, rtol=0.05
        )
        scores = (queries[0] * keys[:, 0, 0]).sum(-1)
        expected = (queries[0] * dense.keys(x[:, 0].double())[:, 0].float()).sum(-1)
    assert float((scores - expected).square().mean() / expected.var()) < 0.01


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rank=st.integers(1, 8), rows=st.integers(1, 12))
def test_factors_are_the_best_of_their_rank(seed: int, rank: int, rows: int) -> None:
    """Without samples no norm is refitted, and the loss is that of the singular values left out."""
    torch.manual_seed(seed)
    target = Linear(torch.randn(rows, 8).double(), torch.randn(rows).double())
    metric = torch.randn(rows, rows).double()
    metric = metric @ metric.T + 0.1 * torch.eye(rows).double()
    root = torch.randn(8, 8).double()
    tokens = Tokens(torch.randn(8).double(), root)
    best = LowRank(Target(target, target, metric), tokens)
    factors = best.factors(rank, 1e-12)
    kept = min(rank, rows, 8)
    size = float(factors.gain_r[0])  # the norm at its typical size: what comes out is what went in
    map_back = factors.up.weight * factors.gain_r / size @ factors.down.weight
    left_out = torch.linalg.svdvals(metric @ target.weight @ root)[kept:]
    lost = (metric @ (map_back - target.weight) @ root).square().sum()
    torch.testing.assert_close(lost, left_out.square().sum(), atol=1e-8, rtol=1e-6)
    whole = (metric @ target.weight @ root).square().sum()
    assert sum(best.gains()[kept:]) == pytest.approx(float(lost / whole), abs=1e-9)
    latent_mean = factors.down(tokens.mean_w[None])[0]
    torch.testing.assert_close(latent_mean, torch.zeros(rank).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("storage", "bits"), [("full", 16), ("fp8", 8), ("int4", 4.25)])
def test_a_budget_counts_bytes_as_they_are_stored(storage: Any, bits: float) -> None:
    plan = Plan(small_dit().config, LATENT, "covariance")
    config = ConvertConfig(budget_bytes=44, storage=storage)
    ranks = config.chosen(plan, small_dit().state_dict(), [sampled(), sampled(1)]).latent.ranks(2)
    keys = 2 * 2 * LATENT.rope_dim
    assert 44 - keys - 2 < sum(-(-rank * bits // 8) for rank in ranks) <= 44 - keys


def test_tokens_have_the_mean_and_covariance_of_samples() -> None:
    both = sampled()
    samples, tokens = both.fitted_nw.double(), Tokens.sampled(both)
    covariance = torch.cov(samples.T, correction=0)
    torch.testing.assert_close(
        tokens.root_ww @ tokens.root_ww.T, covariance, atol=1e-3 * float(covariance.diagonal().mean()), rtol=0
    )
    target = Linear(torch.randn(5, WIDTH).double(), torch.randn(5).double())
    fitted = tokens.fit(target(samples))
    assert float((fitted(samples) - target(samples)).square().mean() / target(samples).var()) < 1e-3
    moment = tokens.moment(target)
    torch.testing.assert_close(
        moment,
        target(samples).T @ target(samples) / len(samples),
        rtol=1e-2,
        atol=1e-2 * float(moment.abs().max()),
    )


def test_effective_ranks() -> None:
    assert effective_ranks(torch.tensor([3.0, 1.0, 0.0])) == (1, 2, 2)
    assert effective_ranks(torch.ones(100)) == (90, 95, 99)


@pytest.mark.parametrize("num_prompts", [1, 2, 12])
def test_sampling_tokens_leaves_no_hooks_and_the_network_as_it_was(num_prompts: int) -> None:
    dit = small_dit()
    texts = [dit.encode_text(torch.randn(1, 4, 8)) for _ in range(num_prompts)]
    history = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2)
    steps = Schedule(steps=(1000, 500)).resolve()
    tokens = sample_tokens(dit, texts, history, steps, (3, *GRID), 3, 324)
    assert [(each.fitted_nw.shape, each.held_out_nw.shape) for each in tokens] == [
        ((243, WIDTH), (81, WIDTH))
    ] * 2
    assert not any(block.self_attn._forward_pre_hooks for block in dit.blocks)
    again = sample_tokens(dit, texts, history, steps, (3, *GRID), 3, 324)
    for one, other in zip(tokens, again, strict=True):
        assert torch.equal(one.fitted_nw, other.fitted_nw)
        assert torch.equal(one.held_out_nw, other.held_out_nw)


def test_what_is_held_out_is_of_other_streams() -> None:
    """A stream's noise is its own, and so are its tokens: those of the last of four are in no other."""
    dit = small_dit()
    text = dit.encode_text(torch.randn(1, 4, 8))
    history = HistoryConfig(window_frames=4, sink_frames=0, chunk_frames=2)
    steps = Schedule(steps=(1000, 500)).resolve()
    entered: list[Tensor] = []
    hook = dit.blocks[0].self_attn.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    every = 4 * 3 * 2 * 2 * GRID[0] * GRID[1]  # streams, passes, chunks and their tokens
    (first, _) = sample_tokens(dit, [text], history, steps, (3, *GRID), 2, every)
    hook.remove()
    rows_rw = torch.stack(entered).movedim(1, 0).flatten(1, 2)
    for kept, rows in ((first.fitted_nw, rows_rw[:3].flatten(0, 1)), (first.held_out_nw, rows_rw[3])):
        assert len(kept) == len(rows)
        rounded = rows.to(kept.dtype).float()
        distance = torch.cdist(kept.float(), rounded, compute_mode="donot_use_mm_for_euclid_dist")
        assert distance.amin(1).max() == 0


def test_nothing_of_a_converted_layer_stays() -> None:
    """At Wan2.1-1.3B's size what is computed on the way is half a gigabyte: it goes with the layer, not when
    cycles are collected.
    """
    dense, tokens = dense_layer(), Tokens.sampled(sampled())
    gone = weakref.ref(dense), weakref.ref(tokens)
    gc.disable()
    try:
        made = convert_layer(dense, LATENT, 12, tokens, "covariance")
        del dense, tokens
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()
    assert made.kv_error is not None


@pytest.mark.parametrize("method", ["covariance", "svd", "random"])
def test_errors_are_those_of_tokens_that_nothing_was_fitted_to(method: Any) -> None:
    """Few samples are fitted far too well; what is told of them holds for others all the same."""
    dense, described = dense_layer(), Tokens.isotropic if method == "svd" else Tokens.sampled
    few, held_out, others = tokens_like_a_networks(0, 6060).split([60, 3000, 3000])
    made, on_others, on_itself = (
        convert_layer(dense, LATENT, 12, described(Samples(few, judged)), method)
        for judged in (held_out, others, few)
    )
    for name in ("kv_error", "q_error", "rope_error"):
        assert getattr(made, name) == pytest.approx(getattr(on_others, name), rel=0.15)
    if method == "covariance":
        assert made.kv_error > 1.3 * on_itself.kv_error  # type: ignore[operator]
        assert made.q_error > 1.3 * on_itself.q_error  # type: ignore[operator]


def test_what_a_rank_is_predicted_to_lose_is_what_it_loses() -> None:
    dense, tokens = dense_layer(), Tokens.sampled(sampled())
    for rank in (3, 8, 20):
        made = convert_layer(dense, LATENT, rank, tokens, "covariance")
        assert made.predicted_loss == pytest.approx(made.kv_error, rel=0.25)


def different_layers() -> DiT:
    """Two layers that have nothing in common: sizes, gains and biases."""
    dit = small_dit(5, num_layers=2, num_heads=1)
    torch.manual_seed(6)
    with torch.no_grad():
        for block in dit.blocks:
            for linear in (block.self_attn.q, block.self_attn.k, block.self_attn.v, block.self_attn.o):
                linear.bias.normal_(0, 0.5)
            for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
                norm.weight.uniform_(0.3, 1.7)
    return dit


def one_headed_errors(dit: DiT, samples: list[Samples], config: LatentConfig) -> list[list[float]]:
    """Of every layer those of output, still channels of keys, and values: one head, at one time."""
    plan = Plan(dit.config, config, "covariance")
    still = list(config.channels(WIDTH)[0])
    errors = []
    for layer, made in convert_layers(plan, dit.state_dict(), samples):
        own = dit.blocks[layer].self_attn
        latent = LatentAttention(WIDTH, 1, 1e-6, config, plan.latent.ranks(2)[layer])
        latent.load_state_dict(made.weights)
        x = sampled(10 + layer).held_out_nw[:600].view(-1, 6, WIDTH)
        own_view, view = (
            HistoryView((), frame_phases([(2.0,)], (2, 3), spec, "cpu"), 1, (2, 3))
            for spec in (dit.cache_spec(), latent_layout(plan.latent.ranks(2), config.rope(WIDTH)))
        )
        with torch.no_grad():
            (expected, entries), (found, latents) = own(x, own_view, layer), latent(x, view, layer)
            keys, values = latent.dense(latents)
        pairs = (
            (found, expected),
            (keys[..., still], entries["k"][..., still]),
            (values, entries["v"]),
        )
        errors.append([float((one - other).square().mean() / other.var()) for one, other in pairs])
    return errors


def test_every_layer_becomes_what_it_was() -> None:
    """At full rank what is left is what stopped turning, and what the norm of keys does. Layers differ, so
    that one's tokens, gains or biases do not do for the other.
    """
    dit = different_layers()
    config = LatentConfig(kv_rank=24, query_rank=None, nope_dim=12, rope_bands=(2, 2, 2))
    samples = [sampled(10), sampled(11)]
    for output, keys, values in one_headed_errors(dit, samples, config):
        assert output < 0.12
        assert keys < 0.12
        assert values < 0.01
    for output, keys, values in one_headed_errors(dit, samples[::-1], config):
        assert min(output, keys, values) > 0.5


def test_what_cannot_be_made_is_refused() -> None:
    dit = small_dit()
    with pytest.raises(ConfigError, match="kv_rank=25 exceeds a width of 24"):
        Plan(dit.config, LATENT.replace(kv_rank=25), "svd")
    with pytest.raises(ConfigError, match="query_rank=25 exceeds"):
        Plan(dit.config, LATENT.replace(query_rank=25), "svd")
    with pytest.raises(ConfigError, match="latent already"):
        Plan(dit.config.replace(latent=LATENT), LATENT, "svd")
    with pytest.raises(ConfigError, match="needs tokens"):
        next(convert_layers(Plan(dit.config, LATENT, "covariance"), dit.state_dict(), None))


@pytest.mark.parametrize("method", ["covariance", "svd"])
def test_a_layer_whose_output_is_zero_is_converted(method: Any) -> None:
    """Layers that a warm start added begin so."""
    dit = small_dit(0)
    torch.nn.init.zeros_(dit.blocks[0].self_attn.o.weight)
    samples = Samples(torch.randn(200, WIDTH), torch.randn(100, WIDTH))
    made = next(
        convert_layers(Plan(dit.config.replace(num_layers=1), LATENT, method), dit.state_dict(), [samples])
    )[1]
    assert all(tensor.isfinite().all() for tensor in made.weights.values())
    if method == "covariance":
        assert made.kv_error is not None
        assert 0 < made.kv_error < 1


def test_small_heads_keep_what_was_asked_for() -> None:
    """Where all defaults would leave no channel, or no rank."""
    small = small_dit().config.replace(width=12, num_heads=2)
    assert small.head_dim == 6
    made = ConvertConfig(rope_bands=(1, 0, 0), kv_rank=3).latent(small)
    assert (made.rope_dim, made.nope_dim, made.kv_rank) == (2, 4, 3)
    assert ConvertConfig(nope_dim=2).latent(small).kv_rank == 1
    with pytest.raises(ConfigError, match="take all 6 channels"):
        ConvertConfig().latent(small)


def test_dense_layers_compute_what_the_network_does() -> None:
    dit = small_dit()
    layer = DenseLayer.of(dit.state_dict(), 1, HEADS, 1e-6)
    own = dit.blocks[1].self_attn
    x = torch.randn(7, WIDTH)
    keys, values = own.keys_and_values(x)
    torch.testing.assert_close(layer.keys(x.double()).float(), keys, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.values(x.double()).float(), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.queries(x.double()).float(), own.queries(x), atol=1e-5, rtol=1e-5)
    assert isinstance(dit, DiT)

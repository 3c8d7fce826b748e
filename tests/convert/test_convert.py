"""Conversion to latent attention: factors are the best of their rank, layers come close to what they replace,
files of all layouts come out whole.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.cache.latent import latent_layout
from longtake.cli import main
from longtake.convert.bare import BareWeights
from longtake.convert.calibrate import sample_tokens
from longtake.convert.dense import DenseLayer, Linear
from longtake.convert.factor import LowRank, Samples, Target, Tokens, effective_ranks
from longtake.convert.layer import convert_layer
from longtake.convert.network import Plan, convert_layers
from longtake.convert.ranks import lost, ranks_for_budget, ranks_for_loss
from longtake.convert.settings import ConvertConfig
from longtake.diffusion.flow import Schedule
from longtake.errors import CheckpointError, ConfigError
from longtake.history.base import HistoryConfig, HistoryView, frame_phases, full_view
from longtake.history.evolving import EvolvingConfig
from longtake.io.checkpoints import NETWORK_KEY, STREAM_KEY, write_safetensors_by_one
from longtake.io.names import from_own
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.bundle import load_model
from longtake.stream.pipeline import StreamConfig
from longtake.stream.session import Stream
from model_file import write_model
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


falling = st.lists(st.floats(1e-6, 1e3), min_size=6, max_size=12).map(
    lambda x: [each / sum(x) for each in sorted(x, reverse=True)]
)


@settings(max_examples=40, deadline=None)
@given(
    gains=st.lists(falling, min_size=1, max_size=3), numbers=st.integers(0, 30), multiple=st.integers(1, 2)
)
def test_no_other_ranks_make_more_of_a_budget(gains: list[list[float]], numbers: int, multiple: int) -> None:
    rope_dim, layers = 4, len(gains)
    budget = 2 * (layers * (rope_dim + multiple) + numbers)

    def bytes_of(rank: int) -> int:
        return 2 * (rank + rope_dim)

    ranks = ranks_for_budget(gains, budget, bytes_of, multiple)
    (rank,) = set(ranks_for_budget(gains, budget, bytes_of, multiple, one_rank=True))
    assert layers * bytes_of(rank) <= budget
    most = rank + multiple > min(map(len, gains))
    assert most or layers * bytes_of(rank + multiple) > budget
    assert 2 * (sum(ranks) + layers * rope_dim) <= budget
    assert all(rank % multiple == 0 for rank in ranks)
    best = min(
        sum(lost(of_layer, rank) for of_layer, rank in zip(gains, others, strict=True))
        for others in product(*(range(multiple, len(of_layer) + 1, multiple) for of_layer in gains))
        if 2 * (sum(others) + layers * rope_dim) <= budget
    )
    assert sum(map(lost, gains, ranks)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(gains=st.lists(falling, min_size=1, max_size=3), max_loss=st.floats(0.001, 0.9))
def test_ranks_for_a_loss_are_the_least_that_keep_it(gains: list[list[float]], max_loss: float) -> None:
    ranks = ranks_for_loss(gains, max_loss)
    for of_layer, rank in zip(gains, ranks, strict=True):
        assert lost(of_layer, rank) <= max_loss + 1e-9
        assert rank == 1 or lost(of_layer, rank - 1) > max_loss
    assert set(ranks_for_loss(gains, max_loss, one_rank=True)) == {max(ranks)}


def test_a_loss_that_no_rank_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 1 loses more at any rank.*use 0.3 or more"):
        ranks_for_loss([[0.6, 0.3, 0.0], [0.5, 0.2, -0.1]], 0.25)
    assert ranks_for_loss([[0.6, 0.3, 0.0], [0.5, 0.2, -0.1]], 0.3) == (2, 2)


@pytest.mark.parametrize(("storage", "bits"), [("full", 16), ("fp8", 8), ("int4", 4.25)])
def test_a_budget_counts_bytes_as_they_are_stored(storage: Any, bits: float) -> None:
    plan = Plan(small_dit().config, LATENT, "covariance")
    config = ConvertConfig(budget_bytes=44, storage=storage)
    ranks = config.chosen(plan, small_dit().state_dict(), [sampled(), sampled(1)]).latent.ranks(2)
    keys = 2 * 2 * LATENT.rope_dim
    assert 44 - keys - 2 < sum(-(-rank * bits // 8) for rank in ranks) <= 44 - keys


def test_budgets_and_losses_decide_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "latent.safetensors"
    few = ("--num-tokens", "300")
    assert convert(source, out, *few, "--budget-bytes", "64") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert 2 * report["latent_numbers"] == report["latent_bytes"] == 64
    assert report["dense_bytes"] == 2 * 2 * 2 * 24
    ranks = [row["kv_rank"] for row in report["layers"]]
    assert load_model(str(out)).card.dit.latent.kv_rank == tuple(ranks)  # type: ignore[union-attr]
    assert convert(source, out, *few, "--max-loss", "0.4", "--rank-multiple", "4") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert all(row["predicted_loss"] <= 0.4 and row["kv_rank"] % 4 == 0 for row in report["layers"])
    assert convert(source, out, *few, "--budget-bytes", "70", "--one-rank", "--storage", "fp8") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert [row["kv_rank"] for row in report["layers"]] == [23, 23]  # beside two keys of 12 bytes
    assert report["latent_bytes"] == 70
    capsys.readouterr()
    assert convert(source, out, *few, "--budget-bytes", "20") == 2
    assert "use 28 or more" in capsys.readouterr().err
    assert convert(source, out, "--budget-bytes", "64", "--kv-rank", "4") == 2
    assert "give one of them" in capsys.readouterr().err
    assert convert(source, out, "--kv-rank", "4", "--one-rank") == 2
    assert "one_rank is for ranks that are chosen" in capsys.readouterr().err


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
        assert torch.cdist(kept, rows, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() == 0


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


def convert(source: object, out: Path, *more: str) -> int:
    return main(["convert", str(source), "--out", str(out), *more])


@pytest.mark.parametrize("method", ["covariance", "svd", "random"])
def test_a_model_file_is_converted_and_streams(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "latent.safetensors"
    assert convert(source, out, "--method", method, "--num-tokens", "300", "--kv-rank", "6") == 0
    printed = capsys.readouterr().out
    assert "% less" in printed
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["method"] == method
    assert report["saved"] == pytest.approx(1 - (2 * 6 + 2 * 6) / (2 * 2 * 24))
    assert report["num_held_out"] == pytest.approx(report["num_tokens"] / 3, rel=0.4)
    for row in report["layers"]:
        assert row["kv_error"] > 0
        assert (row["predicted_loss"] is None) == (method == "random")
    assert out.with_suffix(".png").stat().st_size > 1000
    model = load_model(str(out))
    assert model.card.dit.latent is not None
    assert model.card.name == "random-latent"
    stream = Stream(model.pipeline, "a red circle", seed=1)
    frames = [next(stream) for _ in range(4)]
    assert len(frames) == 4
    packed = tmp_path / "packed.safetensors"
    assert convert(out, packed, "--storage", "int4", "--debias") == 0
    stream = Stream(load_model(str(packed)).pipeline, "a red circle", seed=1)
    close = [next(stream).frames for _ in range(4)][-1]
    assert abs(close.astype(int) - frames[-1].frames.astype(int)).mean() < 20
    capsys.readouterr()
    assert convert(packed, tmp_path / "back.safetensors") == 0
    assert load_model(str(tmp_path / "back.safetensors")).pipeline.digest == model.pipeline.digest
    assert convert(out, tmp_path / "again.safetensors", "--kv-rank", "3", "--storage", "fp8") == 2
    assert "not --kv-rank" in capsys.readouterr().err
    assert convert(out, tmp_path / "again.safetensors") == 2
    assert "latent already" in capsys.readouterr().err
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("layout", ["wan", "diffusers", "wrapped"])
def test_bare_weights_of_every_layout_are_converted(tmp_path: Path, layout: str) -> None:
    dit = small_dit(width=32, num_heads=2)
    own = {name: tensor.clone().bfloat16() for name, tensor in dit.state_dict().items()}
    path = tmp_path / ("dense.pt" if layout == "wrapped" else "dense.safetensors")
    if layout == "wrapped":
        torch.save({"generator": {f"model.{name}": tensor for name, tensor in own.items()}, "step": 3}, path)
    else:
        save_file(from_own(own, "diffusers" if layout == "diffusers" else "wan"), path)
    out = tmp_path / "latent.safetensors"
    few = ["--num-tokens", "200", "--num-chunks", "2", "--latent-size", "2", "3", "--num-heads", "2"]
    assert convert(path, out, *few, "--kv-rank", "5", "7", "--query-rank", "9") == 0
    stored = load_file(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    for name, tensor in own.items():
        if ".self_attn." not in name:
            assert torch.equal(stored[name], tensor)
    made = BareWeights.read(out).network().float()
    assert made.config.latent is not None
    assert made.config.latent.kv_rank == (5, 7)
    x, text = torch.randn(1, 2, 3, *GRID), made.encode_text(torch.randn(1, 4, 8))
    with torch.no_grad():
        flow, _ = made(x, torch.zeros(1, 2), text, full_view(made.cache_spec(), range(2), GRID))
    assert flow.isfinite().all()
    packed = tmp_path / "packed.safetensors"
    assert convert(out, packed, "--storage", "fp8") == 0
    again = BareWeights.read(packed)
    assert again.config.latent == made.config.latent.replace(storage="fp8")
    assert all(torch.equal(again.state[name], tensor) for name, tensor in stored.items())


def test_split_weights_that_tell_what_they_are_are_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As training exports them: a memory of our own, heads that no shape tells, its stream."""
    memory = MemoryEncoderConfig(width=32, num_heads=2, rows=2, columns=3)
    dit = small_dit(width=32, num_heads=2, memory=memory)
    history = HistoryConfig(window_frames=4, sink_frames=1, chunk_frames=2, policy=EvolvingConfig())
    stream = StreamConfig(height=16, width=24, fps=16, history=history)
    told = {NETWORK_KEY: dit.config.dumps(), STREAM_KEY: stream.dumps()}
    folder = tmp_path / "model"
    folder.mkdir()
    state = {name: tensor.contiguous() for name, tensor in dit.state_dict().items()}
    for part in (0, 1):
        names = list(state)[part::2]
        save_file({name: state[name] for name in names}, folder / f"{part}.safetensors", told)
    few = ["--num-tokens", "400", "--num-chunks", "3", "--latent-size", "2", "3"]
    out = tmp_path / "new" / "latent.safetensors"
    assert convert(folder, out, *few, "--num-heads", "4") == 2
    assert "is of a network of 2 heads" in capsys.readouterr().err
    assert not out.parent.exists()
    assert convert(folder, out, *few) == 0
    made = BareWeights.read(out)
    assert made.config == dit.config.replace(latent=made.config.latent)
    assert made.stream == stream
    for name, tensor in state.items():
        if name.startswith("memory."):
            assert torch.equal(made.state[name], tensor)


def test_wrong_use_is_told_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "dense.safetensors")
    out = tmp_path / "out.safetensors"
    for more, words in (
        (["--out", str(tmp_path / "out.pt")], "no .safetensors file"),
        (["--kv-rank", "99"], "exceeds a width"),
        (["--kv-rank", "3", "4", "5"], "3 ranks for 2 layers"),
        (["--prompts", str(tmp_path / "none.txt")], "cannot read"),
        (["--rope-bands", "2", "2", "2"], "take all 12 channels"),
        (["--rope-bands", "9", "0", "0"], "a head of 12 channels has (2, 2, 2) bands"),
    ):
        assert main(["convert", str(source), "--out", str(out), *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing.safetensors"), "--out", str(out)]) == 2
    weights = tmp_path / "bare.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in small_dit().state_dict().items()}, weights)
    assert main(["convert", str(weights), "--out", str(out)]) == 2
    assert "does not split into any heads of even size" in capsys.readouterr().err
    state = small_dit(width=32, num_heads=2).state_dict()
    odd = {
        "half a model": {name: tensor for name, tensor in state.items() if not name.startswith("head.")},
        "no numbers": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()},
        "ours": {**state, "pooled_text.weight": torch.zeros(32, 32)},
        "no bias": {name: tensor for name, tensor in state.items() if "0.self_attn.q.bias" not in name},
        "one norm": {name: tensor for name, tensor in state.items() if "1.self_attn.norm_k" not in name},
        "no end": {name: tensor for name, tensor in state.items() if "1.ffn.2.weight" not in name},
        "cut": {**state, "blocks.1.self_attn.k.weight": torch.zeros(32, 31)},
        "broken": {**state, "blocks.1.self_attn.k.weight": torch.full((32, 32), torch.nan)},
    }
    told = (
        "lacks head",
        "float8",
        "do not say how",
        "missing: blocks.0.self_attn.q.bias",
        "missing: blocks.1.self_attn.norm_k",
        "missing: blocks.1.ffn.2.weight",
        "wrong shape: blocks.1.self_attn.k.weight (32, 31)",
        "'blocks.1.self_attn.k.weight' holds values that are not finite",
    )
    for (name, tensors), words in zip(odd.items(), told, strict=True):
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors"
        )
        few = ["--num-heads", "2", "--num-tokens", "0", "--method", "svd"]
        assert main(["convert", str(tmp_path / f"{name}.safetensors"), "--out", str(out), *few]) == 2
        assert words in capsys.readouterr().err
    save_file(state, weights)
    for more, words in (
        (["--latent-size", "0", "3"], "is no size"),
        (["--prompts", "x"], "not used for bare weights"),
        (["--num-tokens", "0"], "nothing to be fitted to"),
    ):
        assert main(["convert", str(weights), "--out", str(out), "--num-heads", "2", *more]) == 2
        assert words in capsys.readouterr().err
    assert main(["convert", str(source), "--out", str(source)]) == 2
    assert "is the model itself" in capsys.readouterr().err
    below = tmp_path / "a" / "b.safetensors"
    assert main(["convert", str(source), "--out", str(below), "--latent-size", "2", "3"]) == 2
    assert "not used for one of our" in capsys.readouterr().err
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"dense.safetensors", "bare.safetensors", *(f"{name}.safetensors" for name in odd)}


def test_files_written_tensor_by_tensor_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "empty": torch.zeros(0, 4).half(),
        "c": torch.randn(4, 6).T,
    }
    asked: list[str] = []

    def one(name: str) -> Tensor:
        asked.append(name)
        return tensors[name]

    path = tmp_path / "file.safetensors"
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors_by_one(path, shapes, one, {"key": "value"})
    assert asked == list(tensors)
    back = load_file(path)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())

    def broken(name: str) -> Tensor:
        raise OSError("disk full")

    with pytest.raises(CheckpointError, match="disk full"):
        write_safetensors_by_one(tmp_path / "other.safetensors", shapes, broken, {})
    assert list(tmp_path.iterdir()) == [path]


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

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
from longtake.convert.bare import load_converted
from longtake.convert.calibrate import sample_tokens
from longtake.convert.dense import DenseLayer, Linear
from longtake.convert.factor import Tokens, effective_ranks, factorise
from longtake.convert.layer import convert_layer
from longtake.convert.network import Plan, convert_layers
from longtake.convert.ranks import lost, ranks_for_budget, ranks_for_loss
from longtake.convert.settings import ConvertConfig
from longtake.diffusion.flow import Schedule
from longtake.errors import CheckpointError, ConfigError
from longtake.history.base import HistoryConfig, HistoryView, frame_phases, full_view
from longtake.io.checkpoints import from_own, write_safetensors_by_one
from longtake.models.dit import DiT
from longtake.models.latent import LatentAttention
from longtake.models.latent_config import LatentConfig
from longtake.stream.bundle import load_model
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


def converted_error(samples: Tensor, seen: Tensor, method: Any, rank: int) -> float:
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
    expected = attended(dit.blocks[0].self_attn, dit.cache_spec(), seen)
    found = attended(layer, latent_layout((rank,), LATENT.rope(WIDTH // HEADS)), seen)
    return float((found - expected).square().mean() / expected.var())


def test_what_is_fitted_to_tokens_beats_the_weights_alone_and_both_beat_chance() -> None:
    samples, seen = tokens_like_a_networks().split([2000, 1000])
    errors = {
        method: converted_error(samples, seen, method, 12) for method in ("covariance", "svd", "random")
    }
    assert errors["covariance"] < 0.8 * errors["svd"]
    assert errors["svd"] < 0.5 * errors["random"]


def test_more_rank_loses_less() -> None:
    samples, seen = tokens_like_a_networks().split([2000, 1000])
    ranks = (2, 5, 10)
    outputs = [converted_error(samples, seen, "covariance", rank) for rank in ranks]
    assert outputs[-1] < 0.7 * outputs[0]  # what heads lose of their positions is lost at any rank
    tokens, dense = Tokens.sampled(samples), dense_layer()
    errors = [convert_layer(dense, LATENT, rank, tokens, "covariance").kv_error or 0.0 for rank in ranks]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3 * errors[0]


def test_one_head_at_one_place_is_what_it_was() -> None:
    """Nothing is shared between heads and nothing turns, so all that is left is the norms' doing."""
    dit = small_dit(0, num_heads=1, qk_norm=False)
    weights = dit.state_dict()
    samples = tokens_like_a_networks()
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
    x = samples[:300].view(300, 1, WIDTH)
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
    factors = factorise(target, tokens, rank, 1e-12, metric)
    kept = min(rank, rows, 8)
    size = float(factors.gain_r[0])  # the norm at its typical size: what comes out is what went in
    map_back = factors.up.weight * factors.gain_r / size @ factors.down.weight
    left_out = torch.linalg.svdvals(metric @ target.weight @ root)[kept:]
    lost = (metric @ (map_back - target.weight) @ root).square().sum()
    torch.testing.assert_close(lost, left_out.square().sum(), atol=1e-8, rtol=1e-6)
    latent_mean = factors.down(tokens.mean_w[None])[0]
    torch.testing.assert_close(latent_mean, torch.zeros(rank).double(), atol=1e-9, rtol=0)


falling = st.lists(st.floats(1e-6, 1e3), min_size=6, max_size=12).map(lambda x: sorted(x, reverse=True))


@settings(max_examples=40, deadline=None)
@given(
    energies=st.lists(falling, min_size=1, max_size=3), numbers=st.integers(0, 30), multiple=st.integers(1, 2)
)
def test_no_other_ranks_make_more_of_a_budget(
    energies: list[list[float]], numbers: int, multiple: int
) -> None:
    rope_dim, layers = 4, len(energies)
    budget = 2 * (layers * (rope_dim + multiple) + numbers)
    ranks = ranks_for_budget(energies, budget, rope_dim, multiple)
    assert 2 * (sum(ranks) + layers * rope_dim) <= budget
    assert all(rank % multiple == 0 for rank in ranks)
    best = min(
        sum(lost(of_layer, rank) for of_layer, rank in zip(energies, others, strict=True))
        for others in product(*(range(multiple, len(of_layer) + 1, multiple) for of_layer in energies))
        if 2 * (sum(others) + layers * rope_dim) <= budget
    )
    assert sum(map(lost, energies, ranks)) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(energies=st.lists(falling, min_size=1, max_size=3), max_loss=st.floats(0.001, 0.9))
def test_ranks_for_a_loss_are_the_least_that_keep_it(energies: list[list[float]], max_loss: float) -> None:
    for of_layer, rank in zip(energies, ranks_for_loss(energies, max_loss), strict=True):
        assert lost(of_layer, rank) <= max_loss
        assert rank == 1 or lost(of_layer, rank - 1) > max_loss


def test_budgets_and_losses_decide_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "latent.safetensors"
    few = ("--num-tokens", "300")
    assert convert(source, out, *few, "--budget-bytes", "64") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert 2 * report["latent_numbers"] == 64
    ranks = [row["kv_rank"] for row in report["layers"]]
    assert load_model(str(out)).card.dit.latent.kv_rank == tuple(ranks)  # type: ignore[union-attr]
    assert convert(source, out, *few, "--max-loss", "0.1", "--rank-multiple", "4") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert all(row["predicted_loss"] <= 0.1 and row["kv_rank"] % 4 == 0 for row in report["layers"])
    capsys.readouterr()
    assert convert(source, out, *few, "--budget-bytes", "20") == 2
    assert "use 28 or more" in capsys.readouterr().err
    assert convert(source, out, "--budget-bytes", "64", "--kv-rank", "4") == 2
    assert "give one of them" in capsys.readouterr().err


def test_tokens_have_the_mean_and_covariance_of_samples() -> None:
    samples = tokens_like_a_networks().double()
    tokens = Tokens.sampled(samples)
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


def test_sampling_tokens_leaves_no_hooks_and_the_network_as_it_was() -> None:
    dit = small_dit()
    text = dit.encode_text(torch.randn(1, 4, 8))
    history = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2)
    tokens = sample_tokens(
        dit, [text, text], history, Schedule(steps=(1000, 500)).resolve(), (3, *GRID), 3, 90
    )
    assert [each.shape for each in tokens] == [(90, WIDTH)] * 2
    assert not any(block.self_attn._forward_pre_hooks for block in dit.blocks)
    again = sample_tokens(
        dit, [text, text], history, Schedule(steps=(1000, 500)).resolve(), (3, *GRID), 3, 90
    )
    assert all(torch.equal(one, other) for one, other in zip(tokens, again, strict=True))


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
    samples = torch.randn(200, WIDTH)
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
    made = load_converted(out)
    assert made.config.latent is not None
    assert made.config.latent.kv_rank == (5, 7)
    x, text = torch.randn(1, 2, 3, *GRID), made.encode_text(torch.randn(1, 4, 8))
    with torch.no_grad():
        flow, _ = made(x, torch.zeros(1, 2), text, full_view(made.cache_spec(), range(2), GRID))
    assert flow.isfinite().all()


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
    assert "give the number of heads" in capsys.readouterr().err
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

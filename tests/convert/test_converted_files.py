"""`longtake convert`: files of all layouts come out whole; what cannot be made is told and leaves nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longtake.cli import main
from longtake.convert.bare import BareWeights
from longtake.errors import CheckpointError
from longtake.history.base import HistoryConfig, full_view
from longtake.history.evolving import EvolvingConfig
from longtake.io.checkpoints import NETWORK_KEY, STREAM_KEY, write_safetensors_by_one
from longtake.io.names import from_own
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.bundle import load_model
from longtake.stream.pipeline import StreamConfig
from longtake.stream.session import Stream
from model_file import write_model
from tiny_parts import GRID, small_dit


def test_budgets_and_losses_decide_on_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "latent.safetensors"
    few = ("--num-tokens", "300")
    assert convert(source, out, *few, "--budget-bytes", "64") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert 2 * report["latent_numbers"] == report["latent_bytes"] == 64
    assert "the flow's error before tuning, as predicted" in capsys.readouterr().out
    assert 0 < report["predicted_flow_error"] < 1
    assert all(row["weight"] > 0 for row in report["layers"])
    assert report["dense_bytes"] == 2 * 2 * 2 * 24
    ranks = [row["kv_rank"] for row in report["layers"]]
    assert load_model(str(out)).card.dit.latent.kv_rank == tuple(ranks)  # type: ignore[union-attr]
    assert convert(source, out, *few, "--budget-bytes", "64", "--weigh", "alike") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["predicted_flow_error"] is None
    assert all(row["weight"] is None for row in report["layers"])
    assert convert(source, out, *few, "--max-loss", "0.4", "--rank-multiple", "4") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert all(row["predicted_loss"] <= 0.4 and row["kv_rank"] % 4 == 0 for row in report["layers"])
    assert convert(source, out, *few, "--budget-bytes", "70", "--one-rank", "--storage", "fp8") == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert [row["kv_rank"] for row in report["layers"]] == [23, 23]  # beside two keys of 12 bytes
    assert report["latent_bytes"] == 70
    bytes_of_keys = ("--budget-bytes", "50", "--one-rank", "--storage", "fp8", "--key-storage", "fp8")
    assert convert(source, out, *few, *bytes_of_keys) == 0
    report = json.loads(out.with_suffix(".json").read_text())
    assert [row["kv_rank"] for row in report["layers"]] == [19, 19]
    capsys.readouterr()
    assert convert(source, out, *few, "--budget-bytes", "20") == 2
    told = capsys.readouterr().err
    assert "use 28 or more" in told
    assert "layer 1" not in told  # nothing was measured for it
    assert convert(source, out, "--budget-bytes", "64", "--kv-rank", "4") == 2
    assert "give one of them" in capsys.readouterr().err
    assert convert(source, out, "--kv-rank", "4", "--weigh", "alike") == 2
    assert "--weigh alike is for a budget" in capsys.readouterr().err
    assert convert(source, out, "--kv-rank", "4", "--one-rank") == 2
    assert "one_rank is for ranks that are chosen" in capsys.readouterr().err


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
    assert convert(packed, tmp_path / "keys.safetensors", "--key-storage", "fp8") == 0
    kept = load_model(str(tmp_path / "keys.safetensors")).card.dit.latent
    assert kept is not None
    assert (kept.storage, kept.key_storage, kept.debias) == ("int4", "fp8", True)  # what is not said stays
    assert kept.path == "auto"
    assert convert(packed, tmp_path / "fast.safetensors", "--path", "kept") == 0
    fast = load_model(str(tmp_path / "fast.safetensors")).card.dit.latent
    assert fast == kept.replace(path="kept", key_storage="full")
    assert convert(packed, tmp_path / "back.safetensors", "--storage", "full") == 0
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
    assert convert(out, packed, "--storage", "fp8", "--key-storage", "fp8") == 0
    again = BareWeights.read(packed)
    assert again.config.latent == made.config.latent.replace(storage="fp8", key_storage="fp8")
    assert all(torch.equal(again.state[name], tensor) for name, tensor in stored.items())
    budget = tmp_path / "budget.safetensors"
    assert convert(path, budget, *few, "--budget-bytes", "60") == 0
    report = json.loads(budget.with_suffix(".json").read_text())
    assert report["latent_bytes"] <= 60
    assert all(math.isfinite(row["weight"]) and row["weight"] > 0 for row in report["layers"])


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

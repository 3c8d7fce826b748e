"""`longtake eval conversion`: more bytes lose less, and what cannot be is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longtake.cli import main
from longtake.convert.flow_probe import FlowProbe
from longtake.convert.sweep import SweepConfig, run_sweep
from longtake.errors import CheckpointError, ConfigError
from longtake.stream.bundle import load_model
from model_file import write_model


def sweep(source: Path, out: Path, *more: str) -> int:
    few = ("--num-tokens", "300", "--num-streams", "2", "--num-chunks", "2", "--max-losses", "0.4")
    return main(["eval", "conversion", str(source), "--out", str(out), *few, *more])


def test_more_bytes_lose_less(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "sweep"
    assert sweep(source, out, "--ranks", "2", "8", "24", "--stored-rank", "8") == 0
    report = json.loads((out / "conversion.json").read_text())
    assert (out / "conversion.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    points = {(point["kind"], point["asked"]): point for point in report["points"]}
    plain = [points["one rank", rank] for rank in (2, 8, 24)]
    assert [point["bytes"] for point in plain] == [2 * 2 * (rank + 6) for rank in (2, 8, 24)]
    errors = [point["kv_error"] for point in plain]
    assert 1 > errors[0] > errors[1] > errors[2] > 0
    assert all(1 > point["flow_error"] > 0 for point in plain)
    for point in plain:
        assert point["saved"] == pytest.approx(1 - point["bytes"] / report["dense_bytes"])
        chosen = points["automatic", point["bytes"]]
        assert chosen["bytes"] <= point["bytes"]
        assert chosen["predicted_flow_error"] <= point["predicted_flow_error"] + 1e-9
    assert points["max loss", 0.4]["predicted_loss"] <= 0.4
    stored = points["int4", 8]
    assert stored["bytes"] < plain[1]["bytes"]
    assert stored["kv_error"] == plain[1]["kv_error"]  # of the weights, which are the same
    assert stored["flow_error"] != plain[1]["flow_error"]  # of what is read from the cache
    told = capsys.readouterr().err
    assert told.count("one rank") == 3


def test_several_shared_keys_are_swept_at_the_same_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they leave room for latents at all."""
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "sweep"
    swept = ("--ranks", "2", "20", "--rope-keys", "2", "--stored-rank", "None")
    assert sweep(source, out, *swept) == 0
    points = json.loads((out / "conversion.json").read_text())["points"]
    one, two = (
        [point for point in points if point["kind"] == kind] for kind in ("automatic", "automatic, 2 keys")
    )
    assert len(one) == 2
    assert [point["bytes"] for point in two] == [2 * 2 * (20 + 6)]
    assert sum(two[0]["ranks"]) == sum(one[1]["ranks"]) - 2 * 6
    assert two[0]["flow_error"] != one[1]["flow_error"]
    told = capsys.readouterr().err
    assert "automatic, 2 keys, 32 bytes: left out: budget_bytes=32 holds no rank of 1 in 2 layers" in told
    assert sweep(source, out, *swept[:-3], "3", "--stored-rank", "None") == 2
    assert "name a band 3 times for 2 heads" in capsys.readouterr().err


def test_a_loss_that_no_rank_holds_takes_nothing_else_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "sweep"
    assert sweep(source, out, "--ranks", "4", "--stored-rank", "None", "--max-losses", "1e-9", "0.5") == 0
    assert "max loss 1e-09 is left out" in capsys.readouterr().err
    kinds = [point["kind"] for point in json.loads((out / "conversion.json").read_text())["points"]]
    assert kinds == ["one rank", "automatic", "max loss"]


def test_a_network_is_at_no_distance_from_itself(tmp_path: Path) -> None:
    pipeline = load_model(str(write_model(tmp_path / "dense.safetensors"))).pipeline
    stream, dit = pipeline.config, pipeline.dit
    texts = [pipeline.encode_prompt("a red circle"), pipeline.encode_prompt("a blue star")]
    probe = FlowProbe(
        dit, texts, stream.history, stream.schedule.resolve(), pipeline.latent_shape[1:], num_chunks=3, seed=0
    )
    assert probe.error_of(dit) == 0
    with torch.no_grad():
        dit.blocks[0].self_attn.o.weight.mul_(0.9)  # type: ignore[union-attr,operator]
    assert 0 < probe.error_of(dit) < 1


def test_what_cannot_be_swept_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write_model(tmp_path / "dense.safetensors"), tmp_path / "sweep"
    assert sweep(source, out, "--ranks", "200") == 2
    assert "kv_rank=200 exceeds a width of 24" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no shares"):
        SweepConfig(max_losses=(1.5,))
    with pytest.raises(ConfigError, match="decides on ranks"):
        SweepConfig.model_validate({"conversion": {"kv_rank": 3}})
    latent = tmp_path / "latent.safetensors"
    assert main(["convert", str(source), "--out", str(latent), "--num-tokens", "300", "--kv-rank", "6"]) == 0
    with pytest.raises(CheckpointError, match="latent already"):
        run_sweep(latent, SweepConfig(), lambda _: None)

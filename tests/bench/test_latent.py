"""What latent attention saves and costs: counted as torch counts it, allocated as counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from counting import flops_of_a_chunk
from longtake.bench.latent import as_latent, counted_window, measured_allocation, timed_memory
from longtake.bench.memory import MemorySetting, with_memory
from longtake.bench.turns import TurnsConfig
from longtake.cli import main
from longtake.models.dit_config import wan_dit
from longtake.models.latent_config import LatentConfig
from longtake.train.dit_costs import DiTCosts
from model_file import write_model
from tiny_parts import LATENT, small_pipeline


@pytest.mark.parametrize("path", ["expand", "absorbed"])
def test_a_latent_chunk_costs_what_torch_counts(path: str) -> None:
    pipeline = as_latent(small_pipeline())
    config = pipeline.dit.config
    assert config.latent is not None
    config = config.replace(latent=config.latent.replace(path=path))
    made = type(pipeline.dit)(config).eval().requires_grad_(False)
    pipeline = dataclasses.replace(pipeline, dit=made)
    costs = DiTCosts(config, pipeline.config.history, *pipeline.latent_shape[2:])
    assert 3 * costs.forward(1, 20).flops == pytest.approx(flops_of_a_chunk(pipeline), rel=0.01)


def test_windows_are_counted_as_published() -> None:
    """reference: 2.01 GB dense and 0.147 GB for 7 frames, 6.04 and 0.44 for 21; expanding costs a little."""
    seven, twenty_one = (counted_window(window, 80e9) for window in (7, 21))
    assert seven["cache_bytes"]["dense"] == pytest.approx(2.01e9, rel=0.01)
    assert seven["cache_bytes"]["latent"] == pytest.approx(0.147e9, rel=0.01)
    assert twenty_one["cache_bytes"]["dense"] == pytest.approx(6.04e9, rel=0.01)
    assert twenty_one["cache_bytes"]["latent"] == pytest.approx(0.44e9, rel=0.01)
    assert twenty_one["cache_bytes"]["latent, int4"] == pytest.approx(21 * 1560 * 30 * 166)
    for row in (seven, twenty_one):
        flops = row["flops"]
        assert flops["auto"] == min(flops["expand"], flops["absorbed"]) == flops["expand"]
        # Fewer and smaller products make queries, keys and values; that is more than expanding costs.
        assert flops["expand"] < flops["dense"] < flops["absorbed"]
    assert twenty_one["streams"]["latent"] > 3 * twenty_one["streams"]["dense"]


def test_a_model_with_a_memory_of_its_own_is_timed_too() -> None:
    """Its own is as small as it likes; what is timed is another."""
    own = with_memory(
        small_pipeline(latent=LATENT.replace(kv_rank=8)), MemorySetting(num_frames=1, num_layers=1)
    )
    for read_as_latent in (None, (8, 6)):
        times = timed_memory(TurnsConfig(num_pairs=3), own, read_as_latent)
        assert times["memory_seconds"]["num"] == 3


def test_buffers_take_what_is_counted() -> None:
    for row in measured_allocation(32 << 20):
        assert row["allocated_bytes"] == row["counted_bytes"] >= 32 << 20
        if row["resident_bytes"] is not None:  # each starts with nothing that could be used again
            assert row["resident_bytes"] == pytest.approx(row["counted_bytes"], rel=0.1)


def test_proportions_are_the_papers() -> None:
    wan = wan_dit()
    assert LatentConfig.proportional(wan.width, wan.head_dim) == LatentConfig().replace(query_rank=None)


def test_the_command_reports_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_model(tmp_path / "model.safetensors"), tmp_path / "report.json"
    assert main(["bench", "latent", "--model-path", str(path), "--num-pairs", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["window_frames"] for row in report["wan_1_3b"]] == [7, 12, 21, 63]
    assert {bar["what"]: bar["met"] for bar in report["bars"]}["bytes a token and layer, int4"]
    assert report["time"]["ratio_of_medians"] > 0
    keys, latents = report["memory"]["keys"], report["memory"]["latents"]
    assert latents["segment_bytes"] == pytest.approx(4680 * 224 * 2)
    assert keys["segment_bytes"] == pytest.approx(4680 * 3072 * 2)
    # Latents have to be expanded in every layer that reads them, and keys are made once.
    assert latents["share"] > keys["share"] > 0.1
    assert all(row["time"]["ratio_of_medians"] > 0 for row in (keys, latents))
    printed = capsys.readouterr().out
    assert "read as latents" in printed
    assert "by cache alone" in printed
    assert str(out) in printed

"""The cost of a memory: counted as torch counts it, at Wan's size as published, and every figure is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from counting import flops_of_a_chunk
from longtake.bench.memory import (
    SETTINGS,
    THIS_MODELS,
    WAN_1_3B,
    MemoryBenchConfig,
    MemorySetting,
    bars,
    count,
    run_memory_bench,
    with_memory,
)
from longtake.cli import main
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.recipes import get_recipe
from model_file import write_model
from tiny_parts import small_pipeline

CHEAPEST = "half a grid, six readers"


@pytest.mark.parametrize(
    "setting",
    [
        MemorySetting(num_frames=2, num_layers=1),
        MemorySetting(num_frames=1, num_readers=1, ffn_ratio=2),
        MemorySetting(num_frames=3, token_share=0.5),
        MemorySetting(num_frames=1, attends="cell", own_readings=True),
    ],
)
def test_a_memory_costs_what_torch_counts(setting: MemorySetting) -> None:
    pipeline = with_memory(small_pipeline(), setting)
    history, policy = pipeline.config.history, pipeline.config.history.policy
    assert isinstance(policy, EvolvingConfig)
    counted = count(pipeline.dit.config, history, policy, pipeline.latent_shape[2:], 3)
    without = pipeline.with_history(history.replace(policy=policy.replace(mode="off")))
    off, on = flops_of_a_chunk(without), flops_of_a_chunk(pipeline)
    assert counted.plain == pytest.approx(off, rel=0.01)
    assert counted.keys + counted.read + counted.update == pytest.approx(on - off, rel=0.02)


def test_the_published_setting_costs_what_is_published() -> None:
    """Three frames read in all layers: about 14 % at a window of 12 frames, the update 0.6 %."""
    grid, history = (30, 52), HistoryConfig(window_frames=12)
    dit = WAN_1_3B.replace(memory=SETTINGS["paper"].encoder(WAN_1_3B, grid))
    assert dit.memory is not None
    assert dit.memory.num_tokens == 4680
    counted = count(dit, history, SETTINGS["paper"].policy(dit), (60, 104), 5)
    assert counted.keys / counted.plain == pytest.approx(0.14, abs=0.01)
    assert counted.update / counted.plain == pytest.approx(0.006, abs=0.001)


def test_readers_are_spread_and_hold_the_last_layer() -> None:
    assert MemorySetting(num_readers=1).policy(WAN_1_3B).read_layers == (29,)
    assert MemorySetting(num_readers=6).policy(WAN_1_3B).read_layers == (4, 9, 14, 19, 24, 29)
    assert MemorySetting(num_readers=30).policy(WAN_1_3B).read_layers == tuple(range(30))
    assert MemorySetting().policy(WAN_1_3B).read_layers == "all"
    with pytest.raises(ConfigError, match="num_readers=31"):
        MemorySetting(num_readers=31).policy(WAN_1_3B)
    with pytest.raises(ConfigError, match="does not hold sink"):
        MemoryBenchConfig(window_frames=5)


def test_a_models_own_memory_is_scaled_and_its_bar_is_of_that(tmp_path: Path) -> None:
    """The small recipe's memory: one frame, read with keys of their own by four of eight layers."""
    made = get_recipe("tiny")
    policy = made.stream.history.policy
    assert isinstance(policy, EvolvingConfig)
    setting = MemorySetting.like(made.dit_model, policy, (4, 4))
    assert setting == MemorySetting(
        num_frames=1, num_layers=1, ffn_ratio=1, num_readers=15, attends="cell", own_readings=True
    )
    assert setting.encoder(WAN_1_3B, (30, 52)).num_readings == 15
    assert MemorySetting.like(made.dit_model, EvolvingConfig(), (8, 8)).token_share == 0.5
    pipeline = with_memory(small_pipeline(), MemorySetting(num_frames=1, num_readers=1))
    report = run_memory_bench(MemoryBenchConfig(num_pairs=3), pipeline, "small", lambda line: None)
    own = report["counted"]["wan_1_3b"][THIS_MODELS]
    assert own["tokens"] == 1560
    assert report["bars"][0]["measured"] == own["share"] > report["counted"]["wan_1_3b"][CHEAPEST]["share"]


def test_the_command_reports_every_figure_and_its_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    out = tmp_path / "new" / "bench.json"
    assert main(["bench", "memory", "--model-path", str(model), "--num-pairs", "3", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["model"]["trained_memory"] is False
    assert set(report["counted"]["wan_1_3b"]) == set(SETTINGS)
    for name in ("chunk", "latents"):
        assert report["time"][name]["memory_seconds"]["num"] == 3
    printed = capsys.readouterr().out
    assert "with an untrained memory" in printed
    assert printed.count("met\n") == 2
    worse = {**report, "time": {"chunk": {"ratio_of_medians": 1.2}}}
    assert [bar["met"] for bar in bars(worse)] == [True, False]

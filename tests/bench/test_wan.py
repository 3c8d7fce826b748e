"""A chunk at a published network's size, measured here at a toy's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.bench.memory import SETTINGS, WAN_1_3B
from longtake.bench.wan import Case, WanBenchConfig, cases, run_wan_bench
from longtake.cli import main
from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.models.latent_config import LatentConfig

TOY = WAN_1_3B.replace(
    width=96,
    ffn_width=128,
    num_layers=6,
    num_heads=2,
    text_width=32,
    text_length=16,
    frequency_width=32,
)
SIZE = (8, 12)


def toy_cases(config: WanBenchConfig) -> list[Case]:
    return cases(config, TOY, LatentConfig.proportional(96, 48), SIZE)


def test_every_case_is_measured_over_a_full_window() -> None:
    config = WanBenchConfig(windows=(7, 12), num_chunks=1)
    saved: list[int] = []
    report = run_wan_bench(
        config,
        torch.device("cpu"),
        lambda _: None,
        toy_cases(config),
        save=lambda report: saved.append(len(report["cases"])),
        size=SIZE,
        dtype=torch.float32,
    )
    rows = {row["case"]: row for row in report["cases"]}
    assert saved == list(range(1, len(rows) + 1))
    assert len(rows) == 2 * 3 + 1 + len(SETTINGS)
    assert all(row["seconds"] > 0 for row in rows.values())
    # A window of 7 keeps 4 frames beside the chunk: keys and values of 24 tokens in 6 layers, fp32, and
    # the sink's keys once more, un-rotated.
    dense = rows["dense, window 7"]["cache_bytes"]
    assert dense == 24 * 6 * 96 * 4 * (2 * 4 + 1)
    expanded, absorbed = (rows[f"latent {path}, window 7"]["cache_bytes"] for path in ("expand", "absorbed"))
    assert expanded == absorbed < dense / 4
    assert rows["memory, paper"]["cache_bytes"] > rows["no memory"]["cache_bytes"]


def test_a_memory_is_measured_beside_the_same_window_without_one() -> None:
    plain, remembering = toy_cases(WanBenchConfig(windows=(), memories=("one frame, six readers",)))
    assert plain.name == "no memory"
    assert plain.dit == TOY
    assert isinstance(remembering.history.policy, EvolvingConfig)
    assert remembering.dit.memory is not None
    same = ("window_frames", "sink_frames", "chunk_frames")
    assert all(getattr(plain.history, name) == getattr(remembering.history, name) for name in same)


def test_what_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="window of 3 frames"):
        WanBenchConfig(windows=(3,))
    with pytest.raises(ConfigError, match="no memory is called 'huge'.*paper"):
        WanBenchConfig(memories=("huge",))
    if not torch.cuda.is_available():
        assert main(["bench", "wan", "--out", str(tmp_path / "report.json")]) == 2
        assert not (tmp_path / "report.json").exists()
        assert "--device cpu" in capsys.readouterr().err

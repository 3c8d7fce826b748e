"""The CPU benchmark on a small random model: every figure is there, and each bar can fail."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from longtake.bench.cpu import CpuBenchConfig, bars, count_allocations
from longtake.bench.turns import full_window_chunk, measure_pairs, spread
from longtake.cli import bench_cpu, main
from longtake.errors import ConfigError
from longtake.stream.session import Stream
from model_file import write_model
from tiny_parts import small_pipeline


def test_the_command_reports_every_figure_and_its_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    out = tmp_path / "new" / "bench.json"
    argv = ["--model-path", str(model), "--prompt", "a red circle", "--out", str(out)]
    assert main(["bench", "cpu", *argv, "--far-chunk", "30", "--num-pairs", "6", "--num-starts", "1"]) == 0
    report = json.loads(out.read_text())
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["cpu"]
    assert report["long_run"]["chunks"] == 28  # chunks 2 to 29: a window of 7 frames is full at chunk 2
    assert report["long_run"]["frames_per_second"] > 0
    assert 0 < report["long_run"]["encode_and_write_share"] < 1
    early, late = report["long_run"]["resident_bytes_early"], report["long_run"]["resident_bytes_late"]
    assert early["num"] == late["num"] == 27
    assert report["long_run"]["resident_growth_bytes"] == late["median"] - early["median"]
    assert report["long_run"]["file_bytes"] > 1000
    cost = report["constant_cost"]
    assert (cost["just_full_chunk"], cost["far_chunk"]) == (2, 30)
    assert cost["just_full_seconds"]["num"] == cost["far_seconds"]["num"] == 6
    assert report["allocations"]["equal"]
    assert report["allocations"]["far"]["count"] > 50
    start = {name: value["median"] for name, value in report["start"].items()}
    assert start["import_seconds"] > 0
    assert start["first_frame_beyond_import_seconds"] == pytest.approx(
        start["time_to_first_frame_seconds"] - start["import_seconds"]
    )
    printed = capsys.readouterr().out
    assert "FPS from text to file" in printed
    assert printed.count(" met\n") == len(report["bars"]) == 5


def test_every_bar_can_fail() -> None:
    good = {
        "long_run": {"real_time_factor": 3.1, "resident_growth_bytes": 0},
        "constant_cost": {"ratio_of_medians": 1.01},
        "allocations": {"far": {"count": 5}, "just_full": {"count": 5}},
        "start": {"first_frame_beyond_import_seconds": {"median": 1.0}},
    }
    assert all(bar["met"] for bar in bars(good))
    spoils = [
        ("long_run", "real_time_factor", 2.9),
        ("constant_cost", "ratio_of_medians", 1.03),
        ("allocations", "far", {"count": 6}),
        ("long_run", "resident_growth_bytes", 1_100_000),
        ("start", "first_frame_beyond_import_seconds", {"median": 2.1}),
    ]
    for index, (part, name, value) in enumerate(spoils):
        report = copy.deepcopy(good)
        report[part][name] = value  # type: ignore[index]
        assert [bar["met"] for bar in bars(report)] == [other != index for other in range(5)]


def test_allocations_are_counted() -> None:
    pipeline = small_pipeline()
    stream, guided = Stream(pipeline, "one"), Stream(small_pipeline(guidance=2.0), "one")
    for _ in range(6):
        next(stream)
        next(guided)
    counts = [count_allocations(stream) for _ in range(2)]
    assert counts[0] == counts[1]
    assert counts[0]["count"] > 100  # hundreds of operators, each with a result of its own
    assert count_allocations(guided)["bytes"] > counts[0]["bytes"]  # twice the rows


def test_pairs_advance_both_streams_equally() -> None:
    pipeline = small_pipeline()
    near, far = Stream(pipeline, "one"), Stream(pipeline, "two")
    result = measure_pairs(near, far, 5)
    assert near.state.chunk == far.state.chunk == 5
    assert result["ratio_of_medians"] == pytest.approx(
        result["far_seconds"]["median"] / result["just_full_seconds"]["median"]
    )


def test_spread() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "quartiles": [1.5, 2.5], "range": [1.0, 3.0], "num": 3}
    assert spread([4.0])["quartiles"] == [4.0, 4.0]


def test_when_a_window_is_full() -> None:
    for window, chunk, index in ((7, 2, 3), (6, 2, 2), (2, 2, 0)):
        pipeline = small_pipeline(window_frames=window, chunk_frames=chunk, sink_frames=0)
        assert full_window_chunk(pipeline) == index
    with pytest.raises(ConfigError, match="no limit"):
        full_window_chunk(small_pipeline(window_frames=None))


def test_arguments_repeat_their_config_faithfully() -> None:
    for name, field in CpuBenchConfig.model_fields.items():
        assert bench_cpu.Arguments.model_fields[name].default == field.default, name


def test_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors")
    common = ["bench", "cpu", "--model-path", str(model)]
    assert main([*common, "--out", f"{tmp_path}/a.json", "--far-chunk", "2"]) == 2
    assert "the window is full at 2" in capsys.readouterr().err
    assert main([*common, "--out", "/proc/no/a.json"]) == 2
    assert "cannot write" in capsys.readouterr().err

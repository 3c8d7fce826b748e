"""Meters: right quantiles in constant memory, and a split of the time that adds up."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time

import numpy as np
import pytest

from longtake.bench.meter import (
    DurationHistogram,
    GenerationMeter,
    environment,
    process_started,
    resident_bytes,
)


def test_quantiles_agree_with_the_exact_ones_to_a_percent() -> None:
    durations = np.random.default_rng(0).lognormal(-2, 1, 20_000)
    histogram = DurationHistogram()
    for value in durations:
        histogram.add(float(value))
    for share in (0.01, 0.5, 0.95, 0.999):
        exact = np.quantile(durations, share, method="inverted_cdf")
        assert histogram.quantile(share) == pytest.approx(exact, rel=0.011)
    assert histogram.count == 20_000
    assert histogram.total_seconds == pytest.approx(durations.sum())


def test_extremes_and_emptiness() -> None:
    histogram = DurationHistogram()
    assert histogram.quantile(0.5) is None
    for value in (0.0, 1e9):
        histogram.add(value)
    low, high = histogram.quantile(0.0), histogram.quantile(1.0)
    assert low is not None
    assert high is not None
    assert low < 2e-6
    assert high > 9e3


def test_the_split_adds_up_and_rates_leave_out_the_first_chunk() -> None:
    meter = GenerationMeter(fps=16, started=time.perf_counter())
    time.sleep(0.02)
    meter.imported()
    meter.loaded()
    assert meter.frames_per_second is None
    time.sleep(0.05)
    meter.wrote(9)
    assert meter.real_time_factor is None
    for _ in range(4):
        time.sleep(0.01)
        meter.wrote(12)
    summary = meter.summary()
    parts = ("import_seconds", "load_seconds", "first_chunk_seconds")
    assert sum(summary[part] for part in parts) == pytest.approx(summary["time_to_first_frame_seconds"])
    assert summary["num_frames"] == 57
    after = summary["wall_seconds"] - summary["time_to_first_frame_seconds"]
    assert summary["frames_per_second"] == pytest.approx(48 / after)
    assert summary["real_time_factor"] == pytest.approx(3 / after)
    assert 0.01 <= summary["chunk_seconds_p50"] <= summary["chunk_seconds_p95"]
    assert summary["chunks_after_the_first"] == 4


def test_a_run_that_never_began_has_a_summary() -> None:
    summary = GenerationMeter(fps=16, started=time.perf_counter()).summary()
    assert summary["num_frames"] == 0
    assert summary["time_to_first_frame_seconds"] is None
    json.dumps(summary)


def test_memory_and_environment_are_told() -> None:
    before = resident_bytes()
    # A mapping of its own: an array may be laid into memory that an earlier test has left to the allocator.
    with mmap.mmap(-1, 64_000_000) as block:
        np.frombuffer(block, np.uint8)[:] = 1
        after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > 0.9 * 64_000_000
    told = environment()
    assert told["torch_threads"] >= 1
    assert told["cpu"]
    json.dumps(told)


def test_a_process_knows_its_age() -> None:
    code = (
        "import time; from longtake.bench.meter import process_started as p; a = time.perf_counter() - p();"
        "time.sleep(0.3); b = time.perf_counter() - p(); assert 0 <= a < 10, a; "
        "assert 0.25 < b - a < 0.6, (a, b)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert process_started() < time.perf_counter()

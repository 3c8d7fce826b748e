"""Diversity across seeds: real clips differ as they should, and each kind of sameness is noticed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from faulty_sources import FaultySource
from longtake.eval import runner
from longtake.eval.diversity import SPREADS, Start, spreads, start_of
from longtake.eval.runner import WorldEvalConfig, jobs
from longtake.eval.score import Record
from longtake.eval.source import TruthSource
from longtake.eval.summary import summarize

CONFIG = WorldEvalConfig(scenes=4, seconds=1, diversity_prompts=4, diversity_seeds=16, batch=68)


def records(source: TruthSource) -> list[Record]:
    return runner._run_batch(CONFIG, source, jobs(CONFIG), None)


def test_a_start_has_place_size_and_heading() -> None:
    frames = np.arange(0, 32, 4)
    track = np.stack([0.5 + 0.01 * frames, 0.5 - 0.01 * frames], axis=1)
    track[0] = np.nan  # not seen at once
    start = start_of(track, np.full(8, 10 / 64), frames)
    assert start is not None
    assert start.center == pytest.approx((64 * 0.54, 64 * 0.46))
    assert start.radius == pytest.approx(10)
    assert start.heading == pytest.approx(-math.pi / 4)
    still = start_of(np.full((8, 2), 0.5), np.full(8, 0.2), frames)
    assert still is not None
    assert still.heading is None
    assert start_of(np.full((8, 2), np.nan), np.full(8, np.nan), frames) is None


def test_spreads_by_hand() -> None:
    corners = [(0.0, 0.0), (3.0, 4.0), (0.0, 0.0), (3.0, 4.0)]
    starts = [
        Start(center=center, radius=8.0 + n, heading=n * math.pi / 2) for n, center in enumerate(corners)
    ]
    found = spreads(starts)
    assert found["diversity_px"] == pytest.approx(5 * 4 / 6)
    assert found["diversity_heading"] == pytest.approx(1)
    assert found["diversity_radius_px"] == pytest.approx((3 * 1 + 2 * 2 + 1 * 3) / 6)
    same = spreads([starts[0]] * 3)
    assert same == {"diversity_px": 0, "diversity_heading": pytest.approx(0), "diversity_radius_px": 0}
    assert spreads(starts[:1]) == dict.fromkeys(SPREADS)
    still = [start.replace(heading=None) for start in starts]
    assert spreads(still)["diversity_heading"] is None


def test_ratios_to_real_clips() -> None:
    real = records(TruthSource())
    for source, low, high in ((FaultySource("none"), 1, 1), (FaultySource("one place"), -0.01, 0.01)):
        found = {"model": records(source), "truth": real}
        ratios = summarize(CONFIG, "model", found, {"model": {}, "truth": {}}).sources["model"].ratios
        for key in SPREADS:
            value = ratios[key].value
            assert value is not None, key
            assert low <= value <= high, key
    still = summarize(
        CONFIG, "model", {"model": records(FaultySource("frozen")), "truth": real}, {"model": {}, "truth": {}}
    )
    assert still.sources["model"].ratios["diversity_px"].value == pytest.approx(1, abs=0.01)
    assert still.sources["model"].metrics["diversity_heading"].value is None
    assert still.sources["model"].ratios["speed_px"].value == pytest.approx(0, abs=0.01)

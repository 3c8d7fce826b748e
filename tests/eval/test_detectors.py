"""The detectors' accuracy on a few hundred frames of every level."""

from __future__ import annotations

import numpy as np
import pytest

from longtake.eval.detectors import (
    ATTRIBUTES,
    DetectorEvalConfig,
    DetectorReport,
    compare,
    evaluate_detectors,
)
from longtake.world import render, sample_scene
from longtake.world.detect import detect


@pytest.fixture(scope="module", params=[1, 2, 3])
def report(request: pytest.FixtureRequest) -> DetectorReport:
    return evaluate_detectors(DetectorEvalConfig(level=request.param, scenes=16, seconds=4, seed=7))


@pytest.mark.parametrize(("kind", "required"), [("rendered", 0.99), ("h264", 0.98), ("blur_noise", 0.98)])
def test_attributes_are_read_right(report: DetectorReport, kind: str, required: float) -> None:
    for attribute in ATTRIBUTES:
        found = report.accuracy[kind][attribute]
        assert found.num > (3 if attribute == "motion" else 80), attribute
        assert found.value is not None
        assert found.value >= required, (kind, attribute, found)


def test_wrong_readings_are_counted_as_wrong() -> None:
    scene, other = sample_scene(0, 1, "any"), sample_scene(2, 1, "any")
    frames = np.arange(0, 40, 4)
    found = detect(render(other, 0, 40)[::4])
    answers = {key: right / total for key, right, total in compare(found, scene, frames)}
    assert answers["present"] == 1
    assert answers["colour"] == 0
    assert answers["position"] < 0.5

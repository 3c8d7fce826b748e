"""Attribute binding, prompt switches and returning objects: real clips are right, each fault is noticed."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from faulty_sources import FaultySource
from longtake.errors import ConfigError
from longtake.eval import runner
from longtake.eval.detectors import blurred_and_noisy
from longtake.eval.errors import EvalError
from longtake.eval.returns import returns
from longtake.eval.runner import Job, WorldEvalConfig, jobs, pairable
from longtake.eval.score import Record
from longtake.eval.script import Chunking, Script, scene_for_script
from longtake.eval.source import TruthSource
from longtake.eval.stats import estimate
from longtake.eval.summary import summarize
from longtake.eval.world import run_world_eval
from longtake.world import parse_caption, render, sample_scene
from longtake.world.detect import detect

LEVEL_2 = WorldEvalConfig(level=2, scenes=12, seconds=5, diversity_prompts=0)
LEVEL_3 = WorldEvalConfig(level=3, scenes=20, seconds=30, diversity_prompts=0)


def crowded_jobs() -> list[Job]:
    return [job for job in jobs(LEVEL_2) if len(parse_caption(job.script.text).objects) > 1]


def panning_jobs() -> list[Job]:
    """Some with absences of two seconds (14 and 15), some with longer ones only."""
    return [job for job in jobs(LEVEL_3) if job.index in (0, 5, 14, 15)]


def switching_jobs() -> list[Job]:
    return [dataclasses.replace(job, num_frames=208) for job in jobs(LEVEL_3) if not job.script.panning][:4]


@cache
def measured(fault: str, kind: str) -> tuple[Record, ...]:
    config = LEVEL_2 if kind == "several objects" else LEVEL_3
    listed = {
        "several objects": lambda: [
            j for j in jobs(LEVEL_2) if len(parse_caption(j.script.text).objects) > 1
        ],
        "panning": panning_jobs,
        "switching": switching_jobs,
    }[kind]()
    return tuple(runner._run_batch(config, FaultySource(fault, config.level), listed, None))


def mean(metric: str, fault: str, kind: str) -> float:
    value = estimate([record.scores[metric] for record in measured(fault, kind)]).value
    assert value is not None, metric
    return value


@pytest.mark.parametrize(
    ("kind", "metrics"),
    [
        ("several objects", ("binding", "background")),
        ("switching", ("binding", "background", "switch")),
        ("panning", ("binding", "background", "shown", "return_present", "return_colour", "return_shape")),
    ],
)
def test_real_clips_are_the_ceiling(kind: str, metrics: tuple[str, ...]) -> None:
    for metric in metrics:
        assert mean(metric, "none", kind) >= 0.98, metric


@pytest.mark.parametrize(
    ("fault", "kind", "metric", "at_most"),
    [
        ("swapped colours", "several objects", "binding", 0.4),
        ("no object", "several objects", "binding", 0.0),
        ("blobs", "several objects", "binding", 0.7),
        ("ignored switch", "switching", "switch", 0.1),
        ("late switch", "switching", "switch", 0.97),
        ("returns recoloured", "panning", "return_colour", 0.2),
        ("returns recoloured", "panning", "binding", 0.9),
        ("does not return", "panning", "return_present", 0.0),
        ("no object", "panning", "shown", 0.0),
        ("no object", "panning", "binding", 0.0),
    ],
)
def test_each_fault_is_noticed(fault: str, kind: str, metric: str, at_most: float) -> None:
    assert mean(metric, fault, kind) <= at_most


def test_faults_leave_the_rest_alone() -> None:
    assert mean("colour", "swapped colours", "several objects") == pytest.approx(
        mean("colour", "none", "several objects"), abs=0.05
    )
    assert mean("return_present", "returns recoloured", "panning") >= 0.95
    assert mean("background", "returns recoloured", "panning") == 1.0


def test_returns_are_told_apart_by_the_length_of_the_absence() -> None:
    events = [event for record in measured("none", "panning") for event in record.returns]
    away = [event.away for event in events if event.away is not None]
    assert min(away) <= 48 < max(away)
    for metric in ("return_present_in_window", "return_colour_in_window", "return_present_beyond"):
        assert mean(metric, "none", "panning") >= 0.97, metric
    assert 0 < mean("returned_in_window", "none", "panning") < 1
    # What never comes back has been away for longer than any window.
    assert {event.away for r in measured("does not return", "panning") for event in r.returns} == {None}
    assert mean("return_present_beyond", "does not return", "panning") == 0


def test_the_length_of_the_window_is_the_sources() -> None:
    source = TruthSource(3, chunking=Chunking(window_frames=200))
    job = next(j for j, r in zip(panning_jobs(), measured("none", "panning"), strict=True) if r.returns)
    record = runner._run_batch(LEVEL_3, source, [job], None)[0]
    short = [event for event in record.returns if event.away is not None and event.away <= 200]
    assert short
    assert record.scores["return_present_in_window"] == pytest.approx(np.mean([e.present for e in short]))


def test_level_3_has_bars_on_returns() -> None:
    for fault, met in (("none", True), ("returns recoloured", False)):
        records = {"model": measured(fault, "panning"), "truth": measured("none", "panning")}
        summary = summarize(LEVEL_3, "model", records, {"model": {}, "truth": {}})
        bars = {bar.metric: bar for bar in summary.bars}
        assert bars["return_present_in_window"].met
        assert bars["return_colour_in_window"].met == met
        assert bars["departures over real clips'"].met
    records = {"model": measured("no object", "panning"), "truth": measured("none", "panning")}
    summary = summarize(LEVEL_3, "model", records, {"model": {}, "truth": {}})
    bars = {bar.metric: bar for bar in summary.bars}
    for metric in ("return_present_in_window", "return_colour_in_window", "departures over real clips'"):
        assert not bars[metric].met


def test_a_transition_is_not_judged() -> None:
    for record in measured("none", "switching"):
        assert all(start == Chunking().boundary(start) for start, _ in record.prompts)
    late = [record.scores["background"] for record in measured("late switch", "switching")]
    on_time = [record.scores["background"] for record in measured("none", "switching")]
    assert on_time == [1.0] * len(on_time)
    assert min(value for value in late if value is not None) < 1
    # The picture changes at the switch, and that is no seam.
    seams = [abs(record.scores["seam"] or 0.0) for record in measured("none", "switching")]
    assert max(seams) < 0.1


def test_short_clips_of_level_3_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seconds=20 is too short for level 3.*use seconds > 20"):
        WorldEvalConfig(level=3, seconds=20)
    assert WorldEvalConfig(level=3).length_seconds == 40
    assert WorldEvalConfig(level=2).length_seconds == 5


def test_switches_move_to_the_chunk_where_they_can_take_effect() -> None:
    chunking = Chunking(first_frames=9, frames=12)
    assert [chunking.boundary(frame) for frame in (0, 1, 9, 10, 21, 22)] == [0, 9, 9, 21, 21, 33]
    script = Script(((0, "a"), (50, "b"), (100, "c"))).on(chunking, 90)
    assert script.prompts == ((0, "a"), (57, "b"))
    spans = script.spans(90, 12)
    assert [(span.start, span.stop, span.judged_from) for span in spans] == [(0, 57, 0), (57, 90, 69)]
    for starts in ((), ((3, "a"),), ((0, "a"), (0, "b"))):
        with pytest.raises(EvalError, match="first start at 0"):
            Script(starts)


def test_real_clips_of_scripts_pan_and_keep_what_goes_on() -> None:
    panning = "a red circle still and a small blue star bouncing on hills, the camera pans"
    scene = scene_for_script(Script.of(panning), 3, 3)
    assert scene.segments[0].camera.panning
    assert len(np.unique(scene.truth(0, 200).camera_x)) > 100
    script = Script(((0, "a red circle still on white"), (21, "a blue circle still on white")))
    truth = scene_for_script(script, 4).truth(0, 40)
    assert np.ptp(truth.center_xy[:, 0], axis=0).max() == 0
    assert set(truth.colour[:, 0].tolist()) == {0, 4}
    plain = sample_scene(0, 1).caption
    video = np.concatenate(list(TruthSource().generate([Script.of(plain)], [9], 20)), axis=1)[0]
    np.testing.assert_array_equal(video, render(scene_for_script(Script.of(plain), 9), 0, 20))


def test_runs_on_two_splits_are_compared(tmp_path: Path) -> None:
    config = WorldEvalConfig(scenes=3, seconds=1, diversity_prompts=0, split="train")
    run_world_eval(config, FaultySource("none"), (), tmp_path / "train")
    heldout = config.replace(split="heldout")
    worse = FaultySource("none")
    summary = run_world_eval(heldout, worse, (), tmp_path / "heldout", against=tmp_path / "train")
    assert summary is not None
    assert summary.against["colour"].value == 0
    assert {bar.metric: bar.met for bar in summary.bars}["loss of colour against the other run"]
    assert "Against the other run" in (tmp_path / "heldout" / "report.html").read_text()
    same = run_world_eval(config, FaultySource("frozen"), (), tmp_path / "frozen", against=tmp_path / "train")
    assert same is not None
    assert same.against_same_scenes
    assert same.against["colour"].value == 0
    assert same.against["speed_px"].value is not None
    assert same.against["speed_px"].value < -0.1
    assert "diversity_px" in same.against
    more = config.replace(scenes=5, diversity_prompts=1)
    assert pairable(more) == pairable(config) != pairable(config.replace(seconds=None))
    assert pairable(config.replace(seconds=None)) == pairable(config.replace(seconds=5))
    few = run_world_eval(more, FaultySource("frozen"), (), tmp_path / "more", against=tmp_path / "train")
    assert few is not None
    assert few.against_same_scenes
    assert few.against["speed_px"] == same.against["speed_px"]
    assert few.against["diversity_px"].num == 0
    with pytest.raises(EvalError, match="compare evaluations of one model"):
        run_world_eval(heldout, FaultySource("frozen"), (), tmp_path / "x", against=tmp_path / "train")
    with pytest.raises(EvalError, match="no finished evaluation"):
        run_world_eval(heldout, worse, (), tmp_path / "y", against=tmp_path / "none")
    with pytest.raises(EvalError, match="of level 1, and this one of level 2"):
        run_world_eval(
            heldout.replace(level=2), FaultySource("none", 2), (), tmp_path / "z", against=tmp_path / "train"
        )


def test_returns_are_found_in_degraded_clips() -> None:
    for job in panning_jobs()[:3]:
        video = render(scene_for_script(job.script, job.seed, 3), 0, job.num_frames)
        wanted, frames = parse_caption(job.script.text), np.arange(0, job.num_frames, 2)
        sharp, blurred = (
            returns(detect(clip[::2]), frames, wanted, job.num_frames, 12)
            for clip in (video, blurred_and_noisy(video))
        )
        assert sharp
        assert len(blurred) == len(sharp)
        for one, other in zip(sharp, blurred, strict=True):
            assert other.side == one.side
            assert other.colour is True
            assert abs(other.left_at - one.left_at) <= 4

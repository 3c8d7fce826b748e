"""The evaluation notices each fault and nothing else; it shards, resumes and merges."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from faulty_sources import FaultySource
from longtake.errors import PackageError
from longtake.eval import runner
from longtake.eval.diversity import SPREADS
from longtake.eval.errors import EvalError
from longtake.eval.meter import Meter
from longtake.eval.records import RecordFile, Shard
from longtake.eval.report import HTML_NAME, PNG_NAME, heldout_rows
from longtake.eval.runner import WorldEvalConfig, evaluate, jobs, merge
from longtake.eval.score import METRICS, Record
from longtake.eval.source import TruthSource
from longtake.eval.summary import Summary, summarize
from longtake.eval.world import SUMMARY_NAME, run_world_eval
from longtake.world import parse_caption, render, scene_for_prompt

CONFIG = WorldEvalConfig(
    scenes=8, seconds=8, window_seconds=4, diversity_prompts=2, diversity_seeds=3, batch=7
)
HIGHER_IS_WORSE = ("frozen", "flicker", "seam", "background_error", "colour_error", "jerk_px", "size_change")


@cache
def measured(fault: str) -> tuple[Record, ...]:
    source = FaultySource(fault)
    records = []
    listed = jobs(CONFIG)
    for begin in range(0, len(listed), CONFIG.batch):
        records += runner._run_batch(CONFIG, source, listed[begin : begin + CONFIG.batch], None)
    return tuple(records)


@cache
def summary_of(fault: str) -> Summary:
    records = {"model": measured(fault), "truth": measured("none")}
    return summarize(CONFIG, "model", records, {"model": {}, "truth": {}})


def test_real_clips_are_right_in_everything() -> None:
    metrics = summary_of("none").sources["truth"].metrics
    for name in ("present", "colour", "shape", "background", "size", "all_right", "motion", "moving"):
        assert metrics[name].value == 1.0, name
    assert metrics["frozen"].value == 0.0
    assert abs(metrics["seam"].value) < 0.05  # type: ignore[arg-type]
    assert metrics["background_error"].value < 0.5  # type: ignore[operator]
    assert metrics["diversity_px"].value > 5  # type: ignore[operator]
    assert 0.5 < metrics["speed_px"].value < 1.5  # type: ignore[operator]
    assert all(bar.met for bar in summary_of("none").bars)


@pytest.mark.parametrize(
    ("fault", "noticed_by"),
    [
        ("wrong colour", {"colour", "all_right"}),
        ("no object", {"present", "colour", "shape", "all_right", "motion"}),
        ("two objects", {"present", "all_right"}),
        ("frozen", {"motion", "moving", "frozen"}),
        ("drifting colours", {"background_error", "colour_error"}),
        ("jerky", {"motion", "jerk_px"}),
        ("flickering", {"flicker"}),
        ("seams", {"seam"}),
        ("blobs", {"shape"}),
    ],
)
def test_each_fault_is_noticed(fault: str, noticed_by: set[str]) -> None:
    difference = summary_of(fault).differences["truth"]
    for metric in noticed_by:
        found = difference[metric]
        assert found.low is not None, metric
        assert found.high is not None, metric
        if metric in HIGHER_IS_WORSE:
            assert found.low > 0, (metric, found)
        else:
            assert found.high < 0, (metric, found)


def test_a_wrong_colour_leaves_the_rest_alone() -> None:
    metrics = summary_of("wrong colour").sources["model"].metrics
    for name in ("present", "shape", "background", "motion"):
        assert metrics[name].value == 1.0, name
    missed = {bar.metric for bar in summary_of("wrong colour").bars if not bar.met}
    assert missed == {"colour"}


def test_long_clips_must_not_freeze_fade_or_drift() -> None:
    assert not next(bar for bar in summary_of("frozen").bars if bar.metric == "frozen").met
    records = {"model": measured("drifting colours"), "vae": measured("none")}
    bars = {bar.metric: bar for bar in summarize(CONFIG, "model", records, {"model": {}, "vae": {}}).bars}
    assert not bars["last background_error"].met
    assert not bars["last colour_error"].met
    assert bars["loss of present"].met
    same = {"model": measured("none"), "vae": measured("none")}
    assert all(bar.met for bar in summarize(CONFIG, "model", same, {"model": {}, "vae": {}}).bars)
    fading = [
        record.replace(scores={**record.scores, "present": 0.8}) if record.kind == "scene" else record
        for record in measured("none")
    ]
    bars = {bar.metric: bar for bar in summarize(CONFIG, "model", {"model": fading}, {"model": {}}).bars}
    assert bars["loss of present"].value == pytest.approx(0.2)
    assert not bars["loss of present"].met


def test_drift_shows_window_by_window() -> None:
    source = summary_of("drifting colours").sources["model"]
    assert len(source.windows) == 2
    first, last = (window["background_error"].value for window in source.windows)
    assert first is not None
    assert last is not None
    assert last > 1.5 * first
    drift = source.drift["background_error"]
    assert drift.low is not None
    assert drift.low > 0
    steady = summary_of("none").sources["model"].drift["background_error"]
    assert abs(steady.value) < 0.3  # type: ignore[arg-type]


def test_a_source_of_one_place_has_no_diversity() -> None:
    metrics = summary_of("one place").sources["model"].metrics
    assert metrics["diversity_px"].value == pytest.approx(0.0, abs=0.01)
    assert metrics["colour"].value == 1.0


def assert_same(ours: list[Record], theirs: list[Record]) -> None:
    """Equal but for rounding: sums over a batch's patches depend on the largest one."""
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("kind", "index", "seed", "prompts", "heldout"):
            assert getattr(mine, name) == getattr(other, name)
        assert mine.scores == pytest.approx(other.scores, abs=1e-5)


def test_shards_resume_and_merge_to_the_whole(tmp_path: Path) -> None:
    config = CONFIG.replace(scenes=5, seconds=2, diversity_prompts=1, diversity_seeds=2, batch=2)
    whole = evaluate(config, FaultySource("none"), tmp_path / "whole")
    assert [(r.kind, r.index) for r in whole[:5]] == [("scene", i) for i in range(5)]
    parts = tmp_path / "parts"
    evaluate(config, FaultySource("none"), parts, Shard(0, 2))
    assert merge(config, FaultySource("none"), parts) is None
    evaluate(config, FaultySource("none"), parts, Shard(1, 2))
    # Another batch size changes no result, so it may finish what this one began.
    merged = merge(config.replace(batch=3), FaultySource("none"), parts)
    assert merged is not None
    assert_same(merged, whole)

    path = tmp_path / "whole" / "model-0of1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:200])  # killed while writing the fourth record
    again = FaultySource("none")
    told: list[tuple[int, int]] = []
    resumed = evaluate(config, again, tmp_path / "whole", progress=lambda *count: told.append(count))
    assert_same(resumed, whole)
    assert again.generated == len(whole) - 3
    assert told[-1] == (7, 7)
    assert path.read_text().splitlines(keepends=True)[:4] == lines[:4]
    assert len(path.read_text().splitlines()) == len(lines)


def test_records_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    config = CONFIG.replace(scenes=1, seconds=1, diversity_prompts=0)
    evaluate(config, FaultySource("none"), tmp_path)
    with pytest.raises(EvalError, match="another config"):
        evaluate(config.replace(seed=1), FaultySource("none"), tmp_path)
    with pytest.raises(EvalError, match="another about"):
        evaluate(config, FaultySource("frozen"), tmp_path)
    (tmp_path / "model-0of1.jsonl").write_text("hello\n")
    with pytest.raises(EvalError, match="no file of records"):
        evaluate(config, FaultySource("none"), tmp_path)
    (tmp_path / "model-0of1.jsonl").unlink()
    (tmp_path / "model-1of2.jsonl").mkdir()  # nothing that a shard could have written
    with pytest.raises(EvalError, match="cannot be read"):
        evaluate(config, FaultySource("none"), tmp_path, Shard(0, 3))
    file = RecordFile(tmp_path / "gone" / "records.jsonl", Record, {})
    file.resume()
    file.path.unlink()
    file.path.mkdir()
    with pytest.raises(EvalError, match="cannot write"):
        file.append([])
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot create the directory"):
        evaluate(config, FaultySource("none"), tmp_path / "file")


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_impossible_shards_are_refused(text: str) -> None:
    with pytest.raises(EvalError, match="0 <= i < n"):
        Shard.parse(text)
    assert Shard.parse("3/4") == Shard(3, 4)


def test_a_run_leaves_summary_report_and_sheets(tmp_path: Path) -> None:
    config = CONFIG.replace(scenes=2, seconds=2, diversity_prompts=1, diversity_seeds=2)
    subject, truth = FaultySource("wrong colour"), TruthSource()
    assert run_world_eval(config, subject, (truth,), tmp_path, Shard(0, 2)) is None
    summary = run_world_eval(config, subject, (truth,), tmp_path, Shard(1, 2))
    assert summary is not None
    assert Summary.load(tmp_path / SUMMARY_NAME) == summary
    data = json.loads((tmp_path / SUMMARY_NAME).read_text())
    assert data["world_version"] == "1"
    assert data["config_digest"] == config.digest()
    assert set(data["sources"]["model"]["metrics"]) == {*METRICS, *SPREADS}
    for name in (PNG_NAME, "sheet-model.png", "sheet-truth.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / HTML_NAME).read_text()
    assert "NOT met" in page
    assert "sheet-truth.png" in page


def test_a_missing_matplotlib_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    source = FaultySource("none")
    with pytest.raises(PackageError, match=r"longtake\[eval\]"):
        run_world_eval(CONFIG, source, (), tmp_path)
    assert source.generated == 0


def test_chunking_changes_no_measurement() -> None:
    scenes = [scene_for_prompt("a red star bouncing on sky", seed) for seed in range(2)]
    video = np.stack([render(scene, 0, 40) for scene in scenes])
    results = []
    for sizes in ([40], [9, 12, 12, 12], [1] * 40, [2, 38]):
        meter = Meter(40, 4)
        start = 0
        for size in sizes:
            meter.feed(video[:, start : start + size])
            start += size
        assert meter.done
        results.append(meter.results())
    assert [len(result[0].boundaries) for result in results] == [0, 3, 39, 1]
    step = np.abs(np.diff(video.astype(int), axis=1))
    np.testing.assert_allclose(results[0][1].change, step[1].mean(axis=(1, 2, 3)))
    second = np.abs(np.diff(video.astype(int), n=2, axis=1))
    np.testing.assert_allclose(results[0][1].flicker, second[1].mean(axis=(1, 2, 3)))
    for result in results[1:]:
        for whole, cut in zip(results[0], result, strict=True):
            np.testing.assert_array_equal(whole.frames, cut.frames)
            np.testing.assert_allclose(whole.change, cut.change)
            np.testing.assert_allclose(whole.flicker, cut.flicker)
            np.testing.assert_array_equal(whole.detections.colour, cut.detections.colour)
            np.testing.assert_allclose(whole.detections.center_xy, cut.detections.center_xy)


def test_evaluation_scenes_are_no_training_scenes() -> None:
    listed = jobs(WorldEvalConfig(scenes=20, split="train"))
    assert min(job.seed for job in listed) >= 1 << 40
    assert len({job.key for job in listed}) == len(listed)
    assert all(parse_caption(job.script.text).objects for job in listed)


def test_two_objects_are_matched_by_colour() -> None:
    config = CONFIG.replace(level=2, scenes=6, seconds=2, diversity_prompts=0)
    records = runner._run_batch(config, TruthSource(2), jobs(config), None)
    several = [r for r in records if len(parse_caption(r.prompts[0][1]).objects) > 1]
    assert several
    assert np.mean([record.scores["colour"] for record in several]) > 0.9  # type: ignore[arg-type]
    assert all(record.scores["background"] == 1 for record in records)


def test_held_out_combinations_are_set_against_the_others() -> None:
    half = [
        record.replace(heldout=number % 2 == 0, scores={**record.scores, "shape": 0.8 + 0.2 * (number % 2)})
        for number, record in enumerate(measured("none"))
    ]
    summary = summarize(CONFIG, "model", {"model": half}, {"model": {}})
    found = summary.sources["model"].generalization
    assert found["shape"].value == pytest.approx(-0.2)
    assert found["colour"].value == 0
    bars = {bar.metric: bar for bar in summary.bars}
    assert bars["loss of shape held out"].value == pytest.approx(0.2)
    assert not bars["loss of shape held out"].met
    assert bars["loss of colour held out"].met
    assert heldout_rows(summary)[2][:3] == ["shape", "100.0 % [51.0, 100.0]", "80.0 % [33.7, 96.9]"]


def test_motion_and_seams_are_held_to_real_clips() -> None:
    def bars(fault: str) -> dict[str, bool]:
        return {bar.metric: bar.met for bar in summary_of(fault).bars}

    assert bars("none")["speed off real clips'"]
    assert not bars("frozen")["speed off real clips'"]
    assert bars("none")["seam over change of real clips"]
    assert not bars("seams")["seam over change of real clips"]

"""The interactive test: real clips arrive at once; ignored and late switches are noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faulty_sources import FaultySource
from longtake.eval.errors import EvalError
from longtake.eval.interactive import PNG_NAME, SUMMARY_NAME, run_interactive, scripts_of
from longtake.eval.interactive_records import (
    ADHERENCE,
    ATTRIBUTES,
    InteractiveConfig,
    InteractiveRecord,
    InteractiveSource,
    InteractiveSummary,
)
from longtake.eval.interactive_summary import HOLD_FRAMES, arrival, latencies, summarize_source
from longtake.eval.records import Shard
from longtake.eval.source import TruthSource

CONFIG = InteractiveConfig(streams=2, prompts=3, seconds_each=2)


def test_prompts_change_every_few_seconds() -> None:
    listed = scripts_of(CONFIG)
    assert len({seed for seed, _ in listed}) == 2
    for _, script in listed:
        assert [start for start, _ in script.prompts] == [0, 32, 64]
        assert len({text for _, text in script.prompts}) == 3


@pytest.mark.parametrize(
    ("marks", "frame"),
    [
        ("1" * 20, 0),
        ("0" * 5 + "1" * 15, 5),
        ("1" * 7 + "0" + "1" * 12, 8),
        ("1" * 7 + "0" * 13, None),
        ("1" * (HOLD_FRAMES - 1), None),
        ("0" * 12 + "1" * 8, 12),
    ],
)
def test_a_prompt_arrives_when_it_holds(marks: str, frame: int | None) -> None:
    assert arrival(np.array([mark == "1" for mark in marks])) == frame


def test_only_what_a_switch_changes_has_a_latency() -> None:
    prompts = (
        "a red circle still on white",
        "a blue circle still on white",
        "a blue circle orbiting on white",
    )
    record = InteractiveRecord(
        index=0,
        seed=0,
        prompts=tuple(zip((0, 21, 45), prompts, strict=True)),
        settled=(),
        whole=(),
        right={"colour": "1" * 21 + "0" * 6 + "1" * 40, "shape": "1" * 67, "background": "1" * 67},
    )
    assert latencies(record) == {"all": [6], "colour": [6], "shape": [], "background": []}


def run(fault: str, out: Path) -> InteractiveSource:
    return run_interactive(CONFIG, (FaultySource(fault), TruthSource()), out).sources["model"]


def test_real_clips_arrive_at_once_and_leave_a_report(tmp_path: Path) -> None:
    source = run("none", tmp_path)
    for name in ("present", "colour", "shape", "background", "all_right"):
        assert source.mean_settled[name].value == 1.0, name
        assert source.mean_whole[name].value == 1.0, name
        assert len(source.settled) == 3
        assert source.last_less_first[name].value == 0, name
    assert source.latency["all"].switches == 4
    assert source.latency["all"].median == source.latency["all"].quantile_90 == 0
    assert source.latency["all"].never.value == 0
    summary = InteractiveSummary.load(tmp_path / SUMMARY_NAME)
    assert summary.sources["model"] == source
    for name in (PNG_NAME, "interactive-model.png", "interactive-truth.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    # A second run takes up what is recorded; another source's records are refused.
    again = FaultySource("none")
    run_interactive(CONFIG, (again, TruthSource()), tmp_path)
    assert again.generated == 0
    with pytest.raises(EvalError, match="another about"):
        run_interactive(CONFIG, (FaultySource("frozen"),), tmp_path)


def test_shards_share_what_is_recorded_and_streams_are_added(tmp_path: Path) -> None:
    config = CONFIG.replace(streams=3)
    whole = run_interactive(config, (FaultySource("frozen"),), tmp_path / "whole")
    assert whole is not None
    out, parts = tmp_path / "parts", [FaultySource("frozen"), FaultySource("frozen")]
    assert run_interactive(config, (parts[1],), out, shard=Shard(1, 2)) is None
    assert parts[1].generated == 1
    merged = run_interactive(config.replace(batch=1), (parts[0],), out, shard=Shard(0, 2))
    assert parts[0].generated == 2
    assert merged is not None
    assert merged.sources == whole.sources
    more = FaultySource("frozen")
    assert run_interactive(config.replace(streams=5), (more,), out) is not None
    assert more.generated == 2


def test_ignored_and_late_switches_are_noticed(tmp_path: Path) -> None:
    ignored = run("ignored switch", tmp_path / "ignored")
    assert ignored.settled[0]["all_right"].value == 1.0
    assert ignored.settled[2]["all_right"].value == 0.0
    assert ignored.last_less_first["all_right"].value == -1
    assert ignored.latency["all"].never.value == 1.0
    assert ignored.latency["all"].median is None
    late = run("late switch", tmp_path / "late")
    assert late.latency["all"].median == 18
    assert late.latency["background"].median == 18
    assert late.latency["all"].never.value == 0
    settled, whole = late.mean_settled["background"].value, late.mean_whole["background"].value
    assert settled is not None
    assert whole is not None
    assert whole < settled < 1


def test_the_end_is_compared_with_the_beginning_by_sixths() -> None:
    """Twelve prompts, two at each end; a stream that saw nothing at an end is left out."""

    def record(index: int, shares: list[float | None]) -> InteractiveRecord:
        settled = tuple(dict.fromkeys(ADHERENCE, share) for share in shares)
        right = dict.fromkeys(ATTRIBUTES, "1")
        prompts = ((0, "a red circle still on white"),)
        return InteractiveRecord(
            index=index, seed=0, prompts=prompts, settled=settled, whole=settled, right=right
        )

    middle: list[float | None] = [0.0] * 8
    streams = [
        record(0, [1.0, 0.8, *middle, 0.7, 0.5]),
        record(1, [0.6, None, *middle, 0.6, 1.0]),
        record(2, [None, None, *middle, 1.0, 1.0]),
    ]
    found = summarize_source(streams, {}).last_less_first["colour"]
    assert found.num == 2
    assert found.value == pytest.approx(((0.6 - 0.9) + (0.8 - 0.6)) / 2)


def test_quantiles_count_what_never_arrives() -> None:
    def record(marks: str) -> InteractiveRecord:
        prompts = ((0, "a red circle still on white"), (4, "a red circle still on black"))
        right = {"colour": "1" * 44, "shape": "1" * 44, "background": "1111" + marks}
        return InteractiveRecord(index=0, seed=0, prompts=prompts, settled=(), whole=(), right=right)

    records = [record("0" * delay + "1" * (40 - delay)) for delay in (0, 2, 4, 6, 8, 10, 12, 14, 16)]
    source = summarize_source([*records, record("0" * 40)], {})
    found = source.latency["background"]
    assert (found.switches, found.median, found.quantile_90) == (10, 8, 16)
    assert found.never.value == pytest.approx(0.1)
    assert summarize_source([*records, *[record("0" * 40)] * 2], {}).latency["all"].quantile_90 is None


def test_objects_that_cover_each_other_do_not_delay_a_prompt(tmp_path: Path) -> None:
    config = InteractiveConfig(level=2, streams=2, prompts=3, seconds_each=2)
    truth = run_interactive(config, (TruthSource(2),), tmp_path).sources["truth"]
    assert truth.latency["all"].median == 0
    assert truth.latency["all"].quantile_90 == 0

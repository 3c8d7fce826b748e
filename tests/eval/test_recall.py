"""The recall test: real clips pass it, every failure shows where it should, streams resume and swap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.policies import with_policy
from longtake.eval.recall import PNG_NAME, SUMMARY_NAME, run_recall
from longtake.eval.recall_records import PLACE_PX, RecallConfig, RecallRecord, scenes_of
from longtake.eval.recall_summary import AbsenceFigures, RecallSummary, summarize
from longtake.eval.recall_videos import ModelVideos, TruthVideos
from longtake.eval.records import Shard
from longtake.eval.script import Chunking
from longtake.eval.source import TruthSource
from longtake.history.evolving import EvolvingConfig
from longtake.stream.state import PromptSwitch
from longtake.world import Scene, SceneObject, Segment
from longtake.world.motion import Camera, Line
from longtake.world.recall import RecallScene
from tiny_parts import small_pipeline

CONFIG = RecallConfig(scenes=4, absence=(1.0,))
WINDOW = 48
Change = Callable[[RecallScene], Scene]


def with_segments(made: RecallScene, **changes: Callable[[Segment], Segment]) -> Scene:
    """The scene with some of its segments changed, named s0 to s3."""
    segments = [changes.get(f"s{i}", lambda same: same)(s) for i, s in enumerate(made.scene.segments)]
    return dataclasses.replace(made.scene, segments=tuple(segments))


def with_target(change: Callable[[SceneObject], SceneObject]) -> Callable[[Segment], Segment]:
    return lambda segment: dataclasses.replace(
        segment, objects=(change(segment.objects[0]), *segment.objects[1:])
    )


def moved(item: SceneObject) -> SceneObject:
    assert isinstance(item.path, Line)
    x, y = item.path.start
    target = (item.path.low[0] + item.path.high[0] - x, item.path.low[1] + item.path.high[1] - y)
    return dataclasses.replace(item, path=dataclasses.replace(item.path, start=target))


def other_size(item: SceneObject) -> SceneObject:
    return dataclasses.replace(item, radius=0.16 if item.size == "small" else 0.09)


def other_colour(made: RecallScene) -> Callable[[SceneObject], SceneObject]:
    free = {"red", "yellow", "green", "cyan", "blue", "purple"} - {made.target.colour, made.third.colour}
    return lambda item: dataclasses.replace(item, colour=min(free))  # type: ignore[arg-type]


FAULTS: dict[str, Change] = {
    "none": lambda made: made.scene,
    "forgets": lambda made: with_segments(made, s3=lambda s: dataclasses.replace(s, objects=s.objects[1:])),
    "recolours": lambda made: with_segments(made, s3=with_target(other_colour(made))),
    "reshapes": lambda made: with_segments(
        made,
        s3=with_target(lambda o: dataclasses.replace(o, shape="star" if o.shape != "star" else "circle")),
    ),
    "resizes": lambda made: with_segments(made, s3=with_target(other_size)),
    "moves": lambda made: with_segments(made, s3=with_target(moved)),
    "stays": lambda made: with_segments(
        made, s2=lambda s: dataclasses.replace(s, camera=Camera()), s3=lambda s: s
    ),
    "never shows": lambda made: with_segments(made, s1=with_target(other_colour(made))),
}


class FaultyVideos(TruthVideos):
    """Real clips with one fault."""

    name = "model"

    def __init__(self, fault: str) -> None:
        super().__init__(TruthSource(3))
        self.about = {**self.about, "fault": fault}
        self._change = FAULTS[fault]
        self.filmed = 0

    def film(self, scenes: Sequence[RecallScene], num_frames: int) -> Iterator[NDArray[np.uint8]]:
        self.filmed += len(scenes)
        return super().film(
            [dataclasses.replace(made, scene=self._change(made)) for made in scenes], num_frames
        )


def figures(fault: str, out: Path, config: RecallConfig = CONFIG) -> AbsenceFigures:
    summary = run_recall(config, (FaultyVideos(fault), TruthVideos(TruthSource(3))), out)
    return summary.sources["model"].absences[0]


@pytest.mark.parametrize("kind", ["pan", "narrative"])
def test_real_clips_recall_everything(tmp_path: Path, kind: str) -> None:
    config = RecallConfig.model_validate({**CONFIG.model_dump(), "kind": kind})
    summary = run_recall(config, (TruthVideos(TruthSource(3)),), tmp_path)
    [item] = summary.sources["truth"].absences
    assert item.gate.value == item.shown.value == item.left.value == 1
    for name, value in item.gated.items():
        assert value.value == 1, name
        assert item.all[name].value == 1, name
    assert item.seconds >= WINDOW / 16
    assert RecallSummary.load(tmp_path / SUMMARY_NAME) == summary
    for name in (PNG_NAME, "recall-truth-1.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("fault", "wrong"),
    [
        ("forgets", {"recalled", "present"}),
        ("recolours", {"recalled", "colour"}),
        ("reshapes", {"recalled", "shape"}),
        ("resizes", {"size"}),
    ],
)
def test_what_is_forgotten_shows_where_it_should(tmp_path: Path, fault: str, wrong: set[str]) -> None:
    item = figures(fault, tmp_path)
    assert item.gate.value == 1
    for name, value in item.gated.items():
        if fault == "forgets" and name not in wrong:
            assert value.value is None, name  # identity is asked of what is present
        else:
            assert value.value == (0 if name in wrong else 1), name
    difference = RecallSummary.load(tmp_path / SUMMARY_NAME).sources["truth"].less_subject[0]
    assert {name for name, value in difference.items() if value.value == 1} == wrong


def test_another_place_counts_only_as_that(tmp_path: Path) -> None:
    item = figures("moves", tmp_path)
    scenes = scenes_of(CONFIG, 1.0, WINDOW, Chunking().boundary)
    far = [
        np.hypot(*(np.array(moved(made.target).path.start) - made.target.path.start)) * 64 > PLACE_PX + 1  # type: ignore[union-attr]
        for made in scenes
    ]
    assert all(far)
    assert item.gated["place"].value == 0
    assert item.gated["recalled"].value == 1


@pytest.mark.parametrize(("fault", "gate"), [("stays", "left"), ("never shows", "shown")])
def test_what_was_not_asked_for_right_is_no_evidence(tmp_path: Path, fault: str, gate: str) -> None:
    item = figures(fault, tmp_path)
    assert item.gate.value == 0
    assert getattr(item, gate).value == 0
    assert item.gated["recalled"].value is None
    assert item.all["recalled"].value == 1


def test_every_frame_is_kept_with_its_phase(tmp_path: Path) -> None:
    """Of scenes of different lengths in one batch, each to its own end."""
    config = CONFIG.replace(absence=(1.0,), batch=4)
    run_recall(config, (FaultyVideos("none"),), tmp_path)
    made = scenes_of(config, 1.0, WINDOW, Chunking().boundary)
    for record, scene in zip(_records_in(tmp_path), made, strict=True):
        spans = {
            "v": range(scene.shown_from + 12, scene.away_from),
            "a": range(scene.left_at + 8, scene.back_from),
            "r": range(scene.home_at + 4, scene.num_frames),
        }
        assert len(record.phases) == len(record.seen) == scene.num_frames
        for letter, frames in spans.items():
            assert frames
            assert [i for i, found in enumerate(record.phases) if found == letter] == list(frames)
        in_view = {frame for letter in "vr" for frame in spans[letter]}
        assert all(record.seen[frame] == "1" for frame in in_view)
        assert all(record.seen[frame] == "0" for frame in spans["a"])


def _records_in(out: Path) -> list[RecallRecord]:
    lines = (out / "recall-model-0of1.jsonl").read_text().splitlines()[1:]
    return [RecallRecord.model_validate_json(line) for line in lines]


@pytest.mark.parametrize(
    ("shown", "away", "gated"), [(0.5, 0.1, True), (0.49, 0.1, False), (0.5, 0.11, False)]
)
def test_the_gate_is_half_shown_and_nine_tenths_gone(
    tmp_path: Path, shown: float, away: float, gated: bool
) -> None:
    run_recall(CONFIG, (FaultyVideos("none"),), tmp_path)
    record = _records_in(tmp_path)[0].replace(shown=shown, seen_while_absent=away)
    assert record.gated is gated


def test_where_nothing_was_shown_there_is_no_place_to_be_back_in(tmp_path: Path) -> None:
    assert figures("never shows", tmp_path).all["place"].value is None
    assert all(record.place is None and record.shown_x is None for record in _records_in(tmp_path))


def test_chance_of_place_counts_places_within_the_radius(tmp_path: Path) -> None:
    run_recall(CONFIG, (FaultyVideos("none"),), tmp_path)
    one, other, third, _ = _records_in(tmp_path)
    assert one.observed is not None
    seen = one.observed.replace(x=20.0, y=20.0)

    def at(record: RecallRecord, index: int, x: float, observed: object) -> RecallRecord:
        colours = {"target": ("red", "star", "small"), "others": ("blue", "green")}
        return record.replace(index=index, shown_x=x, shown_y=20.0, observed=observed, **colours)

    records = [at(one, 0, 20.0, seen), at(other, 1, 20.0 + PLACE_PX, None), at(third, 2, 27.0, None)]
    found = summarize({"model": records}, {"model": {}})["model"].absences[0].chance
    assert found["place"] == 0.5  # one of the two others' places
    assert found["shape"] == (1.0 if seen.shape == "star" else 0.0)
    apart = [records[0].replace(others=("red", "green")), records[1]]  # the other is impossible here
    assert summarize({"model": apart}, {"model": {}})["model"].absences[0].chance["colour"] is None


def test_chance_is_what_other_targets_would_score(tmp_path: Path) -> None:
    config = CONFIG.replace(scenes=8)
    scenes = scenes_of(config, 1.0, WINDOW, Chunking().boundary)
    shares = []
    for made in scenes:
        possible = [
            other.target.colour
            for other in scenes
            if other is not made and other.target.colour not in (made.opener.colour, made.third.colour)
        ]
        if possible:
            shares.append(np.mean([colour == made.target.colour for colour in possible]))
    assert figures("none", tmp_path, config).chance["colour"] == pytest.approx(np.mean(shares))


def test_what_is_recorded_is_not_filmed_again(tmp_path: Path) -> None:
    figures("none", tmp_path)
    path = tmp_path / "recall-model-0of1.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], *lines[3:]]))  # the second scene's record is lost
    again = FaultyVideos("none")
    run_recall(CONFIG, (again,), tmp_path)
    assert again.filmed == 2  # with the other of its pair
    assert len(path.read_text().split("\n")) == 1 + 5 + 1
    with pytest.raises(EvalError, match="another about"):
        run_recall(CONFIG, (FaultyVideos("moves"),), tmp_path)
    with pytest.raises(EvalError, match="share a name"):
        run_recall(CONFIG, (again, again), tmp_path)


def test_shards_share_what_is_recorded(tmp_path: Path) -> None:
    config = CONFIG.replace(scenes=6, absence=(1.0, 2.0))
    whole = run_recall(config, (FaultyVideos("moves"),), tmp_path / "whole")
    assert whole is not None
    parts = [FaultyVideos("moves"), FaultyVideos("moves")]
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "parts"
    assert run_recall(config, (parts[0],), out, lambda *count: told.append(count), Shard(0, 2)) is None
    assert parts[0].filmed == 8  # two of three pairs, of two absences
    assert told[-1] == ("model", 8, 8)
    merged = run_recall(config.replace(batch=2), (parts[1],), out, shard=Shard(1, 2))
    assert parts[1].filmed == 4
    assert merged is not None
    assert merged.sources == whole.sources
    more = FaultyVideos("moves")  # a run without shards adds scenes to what they have made
    assert run_recall(config.replace(scenes=8), (more,), out) is not None
    assert more.filmed == 4


def film(text: str, scenes: Sequence[RecallScene], num_frames: int) -> NDArray[np.uint8]:
    pipeline = small_pipeline(policy=EvolvingConfig())
    videos = ModelVideos(
        with_policy(pipeline, text),
        "tiny",
        text,
        PromptSwitch(text="", memory="keep"),
        swaps=text == "swapped",
    )
    return np.concatenate(list(videos.film(scenes, num_frames)), axis=1)


def test_swapped_memories_change_what_comes_after_and_nothing_before() -> None:
    pipeline = small_pipeline(policy=EvolvingConfig())
    chunking = ModelVideos(pipeline, "tiny", "own", PromptSwitch(text="")).chunking
    window = chunking.window_frames
    assert window is not None
    scenes = scenes_of(RecallConfig(scenes=2), 96 / window, window, chunking.boundary)
    end = max(made.back_from for made in scenes) + 1
    # The window keeps three frames of four, and a chunk is in the making.
    swap = chunking.boundary(max(made.left_at for made in scenes) + (3 + 2) * 4)
    own, swapped, off = (film(text, scenes, end).astype(int) for text in ("own", "swapped", "off"))
    assert np.array_equal(own[:, :swap], swapped[:, :swap])
    assert not np.array_equal(own[:, swap:], swapped[:, swap:])
    assert not np.array_equal(own, off)
    with pytest.raises(EvalError, match="1 scenes make no pairs"):
        film("swapped", scenes[:1], end)
    short = [dataclasses.replace(made, back_at=made.left_at + 19) for made in scenes]
    keep = PromptSwitch(text="", memory="keep")
    videos = ModelVideos(pipeline, "tiny", "swapped", keep, swaps=True)
    with pytest.raises(EvalError, match="absences of two windows or more"):
        videos.check(short)
    with pytest.raises(EvalError, match="no memories to swap"):
        ModelVideos(small_pipeline(), "tiny", "swapped", keep, swaps=True)
    with pytest.raises(EvalError, match="leaves nothing of what was swapped"):
        ModelVideos(pipeline, "tiny", "swapped", PromptSwitch(text="", memory="rebuild"), swaps=True)


def test_scenes_and_absences_can_be_added(tmp_path: Path) -> None:
    figures("none", tmp_path)
    more = FaultyVideos("none")
    summary = run_recall(CONFIG.replace(scenes=6, absence=(1.0, 2.0)), (more,), tmp_path)
    assert more.filmed == 2 + 6
    assert [item.gate.num for item in summary.sources["model"].absences] == [6, 6]
    fewer = FaultyVideos("none")
    summary = run_recall(CONFIG.replace(scenes=2), (fewer,), tmp_path)
    assert fewer.filmed == 0
    assert [item.gate.num for item in summary.sources["model"].absences] == [2]
    with pytest.raises(EvalError, match="another seed"):
        run_recall(CONFIG.replace(seed=1), (FaultyVideos("none"),), tmp_path)


def test_absences_are_the_subjects_and_all_is_refused_before_anything_is_filmed(tmp_path: Path) -> None:
    one, other = FaultyVideos("none"), TruthVideos(TruthSource(3))
    other.chunking = Chunking(window_frames=96)
    run_recall(CONFIG, (one, other), tmp_path)
    again = FaultyVideos("none")
    again.name = "a"
    with pytest.raises(EvalError, match="another window_frames"):
        run_recall(CONFIG, (other, again), tmp_path)
    wide = TruthVideos(TruthSource(3, 64, 96))
    for source, words in ((wide, "another shape"), (_chunks_of(8), "chunks of another length")):
        source.name = "b"
        with pytest.raises(EvalError, match=words):
            run_recall(CONFIG, (again, source), tmp_path)
    assert again.filmed == 0
    with pytest.raises(ConfigError, match="still in it"):
        CONFIG.replace(absence=(0.9,))
    again.chunking = Chunking(window_frames=36)
    with pytest.raises(EvalError, match=r"absence of 1 windows of 36 frames .* use 1\.12 windows or more"):
        run_recall(CONFIG, (again,), tmp_path / "other")


def _chunks_of(frames: int) -> TruthVideos:
    made = TruthVideos(TruthSource(3))
    made.chunking = Chunking(frames=frames)
    return made


def test_views_need_not_be_square(tmp_path: Path) -> None:
    summary = run_recall(
        CONFIG.replace(scenes=2, absence=(2.0,)), (TruthVideos(TruthSource(3, 64, 96)),), tmp_path
    )
    assert summary.sources["truth"].absences[0].gated["recalled"].value == 1


def test_a_sink_that_keeps_what_is_asked_for_is_refused() -> None:
    pipeline = small_pipeline(sink_frames=12, window_frames=16)
    videos = ModelVideos(pipeline, "tiny", "own", PromptSwitch(text=""))
    scenes = scenes_of(CONFIG, 1.0, 64, videos.chunking.boundary)
    with pytest.raises(EvalError, match="a sink of 12 latent frames keeps what is to be recalled"):
        videos.check(scenes)
    ModelVideos(small_pipeline(), "tiny", "own", PromptSwitch(text="")).check(scenes)
    unlimited = ModelVideos(small_pipeline(window_frames=None), "tiny", "own", PromptSwitch(text=""))
    with pytest.raises(EvalError, match="unlimited"):
        run_recall(CONFIG, (unlimited,), Path("unused"))

"""Scenes: determinism, closed form, truth, levels, splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.world import (
    Scene,
    SceneObject,
    Segment,
    WorldError,
    render,
    render_masks,
    sample_scene,
    scene_for_prompt,
)
from longtake.world.captions import Split
from longtake.world.motion import Camera, Line, Orbit
from longtake.world.sampling import combinations
from longtake.world.vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOURS,
    HELDOUT_COMBINATIONS,
    HELDOUT_SPEED_RANGE_PX,
    HILL_RGB,
    MOTIONS,
    OBJECT_RGB,
    SHAPES,
    SIZE_RADII_PX,
    SPEED_RANGE_PX,
)

seeds = st.integers(0, 2**41)
levels = st.sampled_from([1, 2, 3])
splits: st.SearchStrategy[Split] = st.sampled_from(["train", "heldout", "any"])


@given(seed=seeds, level=levels, split=splits)
@settings(max_examples=60, deadline=None)
def test_a_seed_means_one_scene(seed: int, level: int, split: Split) -> None:
    first, second = sample_scene(seed, level, split), sample_scene(seed, level, split)
    assert first == second
    assert np.array_equal(render(first, 3, 6), render(second, 3, 6))


def test_version_1_is_pinned() -> None:
    """A seed must go on meaning the same scene; whoever changes it raises `vocabulary.VERSION`."""
    scene = sample_scene(0, 1, "train")
    assert scene.caption == "a cyan square does not move on a sunset sky"
    assert render(scene, 0, 1).astype(np.int64).sum() == 2_181_966
    assert sample_scene(5, 2, "any").caption == (
        "red triangle, moving from side to side and small cyan square, sweeping, sky background"
    )


@given(seed=seeds, level=levels, start=st.integers(0, 500), count=st.integers(1, 20), cut=st.integers(1, 19))
@settings(max_examples=40, deadline=None)
def test_frame_ranges_agree_however_they_are_cut(
    seed: int, level: int, start: int, count: int, cut: int
) -> None:
    scene = sample_scene(seed, level, "any")
    whole = render(scene, start, start + count, 32, 32)
    parts = [(start, start + min(cut, count)), (start + min(cut, count), start + count)]
    pieces = [render(scene, begin, end, 32, 32) for begin, end in parts if begin < end]
    assert np.array_equal(whole, np.concatenate(pieces))
    truth = scene.truth(start, start + count)
    last = scene.truth(start + count - 1, start + count)
    num = last.present.shape[1]
    np.testing.assert_array_equal(truth.center_xy[-1, :num], last.center_xy[0])
    np.testing.assert_array_equal(truth.visible[-1, :num], last.visible[0])


def test_a_distant_frame_costs_nothing_before_it() -> None:
    scene = sample_scene(7, 1, "any")
    frame = 10**6 * 24
    center = scene.truth(frame, frame + 1).center_xy[0, 0] * 64
    mask = render_masks(scene, frame, frame + 1)[0, 0]
    rows, columns = np.mgrid[:64, :64] + 0.5
    weight = mask / mask.sum()
    assert np.hypot((columns * weight).sum() - center[0], (rows * weight).sum() - center[1]) < 0.3


@given(seed=seeds, level=st.sampled_from([1, 2]), frame=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_objects_stay_inside_the_view(seed: int, level: int, frame: int) -> None:
    scene = sample_scene(seed, level, "any")
    truth = scene.truth(frame, frame + 1)
    for slot, item in enumerate(scene.segments[0].objects):
        left, right, up, down = item.reach
        x, y = truth.center_xy[0, slot]
        assert x - left > 0
        assert x + right < 1
        assert y - up > 0
        assert y + down < 1


@given(seed=seeds, level=levels)
@settings(max_examples=100, deadline=None)
def test_levels_hold_what_they_say(seed: int, level: int) -> None:
    scene = sample_scene(seed, level, "any")
    for segment in scene.segments:
        colours = [item.colour for item in segment.objects]
        assert len(set(colours)) == len(colours)
        assert (segment.hills is not None) == (segment.background == "hills")
        for item in segment.objects:
            low, high = SIZE_RADII_PX[item.size]
            assert low <= item.radius * 64 <= high
            speed = item.path.speed * 64
            if item.motion == "still":
                assert speed == 0
            else:
                assert SPEED_RANGE_PX[0] <= speed <= SPEED_RANGE_PX[1] + 1e-9
            assert isinstance(item.path, Orbit if item.motion == "orbiting" else Line)
    if level == 1:
        (segment,) = scene.segments
        assert len(segment.objects) == 1
        assert segment.objects[0].size == "large"
        assert segment.background != "hills"
    if level < 3:
        assert not scene.segments[0].camera.panning
    else:
        assert scene.segments[0].camera.panning != (len(scene.segments) > 1)


def test_every_attribute_is_drawn() -> None:
    scenes = [sample_scene(seed, 2, "any") for seed in range(300)]
    objects = [item for scene in scenes for item in scene.segments[0].objects]
    assert {item.colour for item in objects} == set(COLOURS)
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.motion for item in objects} == set(MOTIONS)
    assert {item.size for item in objects} == {"small", "large"}
    assert {scene.segments[0].background for scene in scenes} == set(BACKGROUNDS)
    assert {len(scene.segments[0].objects) for scene in scenes} == {1, 2, 3}


@given(seed=seeds, level=levels)
@settings(max_examples=100, deadline=None)
def test_splits_do_not_meet(seed: int, level: int) -> None:
    low, high = HELDOUT_SPEED_RANGE_PX
    for split in ("train", "heldout"):
        for segment in sample_scene(seed, level, split).segments:
            for item in segment.objects:
                held = (item.colour, item.shape, item.motion) in HELDOUT_COMBINATIONS
                assert held == (split == "heldout")
                if item.motion != "still":
                    in_band = low - 1e-9 <= item.path.speed * 64 < high
                    assert in_band == (split == "heldout")


def test_heldout_combinations_are_balanced() -> None:
    assert len(combinations("train")) + len(combinations("heldout")) == len(combinations("any")) == 96
    for position, names in enumerate((COLOURS, SHAPES, MOTIONS)):
        counts = [sum(item[position] == name for item in HELDOUT_COMBINATIONS) for name in names]
        assert len(set(counts)) == 1
    assert ("red", "circle", "bouncing") not in HELDOUT_COMBINATIONS


def test_the_palette_is_unambiguous() -> None:
    ends = np.array(list(BACKGROUND_RGB.values()), float)
    grounds = [*np.linspace(ends[:, 0], ends[:, 1], 20).reshape(-1, 3)]
    grounds += [*np.linspace(HILL_RGB, BACKGROUND_RGB["hills"][1], 20)]
    objects = np.array(list(OBJECT_RGB.values()), float)
    assert min(np.linalg.norm(objects - ground, axis=1).min() for ground in grounds) > 95
    between = np.linalg.norm(objects[:, None] - objects, axis=-1) + 1000 * np.eye(len(objects))
    assert between.min() > 100


def test_panning_objects_leave_for_seconds_and_come_back() -> None:
    panned = [scene for seed in range(20) if (scene := sample_scene(seed, 3)).segments[0].camera.panning]
    assert panned
    for scene in panned:
        visible = scene.truth(0, 640).visible[:, 0]
        assert visible[0] > 0.9
        gone = np.flatnonzero(visible == 0)
        assert len(gone) > 48
        assert (visible[gone[0] :] > 0.9).any()


def test_prompts_switch_at_their_frame() -> None:
    switched = [scene for seed in range(30) if len((scene := sample_scene(seed, 3)).segments) > 1]
    assert switched
    for scene in switched:
        start, text = scene.captions[1]
        assert text != ""
        truth = scene.truth(start - 1, start + 1)
        assert truth.segment.tolist() == [0, 1]
        assert scene.segments[1] != scene.segments[0]


def test_visible_counts_what_covers() -> None:
    red = scene_for_prompt("a red square standing still and a blue square standing still on white", 0)
    back, front = red.segments[0].objects
    same = Line((0.5, 0.5), (0.0, 0.0), (0.5, 0.5), (0.5, 0.5))
    hidden = Scene(0, 2, 1.0, (_with(red, (_moved(back, same), _moved(front, same))),))
    truth = hidden.truth(0, 1)
    masks = render_masks(hidden, 0, 1)
    expected = 1 - min(1.0, (front.radius / back.radius) ** 2)
    assert truth.visible[0, 0] == pytest.approx(expected, abs=0.05)
    assert truth.visible[0, 1] == pytest.approx(1.0)
    assert masks.sum(axis=1).max() <= 1 + 1e-6


def _moved(item: SceneObject, path: Line) -> SceneObject:
    return dataclasses.replace(item, path=path)


def _with(scene: Scene, objects: tuple[SceneObject, ...]) -> Segment:
    return dataclasses.replace(scene.segments[0], objects=objects)


def test_wide_views() -> None:
    scene = sample_scene(3, 1, aspect=2.0)
    assert render(scene, 0, 2, 64, 128).shape == (2, 64, 128, 3)
    with pytest.raises(WorldError, match="use a width of 128"):
        render(scene, 0, 2, 64, 64)


def test_camera_turns_round() -> None:
    offsets = Camera(travel=2.0, speed=0.1, start=0.0).offsets(np.arange(60))
    assert offsets.min() == 0
    assert offsets.max() == pytest.approx(2.0)
    assert np.abs(np.diff(offsets)).max() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sample_scene(0, 4), "unknown world level 4"),
        (lambda: sample_scene(-1), "seed -1 is negative"),
        (lambda: sample_scene(0, split="test"), "unknown split 'test'"),  # type: ignore[arg-type]
        (lambda: sample_scene(0, aspect=0.5), "aspect 0.5 is narrower"),
        (lambda: sample_scene(0).truth(5, 5), "frames 5 to 5 are no range"),
        (lambda: render(sample_scene(0), -1, 5), "frames -1 to 5 are no range"),
        (lambda: scene_for_prompt("hello", 0), "names no object"),
        (lambda: Scene(0, 1, 1.0, ()), "segments start at frames"),
    ],
)
def test_wrong_use_is_told(call: Callable[[], object], message: str) -> None:
    with pytest.raises(WorldError, match=message):
        call()

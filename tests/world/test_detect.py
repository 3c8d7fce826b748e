"""Detectors and motion classes against truth, and their honesty about what is not there.

The accuracy on some thousand frames of all levels is measured by `longtake eval detectors`; a few hundred
frames are checked in tests/eval/test_detectors.py.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.world import render, render_masks, sample_scene, scene_for_prompt
from longtake.world.components import erode, label_components
from longtake.world.detect import detect
from longtake.world.tracking import classify_motion
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZES


def flood_fill(classes: np.ndarray) -> np.ndarray:
    """Reference labelling of one frame, pixel by pixel."""
    labels = np.zeros(classes.shape, int)
    count = 0
    for start in zip(*np.nonzero(classes), strict=True):
        if labels[start]:
            continue
        count += 1
        stack = [start]
        while stack:
            y, x = stack.pop()
            if labels[y, x] or classes[y, x] != classes[start]:
                continue
            labels[y, x] = count
            neighbours = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            stack += [p for p in neighbours if 0 <= p[0] < len(classes) and 0 <= p[1] < classes.shape[1]]
    return labels


@given(seed=st.integers(0, 10_000), classes=st.integers(1, 3), density=st.floats(0.2, 0.95))
@settings(max_examples=60, deadline=None)
def test_components_equal_a_flood_fill(seed: int, classes: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    image = (rng.integers(1, classes + 1, (3, 13, 17)) * (rng.random((3, 13, 17)) < density)).astype(np.int8)
    labels, count = label_components(image)
    assert set(np.unique(labels)) - {0} == set(range(1, count + 1))
    begin = 0
    for frame, found in zip(image, labels, strict=True):
        expected = flood_fill(frame)
        # The numbering is in order of first pixels too, so labels agree exactly.
        np.testing.assert_array_equal(np.where(found > 0, found - begin, 0), expected)
        begin += expected.max()


def test_components_of_a_spiral_and_of_nothing() -> None:
    spiral = np.zeros((1, 15, 15), np.int8)
    y, x, dy, dx, length = 7, 7, 0, 1, 1
    while length < 14:
        for _ in range(2):
            for _ in range(length):
                spiral[0, y, x] = 1
                y, x = y + dy, x + dx
            dy, dx = dx, -dy
        length += 2
    assert label_components(spiral)[1] == 1
    assert label_components(np.zeros((2, 5, 5), np.int8))[1] == 0


def test_erosion_keeps_the_inside() -> None:
    image = np.zeros((1, 7, 7), np.int8)
    image[0, 1:6, 1:6] = 2
    image[0, 3, 3] = 1
    core = erode(image)
    assert core.sum() == 9 - 5
    assert not core[0, 3, 3]


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_shape_and_size_on_every_background(colour: str, background: str) -> None:
    for shape in SHAPES:
        for size in SIZES:
            scene = scene_for_prompt(f"a {size} {colour} {shape} sweeping on {background}", 3, level=2)
            found, truth = detect(render(scene, 0, 3)), scene.truth(0, 3)
            assert found.num_objects.tolist() == [1, 1, 1], (shape, size)
            assert (found.background == truth.background).all()
            for name in ("colour", "shape", "size"):
                assert (getattr(found, name)[:, :1] == getattr(truth, name)).all(), (shape, size, name)
            assert np.abs(found.center_xy[:, 0] - truth.center_xy[:, 0]).max() * 64 < 0.25
            assert np.abs(found.radius[:, :1] / truth.radius - 1).max() < 0.06


def test_slots_are_sorted_by_size_and_complete() -> None:
    scene = scene_for_prompt("a small red star sweeping and a large blue square standing still on white", 8)
    truth = scene.truth(0, 160)
    clear = np.flatnonzero((truth.visible > 0.99).all(axis=1))
    found = detect(render(scene, 0, 160)[clear])
    apart = found.num_objects == 2  # the two may touch without hiding each other
    assert apart.mean() > 0.95
    assert (found.colour[apart, :2] == [COLOURS.index("blue"), COLOURS.index("red")]).all()
    assert (found.colour[:, 2:] == -1).all()
    assert np.isnan(found.center_xy[:, 2:]).all()


def test_nothing_is_found_where_nothing_is() -> None:
    scene = scene_for_prompt("a red circle standing still on sky", 0)
    frames = render(scene, 0, 1)
    empty = np.repeat(frames[:, :, :1], 64, axis=2)  # its first column: sky alone
    assert render_masks(scene, 0, 1)[0, 0, :, 0].max() == 0
    found = detect(empty)
    assert found.num_objects.tolist() == [0]
    assert found.background.tolist() == [BACKGROUNDS.index("sky")]
    assert found.background_error[0] < 1


def test_what_is_unlike_the_world_gets_no_name() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
    assert (detect(noise).background == -1).all()
    pink = np.full((1, 64, 64, 3), (255, 80, 255), np.uint8)
    assert detect(pink).background.tolist() == [-1]
    assert np.isnan(detect(pink).background_error).all()

    odd = np.full((3, 64, 64, 3), 128, np.uint8)
    odd[0, 20:40, 20:40] = (90, 60, 30)  # a brown square
    odd[1, 30:33, 5:60] = (215, 20, 30)  # a long red bar
    rows, columns = np.mgrid[:64, :64]
    odd[2, (np.hypot(rows - 32, columns - 32) < 16) & (np.hypot(rows - 32, columns - 32) > 11)] = (
        20,
        195,
        60,
    )
    found = detect(odd)
    assert found.num_objects.tolist() == [1, 1, 1]
    assert found.colour[:, 0].tolist() == [-1, COLOURS.index("red"), COLOURS.index("green")]
    assert found.shape[:, 0].tolist() == [SHAPES.index("square"), -1, -1]


def test_shifted_colours_are_followed_and_reported() -> None:
    scene = scene_for_prompt("a blue star standing still on sunset", 1)
    frames = render(scene, 0, 1).astype(int)
    shifted = np.clip(frames + np.array([-12, 8, 10]), 0, 255).astype(np.uint8)
    found = detect(np.concatenate([frames.astype(np.uint8), shifted]))
    assert found.background.tolist() == [BACKGROUNDS.index("sunset")] * 2
    assert found.num_objects.tolist() == [1, 1]
    assert found.shape[:, 0].tolist() == [SHAPES.index("star")] * 2
    assert found.background_error[1] == pytest.approx(10, abs=1)
    assert found.background_error[0] < 1
    assert found.colour_error[1, 0] > 8 > 1 > found.colour_error[0, 0]


def test_objects_at_the_border_are_marked() -> None:
    scene = next(s for seed in range(50) if (s := sample_scene(seed, 3)).segments[0].camera.panning)
    truth = scene.truth(0, 200)
    cut = np.flatnonzero((truth.visible > 0.4).sum(1) * (truth.visible < 0.9).all(1))
    frames = np.concatenate([render(scene, int(frame), int(frame) + 1) for frame in cut[:5]])
    assert detect(frames).at_edge[:, 0].all()


def test_detectors_read_other_resolutions() -> None:
    for seed in range(5):
        scene = sample_scene(seed, 1, "any")
        found, truth = detect(render(scene, 0, 2, 128, 128)), scene.truth(0, 2)
        assert (found.num_objects == 1).all()
        assert (found.shape[:, :1] == truth.shape).all()
        assert np.abs(found.center_xy[:, 0] - truth.center_xy[:, 0]).max() < 0.25 / 64


def test_no_frames() -> None:
    assert detect(np.zeros((0, 64, 64, 3), np.uint8)).num_objects.shape == (0,)


def test_detecting_is_fast() -> None:
    frames = render(sample_scene(4, 1, "any"), 0, 200)
    detect(frames[:32])
    begin = time.process_time()
    detect(frames)
    # About 1000 frames a second on one thread; the bar leaves room for a busy machine.
    assert 200 / (time.process_time() - begin) > 250


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("frames", [48, 80])
def test_motions_are_named(motion: str, frames: int) -> None:
    times = np.arange(0, frames, 4)
    noise = np.random.default_rng(0).normal(0, 0.3 / 64, (len(times), 2))
    for seed in range(8):
        scene = scene_for_prompt(f"a red square {motion} on white", seed)
        fit = classify_motion(scene.truth(0, frames).center_xy[times, 0] + noise, times)
        assert fit.motion == MOTIONS.index(motion), seed
        assert fit.residual * 64 < 1


def test_paths_unlike_any_motion_get_no_name() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(0, 80, 4)
    for _ in range(10):
        walk = 0.5 + np.cumsum(rng.normal(0, 3 / 64, (20, 2)), axis=0)
        assert classify_motion(walk, times).motion == -1
    spiral = 0.5 + np.stack([np.cos(times / 9), np.sin(times / 9)], 1) * times[:, None] / 300
    assert classify_motion(spiral, times).motion == -1


def test_short_or_patchy_tracks_get_no_name() -> None:
    times = np.arange(0, 80, 4)
    track = scene_for_prompt("a red square sweeping on white", 0).truth(0, 80).center_xy[times, 0]
    assert classify_motion(track[:5], times[:5]).motion == -1
    patchy = track.copy()
    patchy[::2] = np.nan
    assert classify_motion(patchy, times).motion == -1
    patchy = track.copy()
    patchy[::4] = np.nan
    assert classify_motion(patchy, times).motion == MOTIONS.index("sweeping")

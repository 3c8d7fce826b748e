"""Rendering: pixels against brute force, masks, speed."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from longtake.world import render, render_masks, sample_scene
from longtake.world.shapes import area, coverage, extents, signed_distance
from longtake.world.vocabulary import BACKGROUND_RGB, OBJECT_RGB, SHAPES, Shape


def corners(shape: Shape) -> np.ndarray:
    """Outline of a shape of radius 1 as a polygon (y downwards), from its definition."""
    if shape == "circle":
        angles = np.linspace(0, 2 * math.pi, 400, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], 1)
    if shape == "square":
        return 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    if shape == "triangle":
        angles = np.radians([90, 210, 330])
        return 1.3 * np.stack([np.cos(angles), -np.sin(angles)], 1)
    angles = np.radians(90 + 36 * np.arange(10))
    radii = np.where(np.arange(10) % 2 == 0, 1.35, 0.675)
    return np.stack([radii * np.cos(angles), -radii * np.sin(angles)], 1)


def inside(polygon: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule."""
    result = np.zeros(np.broadcast(x, y).shape, bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        crosses = (y0 > y) != (y1 > y)
        with np.errstate(divide="ignore", invalid="ignore"):
            result ^= crosses & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_what_they_are_called(shape: Shape) -> None:
    line = np.linspace(-1.6, 1.6, 321) + 0.0013
    expected = inside(corners(shape), line[None, :], line[:, None])
    axis = line[None].astype(np.float32)
    found = signed_distance(shape, axis, axis, 1.0)[0] < 0
    assert (found != expected).mean() < 2e-3
    assert found.mean() * 3.2**2 == pytest.approx(area(shape), rel=0.02)
    polygon = corners(shape)
    reach = (-polygon[:, 0].min(), polygon[:, 0].max(), -polygon[:, 1].min(), polygon[:, 1].max())
    assert extents(shape) == pytest.approx(reach, abs=1e-3)
    # The reference point is the centroid: detectors rely on it.
    rows, columns = np.nonzero(expected)
    assert abs(line[columns].mean()) < 0.01
    assert abs(line[rows].mean()) < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased(shape: Shape) -> None:
    offsets = np.arange(64) + 0.5 - 32.3
    covered = coverage(shape, offsets[None].astype(np.float32), offsets[None].astype(np.float32), 10.0)[0]
    assert covered.sum() == pytest.approx(area(shape) * 100, rel=0.02)
    partial = ((covered > 0) & (covered < 1)).sum()
    assert 10 < partial < 150


def test_pixels_are_the_blend_of_truth() -> None:
    for seed in range(12):
        scene = sample_scene(seed, 1, "any")
        (item,), background = scene.segments[0].objects, scene.segments[0].background
        frame, mask = render(scene, 40, 41)[0], render_masks(scene, 40, 41)[0, 0][..., None]
        top, bottom = (np.array(end, float) for end in BACKGROUND_RGB[background])
        rows = ((np.arange(64) + 0.5) / 64)[:, None, None]
        expected = (1 - mask) * (top + rows * (bottom - top)) + mask * np.array(OBJECT_RGB[item.colour])
        assert np.abs(frame - expected).max() <= 1.01


def test_any_resolution_shows_the_same_scene() -> None:
    for seed in range(6):
        scene = sample_scene(seed, 2, "any")
        small = render(scene, 10, 12, 64, 64).astype(float)
        large = render(scene, 10, 12, 256, 256).astype(float)
        pooled = large.reshape(2, 64, 4, 64, 4, 3).mean(axis=(2, 4))
        assert np.abs(small - pooled).mean() < 1.0


def test_masks_mark_the_objects_of_each_segment() -> None:
    scene = next(s for seed in range(50) if len((s := sample_scene(seed, 3)).segments) > 1)
    switch = scene.segments[1].start
    masks = render_masks(scene, switch - 2, switch + 2)
    for time_index, segment in ((0, scene.segments[0]), (3, scene.segments[1])):
        shown = masks[time_index].max(axis=(1, 2)) > 0
        assert shown[0]
        assert not shown[len(segment.objects) :].any()


def test_level_1_renders_thousands_of_frames_a_second() -> None:
    scene = sample_scene(1, 1, "any")
    render(scene, 0, 64)
    begin = time.process_time()
    render(scene, 0, 1000)
    # 30,000 a second when alone on a core; the bar leaves room for a busy machine.
    assert 1000 / (time.process_time() - begin) > 3000

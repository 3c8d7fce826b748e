"""Rendering frame ranges of a scene at any resolution.

Only the patch around each object is computed: level 1 renders several thousand 64x64 frames a second on one
thread.

Legend: t frames, n objects, h/w rows and columns of the view, p/q rows and columns of an object's patch,
c the three colour channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from longtake.world.errors import WorldError
from longtake.world.motion import Float64
from longtake.world.scene import Scene, SceneObject, Segment
from longtake.world.shapes import Float32, coverage
from longtake.world.vocabulary import BACKGROUND_RGB, HILL_RGB, OBJECT_RGB

UInt8 = NDArray[np.uint8]

PATCH_PIXELS_AT_ONCE = 1 << 20
"""Bounds the memory of a call beyond its result."""


def render(scene: Scene, start: int, stop: int, height: int = 64, width: int = 64) -> UInt8:
    """The frames [start, stop) as uint8 [T, H, W, 3] (RGB).

    Raises:
        WorldError: The range is empty, or the size does not have the scene's aspect.
    """
    frames_thwc = np.empty((stop - start if stop > start >= 0 else 0, height, width, 3), np.uint8)
    for segment, first, last in _spans(scene, start, stop, height, width):
        for begin, end in _blocks(segment, first, last, height):
            times = np.arange(begin, end)
            out_thwc = frames_thwc[begin - start : end - start]
            camera_t = segment.camera.offsets(times)
            out_thwc[:] = _backdrop(segment, camera_t, height, width)
            for item in segment.objects:
                _paint(out_thwc, item, _view_centers(item, times, camera_t), height)
    return frames_thwc


def render_masks(scene: Scene, start: int, stop: int, height: int = 64, width: int = 64) -> Float32:
    """What each pixel shows of each object: float32 [T, N, H, W] in 0..1, covered parts excluded.

    N is the largest number of objects in any segment of the range. Same errors as `render`.
    """
    spans = _spans(scene, start, stop, height, width)
    num_objects = max(len(segment.objects) for segment, _, _ in spans)
    masks_tnhw = np.zeros((stop - start, num_objects, height, width), np.float32)
    for segment, first, last in spans:
        times = np.arange(first, last)
        camera_t = segment.camera.offsets(times)
        rows = slice(first - start, last - start)
        for slot, item in enumerate(segment.objects):
            centers_t2 = _view_centers(item, times, camera_t)
            masks_tnhw[rows, :slot] *= 1 - _full_coverage(item, centers_t2, height, width)[:, None]
            masks_tnhw[rows, slot] = _full_coverage(item, centers_t2, height, width)
    return masks_tnhw


def _spans(scene: Scene, start: int, stop: int, height: int, width: int) -> list[tuple[Segment, int, int]]:
    if height < 1 or abs(width - scene.aspect * height) > 1:
        raise WorldError(
            f"a scene of aspect {scene.aspect:g} has no {width}x{height} picture",
            f"use a width of {round(scene.aspect * height)} or sample the scene with aspect={width}/{height}",
        )
    return scene.spans(start, stop)


def _blocks(segment: Segment, first: int, last: int, height: int) -> Iterator[tuple[int, int]]:
    widest = max((2 * max(item.reach) for item in segment.objects), default=1.0)
    step = max(1, int(PATCH_PIXELS_AT_ONCE / (widest * height + 4) ** 2))
    for begin in range(first, last, step):
        yield begin, min(begin + step, last)


def _view_centers(item: SceneObject, times: NDArray[np.int64], camera_t: Float64) -> Float64:
    centers_t2 = item.path.centers(times)
    centers_t2[:, 0] -= camera_t
    return centers_t2


def _backdrop(segment: Segment, camera_t: Float64, height: int, width: int) -> UInt8:
    """The background of each frame, [T, H, W, 3]; T is 1 where the camera does not matter."""
    top, bottom = BACKGROUND_RGB[segment.background]
    fraction_h = (np.arange(height, dtype=np.float32) + 0.5) / height
    top_c, bottom_c = np.array(top, np.float32), np.array(bottom, np.float32)
    gradient_hc = top_c + fraction_h[:, None] * (bottom_c - top_c)
    sky_thwc = np.broadcast_to(gradient_hc[None, :, None], (1, height, width, 3))
    if segment.hills is None:
        return np.rint(sky_thwc).astype(np.uint8)
    offsets_t = camera_t if segment.camera.panning else camera_t[:1]
    x_tw = offsets_t[:, None] + (np.arange(width) + 0.5) / height
    depth_thw = (np.arange(height) + 0.5)[None, :, None] - segment.hills.outline(x_tw)[:, None] * height
    hill_thw1 = np.clip(depth_thw + 0.5, 0, 1)[..., None].astype(np.float32)
    blended_thwc = sky_thwc + hill_thw1 * (np.array(HILL_RGB, np.float32) - sky_thwc)
    return np.rint(blended_thwc).astype(np.uint8)


def _patch(item: SceneObject, centers_t2: Float64, height: int) -> tuple[NDArray[np.int64], Float32]:
    """Top-left pixels [T, 2] as (column, row) and coverage [T, P, Q] of an object's surroundings."""
    left, right, up, down = (reach * height for reach in item.reach)
    centers_px = centers_t2 * height
    corner_t2 = np.floor(centers_px - (left + 1, up + 1)).astype(np.int64)
    num_columns, num_rows = math.ceil(left + right) + 3, math.ceil(up + down) + 3
    rest_t2 = corner_t2 + 0.5 - centers_px
    dx_tq = (rest_t2[:, :1] + np.arange(num_columns)).astype(np.float32)
    dy_tp = (rest_t2[:, 1:] + np.arange(num_rows)).astype(np.float32)
    return corner_t2, coverage(item.shape, dx_tq, dy_tp, item.radius * height)


def _paint(frames_thwc: UInt8, item: SceneObject, centers_t2: Float64, height: int) -> None:
    """Blends an object into the frames."""
    _, num_rows, num_columns, _ = frames_thwc.shape
    corner_t2, alpha_tpq = _patch(item, centers_t2, height)
    colour_c = np.array(OBJECT_RGB[item.colour], np.float32)
    inverse_tpq1 = (1 - alpha_tpq)[..., None]
    # Adding one half makes the cast to uint8 round to nearest.
    paint_tpqc = alpha_tpq[..., None] * colour_c + np.float32(0.5)
    _, patch_rows, patch_columns = alpha_tpq.shape
    for index, (x, y) in enumerate(corner_t2.tolist()):
        y0, y1 = max(0, y), min(num_rows, y + patch_rows)
        x0, x1 = max(0, x), min(num_columns, x + patch_columns)
        if y0 < y1 and x0 < x1:
            inner = (index, slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
            under = frames_thwc[index, y0:y1, x0:x1]
            under[:] = under * inverse_tpq1[inner] + paint_tpqc[inner]


def _full_coverage(item: SceneObject, centers_t2: Float64, height: int, width: int) -> Float32:
    """Coverage of every pixel of the view, [T, H, W]."""
    corner_t2, alpha_tpq = _patch(item, centers_t2, height)
    masks_thw = np.zeros((len(alpha_tpq), height, width), np.float32)
    _, patch_rows, patch_columns = alpha_tpq.shape
    for index, (x, y) in enumerate(corner_t2.tolist()):
        y0, y1 = max(0, y), min(height, y + patch_rows)
        x0, x1 = max(0, x), min(width, x + patch_columns)
        if y0 < y1 and x0 < x1:
            masks_thw[index, y0:y1, x0:x1] = alpha_tpq[index, y0 - y : y1 - y, x0 - x : x1 - x]
    return masks_thw

"""Detectors: what a frame shows, from its pixels alone.

Every region of one colour that is thick and large enough is an object. Its coverage per pixel is unmixed
from object and background colour, and compared with each shape rendered at the region's centroid and area:
the shape with the best overlap wins, and none does where the overlap is poor.

Legend: t frames, h rows, w columns, c channels, k object slots, n detected objects of a batch, p rows and
q columns of the patch around an object, s shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from longtake.world.components import erode, label_components
from longtake.world.motion import Float64
from longtake.world.segment import UNKNOWN_CLASS, Segmentation, segment_frames
from longtake.world.shapes import Float32, area, signed_distance
from longtake.world.vocabulary import (
    COLOURS,
    OBJECT_RGB,
    REFERENCE_HEIGHT,
    SHAPES,
    SIZE_RADII_PX,
    SIZES,
)

MAX_OBJECTS = 6
"""Objects reported per frame, the largest first."""
FRAMES_AT_ONCE = 32
"""Frames handled together: large enough to hide Python's cost, small enough for the processor's cache."""
MIN_AREA_PX = 16.0
MIN_CORE_PX = 5.0
"""An object has this many pixels (at 64 rows) surrounded by its own colour: edges and lines do not."""
MAX_COLOUR_DISTANCE = 75.0
"""RGB distance of an object's mean colour from the palette up to which it is named."""
MIN_OVERLAPS = (0.6, 0.72)
"""Bounds of the intersection over union with a shape from which it is named, see `_min_overlap`."""
MIN_COVERAGE = 0.12
"""Unmixed coverage below this is noise."""
_SIZE_LIMIT = (SIZE_RADII_PX["small"][1] + SIZE_RADII_PX["large"][0]) / 2 / REFERENCE_HEIGHT
_PALETTE_KC = np.array([OBJECT_RGB[colour] for colour in COLOURS], np.float32)
_AREAS_S = np.array([area(shape) for shape in SHAPES])


@dataclass(frozen=True)
class Detections:
    """What T frames show; K = `MAX_OBJECTS` slots per frame, the largest object first. -1 and NaN mean none.

    Attributes:
        background: int [T], index into `BACKGROUNDS`.
        background_error: float [T], mean absolute difference (0..255) from the background's true colours.
        num_objects: int [T], objects found (also those beyond K).
        colour: int [T, K], index into `COLOURS`.
        shape: int [T, K], index into `SHAPES`.
        size: int [T, K], index into `SIZES`.
        center_xy: float [T, K, 2], in view heights from the top left.
        radius: float [T, K], in view heights, of the named (else a round) shape with the object's area.
        overlap: float [T, K], intersection over union with the best shape.
        margin: float [T, K], that minus the second best shape's.
        colour_error: float [T, K], mean absolute difference (0..255) from the palette colour.
        at_edge: bool [T, K], the object touches the border of the view.
    """

    background: NDArray[np.int64]
    background_error: Float64
    num_objects: NDArray[np.int64]
    colour: NDArray[np.int64]
    shape: NDArray[np.int64]
    size: NDArray[np.int64]
    center_xy: Float64
    radius: Float64
    overlap: Float64
    margin: Float64
    colour_error: Float64
    at_edge: NDArray[np.bool_]


def detect(frames_thwc: NDArray[np.uint8]) -> Detections:
    """Detects the objects and the background of uint8 RGB frames [T, H, W, 3], frame by frame."""
    blocks = [
        _detect_block(frames_thwc[begin : begin + FRAMES_AT_ONCE])
        for begin in range(0, len(frames_thwc), FRAMES_AT_ONCE)
    ]
    if not blocks:
        return _empty(0, np.zeros(0, np.int64), np.zeros(0))
    return Detections(
        **{
            item.name: np.concatenate([getattr(block, item.name) for block in blocks])
            for item in fields(Detections)
        }
    )


def _empty(num_frames: int, background_t: NDArray[np.int64], error_t: Float64) -> Detections:
    slots = (num_frames, MAX_OBJECTS)
    return Detections(
        background=background_t,
        background_error=error_t,
        num_objects=np.zeros(num_frames, np.int64),
        colour=np.full(slots, -1),
        shape=np.full(slots, -1),
        size=np.full(slots, -1),
        center_xy=np.full((*slots, 2), np.nan),
        radius=np.full(slots, np.nan),
        overlap=np.full(slots, np.nan),
        margin=np.full(slots, np.nan),
        colour_error=np.full(slots, np.nan),
        at_edge=np.zeros(slots, bool),
    )


@dataclass(frozen=True)
class _Regions:
    """The regions that count as objects, N of a batch: frame, bounding box, mean colour, class."""

    frame: NDArray[np.int64]
    number: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    bottom: NDArray[np.int64]
    right: NDArray[np.int64]
    rgb: Float32
    colour_class: NDArray[np.int64]


def _detect_block(frames_thwc: NDArray[np.uint8]) -> Detections:
    pixels_thwc = frames_thwc.astype(np.float32)
    num_frames, height, width, _ = pixels_thwc.shape
    found = segment_frames(pixels_thwc)
    result = _empty(num_frames, found.background, found.background_error.astype(np.float64))
    region_thw, count = label_components(found.classes)
    regions = _regions(pixels_thwc, found.classes, region_thw, count)
    if not len(regions.frame):
        return result
    alpha_npq, corner_n2 = _coverages(pixels_thwc, found, region_thw, regions)
    center_n2, radius_n, shape_n, overlap_n, margin_n = _match_shapes(alpha_npq)
    center_n2 = (center_n2 + corner_n2) / height
    radius_n = radius_n / height
    distance_nk = np.sqrt(((regions.rgb[:, None] - _PALETTE_KC) ** 2).sum(-1))
    named_n = (distance_nk.min(1) < MAX_COLOUR_DISTANCE) & (regions.colour_class != UNKNOWN_CLASS)
    colour_n = np.where(named_n, distance_nk.argmin(1), -1)
    colour_error_n = np.abs(regions.rgb - _PALETTE_KC[distance_nk.argmin(1)]).mean(-1)

    result.num_objects[:] = np.bincount(regions.frame, minlength=num_frames)
    order = np.lexsort((-radius_n, regions.frame))
    first_t = np.cumsum(result.num_objects) - result.num_objects
    slot_n = np.arange(len(order)) - first_t[regions.frame[order]]
    keep = slot_n < MAX_OBJECTS
    where = (regions.frame[order][keep], slot_n[keep])
    chosen = order[keep]
    result.colour[where] = colour_n[chosen]
    result.shape[where] = shape_n[chosen]
    sizes = (SIZES.index("small"), SIZES.index("large"))
    result.size[where] = np.where(radius_n[chosen] < _SIZE_LIMIT, *sizes)
    result.center_xy[where] = center_n2[chosen]
    result.radius[where] = radius_n[chosen]
    result.overlap[where] = overlap_n[chosen]
    result.margin[where] = margin_n[chosen]
    result.colour_error[where] = colour_error_n[chosen]
    at_edge_n = (regions.top == 0) | (regions.left == 0)
    at_edge_n |= (regions.bottom == height - 1) | (regions.right == width - 1)
    result.at_edge[where] = at_edge_n[chosen]
    return result


def _regions(
    pixels_thwc: Float32, classes_thw: NDArray[np.int8], region_thw: NDArray[np.int64], count: int
) -> _Regions:
    """Keeps the regions with enough area and core, and measures them."""
    scale = (pixels_thwc.shape[1] / REFERENCE_HEIGHT) ** 2
    flat = np.flatnonzero(region_thw)
    number_m = region_thw.ravel()[flat]
    core_m = erode(classes_thw).ravel()[flat]
    num_pixels = np.bincount(number_m, minlength=count + 1)
    num_core = np.bincount(number_m[core_m], minlength=count + 1)
    kept = np.flatnonzero((num_pixels >= MIN_AREA_PX * scale) & (num_core >= MIN_CORE_PX * scale))
    frame_m, rest_m = np.divmod(flat, region_thw.shape[1] * region_thw.shape[2])
    row_m, column_m = np.divmod(rest_m, region_thw.shape[2])
    # Pixels sorted by region: first and last of each give ranges for reduceat.
    order = np.argsort(number_m, kind="stable")
    begin = np.cumsum(num_pixels) - num_pixels
    starts = begin[1:] if count else begin[:0]
    box = [
        ufunc.reduceat(values[order], starts) if count else np.zeros(0, np.int64)
        for ufunc, values in (
            (np.minimum, row_m),
            (np.minimum, column_m),
            (np.maximum, row_m),
            (np.maximum, column_m),
        )
    ]
    pixels_mc = pixels_thwc.reshape(-1, 3)[flat[core_m]]
    rgb_nc = np.stack(
        [
            np.bincount(number_m[core_m], pixels_mc[:, channel], count + 1) / np.maximum(num_core, 1)
            for channel in range(3)
        ],
        axis=1,
    ).astype(np.float32)
    first_pixel = order[begin[kept]]
    return _Regions(
        frame=frame_m[first_pixel],
        number=kept,
        top=box[0][kept - 1],
        left=box[1][kept - 1],
        bottom=box[2][kept - 1],
        right=box[3][kept - 1],
        rgb=rgb_nc[kept],
        colour_class=classes_thw.ravel()[flat][first_pixel].astype(np.int64),
    )


def _coverages(
    pixels_thwc: Float32, found: Segmentation, region_thw: NDArray[np.int64], regions: _Regions
) -> tuple[Float32, NDArray[np.int64]]:
    """Unmixed coverage of each object's patch [N, P, Q] and the patches' top-left pixels [N, 2] as (x, y).

    Patches reach two pixels beyond the bounding box; pixels of other objects, of the outside and beyond the
    object's own box are empty.
    """
    height, width = region_thw.shape[1:]
    reach = 2
    rows = int((regions.bottom - regions.top).max()) + 1 + 2 * reach
    columns = int((regions.right - regions.left).max()) + 1 + 2 * reach
    y_np = regions.top[:, None] - reach + np.arange(rows)
    x_nq = regions.left[:, None] - reach + np.arange(columns)
    valid_np = (y_np >= 0) & (y_np < height) & (y_np <= regions.bottom[:, None] + reach)
    valid_nq = (x_nq >= 0) & (x_nq < width) & (x_nq <= regions.right[:, None] + reach)
    index = (
        regions.frame[:, None, None],
        np.clip(y_np, 0, height - 1)[:, :, None],
        np.clip(x_nq, 0, width - 1)[:, None, :],
    )
    backdrop_npqc = found.backdrop[index]
    axis_npqc = regions.rgb[:, None, None] - backdrop_npqc
    difference_npqc = pixels_thwc[index] - backdrop_npqc
    length_npq = np.maximum(np.einsum("npqc,npqc->npq", axis_npqc, axis_npqc), 1.0)
    alpha_npq = np.clip(np.einsum("npqc,npqc->npq", axis_npqc, difference_npqc) / length_npq, 0, 1)
    counted = np.zeros(int(region_thw.max()) + 1, bool)
    counted[regions.number] = True
    region_npq = region_thw[index]
    foreign_npq = counted[region_npq] & (region_npq != regions.number[:, None, None])
    alpha_npq[foreign_npq | ~valid_np[:, :, None] | ~valid_nq[:, None, :] | (alpha_npq < MIN_COVERAGE)] = 0
    return alpha_npq, np.stack([x_nq[:, 0], y_np[:, 0]], axis=1)


def _match_shapes(
    alpha_npq: Float32,
) -> tuple[Float64, Float64, NDArray[np.int64], Float64, Float64]:
    """Centre (x, y) and radius in patch pixels, shape (-1: none), overlap and margin of each object."""
    _, rows, columns = alpha_npq.shape
    x_q, y_p = np.arange(columns) + 0.5, np.arange(rows) + 0.5
    mass_n = alpha_npq.sum((1, 2), dtype=np.float64)
    x_n = (alpha_npq.sum(1) @ x_q) / mass_n
    y_n = (alpha_npq.sum(2) @ y_p) / mass_n
    radius_ns = np.sqrt(mass_n[:, None] / _AREAS_S)
    overlaps = []
    for index, shape in enumerate(SHAPES):
        radius_n = radius_ns[:, index]
        dx_nq = ((x_q - x_n[:, None]) / radius_n[:, None]).astype(np.float32)
        dy_np = ((y_p - y_n[:, None]) / radius_n[:, None]).astype(np.float32)
        distance_npq = signed_distance(shape, dx_nq, dy_np, 1.0)
        distance_npq *= radius_n[:, None, None].astype(np.float32)
        template_npq = np.clip(np.float32(0.5) - distance_npq, 0, 1)
        # Codecs and decoders blur: the better of the sharp and the blurred shape counts.
        overlaps.append(
            np.maximum(_overlap(alpha_npq, template_npq), _overlap(alpha_npq, _blur(template_npq)))
        )
    overlap_ns = np.stack(overlaps, axis=1)
    ranked_ns = np.sort(overlap_ns, axis=1)
    best_n = overlap_ns.argmax(1)
    named_n = ranked_ns[:, -1] >= _min_overlap(radius_ns[:, SHAPES.index("circle")])
    shape_n = np.where(named_n, best_n, -1)
    radius_n = radius_ns[np.arange(len(best_n)), np.where(named_n, best_n, SHAPES.index("circle"))]
    center_n2 = np.stack([x_n, y_n], axis=1)
    return center_n2, radius_n, shape_n, ranked_ns[:, -1], ranked_ns[:, -1] - ranked_ns[:, -2]


def _overlap(alpha_npq: Float32, template_npq: Float32) -> Float64:
    """Intersection over union of two coverages, [N]."""
    shared_n = np.minimum(alpha_npq, template_npq).sum((1, 2), dtype=np.float64)
    total_n = (alpha_npq + template_npq).sum((1, 2), dtype=np.float64)
    overlap_n: Float64 = shared_n / (total_n - shared_n)
    return overlap_n


def _blur(image_npq: Float32) -> Float32:
    """The image convolved with (1, 2, 3, 2, 1) / 9 along both axes: about one pixel of standard deviation."""
    for _ in range(2):
        padded = np.pad(image_npq, [(0, 0), (1, 1), (1, 1)])
        rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        image_npq = (rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / np.float32(9)
    return image_npq


def _min_overlap(radius_n: Float64) -> Float64:
    """What a shape of this radius (pixels) must reach: less where one pixel of outline is a large share."""
    return np.clip(1 - 2 / radius_n, *MIN_OVERLAPS)

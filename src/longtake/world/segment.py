"""From pixels to background and foreground classes: the first half of the detectors.

The background's family (plain colour, sky, sunset, hills) is the one that explains most pixels; it is then
fitted to the frame (offset and vertical slope per channel), so that slightly wrong colours are followed and
not taken for objects. A pixel is foreground where it is far from the fitted background; its class is the
object colour on whose line to the background it lies.

Legend: t frames, h rows, w columns, c channels, k colours or backgrounds, m foreground pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longtake.world.shapes import Float32
from longtake.world.vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOURS,
    HILL_RGB,
    LEVEL_1_BACKGROUNDS,
    OBJECT_RGB,
)

NEAR_BACKGROUND = 45.0
"""RGB distance up to which a pixel may be background of a family."""
MIN_EXPLAINED = 0.4
"""A background is named where it explains at least this share of the pixels."""
MIN_HILLS = 0.08
"""Share of hill pixels from which a sky is called hills."""
FOREGROUND_DISTANCE = 40.0
"""RGB distance from the fitted background from which a pixel may belong to an object."""
MIN_ALPHA = 0.5
"""Coverage by its colour from which a pixel is classified."""
MAX_RESIDUAL = 62.0
"""RGB distance from the line between background and object colour up to which the colour is named."""

UNKNOWN_CLASS = len(COLOURS) + 1
"""Class of foreground pixels that no colour explains; 1 + i is colour i, 0 background."""

_PALETTE_KC = np.array([OBJECT_RGB[colour] for colour in COLOURS], np.float32)
_HILL_C = np.array(HILL_RGB, np.float32)
_HILLS_INDEX = BACKGROUNDS.index("hills")
_SKY_INDEX = BACKGROUNDS.index("sky")


@dataclass(frozen=True)
class Segmentation:
    """Background and pixel classes of T frames.

    Attributes:
        background: Index into `BACKGROUNDS`, -1 where none fits, [T].
        explained: Share of pixels that the background explains, [T].
        background_error: Mean absolute difference (0..255) of the explained pixels from the true colours,
            [T]; NaN where there is no background.
        backdrop: The fitted background under every pixel, [T, H, W, 3].
        classes: 0 background, 1 + colour index, `UNKNOWN_CLASS`, int8 [T, H, W].
    """

    background: NDArray[np.int64]
    explained: Float32
    background_error: Float32
    backdrop: Float32
    classes: NDArray[np.int8]


def segment_frames(pixels_thwc: Float32) -> Segmentation:
    """Segments RGB frames given as float32 in 0..255, [T, H, W, 3]."""
    num_frames, height = pixels_thwc.shape[:2]
    fraction_h1 = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
    background_t, explained_t = _classify(pixels_thwc[:, ::2, ::2], fraction_h1[::2])
    ends_kec = np.array([BACKGROUND_RGB[name] for name in BACKGROUNDS], np.float32)
    # Where no family fits, the frame is measured against its own median colour.
    top_tc, bottom_tc = ends_kec[background_t, 0], ends_kec[background_t, 1]
    lost_t = background_t < 0
    if lost_t.any():
        top_tc[lost_t] = bottom_tc[lost_t] = np.median(pixels_thwc[lost_t][:, ::2, ::2], axis=(1, 2))
    true_thc = top_tc[:, None] + fraction_h1 * (bottom_tc - top_tc)[:, None]
    offset_thwc = pixels_thwc - true_thc[:, :, None]
    near_thw = (offset_thwc**2).sum(-1) < NEAR_BACKGROUND**2
    fitted_thc = true_thc + _fit_offset(offset_thwc, near_thw, fraction_h1[:, 0] - 0.5)
    backdrop_thwc = np.broadcast_to(fitted_thc[:, :, None], pixels_thwc.shape)
    error_t = _mean_error(offset_thwc, near_thw)
    is_hills_t = background_t == _HILLS_INDEX
    if is_hills_t.any():
        backdrop_thwc = backdrop_thwc.copy()
        hilly, error = _hills_backdrop(pixels_thwc[is_hills_t], fitted_thc[is_hills_t])
        backdrop_thwc[is_hills_t] = hilly
        error_t[is_hills_t] = (error_t[is_hills_t] + error) / 2
    error_t[lost_t] = np.nan
    classes_thw = _classify_pixels(pixels_thwc, backdrop_thwc)
    assert classes_thw.shape[0] == num_frames
    return Segmentation(background_t, explained_t, error_t, backdrop_thwc, classes_thw)


def _classify(pixels_thwc: Float32, fraction_h1: Float32) -> tuple[NDArray[np.int64], Float32]:
    """Background index (-1 for none) and explained share of each frame."""
    shares = []
    for name in LEVEL_1_BACKGROUNDS:
        top_c, bottom_c = (np.array(end, np.float32) for end in BACKGROUND_RGB[name])
        expected_h1c = (top_c + fraction_h1 * (bottom_c - top_c))[:, None]
        distance_thw = ((pixels_thwc - expected_h1c) ** 2).sum(-1)
        shares.append((distance_thw < NEAR_BACKGROUND**2).mean(axis=(1, 2)))
    hill_t = (((pixels_thwc - _HILL_C) ** 2).sum(-1) < NEAR_BACKGROUND**2).mean(axis=(1, 2))
    share_kt = np.stack(shares)
    best_t = share_kt.argmax(0)
    background_t = np.array([BACKGROUNDS.index(name) for name in LEVEL_1_BACKGROUNDS])[best_t]
    explained_t = share_kt.max(0)
    # Hills stand before the sky, which may be less than half of the picture.
    sky_t = share_kt[LEVEL_1_BACKGROUNDS.index("sky")]
    is_hills_t = (hill_t > MIN_HILLS) & (sky_t > MIN_HILLS) & (sky_t + hill_t > explained_t)
    background_t = np.where(is_hills_t, _HILLS_INDEX, background_t)
    explained_t = np.where(is_hills_t, sky_t + hill_t, explained_t).astype(np.float32)
    return np.where(explained_t >= MIN_EXPLAINED, background_t, -1), explained_t


def _fit_offset(offset_thwc: Float32, near_thw: NDArray[np.bool_], height_h: Float32) -> Float32:
    """Least-squares offset + slope * height of the near pixels' differences, [T, H, 3]."""
    count_th = near_thw.sum(2, dtype=np.float32)
    total_thc = np.einsum("thwc,thw->thc", offset_thwc, near_thw.astype(np.float32))
    weight_t = np.maximum(count_th.sum(1), 1)
    mean_height_t = (count_th * height_h).sum(1) / weight_t
    mean_tc = total_thc.sum(1) / weight_t[:, None]
    centred_th = height_h - mean_height_t[:, None]
    spread_t = (count_th * centred_th**2).sum(1)
    slope_tc = (total_thc * centred_th[..., None]).sum(1) / (spread_t + 1e-3 * weight_t)[:, None]
    fitted: Float32 = mean_tc[:, None] + slope_tc[:, None] * centred_th[..., None]
    return fitted.astype(np.float32)


def _mean_error(offset_thwc: Float32, near_thw: NDArray[np.bool_]) -> Float32:
    mask_thw = near_thw.astype(np.float32)
    total_t = np.einsum("thwc,thw->t", np.abs(offset_thwc), mask_thw)
    error: Float32 = (total_t / np.maximum(3 * mask_thw.sum((1, 2)), 1)).astype(np.float32)
    return error


def _hills_backdrop(pixels_thwc: Float32, sky_thc: Float32) -> tuple[Float32, Float32]:
    """The nearest point to each pixel between sky and hill colour (outline pixels are blends of both)."""
    offset_thwc = pixels_thwc - _HILL_C
    near_thw = (offset_thwc**2).sum(-1) < NEAR_BACKGROUND**2
    weight_t = np.maximum(near_thw.sum((1, 2)), 1)
    mean_tc = np.einsum("thwc,thw->tc", offset_thwc, near_thw.astype(np.float32)) / weight_t[:, None]
    hill_thc = np.broadcast_to((_HILL_C + mean_tc)[:, None], sky_thc.shape)
    axis_thc = sky_thc - hill_thc
    length_th = (axis_thc**2).sum(-1)
    along_thw = np.einsum("thwc,thc->thw", pixels_thwc - hill_thc[:, :, None], axis_thc)
    along_thw = np.clip(along_thw / length_th[..., None], 0, 1)
    backdrop_thwc = hill_thc[:, :, None] + along_thw[..., None] * axis_thc[:, :, None]
    return backdrop_thwc.astype(np.float32), _mean_error(offset_thwc, near_thw)


def _classify_pixels(pixels_thwc: Float32, backdrop_thwc: Float32) -> NDArray[np.int8]:
    difference_thwc = pixels_thwc - backdrop_thwc
    foreground_thw = (difference_thwc**2).sum(-1) > FOREGROUND_DISTANCE**2
    difference_mc = difference_thwc[foreground_thw]
    backdrop_mc = backdrop_thwc[foreground_thw]
    axis_mkc = _PALETTE_KC - backdrop_mc[:, None]
    length_mk = np.einsum("mkc,mkc->mk", axis_mkc, axis_mkc)
    alpha_mk = np.einsum("mkc,mc->mk", axis_mkc, difference_mc) / length_mk
    # |d - a v|^2 with a clipped to 0..1, expanded so that no [m, k, c] residual is built.
    clipped_mk = np.clip(alpha_mk, 0, 1)
    square_m1 = np.einsum("mc,mc->m", difference_mc, difference_mc)[:, None]
    residual_mk = square_m1 + clipped_mk * length_mk * (clipped_mk - 2 * alpha_mk)
    residual_mk = np.where(alpha_mk >= MIN_ALPHA, residual_mk, np.inf)
    best_m = residual_mk.argmin(1)
    lowest_m = residual_mk.min(1, initial=np.inf) if len(best_m) else np.zeros(0)
    class_m = np.where(lowest_m < MAX_RESIDUAL**2, best_m + 1, UNKNOWN_CLASS)
    # A faint blend of any colour is an edge, not an object.
    class_m[square_m1[:, 0] < (2 * FOREGROUND_DISTANCE) ** 2 * (lowest_m >= MAX_RESIDUAL**2)] = 0
    classes_thw = np.zeros(foreground_thw.shape, np.int8)
    classes_thw[foreground_thw] = class_m
    return classes_thw

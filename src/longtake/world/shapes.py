"""Geometry of the four shapes: true extents and anti-aliased coverage by signed distance.

A shape is given by a *radius* r; the four are sized to have similar areas at equal r. x grows to the right
and y downwards; a shape's centre is the centre of its circumscribed circle, which is also its centroid.

Legend: t frames, h rows, w columns.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from longtake.world.vocabulary import Shape

Float32 = NDArray[np.float32]

SQUARE_HALF_SIDE = 0.9
TRIANGLE_CIRCUMRADIUS = 1.3
STAR_OUTER = 1.35
STAR_INNER = 0.5 * STAR_OUTER

_COS_54, _SIN_54 = math.cos(math.radians(54)), math.sin(math.radians(54))
_TIP = (0.0, STAR_OUTER)
_DENT = (STAR_INNER * _COS_54, STAR_INNER * _SIN_54)


def extents(shape: Shape) -> tuple[float, float, float, float]:
    """How far a shape of radius 1 reaches from its centre: (left, right, up, down), all positive."""
    if shape == "circle":
        return (1.0, 1.0, 1.0, 1.0)
    if shape == "square":
        return (SQUARE_HALF_SIDE,) * 4
    if shape == "triangle":
        half_width = TRIANGLE_CIRCUMRADIUS * math.cos(math.radians(30))
        return (half_width, half_width, TRIANGLE_CIRCUMRADIUS, TRIANGLE_CIRCUMRADIUS / 2)
    half_width = STAR_OUTER * math.cos(math.radians(18))
    return (half_width, half_width, STAR_OUTER, STAR_OUTER * math.sin(math.radians(54)))


def area(shape: Shape) -> float:
    """Area of a shape of radius 1."""
    if shape == "circle":
        return math.pi
    if shape == "square":
        return 4 * SQUARE_HALF_SIDE**2
    if shape == "triangle":
        return 0.75 * math.sqrt(3) * TRIANGLE_CIRCUMRADIUS**2
    return 5 * STAR_OUTER * STAR_INNER * math.sin(math.radians(36))


def signed_distance(shape: Shape, dx_tw: Float32, dy_th: Float32, radius: float) -> Float32:
    """Distance to the outline, negative inside; beyond a corner the distance to the nearer side's line.

    Args:
        shape: Which shape.
        dx_tw: Column offsets from the centre, [T, W], in the unit of `radius`.
        dy_th: Row offsets from the centre (downwards), [T, H].
        radius: The shape's radius.

    Returns:
        [T, H, W] in the same unit.
    """
    x_thw = dx_tw[:, None, :]
    y_thw = -dy_th[:, :, None]
    distance: Float32
    if shape == "circle":
        distance = np.sqrt(x_thw * x_thw + y_thw * y_thw) - np.float32(radius)
    elif shape == "square":
        distance = np.maximum(np.abs(x_thw), np.abs(y_thw)) - np.float32(SQUARE_HALF_SIDE * radius)
    elif shape == "triangle":
        inradius = np.float32(TRIANGLE_CIRCUMRADIUS * radius / 2)
        side_thw = np.abs(x_thw) * np.float32(math.cos(math.radians(30))) + y_thw * np.float32(0.5)
        distance = np.maximum(side_thw, -y_thw) - inradius
    else:
        distance = _star_distance(x_thw, y_thw, radius)
    return distance


def _star_distance(x_thw: Float32, y_thw: Float32, radius: float) -> Float32:
    """Folds the plane into the star's fundamental wedge (54..90 degrees), where one side remains."""
    x_thw = np.abs(x_thw)
    normal = (np.float32(_SIN_54), np.float32(-_COS_54))  # of the mirror line at 54 degrees
    for _ in range(2):
        below_thw = np.maximum(x_thw * normal[0] + y_thw * normal[1], 0) * np.float32(2)
        x_thw = np.abs(x_thw - below_thw * normal[0])
        y_thw = y_thw - below_thw * normal[1]
    side = (_DENT[0] - _TIP[0], _DENT[1] - _TIP[1])
    length = math.hypot(*side)
    outward = (-side[1] / length, side[0] / length)
    offset = radius * (outward[0] * _TIP[0] + outward[1] * _TIP[1])
    distance: Float32 = x_thw * np.float32(outward[0]) + y_thw * np.float32(outward[1]) - np.float32(offset)
    return distance


def coverage(shape: Shape, dx_tw: Float32, dy_th: Float32, radius: float) -> Float32:
    """Share of each pixel that the shape covers, [T, H, W] in 0..1; offsets and radius in pixels.

    A linear ramp one pixel wide across the outline.
    """
    covered: Float32 = np.clip(np.float32(0.5) - signed_distance(shape, dx_tw, dy_th, radius), 0, 1)
    return covered

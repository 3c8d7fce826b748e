"""Three-dimensional rotary positions from real-valued ids: no table, no limit.

Legend: b batch, f frames, t tokens, h heads, d head dim, p rotated pairs (d = 2p), 3 = (time, row, column).

A token's ids are real numbers, so a pooled or memory token can sit on a grid of its own. Phases are
computed in float64 and then cast: float32 ids would err by 0.02 rad after a day of video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeSpec:
    """Which pairs of a head turn with which axis, and how fast.

    Args:
        frequencies: for time, row and column the radians per id of each of the axis's pairs; the pairs lie
            in a head in this order, each pair being two neighbouring channels.
    """

    frequencies: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]

    @property
    def num_pairs(self) -> int:
        """Rotated pairs in all; the head dimension is twice that."""
        return sum(len(axis) for axis in self.frequencies)


class Phases(NamedTuple):
    """Cosine and sine of every token's angle, float32 ``[b or 1, t, 1, p]`` (the 1 broadcasts over heads)."""

    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str) -> Phases:
        """The same phases on another device."""
        return Phases(self.cos.to(device, non_blocking=True), self.sin.to(device, non_blocking=True))

    def of_pairs(self, pairs: Sequence[int]) -> Phases:
        """Of some of the pairs; views of these where they stand equally far apart."""
        step = pairs[1] - pairs[0] if len(pairs) > 1 else 1
        if step > 0 and list(pairs) == list(range(pairs[0], pairs[-1] + 1, step)):
            apart = slice(pairs[0], pairs[-1] + 1, step)
            return Phases(self.cos[..., apart], self.sin[..., apart])
        # Not an index, which would first have to reach the device.
        cos, sin = (torch.cat([part[..., i : i + 1] for i in pairs], dim=-1) for part in self)
        return Phases(cos, sin)


def wan_rope(head_dim: int, theta: float = 10_000.0) -> RopeSpec:
    """Wan2.1's split of a head: ``head_dim - 4 * (head_dim // 6)`` channels for time, ``2 * (head_dim //
    6)`` each for row and column (128 -> 44, 42, 42), every axis with its own geometric series down from 1
    radian per id.

    ``head_dim`` must be even.
    """
    assert head_dim % 2 == 0, head_dim
    space = 2 * (head_dim // 6)
    time = head_dim - 2 * space

    def series(channels: int) -> tuple[float, ...]:
        return tuple(theta ** -(2 * i / channels) for i in range(channels // 2))

    return RopeSpec((series(time), series(space), series(space)))


def token_phases(ids_bt3: Tensor, spec: RopeSpec) -> Phases:
    """Phases of tokens with ids of their own, ``ids_bt3`` float64. The reference for :func:`grid_phases`."""
    angles = [
        ids_bt3[..., axis : axis + 1].double()
        * torch.tensor(frequencies, dtype=torch.float64, device=ids_bt3.device)
        for axis, frequencies in enumerate(spec.frequencies)
    ]
    angle_bt1p = torch.cat(angles, dim=-1).unsqueeze(2)
    return Phases(angle_bt1p.cos().float(), angle_bt1p.sin().float())


def grid_phases(
    frame_ids: Sequence[Sequence[float]],
    row_ids: Sequence[float],
    column_ids: Sequence[float],
    spec: RopeSpec,
) -> Phases:
    """Phases of whole frames of tokens, on the CPU: tokens lie frame by frame, row by row.

    Axes turn separate pairs, so only ``frames + rows + columns`` angles are computed, not one per token.

    Args:
        frame_ids: per row of the batch the temporal id of each frame (all rows equally many).
        row_ids: the row id of each line of the token grid. ``column_ids`` likewise.
        spec: the frequencies.

    Returns:
        Phases ``[b, f * rows * columns, 1, p]``.
    """

    def angles(ids: Sequence[float] | Sequence[Sequence[float]], axis: int) -> Tensor:
        ids_n1 = torch.tensor(ids, dtype=torch.float64).unsqueeze(-1)
        return ids_n1 * torch.tensor(spec.frequencies[axis], dtype=torch.float64)

    time_bfp, row_rp, column_cp = angles(frame_ids, 0), angles(row_ids, 1), angles(column_ids, 2)
    batch, frames = time_bfp.shape[:2]
    rows, columns = len(row_ids), len(column_ids)

    def spread(turn: Callable[[Tensor], Tensor]) -> Tensor:
        time, row, column = (turn(angle).float() for angle in (time_bfp, row_rp, column_cp))
        shape = (batch, frames, rows, columns)
        parts = (
            time[:, :, None, None].expand(*shape, -1),
            row[None, None, :, None].expand(*shape, -1),
            column[None, None, None].expand(*shape, -1),
        )
        return torch.cat(parts, dim=-1).flatten(1, 3).unsqueeze(2)

    return Phases(spread(torch.cos), spread(torch.sin))


def rotate(x_bthd: Tensor, phases: Phases) -> Tensor:
    """Turn neighbouring channel pairs by their phase.

    Computed in float32 at least, returned in the input's dtype.
    """
    x_bthp2 = torch.unflatten(x_bthd.to(torch.promote_types(x_bthd.dtype, torch.float32)), -1, (-1, 2))
    real, imaginary = x_bthp2.unbind(-1)
    turned = torch.stack(
        (real * phases.cos - imaginary * phases.sin, real * phases.sin + imaginary * phases.cos), dim=-1
    )
    return turned.flatten(-2).to(x_bthd.dtype)


def unrotate(x_bthd: Tensor, phases: Phases) -> Tensor:
    """The inverse of :func:`rotate`, equal to it within rounding."""
    return rotate(x_bthd, Phases(phases.cos, -phases.sin))

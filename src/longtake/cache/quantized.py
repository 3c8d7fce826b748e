"""Latents in a byte or half a byte a number, for caches; never more than what is asked for is unpacked.

Legend: n numbers of a latent, g groups of them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Storage = Literal["full", "fp8", "int4"]
KeyStorage = Literal["full", "fp8"]

GROUP = 32
"""Numbers that share a scale in int4."""
FP8 = torch.float8_e4m3fn
_LARGEST_INT4 = 7
_LEAST_SCALE = 2.0**-9  # the smallest that the scale's own type holds


def num_groups(rank: int) -> int:
    """Scales of a latent in int4; the last group may be smaller."""
    return -(-rank // GROUP)


def to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in another type; what an 8-bit float does not reach becomes its largest."""
    return (x.clamp(-448, 448) if dtype == FP8 else x).to(dtype)


def pack_fp8(x_n: Tensor) -> Tensor:
    """Bytes ``[..., n]`` of 8-bit floats (e4m3), which need no scale: a normed latent is of size one."""
    return to_dtype(x_n.detach().float(), FP8).view(torch.uint8)


def unpack_fp8(bytes_n: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_fp8`."""
    return bytes_n.view(FP8).to(dtype)


def pack_int4(x_n: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers a byte ``[..., ceil(n / 2)]``, and a scale for every group of 32 as an 8-bit float,
    ``[..., g]``. Numbers are -7 to 7 times their scale, which is rounded up, so that none is cut off.
    """
    rank = x_n.shape[-1]
    padded = torch.nn.functional.pad(x_n.detach().float(), (0, num_groups(rank) * GROUP - rank))
    grouped = torch.unflatten(padded, -1, (-1, GROUP))
    wanted_g = (grouped.abs().amax(-1) / _LARGEST_INT4).clamp(_LEAST_SCALE, 448)
    scale_g = wanted_g.to(FP8)
    too_small = scale_g.float() < wanted_g
    scale_bytes_g = scale_g.view(torch.uint8) + too_small.to(torch.uint8)  # the next larger one
    scale_g1 = scale_bytes_g.view(FP8).float().unsqueeze(-1)
    whole = (grouped / scale_g1).round().clamp(-_LARGEST_INT4, _LARGEST_INT4).flatten(-2)[..., :rank]
    nibbles = (torch.nn.functional.pad(whole, (0, rank % 2)) + 8).to(torch.uint8)
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4), scale_bytes_g


def unpack_int4(bytes_n: Tensor, scale_bytes_g: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`pack_int4`, ``[..., rank]``."""
    nibbles = torch.stack([bytes_n & 15, bytes_n >> 4], dim=-1).flatten(-2)[..., :rank]
    scale_n = scales_of(scale_bytes_g, dtype).repeat_interleave(GROUP, dim=-1)[..., :rank]
    return (nibbles.to(dtype) - 8) * scale_n


def scales_of(scale_bytes_g: Tensor, dtype: torch.dtype) -> Tensor:
    """The steps of groups packed by :func:`pack_int4`."""
    return scale_bytes_g.view(FP8).to(dtype)


def rounded(x_n: Tensor, storage: Storage) -> Tensor:
    """What would come back, with the gradient of what went in (straight through): for training."""
    if storage == "full":
        return x_n
    if storage == "fp8":
        back = unpack_fp8(pack_fp8(x_n), x_n.dtype)
    else:
        back = unpack_int4(*pack_int4(x_n), x_n.shape[-1], x_n.dtype)
    return x_n + (back - x_n).detach()

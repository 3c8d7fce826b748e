"""What latents and the network's tokens should tell of the objects, from the world's ground truth.

A guide is a picture per latent frame at the resolution of the latents: how much of each cell objects cover at
the first and at the last of its pixel frames, and, where they do, how fast they go, where their centre is,
and which shape and colour they have; for a network, also where their centre will be. A linear probe that
reads it is trained together with what it reads: with the autoencoder, so that the latents say in plain
numbers what goes on, and with the network, whose clean context and noisy chunk alike are read at a middle
layer, so that what is needed to go on with a motion is in the keys and values that later chunks read. The
idea is that of representation alignment (VA-VAE, arXiv 2501.01423; REPA, arXiv 2410.06940), with truth in
place of a pretrained encoder.

Legend: t pixel frames, f latent frames, n objects, a attributes, k guide channels, h/w latent rows and
columns, b clips, u tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from longtake.world import Scene
from longtake.world.vocabulary import OBJECT_RGB, REFERENCE_HEIGHT, SHAPES

GUIDE_PARTS = {"covered": 2, "velocity": 2, "offset": 2, "shape": len(SHAPES), "colour": 3}
"""Channels of each part, in order. Covered: at the first and at the last frame. All others are times the
covered share: velocity (x, y) in quarters of a pixel (of 64) a frame, offset of the centre from the cell
(x, y) in half cells, 1 for the shape, RGB in -1..1. The units say how much an error matters: a velocity must
be known to a few hundredths of a pixel to last for seconds."""
NUM_GUIDE_CHANNELS = sum(GUIDE_PARTS.values())
_VELOCITY_SCALE, _OFFSET_SCALE, _AHEAD_SCALE = 4.0, 2.0, 0.5
_FASTEST = 4.0 / REFERENCE_HEIGHT  # a jump further than this is a cut


def guide_of(
    scene: Scene, start: int, masks_tnhw: Tensor, stride: int, cell: int, ahead: Sequence[int] = ()
) -> Tensor:
    """The guide of a clip, [f,k,h,w].

    Args:
        scene: that the clip shows.
        start: its first frame in the scene.
        masks_tnhw: what each pixel shows of each object, for `1 + (f - 1) * stride` frames.
        stride: pixel frames per latent frame.
        cell: pixels per latent cell along height and width.
        ahead: pixel frames. For each, two channels more, times the covered share: how far from where it is
            the centre will be (x, y) that long after the latent frame's last, in two pixels (of 64).
            Prompts that switch meanwhile do not count.
    """
    num_frames, num_objects, height, width = masks_tnhw.shape
    centers, looks = _objects(scene, start, num_frames, num_objects)
    center_tn2, look_tna = torch.from_numpy(centers).float(), torch.from_numpy(looks).float()
    velocity_tn2 = torch.zeros_like(
        center_tn2
    )  # the first latent frame is one picture, in which nothing moves
    velocity_tn2[1:] = center_tn2.diff(dim=0)
    velocity_tn2[velocity_tn2.norm(dim=-1) > _FASTEST] = 0

    covered_tnhw = F.avg_pool2d(masks_tnhw, cell)
    covered_fgnhw = _groups(covered_tnhw, stride)
    share_fnhw = covered_fgnhw.mean(1)
    velocity_fn2 = _groups(velocity_tn2, stride).mean(1) * REFERENCE_HEIGHT * _VELOCITY_SCALE
    center_fn2 = _groups(center_tn2, stride).mean(1) * height / cell
    rows, columns = height // cell, width // cell
    place_2hw = torch.stack(torch.meshgrid(torch.arange(columns), torch.arange(rows), indexing="xy")) + 0.5
    offset_fn2hw = (center_fn2[..., None, None] - place_2hw) * _OFFSET_SCALE
    look_fna = _groups(look_tna, stride).mean(1)
    ahead_fn2 = []
    for frames in ahead:
        later = torch.from_numpy(_objects(scene, start, num_frames, num_objects, frames)[0]).float()
        way_fn2 = _groups(later, stride)[:, -1] * REFERENCE_HEIGHT - center_fn2 * (
            REFERENCE_HEIGHT * cell / height
        )
        ahead_fn2.append(way_fn2 * _AHEAD_SCALE)
    return torch.cat(
        [
            covered_fgnhw[:, :1].sum(2),
            covered_fgnhw[:, -1:].sum(2),
            (share_fnhw[:, :, None] * velocity_fn2[..., None, None]).sum(1),
            (share_fnhw[:, :, None] * offset_fn2hw).sum(1),
            (share_fnhw[:, :, None] * look_fna[..., None, None]).sum(1),
            *((share_fnhw[:, :, None] * way_fn2[..., None, None]).sum(1) for way_fn2 in ahead_fn2),
        ],
        dim=1,
    )


def num_guide_channels(num_ahead: int = 0) -> int:
    """Channels of a guide that looks ahead so many times."""
    return NUM_GUIDE_CHANNELS + 2 * num_ahead


def guide_errors(read: Tensor, guide: Tensor, dim: int, num_ahead: int = 0) -> dict[str, Tensor]:
    """Mean squared error of each part, cells and tokens that objects touch counting five times.

    Args:
        read: what the probe read.
        guide: the truth, of the same shape.
        dim: its dimension of (one or several sets of) guide channels.
        num_ahead: how many times the guide looks ahead; part `ahead`.
    """
    weight = 1 + 4 * (guide.abs().sum(dim, keepdim=True) > 0)
    squared = ((read.float() - guide).square() * weight).movedim(dim, -1)
    channels = num_guide_channels(num_ahead)
    by_channel = squared.unflatten(-1, (-1, channels)).flatten(0, -2).mean(0)  # type: ignore[no-untyped-call]
    sizes = GUIDE_PARTS | ({"ahead": 2 * num_ahead} if num_ahead else {})
    parts = by_channel.split(list(sizes.values()))
    return {name: part.mean() for name, part in zip(sizes, parts, strict=True)}


def guide_tokens(guide_bfkhw: Tensor, patch: int) -> Tensor:
    """The guide of each token, [b,u,patch*patch*k]."""
    return rearrange(guide_bfkhw, "b f k (h p) (w q) -> b (f h w) (p q k)", p=patch, q=patch)


def _groups(per_frame: Tensor, stride: int) -> Tensor:
    """Frames of each latent frame, [f,g,...]; the first has one, which is repeated."""
    first = per_frame[:1].expand(stride, *per_frame.shape[1:])
    grouped: Tensor = torch.cat([first, per_frame[1:]]).unflatten(0, (-1, stride))  # type: ignore[no-untyped-call]
    return grouped


def _objects(
    scene: Scene, start: int, num_frames: int, num_objects: int, ahead: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres in view heights, relative to the view, [t,n,2], so many frames later, and looks (shape,
    colour) [t,n,a]; 0 for objects that a segment lacks.
    """
    centers_tn2 = np.zeros((num_frames, num_objects, 2))
    looks_tna = np.zeros((num_frames, num_objects, GUIDE_PARTS["shape"] + GUIDE_PARTS["colour"]))
    for segment, first, last in scene.spans(start, start + num_frames):
        times = np.arange(first, last)
        for slot, item in enumerate(segment.objects):
            centers_t2 = item.path.centers(times + ahead)
            centers_t2[:, 0] -= segment.camera.offsets(times + ahead)
            centers_tn2[first - start : last - start, slot] = centers_t2
            shape = np.eye(len(SHAPES))[SHAPES.index(item.shape)]
            colour = np.array(OBJECT_RGB[item.colour]) / 127.5 - 1
            looks_tna[first - start : last - start, slot] = np.concatenate([shape, colour])
    return centers_tn2, looks_tna

"""Excerpts of the world as pixels, with where the foreground is and what a guide says: all of a clip that
needs no network, so that other processes can make it beside a training.

Legend: b clips, t pixel frames, f latent frames, h/w rows and columns (of frames in pixels, of all else in
latent cells), c colours, k guide channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from longtake.train.excerpts import Excerpt, LatentCacheConfig, Prompts
from longtake.train.guide import guide_of
from longtake.world import render, render_masks


@dataclass(frozen=True)
class Rendered:
    """Clips that are not encoded yet: `frames_bthwc` uint8 RGB; the rest as in `train.latents.Clips`."""

    frames_bthwc: Tensor
    foreground_bfhw: Tensor
    prompts: tuple[Prompts, ...]
    opens: tuple[bool, ...]
    levels: tuple[int, ...]
    guide_bfkhw: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class ClipRenderer:
    """Renders what excerpts show.

    Args:
        stride: pixel frames per latent frame.
        cell: pixels per latent cell along height and width.
        guided: clips come with their guide, see `train.guide`.
        ahead: pixel frames that the guide looks ahead.
    """

    stride: int
    cell: int
    guided: bool = False
    ahead: tuple[int, ...] = ()

    def render(self, excerpts: Sequence[Excerpt], config: LatentCacheConfig) -> Rendered:
        """Clips of the configuration's size and of `config.num_latent_frames` latent frames."""
        # A training step may be under autocast, which refuses to join tensors of half precision.
        with torch.autocast("cpu", enabled=False):
            return self._render(excerpts, config)

    def _render(self, excerpts: Sequence[Excerpt], config: LatentCacheConfig) -> Rendered:
        num_frames = 1 + (config.num_latent_frames - 1) * self.stride
        size = (config.height, config.width)
        frames = np.empty((len(excerpts), num_frames, *size, 3), np.uint8)
        foregrounds, guides = [], []
        for row, item in enumerate(excerpts):
            scene, at = item.scene, item.start
            frames[row] = render(scene, at, at + num_frames, *size)
            masks = torch.from_numpy(render_masks(scene, at, at + num_frames, *size))
            foregrounds.append(_pool(masks.sum(1), self.stride, self.cell))
            if self.guided:
                guides.append(guide_of(scene, at, masks, self.stride, self.cell, self.ahead))
        return Rendered(
            torch.from_numpy(frames),
            torch.stack(foregrounds),
            tuple(item.prompts for item in excerpts),
            tuple(item.opens for item in excerpts),
            tuple(item.scene.level for item in excerpts),
            torch.stack(guides) if self.guided else None,
        )


def _pool(masks_thw: Tensor, stride: int, cell: int) -> Tensor:
    """Coverage per latent cell, the strongest over a latent frame's pixel frames, [f,h,w] in 0..1."""
    padded = torch.cat([masks_thw[:1].expand(stride - 1, -1, -1), masks_thw])
    cells = F.max_pool2d(padded.clamp(0, 1), cell)
    pooled: Tensor = cells.unflatten(0, (-1, stride)).amax(dim=1).half()  # type: ignore[no-untyped-call]
    return pooled

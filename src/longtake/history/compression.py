"""Policies that average what leaves at fixed ratios.

Legend: b rows, f frames, n tokens per frame; ``...`` is a part's shape per token.
"""

from __future__ import annotations

from itertools import pairwise, product
from math import prod
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.kept import KeptEntries, KeptFrames, Leaving
from longtake.history.policy import MemoryGrid, PolicyConfig, Surroundings, spread


class AverageConfig(PolicyConfig):
    """Running averages of all that left (the sink of Reward-Forcing, arXiv 2512.04678, beside our own sink).

    Args:
        decays: for every frame of the memory how much of it one frame that leaves lets stay.
    """

    kind: Literal["average"] = "average"
    decays: tuple[float, ...] = (0.99, 0.95, 0.8)

    @model_validator(mode="after")
    def _fits(self) -> AverageConfig:
        if not self.decays or not all(0 <= decay < 1 for decay in self.decays):
            raise ConfigError(f"decays={self.decays} leave 0..1", "use for instance [0.99, 0.9]")
        return self

    def make(self, surroundings: Surroundings) -> AveragePolicy:
        """Always."""
        return AveragePolicy(surroundings, self)


class AveragePolicy(KeptFrames):
    """Every memory frame is a running average of what left, at a speed of its own."""

    def __init__(self, surroundings: Surroundings, config: AverageConfig) -> None:
        super().__init__(surroundings, len(config.decays))
        self._decays = config.decays

    @property
    def averages(self) -> bool:
        """Always."""
        return True

    def keep(self, kept: dict[str, Tensor], leaving: Leaving) -> dict[str, Tensor]:
        """Frame by frame."""
        new = {}
        for name, part in kept.items():
            decay = torch.tensor(self._decays).to(part).view(1, -1, *(1,) * (part.dim() - 2))
            for frame_bn in leaving.parts[name].type_as(part).unbind(1):
                part = decay * part + (1 - decay) * frame_bn.unsqueeze(1)
            new[name] = part
        return new


class Band(Config):
    """Frames of about one age.

    Args:
        num_entries: how many averages the band holds.
        num_frames: frames in each average.
        pool: rows and columns of tokens in each average.
    """

    num_entries: int = Field(ge=1)
    num_frames: int = Field(default=1, ge=1)
    pool: tuple[int, int] = (1, 1)


class PooledConfig(PolicyConfig):
    """The older, the coarser (FramePack, arXiv 2504.12626): what leaves a band is averaged into the next.

    Entries stand oldest first, evenly spread over the memory's ids, in the middle of the rows and columns
    that they average.

    Args:
        bands: youngest first; frames and pools of each must be multiples of those of the band before.
        num_ids: temporal ids that the memory takes.
    """

    kind: Literal["pooled"] = "pooled"
    bands: tuple[Band, ...] = (
        Band(num_entries=4, pool=(2, 2)),
        Band(num_entries=4, num_frames=4, pool=(2, 2)),
        Band(num_entries=16, num_frames=8, pool=(4, 4)),
    )
    num_ids: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> PooledConfig:
        if not self.bands:
            raise ConfigError("bands=() keeps nothing", 'give at least one, or use the policy "window"')
        for younger, older in pairwise(self.bands):
            ratios = [older.num_frames % younger.num_frames]
            ratios += [b % a for a, b in zip(younger.pool, older.pool, strict=True)]
            if any(ratios):
                raise ConfigError(
                    f"a band of {older.num_frames} frames and pool {older.pool} does not follow one of "
                    f"{younger.num_frames} frames and pool {younger.pool}",
                    "let frames and pools of each band be multiples of those of the band before",
                )
        return self

    def make(self, surroundings: Surroundings) -> PooledPolicy:
        """See the base class: pools must divide the token grid."""
        for band in self.bands:
            if any(size % pool for size, pool in zip(surroundings.grid, band.pool, strict=True)):
                raise ConfigError(
                    f"pool={band.pool} does not divide a grid of {surroundings.grid} tokens",
                    "use pools that divide the video's tokens",
                )
        return PooledPolicy(surroundings, self)


class PooledPolicy(KeptEntries):
    """Bands of averages; what a part keeps is all their entries, then what each band is still collecting."""

    def __init__(self, surroundings: Surroundings, config: PooledConfig) -> None:
        self._bands = config.bands
        self._size = surroundings.grid
        self._cells = [
            (surroundings.grid[0] // band.pool[0], surroundings.grid[1] // band.pool[1])
            for band in config.bands
        ]
        num_entries = sum(band.num_entries for band in config.bands)
        ages = iter(range(num_entries))
        places: list[tuple[float, float, float]] = []
        for band, cells in reversed(list(zip(config.bands, self._cells, strict=True))):
            for _ in range(band.num_entries):
                time = next(ages) * (config.num_ids - 1) / max(1, num_entries - 1)
                rows, columns = (
                    spread(count, size) for count, size in zip(cells, surroundings.grid, strict=True)
                )
                places += [(time, row, column) for row, column in product(rows, columns)]
        super().__init__(surroundings, MemoryGrid(config.num_ids, tuple(places)))

    @property
    def averages(self) -> bool:
        """Always."""
        return True

    def state_shape(self) -> tuple[int, ...]:
        """Tokens of all entries, then of what is being collected."""
        return (self.memory_grid.num_tokens + sum(prod(cells) for cells in self._cells),)

    def filled(self, frame_bn: Tensor) -> Tensor:
        """The frame in every entry, nothing collected."""
        entries, collected = [], []
        for band, cells in zip(self._bands, self._cells, strict=True):
            pooled = _pooled(frame_bn, self._size, cells)
            entries.append(pooled.repeat(1, band.num_entries, *(1,) * (pooled.dim() - 2)))
            collected.append(torch.zeros_like(pooled))
        return torch.cat([*reversed(entries), *reversed(collected)], dim=1)

    def shown(self, kept_b: Tensor) -> Tensor:
        """All entries."""
        return kept_b[:, : self.memory_grid.num_tokens]

    def keep(self, kept: dict[str, Tensor], leaving: Leaving) -> dict[str, Tensor]:
        """Frame by frame through the bands."""
        return {
            name: self._passed(part, leaving.parts[name].type_as(part), leaving.count_b)
            for name, part in kept.items()
        }

    def _passed(self, kept_bm: Tensor, frames_bfn: Tensor, count_b: Tensor) -> Tensor:
        bands, cells = list(self._bands), list(self._cells)
        sizes = [band.num_entries * prod(cell) for band, cell in zip(bands, cells, strict=True)]
        sizes = [*reversed(sizes), *(prod(cell) for cell in reversed(cells))]
        pieces = list(torch.split(kept_bm, sizes, dim=1))
        held, collected = pieces[: len(bands)][::-1], pieces[len(bands) :][::-1]
        for number, frame_bn in enumerate(frames_bfn.unbind(1), start=1):
            arriving, weight, size = frame_bn, 1, self._size
            arrives_b = torch.ones_like(count_b, dtype=torch.bool)
            for i, band in enumerate(bands):
                share = weight / band.num_frames * _pooled(arriving, size, cells[i])
                collected[i] = torch.where(_like(arrives_b, share), collected[i] + share, collected[i])
                full_b = (count_b + number) % band.num_frames == 0
                size, weight = cells[i], band.num_frames
                tokens = prod(size)
                arriving = held[i][:, :tokens]
                shifted = torch.cat([held[i][:, tokens:], collected[i]], dim=1)
                held[i] = torch.where(_like(full_b, shifted), shifted, held[i])
                collected[i] = torch.where(
                    _like(full_b, collected[i]), torch.zeros_like(collected[i]), collected[i]
                )
                arrives_b = full_b
        return torch.cat([*reversed(held), *reversed(collected)], dim=1)


def _pooled(tokens_bn: Tensor, size: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Averages over equal parts of a token grid, ``[b, cells, ...]``."""
    if size == cells:
        return tokens_bn
    pool = (size[0] // cells[0], size[1] // cells[1])
    grid = torch.unflatten(tokens_bn, 1, (cells[0], pool[0], cells[1], pool[1]))
    return grid.mean((2, 4)).flatten(1, 2)


def _like(mask_b: Tensor, tensor: Tensor) -> Tensor:
    return mask_b.view(-1, *(1,) * (tensor.dim() - 1))

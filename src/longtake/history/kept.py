"""What retaining and compressing policies share: a memory that holds entries of every layer.

It is read from the first eviction on, as if the first frame that left had been there for ever: places that
nothing else has taken yet hold copies of it.

Legend: b rows, f evicted frames, n tokens per frame, m memory tokens, q query tokens; ``...`` is a part's
shape per token.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.spec import PartSpec
from longtake.errors import ConfigError
from longtake.history.policy import Evicted, MemoryGrid, Policy, PolicyState, Surroundings

_COUNT, _LIKE = "count", "like"


@dataclass(frozen=True)
class Leaving:
    """Frames that leave, as one layer keeps them.

    Args:
        layer: its index.
        parts: by name ``[b, f, n, ...]``, oldest frame first.
        frames: for each row their indices in the stream.
        count_b: frames that the stream had evicted before.
        queries_bqhd: of the newest chunk, see `Evicted`; None where the policy does not need them.
    """

    layer: int
    parts: dict[str, Tensor]
    frames: tuple[tuple[int, ...], ...]
    count_b: Tensor
    queries_bqhd: Tensor | None


class KeptEntries(Policy):
    """Entries of evicted frames, chosen or averaged by subclasses.

    Args:
        surroundings: layout and token grid.
        grid: where the memory tokens stand.

    Raises:
        ConfigError: a layout whose numbers cannot be averaged, for a policy that does.
    """

    def __init__(self, surroundings: Surroundings, grid: MemoryGrid) -> None:
        if self.averages and surroundings.spec.is_packed:
            raise ConfigError(
                "a policy that averages cannot calculate with packed latents",
                'use latent.storage="full", or a policy that keeps entries as they are',
            )
        self._spec = surroundings.spec
        self._frame_tokens = surroundings.grid[0] * surroundings.grid[1]
        self._grid = grid

    @property
    def memory_grid(self) -> MemoryGrid:
        """Every layer has entries of its own."""
        return self._grid

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        """Zeros, which are never read."""
        shapes = [
            {name: ((*self.state_shape(), *part.shape), _bytes(part)) for name, part in parts}
            | {name: (shape, None) for name, shape in self.extra_shapes().items()}
            for parts in self._spec.layers
        ]
        own = torch.float32 if self.averages else dtype
        kept = {
            f"{layer}.{name}": torch.zeros(batch, *shape, device=device, dtype=part_dtype or own)
            for layer, of_layer in enumerate(shapes)
            for name, (shape, part_dtype) in of_layer.items()
        }
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        return kept | {_COUNT: count, _LIKE: torch.zeros(batch, 1, dtype=dtype, device=device)}

    def readable(self, num_evicted: int) -> bool:
        """Once something has left."""
        return num_evicted > 0

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        """Layer by layer."""
        count_b = state[_COUNT]
        new: PolicyState = {_COUNT: count_b + len(evicted.frames[0]), _LIKE: state[_LIKE]}
        for i, layer in enumerate(evicted.entries.layers):
            parts = {
                name: torch.unflatten(layer[name], 1, (-1, self._frame_tokens)) for name in self._spec.names
            }
            kept = {name: state[f"{i}.{name}"] for name in (*parts, *self.extra_shapes())}
            for name, part in parts.items():
                started = (count_b > 0).view(-1, *(1,) * (kept[name].dim() - 1))
                first = self.filled(part[:, 0].type_as(kept[name]))
                kept[name] = torch.where(started, kept[name], first)
            queries_bqhd = None if evicted.queries is None else evicted.queries[i]
            changed = self.keep(kept, Leaving(i, parts, evicted.frames, count_b, queries_bqhd))
            new |= {f"{i}.{name}": part for name, part in changed.items()}
        return new

    def read(self, state: PolicyState) -> Entries:
        """What was kept."""
        like = state[_LIKE].dtype
        return Entries(
            tuple(
                {
                    name: self.shown(state[f"{layer}.{name}"]).to(_bytes(part) or like)
                    for name, part in self._spec.layers[layer]
                }
                for layer in range(self._spec.num_layers)
            )
        )

    @property
    def averages(self) -> bool:
        """Whether it adds up over time, which takes single precision: what is small beside a sum is lost in
        half.
        """
        return False

    def extra_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes per row of what a layer keeps beside its parts, which starts as zeros."""
        return {}

    @abstractmethod
    def state_shape(self) -> tuple[int, ...]:
        """Shape of what is kept of a part, without the batch and the part's own shape."""

    @abstractmethod
    def filled(self, frame_bn: Tensor) -> Tensor:
        """What would be kept of a stream that had always been this frame ``[b, n, ...]``."""

    @abstractmethod
    def keep(self, kept: dict[str, Tensor], leaving: Leaving) -> dict[str, Tensor]:
        """One layer's parts, ``[b, *state_shape, ...]``, and extras after some frames."""

    @abstractmethod
    def shown(self, kept_b: Tensor) -> Tensor:
        """The memory tokens ``[b, m, ...]`` of what is kept of a part."""


class KeptFrames(KeptEntries):
    """Of every place on the token grid as many entries as the memory has frames."""

    def __init__(self, surroundings: Surroundings, num_frames: int) -> None:
        rows, columns = (range(size) for size in surroundings.grid)
        super().__init__(surroundings, MemoryGrid.regular(num_frames, rows, columns))
        self._num_frames = num_frames

    def state_shape(self) -> tuple[int, ...]:
        """Frames, tokens."""
        return self._num_frames, self._frame_tokens

    def filled(self, frame_bn: Tensor) -> Tensor:
        """The frame in every place."""
        return frame_bn.unsqueeze(1).expand(-1, self._num_frames, *frame_bn.shape[1:])

    def shown(self, kept_b: Tensor) -> Tensor:
        """Frame by frame."""
        return kept_b.flatten(1, 2)


def _bytes(part: PartSpec) -> torch.dtype | None:
    """The type of what cannot be calculated with; None for numbers, which a state holds as they are."""
    return None if part.is_rounded else part.dtype

"""Choosing every layer's rank: for a number of bytes a token, or for a loss.

Of a layer's squared singular values (of keys and values over the tokens that come, weighed as errors matter)
those beyond the rank are lost. Each layer's are counted as shares of their sum, so that layers count alike.
Taking the largest share that is left, wherever it is, is the best use of a budget, since within a layer they
fall.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from longtake.errors import ConfigError

BYTES_PER_NUMBER = 2
"""What budgets are counted in: bf16."""


def lost(energies: Sequence[float], rank: int) -> float:
    """Share of a layer's energy beyond a rank, predicted loss of keys and values."""
    total = sum(energies)
    return sum(energies[rank:]) / total if total > 0 else 0.0


def ranks_for_budget(
    energies: Sequence[Sequence[float]], budget_bytes: int, rope_dim: int, multiple: int = 1
) -> tuple[int, ...]:
    """The ranks that lose least, of all whose caches fit.

    Args:
        energies: of every layer, largest first.
        budget_bytes: that a token may leave in all layers' caches, shared keys included.
        rope_dim: of the shared keys.
        multiple: ranks are multiples of this.

    Raises:
        ConfigError: a budget that does not hold the least rank of every layer.
    """
    layers = len(energies)
    left = budget_bytes // BYTES_PER_NUMBER - layers * (rope_dim + multiple)
    if left < 0:
        least = layers * (rope_dim + multiple) * BYTES_PER_NUMBER
        raise ConfigError(
            f"budget_bytes={budget_bytes} holds no rank of {multiple} beside keys of {rope_dim} numbers in "
            f"{layers} layers",
            f"use {least} or more",
        )
    ranks = [multiple] * layers

    def gain(layer: int) -> float:
        rank = ranks[layer]
        return sum(energies[layer][rank : rank + multiple]) / max(sum(energies[layer]), 1e-30)

    heap = [(-gain(layer), layer) for layer in range(layers)]
    heapq.heapify(heap)
    while heap and left >= multiple:
        _, layer = heapq.heappop(heap)
        if ranks[layer] + multiple > len(energies[layer]):
            continue
        ranks[layer] += multiple
        left -= multiple
        heapq.heappush(heap, (-gain(layer), layer))
    return tuple(ranks)


def ranks_for_loss(
    energies: Sequence[Sequence[float]], max_loss: float, multiple: int = 1
) -> tuple[int, ...]:
    """Of every layer the least rank beyond which no more than a share is lost.

    Args:
        energies: of every layer, largest first.
        max_loss: the share, below 1.
        multiple: ranks are multiples of this, or all there is.
    """
    ranks = []
    for of_layer in energies:
        rank = min(multiple, len(of_layer))
        while rank < len(of_layer) and lost(of_layer, rank) > max_loss:
            rank = min(rank + multiple, len(of_layer))
        ranks.append(rank)
    return tuple(ranks)

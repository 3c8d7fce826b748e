"""Choosing every layer's rank: for a number of bytes a token, or for a loss.

Of every layer it is known what share of its error each further number of the latent takes away
(`factor.LowRank.gains`: of keys and values over the tokens that come, weighed as errors matter), and, where
that was measured, how much the flow suffers from each layer's (`layer_weights`). Taking what gains most for
its bytes, wherever it is, is the best use of a budget where the gains of a layer fall and every number costs
the same; nearly so elsewhere.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from longtake.errors import ConfigError


def lost(gains: Sequence[float], rank: int) -> float:
    """Share of a layer's keys and values that is predicted to be lost at a rank."""
    return max(0.0, 1.0 - sum(gains[:rank]))


def check_budget(budget_bytes: int, layers: int, bytes_of: Callable[[int], int], multiple: int = 1) -> None:
    """Raises ConfigError for a budget that does not hold the least rank of every layer; as below."""
    least = layers * bytes_of(multiple)
    if budget_bytes < least:
        raise ConfigError(
            f"budget_bytes={budget_bytes} holds no rank of {multiple} in {layers} layers",
            f"use {least} or more",
        )


def ranks_for_budget(
    gains: Sequence[Sequence[float]],
    budget_bytes: int,
    bytes_of: Callable[[int], int],
    multiple: int = 1,
    *,
    one_rank: bool = False,
    weights: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """The ranks that lose least in all, of all whose caches fit.

    Args:
        gains: of every layer, what each number of its latent gains.
        budget_bytes: that a token may leave in all layers' caches.
        bytes_of: what a layer of a rank takes of it, shared key included.
        multiple: ranks are multiples of this.
        one_rank: the same for all layers.
        weights: of every layer how much its loss counts; None is alike.

    Raises:
        ConfigError: a budget that does not hold the least rank of every layer.
    """
    layers = len(gains)
    check_budget(budget_bytes, layers, bytes_of, multiple)
    most = max(multiple, min(map(len, gains)) // multiple * multiple)
    if one_rank:
        fitting = (rank for rank in range(most, 0, -multiple) if layers * bytes_of(rank) <= budget_bytes)
        return (next(fitting),) * layers
    ranks = [multiple] * layers
    left = budget_bytes - layers * bytes_of(multiple)

    def cost(layer: int) -> int:
        return bytes_of(ranks[layer] + multiple) - bytes_of(ranks[layer])

    def offer(layer: int) -> tuple[float, int]:
        weight = 1.0 if weights is None else weights[layer]
        gain = weight * sum(gains[layer][ranks[layer] : ranks[layer] + multiple])
        return -(gain / cost(layer) if cost(layer) else math.inf), layer

    heap = [offer(layer) for layer in range(layers)]
    heapq.heapify(heap)
    while heap:
        _, layer = heapq.heappop(heap)
        if ranks[layer] + multiple > len(gains[layer]) or cost(layer) > left:
            continue
        left -= cost(layer)
        ranks[layer] += multiple
        heapq.heappush(heap, offer(layer))
    return tuple(ranks)


def ranks_for_loss(
    gains: Sequence[Sequence[float]], max_loss: float, multiple: int = 1, *, one_rank: bool = False
) -> tuple[int, ...]:
    """Of every layer the least rank beyond which no more than a share is lost.

    Args:
        gains: of every layer, what each number of its latent gains.
        max_loss: the share, below 1.
        multiple: ranks are multiples of this, or all there is.
        one_rank: the largest of them for all layers.

    Raises:
        ConfigError: a layer loses more at any rank.
    """
    ranks = []
    for layer, of_layer in enumerate(gains):
        possible = [*range(min(multiple, len(of_layer)), len(of_layer), multiple), len(of_layer)]
        fitting = [rank for rank in possible if lost(of_layer, rank) <= max_loss + 1e-12]
        if not fitting:
            least = max(min(lost(each, rank) for rank in range(1, len(each) + 1)) for each in gains)
            raise ConfigError(
                f"max_loss={max_loss:g}, but layer {layer} loses more at any rank: to norms of keys, which "
                "no linear map makes, or to there being few tokens",
                f"use {math.ceil(1000 * least - 1e-9) / 1000:g} or more, or fit to more tokens",
            )
        ranks.append(fitting[0])
    return (max(ranks),) * len(ranks) if one_rank else tuple(ranks)

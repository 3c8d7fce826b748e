"""Ranks for a budget are the best there are, for a loss the least."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.convert.ranks import lost, ranks_for_budget, ranks_for_loss
from longtake.errors import ConfigError

falling = st.lists(st.floats(1e-6, 1e3), min_size=6, max_size=12).map(
    lambda x: [each / sum(x) for each in sorted(x, reverse=True)]
)


@settings(max_examples=40, deadline=None)
@given(
    gains=st.lists(falling, min_size=1, max_size=3),
    numbers=st.integers(0, 30),
    multiple=st.integers(1, 2),
    weights=st.none() | st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
)
def test_no_other_ranks_make_more_of_a_budget(
    gains: list[list[float]], numbers: int, multiple: int, weights: list[float] | None
) -> None:
    rope_dim, layers = 4, len(gains)
    budget = 2 * (layers * (rope_dim + multiple) + numbers)

    def bytes_of(rank: int) -> int:
        return 2 * (rank + rope_dim)

    ranks = ranks_for_budget(gains, budget, bytes_of, multiple, weights=weights)
    (rank,) = set(ranks_for_budget(gains, budget, bytes_of, multiple, one_rank=True))
    assert layers * bytes_of(rank) <= budget
    most = rank + multiple > min(map(len, gains))
    assert most or layers * bytes_of(rank + multiple) > budget
    assert 2 * (sum(ranks) + layers * rope_dim) <= budget
    assert all(rank % multiple == 0 for rank in ranks)

    def loss(ranks: Sequence[int]) -> float:
        each = zip(weights or (1.0, 1.0, 1.0), map(lost, gains, ranks), strict=False)
        return sum(weight * share for weight, share in each)

    best = min(
        loss(others)
        for others in product(*(range(multiple, len(of_layer) + 1, multiple) for of_layer in gains))
        if 2 * (sum(others) + layers * rope_dim) <= budget
    )
    assert loss(ranks) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(gains=st.lists(falling, min_size=1, max_size=3), max_loss=st.floats(0.001, 0.9))
def test_ranks_for_a_loss_are_the_least_that_keep_it(gains: list[list[float]], max_loss: float) -> None:
    ranks = ranks_for_loss(gains, max_loss)
    for of_layer, rank in zip(gains, ranks, strict=True):
        assert lost(of_layer, rank) <= max_loss + 1e-9
        assert rank == 1 or lost(of_layer, rank - 1) > max_loss
    assert set(ranks_for_loss(gains, max_loss, one_rank=True)) == {max(ranks)}


def test_a_loss_that_no_rank_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 1 loses more at any rank.*use 0.3 or more"):
        ranks_for_loss([[0.6, 0.3, 0.0], [0.5, 0.2, -0.1]], 0.25)
    assert ranks_for_loss([[0.6, 0.3, 0.0], [0.5, 0.2, -0.1]], 0.3) == (2, 2)

"""Rotary phases and attention against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.ops.attention import attention
from longtake.ops.rope import Phases, grid_phases, rotate, token_phases, unrotate, wan_rope


@pytest.mark.parametrize(
    ("head_dim", "pairs"),
    [(128, (22, 21, 21)), (24, (4, 4, 4)), (32, (6, 5, 5)), (4, (2, 0, 0)), (14, (3, 2, 2))],
)
def test_the_split_of_a_head(head_dim: int, pairs: tuple[int, int, int]) -> None:
    spec = wan_rope(head_dim)
    assert tuple(len(axis) for axis in spec.frequencies) == pairs
    assert spec.num_pairs * 2 == head_dim
    assert all(axis[0] == 1 for axis in spec.frequencies if axis)
    assert list(spec.frequencies[0]) == sorted(spec.frequencies[0], reverse=True)


ids = st.floats(-50, 2e6, allow_nan=False)


@settings(deadline=None)
@given(frames=st.lists(ids, min_size=1, max_size=3), rows=st.integers(1, 3), columns=st.integers(1, 3))
def test_grid_phases_equal_token_phases(frames: list[float], rows: int, columns: int) -> None:
    spec = wan_rope(14)
    row_ids, column_ids = [0.5 * i for i in range(rows)], [1.5 * i for i in range(columns)]
    tokens = [[[f, r, c] for f in frames for r in row_ids for c in column_ids]]
    whole = token_phases(torch.tensor(tokens, dtype=torch.float64), spec)
    fast = grid_phases([frames], row_ids, column_ids, spec)
    torch.testing.assert_close(fast.cos, whole.cos)
    torch.testing.assert_close(fast.sin, whole.sin)


def test_phases_do_not_drift_after_a_day() -> None:
    """345,603 latent frames: the angle is exact to float32 rounding of its cosine."""
    spec = wan_rope(128)
    phases = grid_phases([[345_603.0]], [0.0], [0.0], spec)
    for i, frequency in enumerate(spec.frequencies[0]):
        assert float(phases.cos[0, 0, 0, i]) == pytest.approx(math.cos(345_603.0 * frequency), abs=1e-7)


def test_rotation_keeps_relative_angles_and_inverts() -> None:
    spec = wan_rope(12)
    q, k = torch.randn(2, 1, 1, 3, 12)

    def score(a: float, b: float) -> torch.Tensor:
        def at(x: torch.Tensor, time: float) -> torch.Tensor:
            return rotate(x, grid_phases([[time]], [0.0], [0.0], spec))

        return (at(q, a) * at(k, b)).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1_000_007, 1_000_003), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)
    phases = grid_phases([[5.0]], [0.0], [0.0], spec)
    torch.testing.assert_close(unrotate(rotate(q, phases), phases), q)
    half = rotate(q.bfloat16(), phases)
    assert half.dtype == torch.bfloat16


def test_no_turn_at_zero() -> None:
    x = torch.randn(1, 2, 1, 6)
    still = Phases(torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1, 3))
    assert torch.equal(rotate(x, still), x)


@pytest.mark.parametrize(("of_keys", "of_values"), [(5, 3), (3, 5), (4, 4)])
def test_keys_and_values_may_be_of_different_widths(of_keys: int, of_values: int) -> None:
    """Scores are scaled by the keys' own width."""
    q, k = torch.randn(2, 3, 2, of_keys), torch.randn(2, 7, 2, of_keys)
    v = torch.randn(2, 7, 2, of_values, requires_grad=True)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(of_keys**-0.5).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    found = attention(q, k, v)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out.square().sum(), v)[0] for out in (found, expected)), atol=1e-5, rtol=1e-4
    )


def test_attention_is_softmax_and_masks() -> None:
    q, k, v = torch.randn(2, 3, 2, 4), torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 2).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
    mask = torch.tensor([True, False, True, True, False])
    masked = attention(q, k, v, mask[None, None, None])
    torch.testing.assert_close(masked, attention(q, k[:, mask], v[:, mask]))
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(attention(q, k[:, order], v[:, order]), attention(q, k, v))

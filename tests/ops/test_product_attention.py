"""The bf16 products that train on a CPU, against the fused kernel that serves."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from longtake.ops.attention import attention, product_attention


@pytest.mark.parametrize("masked", [False, True])
def test_products_equal_the_fused_kernel_within_bf16(masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 8, generator=generator).requires_grad_() for length in (5, 7, 7))
    mask = torch.rand(3, 1, 5, 7, generator=generator) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    reference = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    products = product_attention(q, k, v, mask)
    assert products.dtype == torch.bfloat16
    torch.testing.assert_close(products.float(), reference, atol=0.03, rtol=0.02)
    weight = torch.randn(reference.shape, generator=generator)
    expected = torch.autograd.grad((reference * weight).sum(), (q, k, v))
    actual = torch.autograd.grad((products.float() * weight).sum(), (q, k, v))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.06, rtol=0.03)


def test_products_are_chosen_for_bf16_training_only() -> None:
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    trained = q.clone().requires_grad_()
    assert attention(q, k, v).dtype == torch.float32
    assert attention(trained, k, v).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(trained, k, v).dtype == torch.bfloat16
    exact = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(attention(q, k, v), exact.transpose(1, 2).flatten(2))

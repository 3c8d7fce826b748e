"""Attention over a sequence of keys. The only place where an attention kernel is chosen.

Legend: b batch, q query tokens, k key tokens, h heads, d head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention


def attention(q_bqhd: Tensor, k_bkhd: Tensor, v_bkhd: Tensor, mask_b1qk: Tensor | None = None) -> Tensor:
    """Softmax attention, scaled by ``d ** -0.5``; the order of the keys does not matter.

    Args:
        q_bqhd: queries. ``k_bkhd``, ``v_bkhd``: keys and values, the same number of heads.
        mask_b1qk: bool, True where a query may see a key, broadcastable to ``[b, h, q, k]``; every query
            must see at least one key. None lets every query see all keys, and is the only form the fastest
            kernels take.

    Returns:
        ``[b, q, h * d]``.
    """
    q_bhqd, k_bhkd, v_bhkd = (x.transpose(1, 2) for x in (q_bqhd, k_bkhd, v_bkhd))
    if _trains_in_bf16_on_cpu(q_bqhd):
        out_bhqd = product_attention(q_bhqd, k_bhkd, v_bhkd, mask_b1qk)
    else:
        out_bhqd = _fused(q_bhqd, k_bhkd, v_bhkd, mask_b1qk)
    return out_bhqd.transpose(1, 2).flatten(2)


def _fused(q_bhqd: Tensor, k_bhkd: Tensor, v_bhkd: Tensor, mask_b1qk: Tensor | None) -> Tensor:
    """Fused kernels take keys and values of one width alone. Else scores are written out: with 48 queries, 8
    heads, and 210 keys of 40 channels values of 32 take 0.56 ms, of 40 0.31 (one thread).
    """
    of_keys, of_values = q_bhqd.shape[-1], v_bhkd.shape[-1]
    if of_values < of_keys:
        v_bhkd = pad(v_bhkd, (0, of_keys - of_values))
    elif of_values > of_keys:
        q_bhqd, k_bhkd = (pad(x, (0, of_values - of_keys)) for x in (q_bhqd, k_bhkd))
    scale = of_keys**-0.5
    out = scaled_dot_product_attention(q_bhqd, k_bhkd, v_bhkd, attn_mask=mask_b1qk, scale=scale)
    return out[..., :of_values]


def product_attention(
    q_bhqd: Tensor, k_bhkd: Tensor, v_bhkd: Tensor, mask_b1qk: Tensor | None = None
) -> Tensor:
    """Attention as two batched products and a softmax, all in bf16 (the softmax accumulates in float32).

    For short sequences on processors that multiply bf16 natively, where the backward pass of the fused CPU
    kernel is slow: forward and backward of 48 queries, 8 heads of 32 and 192 keys take 29 ms against 71 ms
    for 48 rows, with 48 keys 8 ms against 50 ms (one thread). Returns ``[b, h, q, d]`` bf16.
    """
    with torch.autocast(q_bhqd.device.type, enabled=False):
        q, k, v = (x.bfloat16() for x in (q_bhqd, k_bhkd, v_bhkd))
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask_b1qk is not None:
            scores = scores.masked_fill(~mask_b1qk, float("-inf"))
        out: Tensor = scores.softmax(dim=-1) @ v
        return out


def _trains_in_bf16_on_cpu(q: Tensor) -> bool:
    if q.device.type != "cpu" or not (torch.is_grad_enabled() and q.requires_grad):
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return q.dtype == torch.bfloat16

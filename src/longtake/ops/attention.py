"""Attention over a sequence of keys. The only place where an attention kernel is chosen.

Legend: b batch, q query tokens, k key tokens, h heads, d head dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


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
    out_bhqd = scaled_dot_product_attention(
        q_bqhd.transpose(1, 2), k_bkhd.transpose(1, 2), v_bkhd.transpose(1, 2), attn_mask=mask_b1qk
    )
    return out_bhqd.transpose(1, 2).flatten(2)

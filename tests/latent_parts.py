"""A layer of small latent attention."""

from __future__ import annotations

from typing import Any

import torch

from longtake.models.latent import LatentAttention
from tiny_parts import GRID, LATENT

HEADS, WIDTH, HEAD = 2, 24, 12
TOKENS = GRID[0] * GRID[1]


def attention(seed: int = 0, **changes: Any) -> LatentAttention:
    torch.manual_seed(seed)
    config = LATENT.replace(kv_rank=8, **changes)
    made = LatentAttention(WIDTH, HEADS, 1e-6, config, 8)
    for name, parameter in made.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm_kv.weight") else 0.0, std=0.4)
    return made

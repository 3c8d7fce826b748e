"""Low-rank updates of a DiT's blocks (LoRA, arXiv 2106.09685): a large model is tuned with a small one's
gradients and optimiser state, as in Echo-Infinity's second stage and LongLive.

Beside every frozen matrix of the blocks two small ones learn; when a stage ends they are added into it, so
that what leaves training is an ordinary model. A memory learns whole; all else is frozen.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.train.networks import TextToLatents

_USED_AS_MATRICES = ("k_up", "v_up")
"""Of latent attention, which multiplies with their weights itself."""


class LoRAConfig(Config):
    """How low-rank updates are sized and scaled.

    Args:
        rank: of the update of every matrix; Echo-Infinity takes 256 for Wan2.1-1.3B's width of 1536.
        scale: the update counts so many times; what other code calls alpha / rank.
    """

    rank: int = Field(256, ge=1)
    scale: float = Field(1.0, gt=0)


class LowRankLinear(nn.Linear):
    """A linear layer whose own weights are frozen, with a low-rank update beside them.

    Args:
        linear: the layer whose weights are taken over.
        config: rank and scale.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.requires_grad_(False)
        self.lora_down = nn.Parameter(linear.weight.new_empty(config.rank, self.in_features))
        self.lora_up = nn.Parameter(linear.weight.new_zeros(self.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_down, a=math.sqrt(5))
        self.scale = config.scale

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]``; equal to the layer's before the first update, as `lora_up` begins with zeros."""
        update = F.linear(F.linear(input, self.lora_down), self.lora_up)
        return super().forward(input) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """An ordinary layer with the update in its weights."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        update = self.lora_up.float() @ self.lora_down.float()
        self.weight.add_((self.scale * update).type_as(self.weight))
        linear.weight, linear.bias = self.weight, self.bias
        return linear.requires_grad_(True)


def add_lora(networks: TextToLatents, config: LoRAConfig) -> None:
    """Freezes networks but for a memory, and puts low-rank updates beside the matrices of the DiT's blocks.

    Latent attention's expansions to keys and values stay frozen, as it uses their matrices themselves.

    Raises:
        ConfigError: a rank that saves nothing, being no less than a matrix's own.
    """
    dit = networks.dit
    if config.rank >= dit.config.width:
        raise ConfigError(
            f"lora.rank={config.rank} is no less than the DiT's width of {dit.config.width}",
            "use a smaller rank, or no lora",
        )
    networks.requires_grad_(False)
    for parent in list(dit.blocks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name not in _USED_AS_MATRICES:
                setattr(parent, name, LowRankLinear(layer, config))
    if dit.memory is not None:
        dit.memory.requires_grad_(True)


def merge_lora(networks: nn.Module) -> None:
    """Puts what was learned beside matrices into them; networks without such updates stay as they are."""
    found = False
    for parent in list(networks.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LowRankLinear):
                setattr(parent, name, layer.merged())
                found = True
    if found:
        networks.requires_grad_(True)

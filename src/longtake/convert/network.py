"""A whole network's conversion to latent attention, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from longtake.convert.dense import DenseLayer
from longtake.convert.factor import Samples, Tokens
from longtake.convert.layer import Converted, Method, convert_layer, gains_of
from longtake.errors import ConfigError
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig


@dataclass(frozen=True)
class Plan:
    """What a conversion makes.

    Args:
        dense: the network's configuration. ``latent``: of its new attention.
        method: "svd" factorises the weights, "covariance" what they make of tokens as they come; "random"
            draws what it would factorise.
        seed: of "random".
    """

    dense: DiTConfig
    latent: LatentConfig
    method: Method
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dense.latent is not None:
            raise ConfigError("the model's attention is latent already", "give a dense model")
        wide = max(self.latent.ranks(self.dense.num_layers))
        targets = self.dense.num_heads * (self.latent.nope_dim + self.dense.head_dim)
        if wide > min(self.dense.width, targets):
            raise ConfigError(
                f"kv_rank={wide} exceeds a width of {self.dense.width}",
                f"use {min(self.dense.width, targets)} or less",
            )
        if self.latent.query_rank is not None and self.latent.query_rank > self.dense.width:
            raise ConfigError(
                f"query_rank={self.latent.query_rank} exceeds a width of {self.dense.width}",
                "use less, or null for queries straight from tokens",
            )
        most, heads = max(self.latent.keys_of_pairs(self.dense.head_dim)), self.dense.num_heads
        if most > heads:
            raise ConfigError(
                f"rope_bands={self.latent.rope_bands} name a band {most} times for {heads} heads",
                "name it as often as there are heads at the most, when each has its own",
            )
        _ = self.config  # refused where they do not fit

    @property
    def config(self) -> DiTConfig:
        """Of the network that comes out."""
        return self.dense.replace(latent=self.latent)


def convert_layers(
    plan: Plan, weights: Mapping[str, Tensor], samples: Sequence[Samples] | None
) -> Iterator[tuple[int, Converted]]:
    """Every layer with its conversion, one at a time.

    Args:
        plan: what to make.
        weights: of the dense network, under our names; only self-attention is read, when its turn comes.
        samples: of every layer tokens that enter it; None for methods that can do without.

    Raises:
        ConfigError: no samples for a method that needs them.
    """
    if samples is None and plan.method == "covariance":
        raise ConfigError('method "covariance" needs tokens to be fitted to', 'use "svd", or calibrate')
    dense = plan.dense
    for layer, rank in enumerate(plan.latent.ranks(dense.num_layers)):
        attention = DenseLayer.of(weights, layer, dense.num_heads, dense.eps)
        tokens = _tokens(plan, None if samples is None else samples[layer])
        made = convert_layer(attention, plan.latent, rank, tokens, plan.method, plan.seed + layer)
        yield layer, made


def layer_gains(
    plan: Plan, weights: Mapping[str, Tensor], samples: Sequence[Samples] | None
) -> list[tuple[float, ...]]:
    """Of every layer what `ranks` chooses by; arguments as of `convert_layers`."""
    dense = plan.dense
    return [
        gains_of(
            DenseLayer.of(weights, layer, dense.num_heads, dense.eps),
            plan.latent,
            _tokens(plan, None if samples is None else samples[layer]),
        )
        for layer in range(dense.num_layers)
    ]


def _tokens(plan: Plan, samples: Samples | None) -> Tokens:
    """What a method is told of the tokens: "svd" takes their size alone, for the weights to keep theirs."""
    if samples is None:
        return Tokens.white(plan.dense.width)
    return Tokens.isotropic(samples) if plan.method == "svd" else Tokens.sampled(samples)


def is_replaced(name: str) -> bool:
    """Whether a weight is one of those that conversion makes anew."""
    return ".self_attn." in name

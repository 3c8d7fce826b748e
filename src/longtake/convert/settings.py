"""What to make of a dense model: how it is fitted, and which ranks its layers get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.cache.latent import latent_layout
from longtake.cache.quantized import KeyStorage, Storage
from longtake.config import Config
from longtake.convert.factor import Samples
from longtake.convert.layer import Method
from longtake.convert.layer_weights import LayerWeights
from longtake.convert.network import Plan, layer_gains
from longtake.convert.ranks import check_budget, ranks_for_budget, ranks_for_loss
from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import AttentionPath, Bands, HeadsMix, LatentConfig


class ConvertConfig(Config):
    """What to make of a dense model.

    Args:
        method: see `network.Plan`.
        kv_rank: of the latent, for all layers or one each; None is an eighth of the width, as in VideoMLA.
        budget_bytes: that a token may leave in all layers' caches, stored as `storage` and `key_storage`
            say, in bf16 where they are full: ranks that make the best of it.
        weigh: what "best" is: "flow" counts every layer's loss by what it costs the network's flow, which is
            measured (see `layer_weights`), "alike" counts all layers alike. Without tokens, alike.
        max_loss: share of keys and values, as errors matter, that no layer may lose: the least such ranks.
        rank_multiple: chosen ranks are multiples of this. ``one_rank``: and the same for all layers.
        query_rank: of the queries' latent; None makes queries from tokens directly.
        nope_dim: channels without positions; None keeps as many channels a head as there were.
        rope_bands: see `LatentConfig`; None is the share of each axis's highest bands that VideoMLA keeps.
        rope_keys: that heads share of each of these bands; 1 in VideoMLA. "auto" chooses them with the ranks
            for a budget, by what either costs the flow (see `shared_keys`).
        heads_mix: see `LatentConfig`; None is "keys" where a band has several, else "queries".
        path, storage, key_storage, debias: see `LatentConfig`.
        num_tokens: of every layer; three quarters of the streams' are fitted to, the others' are what errors
            are measured with. 0 for none.
        num_chunks: of every stream that is generated for them.
        seed: of their noise, and of method "random".
    """

    method: Method = "covariance"
    kv_rank: int | tuple[int, ...] | None = None
    budget_bytes: int | None = Field(default=None, ge=1)
    weigh: Literal["flow", "alike"] = "flow"
    max_loss: float | None = Field(default=None, gt=0, lt=1)
    rank_multiple: int = Field(default=1, ge=1)
    one_rank: bool = False
    query_rank: int | None = Field(default=None, ge=1)
    nope_dim: int | None = Field(default=None, ge=1)
    rope_bands: tuple[Bands, Bands, Bands] | None = None
    rope_keys: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    heads_mix: HeadsMix | None = None
    path: AttentionPath = "auto"
    storage: Storage = "full"
    key_storage: KeyStorage = "full"
    debias: bool = False
    num_tokens: int = Field(default=24576, ge=0)
    num_chunks: int = Field(default=6, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_tokens(self) -> ConvertConfig:
        if self.method == "covariance" and self.num_tokens == 0:
            raise ConfigError(
                'method="covariance" with num_tokens=0 has nothing to be fitted to',
                'use "svd", or more tokens',
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_ranks(self) -> ConvertConfig:
        given = {
            name: value
            for name in ("kv_rank", "budget_bytes", "max_loss")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise ConfigError(f"{given} all decide on ranks", "give one of them")
        if not self.chooses and (self.rank_multiple != 1 or self.one_rank):
            name = "one_rank" if self.one_rank else "rank_multiple"
            raise ConfigError(
                f"{name} is for ranks that are chosen", "give budget_bytes or max_loss, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _can_choose_keys(self) -> ConvertConfig:
        if self.rope_keys == "auto" and not self.weighs:
            raise ConfigError(
                'rope_keys="auto" is chosen for a budget, by what the flow suffers',
                'give budget_bytes with weigh="flow" and ranks for each layer, or a number of keys',
            )
        return self

    @property
    def chooses(self) -> bool:
        """Whether ranks are to be chosen."""
        return self.budget_bytes is not None or self.max_loss is not None

    @property
    def weighs(self) -> bool:
        """Whether ranks are chosen by what layers' losses cost the flow."""
        asked = self.budget_bytes is not None and not self.one_rank
        return asked and self.weigh == "flow" and self.num_tokens > 0

    def check_budget(self, plan: Plan) -> None:
        """Raises ConfigError for a budget that no ranks fit, before anything is measured."""
        if self.budget_bytes is not None:
            layers, bytes_of = plan.dense.num_layers, partial(self._bytes_of, plan)
            check_budget(self.budget_bytes, layers, bytes_of, self.rank_multiple)

    def _bytes_of(self, plan: Plan, rank: int) -> int:
        """What a layer of a rank takes of a budget."""
        rope = plan.latent.rope(plan.dense.head_dim)
        return latent_layout((rank,), rope, self.storage, self.key_storage).bytes_per_token(torch.bfloat16)

    def chosen(
        self,
        plan: Plan,
        state: Mapping[str, Tensor],
        samples: list[Samples] | None,
        weights: LayerWeights | None = None,
    ) -> Plan:
        """The plan with ranks chosen, where they are to be."""
        if not self.chooses:
            return plan
        gains = layer_gains(plan, state, samples) if weights is None else weights.gains
        multiple = self.rank_multiple
        if self.max_loss is not None:
            ranks = ranks_for_loss(gains, self.max_loss, multiple, one_rank=self.one_rank)
        else:
            assert self.budget_bytes is not None
            ranks = ranks_for_budget(
                gains,
                self.budget_bytes,
                partial(self._bytes_of, plan),
                multiple,
                one_rank=self.one_rank,
                weights=None if weights is None else weights.weights,
            )
        return replace(plan, latent=plan.latent.replace(kv_rank=ranks))

    def latent(self, dense: DiTConfig) -> LatentConfig:
        """Of the attention that replaces a network's own; ranks that are to be chosen have their default."""
        bands: tuple[Bands, Bands, Bands] = (
            LatentConfig.proportional_bands(dense.head_dim) if self.rope_bands is None else self.rope_bands
        )
        if self.rope_keys != "auto" and self.rope_keys > 1:
            time, row, column = (_several(axis, self.rope_keys) for axis in bands)
            bands = (time, row, column)
        made = LatentConfig(
            kv_rank=max(1, dense.width // 8) if self.kv_rank is None else self.kv_rank,
            query_rank=self.query_rank,
            nope_dim=1 if self.nope_dim is None else self.nope_dim,
            rope_bands=bands,
            path=self.path,
            storage=self.storage,
            key_storage=self.key_storage,
            debias=self.debias,
        )
        made.selected(dense.head_dim)  # refuses bands that a head does not have
        several = max(made.keys_of_pairs(dense.head_dim)) > 1
        made = made.replace(heads_mix=self.heads_mix or ("keys" if several else "queries"))
        if self.nope_dim is not None:
            return made
        still = made.still_dim(dense.head_dim)
        if still == 0:
            raise ConfigError(
                f"rope_bands={made.rope_bands} take all {dense.head_dim} channels of a head",
                "use fewer bands, or give nope_dim",
            )
        return made.replace(nope_dim=still)


def _several(bands: Bands, count: int) -> tuple[int, ...]:
    """Each band so many times."""
    named = range(bands) if isinstance(bands, int) else bands
    return tuple(band for band in named for _ in range(count))


@dataclass(frozen=True)
class Calibration:
    """How a bare DiT generates the tokens that conversion is fitted to.

    Args:
        embeddings_nlw: of prompts. ``latent_size``: height and width of the latents.
        history, schedule: of its streams.
    """

    embeddings_nlw: Tensor
    latent_size: tuple[int, int]
    history: HistoryConfig
    schedule: Schedule

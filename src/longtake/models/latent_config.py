"""Settings of latent self-attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from longtake.cache.quantized import KeyStorage, Storage
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.ops.rope import RopeSpec, wan_rope

Bands = int | tuple[int, ...]
"""Of an axis of positions: so many of its highest frequencies, or which of them (0 is the highest); one that
is named several times has as many shared keys."""

AttentionPath = Literal["auto", "expand", "absorbed", "kept"]

HeadsMix = Literal["queries", "keys"]


class LatentConfig(Config):
    """Sizes of latent attention; the defaults are VideoMLA's for Wan2.1-T2V-1.3B.

    Args:
        kv_rank: size of the shared latent (the paper's d_c), one for all layers or one each.
        query_rank: size of the queries' own latent (d_q); None makes queries from tokens directly.
        nope_dim: channels of a head's queries and keys that do not turn with position (d_nope).
        rope_bands: of a head's original frequencies in time, rows and columns those that the shared key
            turns with; its size (d_rope) is twice their number. VideoMLA's heads share one key of each band.
            That is little where heads attend differently: named several times, a band has several, of which
            each head has a mixture of its own.
        heads_mix: where. "queries": a head's query has channels for every shared key of a band, so that each
            more makes attention wider; one key, as VideoMLA has, needs nothing else. "keys": the head's own
            key is made of them when keys are expanded, and attention is as wide as with one, however many
            there are.
        path: how attention is computed. "expand" makes one layer's keys and values, "absorbed" none; "auto"
            takes what costs fewer FLOPs. "kept" expands what a chunk reads of the past once for all its
            passes: the least time where all layers' keys and values may stay until the chunk is done (not
            where gradients are recorded, nor between chunks).
        storage: of latents in a cache: as they are, as 8-bit floats, or in 4 bits with a scale for each 32
            (`cache.quantized`). A chunk's own latents, while it is made, are as they are.
        key_storage: of shared keys in a cache: as they are, or as 8-bit floats.
        debias: with int4, take from scores what rounding adds to attention on average: the exponential of a
            score with an error is larger than without, by half the error's variance (arXiv 2605.26266).
    """

    kv_rank: int | tuple[int, ...] = 192
    query_rank: int | None = Field(default=768, ge=1)
    nope_dim: int = Field(default=96, ge=1)
    rope_bands: tuple[Bands, Bands, Bands] = (6, 5, 5)
    heads_mix: HeadsMix = "queries"
    path: AttentionPath = "auto"
    storage: Storage = "full"
    key_storage: KeyStorage = "full"
    debias: bool = False

    @model_validator(mode="after")
    def _fits(self) -> LatentConfig:
        ranks = (self.kv_rank,) if isinstance(self.kv_rank, int) else self.kv_rank
        if not ranks or min(ranks) < 1:
            raise ConfigError(f"kv_rank={self.kv_rank} holds a rank below 1", "use 1 or more")
        for bands in self.rope_bands:
            if (bands < 0) if isinstance(bands, int) else (list(bands) != sorted(bands)):
                raise ConfigError(
                    f"rope_bands={self.rope_bands} are no numbers of bands, nor ascending bands",
                    "use for instance [6, 5, 5], [[0, 2, 3], [0, 1], [0, 1]] or [[0, 0, 1], [0, 0], [0]]",
                )
        if self.debias and self.storage != "int4":
            raise ConfigError(
                f'debias=True with storage="{self.storage}": only int4 has errors of known size',
                'set debias=False, or storage="int4"',
            )
        if self.rope_dim == 0:
            raise ConfigError(f"rope_bands={self.rope_bands} leave no position", "use one band at least")
        return self

    @classmethod
    def proportional(cls, width: int, head_dim: int) -> LatentConfig:
        """VideoMLA's proportions for another network: a latent of an eighth of its width, the highest quarter
        of its bands, as many channels a head as before; queries straight from tokens.
        """
        bands = cls.proportional_bands(head_dim)
        made = cls(kv_rank=width // 8, query_rank=None, nope_dim=1, rope_bands=bands)
        return made.replace(nope_dim=made.still_dim(head_dim))

    @staticmethod
    def proportional_bands(head_dim: int) -> tuple[int, int, int]:
        """The highest quarter of a head's bands in time, rows and columns, one of each at least."""
        time, row, column = (max(1, round(0.26 * len(axis))) for axis in wan_rope(head_dim).frequencies)
        return time, row, column

    @property
    def rope_dim(self) -> int:
        """Channels of the shared rotary key (d_rope)."""
        return 2 * sum(bands if isinstance(bands, int) else len(bands) for bands in self.rope_bands)

    def ranks(self, num_layers: int) -> tuple[int, ...]:
        """Every layer's kv_rank.

        Raises:
            ConfigError: ranks for another number of layers.
        """
        if isinstance(self.kv_rank, int):
            return (self.kv_rank,) * num_layers
        if len(self.kv_rank) != num_layers:
            raise ConfigError(
                f"kv_rank={self.kv_rank} holds {len(self.kv_rank)} ranks for {num_layers} layers",
                "give one rank for all layers, or one each",
            )
        return self.kv_rank

    def selected(self, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of each axis of a head's original frequencies the indices of those that are kept.

        Raises:
            ConfigError: bands that a head of this size does not have.
        """
        chosen = []
        for axis, bands in zip(wan_rope(head_dim).frequencies, self.rope_bands, strict=True):
            wanted = tuple(range(bands)) if isinstance(bands, int) else bands
            if any(not 0 <= band < len(axis) for band in wanted):
                counts = tuple(len(frequencies) for frequencies in wan_rope(head_dim).frequencies)
                raise ConfigError(
                    f"rope_bands={self.rope_bands}, but a head of {head_dim} channels has {counts} bands",
                    "use bands that it has",
                )
            chosen.append(wanted)
        time, row, column = chosen
        return time, row, column

    def rope(self, head_dim: int) -> RopeSpec:
        """Of the shared key: the selected frequencies of a head of this size."""
        time, row, column = (
            tuple(axis[band] for band in bands)
            for axis, bands in zip(wan_rope(head_dim).frequencies, self.selected(head_dim), strict=True)
        )
        return RopeSpec((time, row, column))

    def dense_rope(self, head_dim: int) -> RopeSpec:
        """Of per-head keys that are read beside latents: only the selected frequencies turn."""
        time, row, column = (
            tuple(frequency if band in bands else 0.0 for band, frequency in enumerate(axis))
            for axis, bands in zip(wan_rope(head_dim).frequencies, self.selected(head_dim), strict=True)
        )
        return RopeSpec((time, row, column))

    def channels(self, head_dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels of an original head that do not turn with position here, and for each of the shared keys'
        channels the one that it stands for.
        """
        first, turning = 0, []
        for axis, bands in zip(wan_rope(head_dim).frequencies, self.selected(head_dim), strict=True):
            turning += [2 * (first + band) + side for band in bands for side in (0, 1)]
            first += len(axis)
        return tuple(sorted(set(range(head_dim)) - set(turning))), tuple(turning)

    def keys_of_pairs(self, head_dim: int) -> tuple[int, ...]:
        """Of every pair of channels of an original head that turns here how many shared keys stand for it."""
        _, turning = self.channels(head_dim)
        first = turning[::2]
        return tuple(first.count(channel) for channel in dict.fromkeys(first))

    def head_rope_dim(self, head_dim: int) -> int:
        """Channels of a head's queries that turn with position."""
        return self.rope_dim if self.heads_mix == "queries" else 2 * len(self.keys_of_pairs(head_dim))

    def head_query_dim(self, head_dim: int) -> int:
        """Channels of a head's queries."""
        return self.nope_dim + self.head_rope_dim(head_dim)

    def still_dim(self, head_dim: int) -> int:
        """Channels of an original head that do not turn with position here."""
        return head_dim - 2 * len(self.keys_of_pairs(head_dim))

    def splits(self, head_dim: int) -> bool:
        """Whether a latent head's keys stand for all channels of an original head, each in its role."""
        return self.nope_dim == self.still_dim(head_dim)

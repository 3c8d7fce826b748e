"""One layer's conversion: dense self-attention to latent attention.

Keys lose their positions but for the selected channels, which all heads then share; what remains of keys, and
values, is factorised together; queries turn and stretch with what became of the keys, unless heads make their
own keys of the shared ones again.

Legend: n samples, w width, h heads, d head dim, p pairs of channels that turn with position, c latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.convert.dense import DenseLayer, Linear
from longtake.convert.factor import Factors, LowRank, Target, Tokens, effective_ranks, root_of
from longtake.convert.ranks import lost
from longtake.models.latent import LEAST_TURN, LatentAttention
from longtake.models.latent_config import LatentConfig

Method = Literal["svd", "covariance", "random"]


@dataclass(frozen=True)
class LayerSpectrum:
    """What a rank can hold of a layer's stacked matrices of keys and values.

    Args:
        energies: squared singular values, largest first, as shares of their sum.
        ranks: how many of them hold 90, 95 and 99 %.
    """

    energies: tuple[float, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, matrix: Tensor) -> LayerSpectrum:
        """Of a matrix of targets by tokens."""
        values = torch.linalg.svdvals(matrix.double())
        energy = values.square()
        return cls(tuple((energy / energy.sum()).tolist()), effective_ranks(values))


@dataclass(frozen=True)
class Converted:
    """A layer after conversion.

    Args:
        weights: of a `LatentAttention`.
        dense, latent: spectra of the dense matrices, keys with their norm's gain, and of the product that
            makes values and the keys without positions.
        predicted_loss: of keys and values, as errors matter, at the rank (see `ranks.lost`); None for
            "random".
        kv_error, q_error, rope_error: shares lost by keys and values (as errors matter), by queries, and by
            keys with positions, which all heads share, over tokens to judge by; None without.
    """

    weights: dict[str, Tensor]
    dense: LayerSpectrum
    latent: LayerSpectrum
    predicted_loss: float | None
    kv_error: float | None
    q_error: float | None
    rope_error: float | None


def convert_layer(
    dense: DenseLayer, config: LatentConfig, kv_rank: int, tokens: Tokens, method: Method, seed: int = 0
) -> Converted:
    """Factorise one layer.

    Args:
        dense: its weights.
        config: of all layers. ``kv_rank``: of this one.
        tokens: what enters it.
        method: "random" draws the latent of keys and values and what is made of it, and keeps the rest; the
            others differ in the tokens that they are given.
        seed: of "random".
    """
    parts = _Parts(dense, config, tokens)
    weights: dict[str, Tensor] = {}

    def put(name: str, linear: Linear) -> None:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = linear.weight, linear.bias

    put("o", dense.o)
    put("k_rope", parts.shared_key)
    weights["turns"] = torch.view_as_real(parts.turns_hp)
    queries: Callable[[Tensor], Tensor] = parts.query.linear
    query_up = parts.query.linear
    if config.query_rank is not None:
        factors = LowRank(parts.query, tokens).factors(config.query_rank, dense.eps)
        put("q_down", factors.down)
        weights["norm_q.weight"] = factors.gain_r
        queries, query_up = partial(factors, eps=dense.eps), factors.up
    split = dense.num_heads * config.nope_dim
    put("q_nope", Linear(query_up.weight[:split], query_up.bias[:split]))
    put("q_rope", Linear(query_up.weight[split:], query_up.bias[split:]))
    predicted = None
    if method == "random":
        made = _drawn(dense, config, kv_rank, seed)
    else:
        best = LowRank(parts.content, tokens)
        predicted, made = lost(best.gains(), kv_rank), best.factors(kv_rank, dense.eps)
    put("kv_down", made.down)
    put("k_up", Linear(made.up.weight[:split], made.up.bias[:split]))
    put("v_up", Linear(made.up.weight[split:], made.up.bias[split:]))
    weights["norm_kv.weight"] = made.gain_r
    judged = tokens.judged_nw
    return Converted(
        {name: tensor.float() for name, tensor in weights.items()},
        LayerSpectrum.of(torch.cat([_with_gain(dense.k, dense.k_gain).weight, dense.v.weight])),
        LayerSpectrum.of((made.up.weight * made.gain_r) @ made.down.weight),
        predicted,
        None if judged is None else parts.content.error(made(judged, dense.eps), judged, tokens),
        None if judged is None else parts.query.error(queries(judged), judged, tokens),
        None if judged is None else parts.rope_error(judged),
    )


def gains_of(dense: DenseLayer, config: LatentConfig, tokens: Tokens) -> tuple[float, ...]:
    """What each number of a layer's latent gains (see `factor.LowRank.gains`)."""
    return LowRank(_Parts(dense, config, tokens).content, tokens).gains()


def _drawn(dense: DenseLayer, config: LatentConfig, kv_rank: int, seed: int) -> Factors:
    """Factors of keys and values that know nothing of the layer."""
    made = LatentAttention(dense.width, dense.num_heads, dense.eps, config, kv_rank)
    generator = torch.Generator().manual_seed(seed)
    weights = []
    for name in ("kv_down", "k_up", "v_up"):
        linear = getattr(made, name)
        assert isinstance(linear, nn.Linear)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        weights.append(linear.weight.detach().double())
    down, up = weights[0], torch.cat(weights[1:])
    return Factors(
        Linear(down, torch.zeros(len(down)).double()),
        torch.ones(kv_rank).double(),
        Linear(up, torch.zeros(len(up)).double()),
    )


class _Parts:
    """What the latent layer is to compute, as linear maps of the tokens, and how much errors matter."""

    def __init__(self, dense: DenseLayer, config: LatentConfig, tokens: Tokens) -> None:
        self._dense = dense
        heads, dim = dense.num_heads, dense.head_dim
        still, turning = config.channels(dim)
        self._keys_of_pairs = list(config.keys_of_pairs(dim))
        # Fewer channels without positions than an original head has left: the last are dropped.
        self.still, self.turning = still[: config.nope_dim], turning
        self._keys_mix = config.heads_mix == "keys"
        self.missing = config.nope_dim - len(self.still)
        # Scores are scaled by the channels of a head, of which there may be more or fewer now.
        self._sharpness = (config.head_query_dim(dim) / dim) ** 0.5
        samples = tokens.samples_nw
        self._key_nhd: Tensor | None = None
        values = _as_heads(dense.v, heads)
        if samples is None:
            queries = _as_heads(_normed_at_typical_size(dense.q, dense.q_gain, tokens), heads)
            keys = _as_heads(_normed_at_typical_size(dense.k, dense.k_gain, tokens), heads)
            self._query_moment_hdd = torch.stack([tokens.moment(head) for head in queries])
            spreads = [head.weight @ tokens.root_ww for head in values]
            value_moment_hdd = torch.stack([spread @ spread.T for spread in spreads])
        else:
            query_nhd, value_nhd = dense.queries(samples), dense.values(samples)
            self._query_moment_hdd = _sample_moment(query_nhd)
            value_moment_hdd = _sample_moment(value_nhd - value_nhd.mean(0))
            queries = _as_heads(tokens.fit(query_nhd.flatten(1)), heads)
            key_nhd = self._key_nhd = dense.keys(samples)
            keys = _as_heads(tokens.fit(key_nhd.flatten(1)), heads)
        self.turns_hp = self._share_keys(keys, tokens)
        self._key_nhd = None
        self._query, self._content = self._latent_queries(queries), _joined(self._nope(keys), values)
        self._content_metric = self._metric(value_moment_hdd)

    # Not kept: targets that hold a method of what holds them would outlive it, at half a gigabyte a layer.

    @property
    def query(self) -> Target:
        """Queries, as they meet the keys that heads share or make of these."""
        return Target(self._query, self._exact_queries, torch.eye(len(self._query.bias)).double())

    @property
    def content(self) -> Target:
        """Keys without positions, and values."""
        return Target(self._content, self._exact_content, self._content_metric)

    def _exact_content(self, x_nw: Tensor) -> Tensor:
        """Keys without positions of all heads, then values."""
        keys = self._nope_samples(self._dense.keys(x_nw))
        return torch.cat([keys.flatten(1), self._dense.values(x_nw).flatten(1)], dim=1)

    def _exact_queries(self, x_nw: Tensor) -> Tensor:
        """Queries without positions of all heads, then those with, as they meet the shared key."""
        query_nhd = self._dense.queries(x_nw)
        asked, turns_hp = self._query_turns()
        pairs_nhp2 = torch.unflatten(query_nhd[..., asked], -1, (-1, 2))
        turned = torch.view_as_complex(pairs_nhp2.contiguous()) * turns_hp
        still = self._nope_samples(query_nhd)
        joined = torch.cat([still.flatten(1), torch.view_as_real(turned).flatten(1)], dim=1)
        queries: Tensor = self._sharpness * joined
        return queries

    def _query_turns(self) -> tuple[list[int], Tensor]:
        """Which channels of an original head's queries turn with position, and what each pair of them is
        times, complex ``[h, p]``.
        """
        if self._keys_mix:
            asked = list(dict.fromkeys(self.turning))
            return asked, self.turns_hp.new_ones(len(self.turns_hp), len(asked) // 2)
        return list(self.turning), self.turns_hp.conj()

    def _nope(self, maps: list[Linear]) -> list[Linear]:
        """Of every head the channels that do not turn, zeros where there are more than it had."""
        chosen = list(self.still)
        return [
            Linear(
                torch.nn.functional.pad(head.weight[chosen], (0, 0, 0, self.missing)),
                torch.nn.functional.pad(head.bias[chosen], (0, self.missing)),
            )
            for head in maps
        ]

    def _nope_samples(self, x_nhd: Tensor) -> Tensor:
        return torch.nn.functional.pad(x_nhd[..., list(self.still)], (0, self.missing))

    def _share_keys(self, keys: list[Linear], tokens: Tokens) -> Tensor:
        """Sets the key that stands for those of all heads; returns what each head's pairs are of it, complex
        ``[h, p]``: ``key of head h = turn * shared key``, as nearly as one key can, or the sum of this over
        the shared keys of a pair, as nearly as so many can.
        """
        pairs = torch.tensor(list(dict.fromkeys(self.turning))).view(-1, 2)
        maps_hpw = torch.stack([_pair_maps(head.weight, pairs) for head in keys])
        bias_hp = torch.stack([_pair_maps(head.bias[:, None], pairs)[:, 0] for head in keys])
        asked_hp = torch.stack([moment.diagonal()[pairs].sum(-1) for moment in self._query_moment_hdd]).sqrt()
        turns, shared_pw, shared_p = [], [], []
        for pair in range(len(pairs)):
            weight_h = asked_hp[:, pair].clamp_min(1e-12)
            real, imaginary = pairs[pair].tolist()
            moment_hh = self._pair_moment(maps_hpw[:, pair], bias_hp[:, pair], (real, imaginary), tokens)
            _, vectors = torch.linalg.eigh(weight_h[:, None] * moment_hh * weight_h[None])
            for rank, vector_h in enumerate(vectors.flip(1).unbind(1)[: self._keys_of_pairs[pair]]):
                together = vector_h.sum()
                vector_h = vector_h / (together.sgn() if together.abs() > 1e-9 else 1)  # turned little
                stretch = (vector_h / weight_h).abs().square().mean().sqrt()
                turn_h = vector_h / weight_h / stretch
                if rank == 0:
                    # Nothing at all could not be turned back, for keys read as they are (a memory's).
                    little = turn_h.abs() < LEAST_TURN
                    turn_h = torch.where(little, LEAST_TURN * (turn_h + 1e-30).sgn(), turn_h)
                turns.append(turn_h)
                combine_h = vector_h.conj() * weight_h * stretch
                shared_pw.append(combine_h @ maps_hpw[:, pair])
                shared_p.append(combine_h @ bias_hp[:, pair])
        self.shared_key = Linear(
            torch.view_as_real(torch.stack(shared_pw)).movedim(-1, 1).flatten(0, 1),
            torch.view_as_real(torch.stack(shared_p)).flatten(),
        )
        return torch.stack(turns, dim=1)

    def _pair_moment(self, maps_hw: Tensor, bias_h: Tensor, pair: tuple[int, int], tokens: Tokens) -> Tensor:
        """Second moment between heads of one pair's keys, complex ``[h, h]``."""
        if self._key_nhd is not None:
            key_nh = torch.complex(self._key_nhd[..., pair[0]], self._key_nhd[..., pair[1]])
            return key_nh.T @ key_nh.conj() / len(key_nh)
        spread = maps_hw @ tokens.root_ww.type_as(maps_hw)
        mean_h = maps_hw @ tokens.mean_w.type_as(maps_hw) + bias_h
        return spread @ spread.conj().T + mean_h[:, None] * mean_h.conj()[None]

    def _latent_queries(self, queries: list[Linear]) -> Linear:
        """The linear map that comes closest to `_exact_queries`, from those of queries."""
        asked, turns_hp = self._query_turns()
        pairs = torch.tensor(asked).view(-1, 2)
        turned = []
        for head, turn_p in zip(queries, turns_hp, strict=True):
            weight = turn_p[:, None] * _pair_maps(head.weight, pairs)
            bias = turn_p * _pair_maps(head.bias[:, None], pairs)[:, 0]
            turned.append(
                Linear(
                    torch.view_as_real(weight).movedim(-1, 1).flatten(0, 1),
                    torch.view_as_real(bias).flatten(),
                )
            )
        joined = _joined(self._nope(queries), turned)
        return Linear(self._sharpness * joined.weight, self._sharpness * joined.bias)

    def _metric(self, value_moment_hdd: Tensor) -> Tensor:
        """How much errors of keys and values matter, as a block-diagonal square root.

        An error of a key changes scores by its product with queries, and the output by that times how much
        values differ, as the output product sees them; an error of a value passes the output product.
        """
        dense = self._dense
        scale = dense.head_dim**-0.5
        blocks: list[Tensor] = []
        out_hwd = torch.unflatten(dense.o.weight, 1, (dense.num_heads, -1)).transpose(0, 1)
        chosen = list(self.still)
        for moment, values, out_wd in zip(self._query_moment_hdd, value_moment_hdd, out_hwd, strict=True):
            spread = torch.trace(out_wd @ values @ out_wd.T).clamp_min(0).sqrt()
            root = root_of(moment[chosen][:, chosen]) * scale * spread
            blocks.append(torch.nn.functional.pad(root, (0, self.missing, 0, self.missing)))
        blocks += [root_of(out_wd.T @ out_wd) for out_wd in out_hwd]
        metric: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
        # What no query asks for and no output shows may be anything, but not everything.
        floor = 1e-3 * metric.diagonal().mean()
        if floor == 0:  # no output shows anything, so that all errors are alike
            floor = torch.ones_like(floor)
        return metric.diagonal_scatter(metric.diagonal() + floor)

    def rope_error(self, x_nw: Tensor) -> float:
        """Share of the variance of heads' turning keys that the shared one, turned, does not hold."""
        chosen = list(dict.fromkeys(self.turning))
        pairs = torch.unflatten(self._dense.keys(x_nw)[..., chosen], -1, (-1, 2))
        key_nhp = torch.view_as_complex(pairs.contiguous())
        shared = torch.unflatten(self.shared_key(x_nw), -1, (-1, 2))
        shared_n1p = torch.view_as_complex(shared.contiguous()).unsqueeze(1)
        of_pairs = torch.split(shared_n1p * self.turns_hp, self._keys_of_pairs, dim=-1)
        missed = (key_nhp - torch.stack([own.sum(-1) for own in of_pairs], dim=-1)).abs().square().sum()
        return float(missed / (key_nhp - key_nhp.mean(0)).abs().square().sum().clamp_min(1e-30))


def _as_heads(linear: Linear, heads: int) -> list[Linear]:
    return [
        Linear(weight, bias)
        for weight, bias in zip(linear.weight.chunk(heads), linear.bias.chunk(heads), strict=True)
    ]


def _joined(*groups: list[Linear]) -> Linear:
    maps = [linear for group in groups for linear in group]
    return Linear(torch.cat([item.weight for item in maps]), torch.cat([item.bias for item in maps]))


def _pair_maps(rows: Tensor, pairs: Tensor) -> Tensor:
    """Rows of pairs of channels as complex rows, ``[p, ...]``."""
    return torch.complex(rows[pairs[:, 0]], rows[pairs[:, 1]])


def _with_gain(linear: Linear, gain: Tensor | None) -> Linear:
    if gain is None:
        return linear
    return Linear(linear.weight * gain[:, None], linear.bias * gain)


def _normed_at_typical_size(linear: Linear, gain: Tensor | None, tokens: Tokens) -> Linear:
    """What a norm makes of a linear map of tokens whose result always has its typical size."""
    if gain is None:
        return linear
    factor = gain * torch.rsqrt(tokens.moment(linear).diagonal().mean())
    return Linear(linear.weight * factor[:, None], linear.bias * factor)


def _sample_moment(x_nhd: Tensor) -> Tensor:
    return torch.einsum("nhd,nhe->hde", x_nhd, x_nhd) / len(x_nhd)

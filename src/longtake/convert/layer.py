"""One layer's conversion: dense self-attention to latent attention.

Keys lose their positions but for the selected channels, which all heads then share; what remains of keys, and
values, is factorised together; queries turn and stretch with what became of the keys.

Legend: n samples, w width, h heads, d head dim, p pairs of channels that turn with position, c latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.convert.dense import DenseLayer, Linear
from longtake.convert.factor import Tokens, effective_ranks, factorise, root_of
from longtake.models.latent import LatentAttention
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
        kv_error, q_error, rope_error: shares of the variance lost by keys and values (as errors matter), by
            queries, and by keys with positions, which all heads share, over sampled tokens; None without.
    """

    weights: dict[str, Tensor]
    dense: LayerSpectrum
    latent: LayerSpectrum
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
    q_error = _queries(parts, config, tokens, dense.eps, put, weights)
    factors = factorise(parts.content, tokens, kv_rank, dense.eps, parts.metric, parts.wanted_content)
    down, gain, up = factors.down, factors.gain_r, factors.up
    if method == "random":
        made = LatentAttention(dense.width, dense.num_heads, dense.eps, config, kv_rank)
        generator = torch.Generator().manual_seed(seed)
        for name in ("kv_down", "k_up", "v_up"):
            linear = getattr(made, name)
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
            put(name, Linear(linear.weight.detach().double(), linear.bias.detach().double()))
        gain = torch.ones_like(gain)
        up = Linear(torch.cat([weights["k_up.weight"], weights["v_up.weight"]]), up.bias)
        down = Linear(weights["kv_down.weight"], weights["kv_down.bias"])
    else:
        put("kv_down", down)
        split = dense.num_heads * config.nope_dim
        put("k_up", Linear(up.weight[:split], up.bias[:split]))
        put("v_up", Linear(up.weight[split:], up.bias[split:]))
    weights["norm_kv.weight"] = gain
    return Converted(
        {name: tensor.float() for name, tensor in weights.items()},
        LayerSpectrum.of(torch.cat([_with_gain(dense.k, dense.k_gain).weight, dense.v.weight])),
        LayerSpectrum.of((up.weight * gain) @ down.weight),
        None if method == "random" else factors.error,
        q_error,
        parts.rope_error,
    )


def weighed_energies(dense: DenseLayer, config: LatentConfig, tokens: Tokens) -> tuple[float, ...]:
    """Squared singular values of what a layer's latent has to hold, as errors matter, largest first."""
    parts = _Parts(dense, config, tokens)
    values = torch.linalg.svdvals(parts.metric @ parts.content.weight @ tokens.root_ww)
    return tuple(values.square().tolist())


class _Parts:
    """What the latent layer is to compute, as linear maps of the tokens, and how much errors matter."""

    def __init__(self, dense: DenseLayer, config: LatentConfig, tokens: Tokens) -> None:
        self._dense = dense
        heads, dim = dense.num_heads, dense.head_dim
        still, turning = config.channels(dim)
        # Fewer channels without positions than an original head has left: the last are dropped.
        self.still, self.turning = still[: config.nope_dim], turning
        self.missing = config.nope_dim - len(self.still)
        # Scores are scaled by the channels of a head, of which there may be more or fewer now.
        self._sharpness = ((config.nope_dim + config.rope_dim) / dim) ** 0.5
        samples = tokens.samples_nw
        self._key_nhd: Tensor | None = None
        if samples is None:
            queries = _as_heads(_normed_at_typical_size(dense.q, dense.q_gain, tokens), heads)
            keys = _as_heads(_normed_at_typical_size(dense.k, dense.k_gain, tokens), heads)
            values = _as_heads(dense.v, heads)
            self._query_moment_hdd = torch.stack([tokens.moment(head) for head in queries])
            spreads = [head.weight @ tokens.root_ww for head in values]
            value_moment_hdd = torch.stack([spread @ spread.T for spread in spreads])
        else:
            query_nhd, value_nhd = dense.queries(samples), dense.values(samples)
            key_nhd = self._key_nhd = dense.keys(samples)
            self._query_moment_hdd = _sample_moment(query_nhd)
            value_moment_hdd = _sample_moment(value_nhd - value_nhd.mean(0))
            queries = _as_heads(tokens.fit(query_nhd.flatten(1)), heads)
            keys = _as_heads(tokens.fit(key_nhd.flatten(1)), heads)
            values = _as_heads(dense.v, heads)
        turns_hp = self.turns_hp = self._share_keys(keys, tokens)
        self.query = self._latent_queries(queries, turns_hp)
        self.content = _joined(self._nope(keys), values)
        self.wanted_content = None
        self.wanted_query = None
        if samples is not None:
            nope = self._nope_samples(key_nhd)
            self.wanted_content = torch.cat([nope.flatten(1), value_nhd.flatten(1)], dim=1)
            turned = self._turned(query_nhd[..., list(self.turning)], turns_hp)
            nope = self._nope_samples(query_nhd)
            self.wanted_query = self._sharpness * torch.cat([nope.flatten(1), turned.flatten(1)], dim=1)
        self.metric = self._metric(value_moment_hdd)
        self.rope_error = None if samples is None else self._rope_error(samples)

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
        ``[h, p]``: ``key of head h = turn * shared key``, as nearly as one key can.
        """
        pairs = torch.tensor(self.turning).view(-1, 2)
        maps_hpw = torch.stack([_pair_maps(head.weight, pairs) for head in keys])
        bias_hp = torch.stack([_pair_maps(head.bias[:, None], pairs)[:, 0] for head in keys])
        asked_hp = torch.stack([moment.diagonal()[pairs].sum(-1) for moment in self._query_moment_hdd]).sqrt()
        turns, shared_pw, shared_p = [], [], []
        for pair in range(len(pairs)):
            weight_h = asked_hp[:, pair].clamp_min(1e-12)
            real, imaginary = pairs[pair].tolist()
            moment_hh = self._pair_moment(maps_hpw[:, pair], bias_hp[:, pair], (real, imaginary), tokens)
            _, vectors = torch.linalg.eigh(weight_h[:, None] * moment_hh * weight_h[None])
            together = vectors[:, -1].sum()
            vector_h = vectors[:, -1] / (together.sgn() if together.abs() > 1e-9 else 1)  # turned little
            stretch = (vector_h / weight_h).abs().square().mean().sqrt()
            turns.append(vector_h / weight_h / stretch)
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

    def _latent_queries(self, queries: list[Linear], turns_hp: Tensor) -> Linear:
        """Queries without positions of all heads, then those with, as they meet the shared key."""
        pairs = torch.tensor(self.turning).view(-1, 2)
        turned = []
        for head, turn_p in zip(queries, turns_hp, strict=True):
            weight = turn_p.conj()[:, None] * _pair_maps(head.weight, pairs)
            bias = turn_p.conj() * _pair_maps(head.bias[:, None], pairs)[:, 0]
            turned.append(
                Linear(
                    torch.view_as_real(weight).movedim(-1, 1).flatten(0, 1),
                    torch.view_as_real(bias).flatten(),
                )
            )
        joined = _joined(self._nope(queries), turned)
        return Linear(self._sharpness * joined.weight, self._sharpness * joined.bias)

    @staticmethod
    def _turned(pairs_nhp: Tensor, turns_hp: Tensor) -> Tensor:
        as_complex = torch.view_as_complex(torch.unflatten(pairs_nhp, -1, (-1, 2)).contiguous())
        return torch.view_as_real(as_complex * turns_hp.conj()).flatten(-2)

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

    def _rope_error(self, samples_nw: Tensor) -> float:
        """Share of the variance of heads' turning keys that the shared one, turned, does not hold."""
        assert self._key_nhd is not None
        pairs = torch.unflatten(self._key_nhd[..., list(self.turning)], -1, (-1, 2))
        key_nhp = torch.view_as_complex(pairs.contiguous())
        shared = torch.unflatten(self.shared_key(samples_nw.double()), -1, (-1, 2))
        shared_n1p = torch.view_as_complex(shared.contiguous()).unsqueeze(1)
        lost = (key_nhp - shared_n1p * self.turns_hp).abs().square().sum()
        return float(lost / (key_nhp - key_nhp.mean(0)).abs().square().sum().clamp_min(1e-30))


def _queries(
    parts: _Parts,
    config: LatentConfig,
    tokens: Tokens,
    eps: float,
    put: Callable[[str, Linear], None],
    weights: dict[str, Tensor],
) -> float | None:
    """Sets the products that make queries; returns their error."""
    heads = parts.query.weight.shape[0] // (config.nope_dim + config.rope_dim)
    split = heads * config.nope_dim
    query, error = parts.query, None
    if config.query_rank is not None:
        metric = torch.eye(len(query.bias)).double()
        factors = factorise(query, tokens, config.query_rank, eps, metric, parts.wanted_query)
        put("q_down", factors.down)
        weights["norm_q.weight"] = factors.gain_r
        query, error = factors.up, factors.error
    elif parts.wanted_query is not None and tokens.samples_nw is not None:
        lost = (query(tokens.samples_nw) - parts.wanted_query).square().sum()
        centred = parts.wanted_query - parts.wanted_query.mean(0)
        error = float(lost / centred.square().sum().clamp_min(1e-30))
    put("q_nope", Linear(query.weight[:split], query.bias[:split]))
    put("q_rope", Linear(query.weight[split:], query.bias[split:]))
    return error


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

"""Low-rank factors of what a dense layer computes.

A latent layer makes keys and values of ``c = RMSNorm(D x + d)`` as ``U c + u``. Of all maps of that rank the
one with the least squared error under a metric, over tokens of a given covariance, follows from one singular
value decomposition (reduced-rank regression; with covariances for weights: CARE, arXiv 2603.17946).

Legend: n samples, w width, m targets, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.convert.dense import Linear

_RIDGE = 1e-4
"""Of the mean variance of tokens: what directions that no sample shows count as."""
_BLOCK = 2048
_ANCHORS = (0.0, 1.0, 4.0)


@dataclass(frozen=True)
class Samples:
    """Tokens that entered a layer.

    Args:
        fitted_nw: what may be fitted to. ``held_out_nw``: of other streams, to judge by.
    """

    fitted_nw: Tensor
    held_out_nw: Tensor


@dataclass(frozen=True)
class Tokens:
    """What tokens are like that enter a layer.

    Args:
        mean_w: of tokens. ``root_ww``: a square root of their covariance (root @ root.T).
        samples_nw: some of them; None where nothing but mean and covariance is assumed.
        judged_nw: some that errors are counted over; None where there are none.
    """

    mean_w: Tensor
    root_ww: Tensor
    samples_nw: Tensor | None = None
    judged_nw: Tensor | None = None

    @classmethod
    def white(cls, width: int) -> Tokens:
        """Mean 0, covariance 1: what a layer norm alone would make of anything."""
        return cls(torch.zeros(width).double(), torch.eye(width).double())

    @classmethod
    def isotropic(cls, samples: Samples) -> Tokens:
        """Mean and size as of these, and alike in all directions around the mean."""
        samples_nw = samples.fitted_nw.double()
        mean_w = samples_nw.mean(0)
        scale = (samples_nw - mean_w).square().mean().sqrt()
        return cls(mean_w, scale * torch.eye(len(mean_w)).double(), None, samples.held_out_nw.double())

    @classmethod
    def sampled(cls, samples: Samples) -> Tokens:
        """As these are."""
        samples_nw = samples.fitted_nw.double()
        mean_w = samples_nw.mean(0)
        centred = samples_nw - mean_w
        covariance = centred.T @ centred / len(samples_nw)
        covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(mean_w)).double()
        values, vectors = torch.linalg.eigh(covariance)
        return cls(mean_w, vectors * values.clamp_min(0).sqrt(), samples_nw, samples.held_out_nw.double())

    def moment(self, linear: Linear) -> Tensor:
        """Second moment of what a linear map makes of tokens, ``[m, m]``."""
        spread, mean = linear.weight @ self.root_ww, linear(self.mean_w[None])[0]
        return spread @ spread.T + torch.outer(mean, mean)

    def fit(self, targets_nm: Tensor) -> Linear:
        """The linear map of samples that comes closest to some targets."""
        assert self.samples_nw is not None
        centred = self.samples_nw - self.mean_w
        mean_m = targets_nm.mean(0)
        crossed = (targets_nm - mean_m).T @ centred / len(centred)
        weight = torch.linalg.solve(self.root_ww @ self.root_ww.T, crossed.T).T
        return Linear(weight, mean_m - weight @ self.mean_w)


@dataclass(frozen=True)
class Target:
    """What factors are to compute, and how errors of it count.

    Args:
        linear: the map, or what comes closest to it.
        exact: the same of tokens as it is, norms of queries and keys included.
        metric_mm: an invertible square root of how much errors matter.
    """

    linear: Linear
    exact: Callable[[Tensor], Tensor]
    metric_mm: Tensor

    def error(self, found_nm: Tensor, x_nw: Tensor, tokens: Tokens) -> float:
        """Of what was found for some tokens, as a share of that of their mean."""
        wanted_nm, mean_m = self.exact(x_nw), self.linear(tokens.mean_w[None])[0]
        lost = _weighed(found_nm, wanted_nm, self.metric_mm)
        there = _weighed(mean_m.expand_as(wanted_nm), wanted_nm, self.metric_mm)
        return float(lost / there.clamp_min(1e-30))


@dataclass(frozen=True)
class Factors:
    """A low-rank map through a normed latent.

    Args:
        down: tokens to the latent before its norm. ``gain_r``: of the norm.
        up: normed latent to targets.
    """

    down: Linear
    gain_r: Tensor
    up: Linear

    def latent(self, x_nw: Tensor, eps: float) -> Tensor:
        """``[n, r]``, normed."""
        raw = self.down(x_nw)
        return raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + eps) * self.gain_r

    def __call__(self, x_nw: Tensor, eps: float) -> Tensor:
        """What comes back, ``[n, m]``."""
        return self.up(self.latent(x_nw, eps))


class LowRank:
    """The best approximations of a target, whatever their rank.

    Args:
        target: what to approximate.
        tokens: over which the error is counted.
    """

    def __init__(self, target: Target, tokens: Tokens) -> None:
        self._target, self._tokens = target, tokens
        weighed = target.metric_mm @ target.linear.weight @ tokens.root_ww
        self._left, self._values, _ = torch.linalg.svd(weighed, full_matrices=False)

    def gains(self) -> tuple[float, ...]:
        """Of every rank the share of the error that its last direction takes away, so that a sum of the first
        is what a rank keeps: over tokens to judge by, where there are some. There the sum of all may be less
        than 1, since no linear map does what norms do; and a direction that only the samples know may cost.
        """
        judged_nw, target = self._tokens.judged_nw, self._target
        if judged_nw is None:
            energies = self._values.square()
            return tuple((energies / energies.sum()).tolist())
        mean_m = target.linear(self._tokens.mean_w[None])[0]
        to_directions = target.metric_mm.T @ self._left
        wanted_nm = target.exact(judged_nw) - mean_m
        made = (target.linear(judged_nw) - mean_m) @ to_directions
        gains = (made * (2 * (wanted_nm @ to_directions) - made)).sum(0)
        there = _weighed(torch.zeros(()).double().expand_as(wanted_nm), wanted_nm, target.metric_mm)
        return tuple((gains / there.clamp_min(1e-30)).tolist())

    def factors(self, rank: int, eps: float) -> Factors:
        """The best factors at a rank.

        The norm would take the latent's size out of keys and values. Where there are samples, one channel may
        therefore become a constant, so large that beside it the norm hardly notices how large the others are,
        if that serves the samples better. The map back is then fitted to what is wanted, norm included.

        Args:
            rank: of the latent.
            eps: of its norm.
        """
        samples_nw = self._tokens.samples_nw
        if samples_nw is None:
            return self._anchored(rank, 0.0)
        wanted_nm = self._target.exact(samples_nw)
        found = []
        for anchor in _ANCHORS if rank > 1 else _ANCHORS[:1]:
            factors = _refitted(self._anchored(rank, anchor), samples_nw, wanted_nm, eps)
            lost = _weighed(factors(samples_nw, eps), wanted_nm, self._target.metric_mm)
            found.append((float(lost), factors))
        return min(found, key=lambda each: each[0])[1]

    def _anchored(self, rank: int, anchor: float) -> Factors:
        """Factors whose last channel is a constant of this size beside the others' sum of squares, where it
        is not 0.
        """
        target, mean_w = self._target, self._tokens.mean_w
        known = int((self._values > 1e-9 * self._values[0]).sum())
        kept = min(rank - (anchor > 0), known)
        left, values = self._left[:, :kept], self._values[:kept]
        # Latents of mean 0 and variance 1: rows of left.T @ metric @ weight over their singular values.
        down_weight = torch.zeros(rank, len(mean_w)).double()
        down_weight[:kept] = (left.T @ target.metric_mm @ target.linear.weight) / values[:, None]
        bias = -down_weight @ mean_w
        if anchor > 0:
            bias[-1] = anchor * rank**0.5
        size = ((kept + (anchor**2) * rank) / rank) ** 0.5  # root mean square of such a latent
        gain = torch.full((rank,), size).double()
        if anchor > 0:
            gain[-1] = size / bias[-1]
        up_weight = torch.zeros(len(target.metric_mm), rank).double()
        up_weight[:, :kept] = torch.linalg.solve(target.metric_mm, left * values)
        return Factors(Linear(down_weight, bias), gain, Linear(up_weight, target.linear(mean_w[None])[0]))


def _refitted(factors: Factors, samples_nw: Tensor, wanted_nm: Tensor, eps: float) -> Factors:
    """With the map back that serves the samples best."""
    latent = factors.latent(samples_nw, eps)
    mean_r, mean_m = latent.mean(0), wanted_nm.mean(0)
    centred = latent - mean_r
    gram = centred.T @ centred
    gram += 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weight = torch.linalg.solve(gram, centred.T @ wanted_nm).T  # what is centred needs no other that is
    return Factors(factors.down, factors.gain_r, Linear(weight, mean_m - weight @ mean_r))


def _weighed(found_nm: Tensor, wanted_nm: Tensor, metric_mm: Tensor) -> Tensor:
    """The sum of squared errors under a metric, a block of tokens at a time: a large network's targets are
    hundreds of megabytes, and there would be several of them.
    """
    total = torch.zeros(()).double()
    for first in range(0, len(wanted_nm), _BLOCK):
        block = slice(first, first + _BLOCK)
        total += ((found_nm[block] - wanted_nm[block]) @ metric_mm.T).square().sum()
    return total


def root_of(second_moment: Tensor) -> Tensor:
    """A symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(second_moment)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def effective_ranks(values: Tensor, shares: tuple[float, ...] = (0.9, 0.95, 0.99)) -> tuple[int, ...]:
    """How many of some singular values hold these shares of their energy (sum of squares)."""
    energy = values.double().square().cumsum(0)
    return tuple(int(torch.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1 for share in shares)

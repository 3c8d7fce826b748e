"""Low-rank factors of what a dense layer computes.

A latent layer makes keys and values of ``c = RMSNorm(D x + d)`` as ``U c + u``. Of all maps of that rank the
one with the least squared error under a metric, over tokens of a given covariance, follows from one singular
value decomposition (reduced-rank regression; with covariances for weights: CARE, arXiv 2603.17946).

Legend: n samples, w width, m targets, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.convert.dense import Linear

_RIDGE = 1e-4
"""Of the mean variance of tokens: what directions that no sample shows count as."""
_ANCHORS = (0.0, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Tokens:
    """What tokens are like that enter a layer.

    Args:
        mean_w: of tokens. ``root_ww``: a square root of their covariance (root @ root.T).
        samples_nw: some of them; None where nothing but mean and covariance is assumed.
    """

    mean_w: Tensor
    root_ww: Tensor
    samples_nw: Tensor | None = None

    @classmethod
    def white(cls, width: int) -> Tokens:
        """Mean 0, covariance 1: what a layer norm alone would make of anything."""
        return cls(torch.zeros(width).double(), torch.eye(width).double())

    @classmethod
    def isotropic(cls, samples_nw: Tensor) -> Tokens:
        """Mean and size as of these, and alike in all directions around the mean."""
        samples_nw = samples_nw.double()
        mean_w = samples_nw.mean(0)
        scale = (samples_nw - mean_w).square().mean().sqrt()
        return cls(mean_w, scale * torch.eye(len(mean_w)).double())

    @classmethod
    def sampled(cls, samples_nw: Tensor) -> Tokens:
        """As these are."""
        samples_nw = samples_nw.double()
        mean_w = samples_nw.mean(0)
        centred = samples_nw - mean_w
        covariance = centred.T @ centred / len(samples_nw)
        covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(len(mean_w)).double()
        values, vectors = torch.linalg.eigh(covariance)
        return cls(mean_w, vectors * values.clamp_min(0).sqrt(), samples_nw)

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
class Factors:
    """A low-rank map through a normed latent.

    Args:
        down: tokens to the latent before its norm. ``gain_r``: of the norm.
        up: normed latent to targets.
        error: share of the targets' variance, under the metric, that is lost; None without samples.
    """

    down: Linear
    gain_r: Tensor
    up: Linear
    error: float | None

    def latent(self, x_nw: Tensor, eps: float) -> Tensor:
        """``[n, r]``, normed."""
        raw = self.down(x_nw)
        return raw * torch.rsqrt(raw.square().mean(-1, keepdim=True) + eps) * self.gain_r


def factorise(
    target: Linear, tokens: Tokens, rank: int, eps: float, metric_mm: Tensor, wanted_nm: Tensor | None = None
) -> Factors:
    """The best factors of a map at a rank.

    The norm would take the latent's size out of keys and values. Where there are samples, one channel may
    therefore become a constant, so large as serves the samples best: beside it the norm hardly notices how
    large the others are. The map back is then fitted to what is wanted, norm included.

    Args:
        target: the map; its rows are weighed by a square root of the metric, ``metric_mm``, invertible.
        tokens: over which the error is counted.
        rank: of the latent.
        eps: of its norm.
        wanted_nm: for every sample what the map should give, where `target` only comes close to it.
    """
    mean_m = target(tokens.mean_w[None])[0]
    left, values, _ = torch.linalg.svd(metric_mm @ target.weight @ tokens.root_ww, full_matrices=False)
    inverse_mm = torch.linalg.inv(metric_mm)
    best: Factors | None = None
    for anchor in _ANCHORS if tokens.samples_nw is not None and rank > 1 else _ANCHORS[:1]:
        kept = min(rank - (anchor > 0), int((values > 1e-9 * values[0]).sum()))
        # Latents of mean 0 and variance 1: rows of left.T @ metric @ weight over their singular values.
        weight = (left[:, :kept].T @ metric_mm @ target.weight) / values[:kept, None]
        down_weight = torch.zeros(rank, weight.shape[1]).double()
        down_weight[:kept] = weight
        bias = -down_weight @ tokens.mean_w
        if anchor > 0:
            bias[-1] = anchor * rank**0.5
        size = ((kept + (anchor**2) * rank) / rank) ** 0.5  # root mean square of such a latent
        gain = torch.full((rank,), size).double()
        if anchor > 0:
            gain[-1] = size / bias[-1]
        down = Linear(down_weight, bias)
        back = inverse_mm @ (left[:, :kept] * values[:kept])
        up_weight = torch.zeros(len(mean_m), rank).double()
        up_weight[:, :kept] = back
        found = Factors(down, gain, Linear(up_weight, mean_m), None)
        if tokens.samples_nw is not None:
            found = _refitted(found, tokens.samples_nw, target, eps, metric_mm, wanted_nm)
        if best is None or (found.error or 0.0) < (best.error or 0.0):
            best = found
    assert best is not None
    return best


def _refitted(
    factors: Factors,
    samples_nw: Tensor,
    target: Linear,
    eps: float,
    metric_mm: Tensor,
    wanted_nm: Tensor | None,
) -> Factors:
    """The map back that serves the samples best, and its error."""
    wanted = target(samples_nw) if wanted_nm is None else wanted_nm
    latent = factors.latent(samples_nw, eps)
    mean_r, mean_m = latent.mean(0), wanted.mean(0)
    centred = latent - mean_r
    gram = centred.T @ centred
    gram += 1e-9 * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weight = torch.linalg.solve(gram, centred.T @ (wanted - mean_m)).T
    up = Linear(weight, mean_m - weight @ mean_r)
    lost = ((up(latent) - wanted) @ metric_mm.T).square().sum()
    there = ((wanted - mean_m) @ metric_mm.T).square().sum()
    return Factors(factors.down, factors.gain_r, up, float(lost / there.clamp_min(1e-30)))


def root_of(second_moment: Tensor) -> Tensor:
    """A symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(second_moment)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def effective_ranks(values: Tensor, shares: tuple[float, ...] = (0.9, 0.95, 0.99)) -> tuple[int, ...]:
    """How many of some singular values hold these shares of their energy (sum of squares)."""
    energy = values.double().square().cumsum(0)
    return tuple(int(torch.searchsorted(energy, share * energy[-1] * (1 - 1e-12))) + 1 for share in shares)

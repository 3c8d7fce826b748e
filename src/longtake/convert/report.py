"""What a conversion keeps of every layer: ranks, energies and errors, as JSON, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from longtake.config import Config
from longtake.convert.layer import Converted
from longtake.io.plot import pyplot


class LayerReport(Config):
    """A layer.

    Attributes:
        layer: its index. ``kv_rank``: of its latent.
        dense_ranks: how many singular values of the stacked matrices of keys and values hold 90, 95 and 99 %
            of their energy.
        energy: share of it that the first `kv_rank` of them hold.
        latent_ranks: as `dense_ranks`, of the product that replaces them.
        dense_energies, latent_energies: cumulated shares.
        predicted_loss: share of keys and values, as errors matter, that the rank was predicted to lose
            (`ranks.lost`); None for ranks that hold nothing of the layer.
        weight: how much the flow's error grows with that; None where it was not measured.
        kv_error, q_error, rope_error: shares lost, over tokens that nothing was fitted to; None without.
    """

    layer: int
    kv_rank: int
    dense_ranks: tuple[int, ...]
    energy: float
    latent_ranks: tuple[int, ...]
    dense_energies: tuple[float, ...]
    latent_energies: tuple[float, ...]
    predicted_loss: float | None
    weight: float | None
    kv_error: float | None
    q_error: float | None
    rope_error: float | None

    @classmethod
    def of(cls, layer: int, kv_rank: int, made: Converted, weight: float | None = None) -> LayerReport:
        """Of a converted layer."""
        dense, latent = _cumulated(made.dense.energies), _cumulated(made.latent.energies)
        return cls(
            layer=layer,
            kv_rank=kv_rank,
            dense_ranks=made.dense.ranks,
            energy=dense[kv_rank - 1],
            latent_ranks=made.latent.ranks,
            dense_energies=dense,
            latent_energies=latent,
            predicted_loss=made.predicted_loss,
            weight=weight,
            kv_error=made.kv_error,
            q_error=made.q_error,
            rope_error=made.rope_error,
        )


class ConversionReport(Config):
    """A conversion.

    Attributes:
        source: of the dense weights. ``method``: of factorisation.
        num_tokens: of every layer that it was fitted to (by "svd": that it has its size from); 0 for none.
        num_held_out: of every layer, of other streams, that errors were measured with.
        dense_numbers, latent_numbers: that a token leaves in all layers' caches.
        dense_bytes, latent_bytes: the same in bytes, in bf16 and as the latents are stored.
        predicted_flow_error: share of the variance of the dense network's flow, to first order and before any
            tuning (see `layer_weights`); None where layers' weights were not measured.
        layers: one each.
    """

    source: str
    method: str
    num_tokens: int
    num_held_out: int
    dense_numbers: int
    latent_numbers: int
    dense_bytes: int
    latent_bytes: int
    predicted_flow_error: float | None
    layers: tuple[LayerReport, ...]

    @property
    def saved(self) -> float:
        """Share of the cache's bytes that is gone."""
        return 1 - self.latent_bytes / self.dense_bytes


def report_json(report: ConversionReport) -> str:
    """With what follows from its figures."""
    return json.dumps({**json.loads(report.dumps()), "saved": report.saved}, indent=2) + "\n"


def table(report: ConversionReport) -> list[str]:
    """A line for every layer, under a heading."""
    lines = [
        "layer  rank  energy  dense 90/95/99 %   latent 90/95/99 %   lost: as predicted   k, v      q   rope"
        "   weight"
    ]
    for row in report.layers:
        lost = (_percent(value) for value in (row.predicted_loss, row.kv_error, row.q_error, row.rope_error))
        lines.append(
            f"{row.layer:>5}{row.kv_rank:>6}{row.energy:>8.3f}"
            f"{'/'.join(map(str, row.dense_ranks)):>18}{'/'.join(map(str, row.latent_ranks)):>20}"
            + "".join(f"{value:>{width}}" for value, width in zip(lost, (21, 7, 7, 7), strict=True))
            + (f"{'-':>9}" if row.weight is None else f"{row.weight:>9.4f}")
        )
    return lines


def draw(report: ConversionReport, path: Path) -> None:
    """Energy held against rank: of dense weights, and of what replaces them.

    Raises:
        PackageError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=100, sharey=True)
    for row in report.layers:
        colour = plt.get_cmap("viridis")(row.layer / max(1, len(report.layers) - 1))
        for panel, energies in zip(axes, (row.dense_energies, row.latent_energies), strict=True):
            panel.plot(range(1, len(energies) + 1), energies, color=colour, linewidth=1)
        axes[0].plot([row.kv_rank], [row.energy], "o", color=colour, markersize=3)
    titles = ("dense matrices of keys and values", "product that makes values and keys without positions")
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("rank")
        panel.grid(alpha=0.3)
        panel.set_ylim(0, 1.02)
    axes[0].set_ylabel(f"share of the energy; {len(report.layers)} layers, first dark")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _cumulated(energies: Sequence[float]) -> tuple[float, ...]:
    total, sums = 0.0, []
    for energy in energies:
        total += energy
        sums.append(total)
    return tuple(sums)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"

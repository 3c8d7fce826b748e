"""What a model loses when it is converted at one rank after another, before any tuning: bytes against errors.

Judged by the whole network, not by its layers alone: the dense model streams under captions that nothing was
fitted to; at some noise levels of every chunk it and its conversion say what the flow is, each over its own
cache of the same past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.cache.latent import latent_layout
from longtake.cache.quantized import KeyStorage, Storage
from longtake.config import Config
from longtake.convert.files import captions_for, converted, generation_of, pipeline_of
from longtake.convert.flow_probe import FAR, FlowProbe
from longtake.convert.layer_weights import LayerWeights
from longtake.convert.network import Plan, is_replaced
from longtake.convert.report import ConversionReport
from longtake.convert.settings import ConvertConfig
from longtake.errors import CheckpointError, ConfigError
from longtake.io.checkpoints import load_into
from longtake.io.plot import pyplot
from longtake.models.dit import DiT
from longtake.stream.bundle import load_networks

PAPER_SAVED: Final = 0.927
"""Of VideoMLA (arXiv 2605.30351)."""
_STORED: Final[dict[str, tuple[Storage, KeyStorage]]] = {
    "fp8": ("fp8", "full"),
    "int4": ("int4", "full"),
    "int4, key in fp8": ("int4", "fp8"),
}


class SweepConfig(Config):
    """What to convert, and how to judge it.

    Attributes:
        ranks: one for all layers, in bf16. At the bytes of each, ranks are chosen for every layer as well.
        max_losses: shares of keys and values that no layer may lose: ranks are chosen for each.
        rope_keys: beside one key that all heads share of each band so many, in as many bytes, with ranks
            chosen.
        stored_rank: whose latents are stored in fewer bits too.
        num_streams, num_chunks: of the dense model, for the flow's error.
        conversion: the rest.
    """

    ranks: tuple[int, ...] = Field((8, 16, 24, 32, 48, 64, 96), min_length=1)
    max_losses: tuple[float, ...] = (0.2, 0.1, 0.05)
    rope_keys: tuple[Annotated[int, Field(ge=2)], ...] = ()
    stored_rank: int | None = Field(32, ge=1)
    num_streams: int = Field(8, ge=1)
    num_chunks: int = Field(6, ge=1)
    conversion: ConvertConfig = ConvertConfig()

    @model_validator(mode="after")
    def _are_shares(self) -> SweepConfig:
        if any(not 0 < loss < 1 for loss in self.max_losses):
            raise ConfigError(f"max_losses={self.max_losses} are no shares", "use for instance [0.2, 0.1]")
        return self

    @model_validator(mode="after")
    def _decides_on_ranks(self) -> SweepConfig:
        told = self.conversion
        stored = told.storage != "full" or told.key_storage != "full"
        if told.kv_rank is not None or told.chooses or stored or told.rope_keys != 1:
            raise ConfigError(
                "the sweep decides on ranks, shared keys and storage itself",
                "leave kv_rank, budget_bytes, max_loss, rope_keys and storage out of conversion",
            )
        return self


class SweepPoint(Config):
    """One conversion.

    Attributes:
        kind: "one rank", "automatic" (ranks chosen for the same bytes), that with several shared keys of each
            band, "max loss", or a storage.
        asked: the rank, its bytes, or the loss.
        ranks: of the layers.
        bytes: that a token leaves in all layers' caches, in bf16 where nothing else is said.
        saved: share of the dense model's bytes that is gone.
        predicted_loss, kv_error: of keys and values, as errors matter, mean over layers, see `LayerReport`.
        predicted_flow_error, flow_error: share of the variance of the dense model's flow, see
            `ConversionReport`.
    """

    kind: str
    asked: float
    ranks: tuple[int, ...]
    bytes: int
    saved: float
    predicted_loss: float | None
    kv_error: float | None
    predicted_flow_error: float | None
    flow_error: float

    @property
    def losses(self) -> tuple[float | None, ...]:
        """Of keys and values, predicted and measured, then of the flow."""
        return self.predicted_loss, self.kv_error, self.predicted_flow_error, self.flow_error


class SweepReport(Config):
    """A sweep.

    Attributes:
        source: of the dense weights. ``config``: of the sweep. ``dense_bytes``: a token's in bf16.
        points: one a conversion.
    """

    source: str
    config: SweepConfig
    dense_bytes: int
    points: tuple[SweepPoint, ...]


def run_sweep(path: Path, config: SweepConfig, progress: Callable[[str], None]) -> SweepReport:
    """Converts one of our dense model files again and again; writes nothing.

    Args:
        path: of the model. ``config``: what to convert. ``progress``: told in words what goes on.

    Raises:
        CheckpointError: unreadable, or latent already. ConfigError: ranks that do not fit.
    """
    card, networks = load_networks(path)
    if card.dit.latent is not None:
        raise CheckpointError(f"{path}: the model's attention is latent already", "give a dense model")
    networks.eval().requires_grad_(False)
    dense, wanted = networks["dit"], config.conversion
    assert isinstance(dense, DiT)
    stored_ranks = () if config.stored_rank is None else (config.stored_rank,)
    asked = [wanted.replace(kv_rank=rank) for rank in (*config.ranks, *stored_ranks)]
    for settings in (*asked, *(wanted.replace(rope_keys=keys) for keys in config.rope_keys)):
        Plan(card.dit, settings.latent(card.dit), settings.method)  # refused before anything is generated
    pipeline = pipeline_of(card.stream, networks)
    samples = None
    layer_weights: dict[int, LayerWeights | None] = dict.fromkeys((1, *config.rope_keys))
    if wanted.num_tokens > 0:
        progress("tokens to be fitted to")
        generation = generation_of(pipeline, captions_for(networks["text"], wanted.seed))
        samples = generation.samples(wanted)
        if wanted.weigh == "flow":
            weighing = generation.weighing(samples, wanted, progress)
            for keys in layer_weights:
                latent = wanted.replace(kv_rank=min(config.ranks), rope_keys=keys).latent(card.dit)
                plan, one = Plan(card.dit, latent, wanted.method, wanted.seed), layer_weights[1]
                layer_weights[keys] = weighing.layers(plan) if one is None else weighing.with_keys(one, plan)
    progress("streams to be judged by")
    prompts = captions_for(networks["text"], wanted.seed + FAR, config.num_streams)
    probe = FlowProbe(
        dense,
        [pipeline.encode_prompt(prompt) for prompt in prompts],
        card.stream.history,
        card.stream.schedule.resolve(),
        pipeline.latent_shape[1:],
        config.num_chunks,
        wanted.seed + FAR,
    )
    state = dense.state_dict()
    points: list[SweepPoint] = []
    made: dict[ConvertConfig, tuple[Plan, dict[str, Tensor], ConversionReport]] = {}
    dense_bytes = 0

    def take(
        kind: str,
        asked: float,
        settings: ConvertConfig,
        storages: tuple[Storage, KeyStorage] = ("full", "full"),
    ) -> SweepPoint:
        nonlocal dense_bytes
        if settings not in made:
            plan = Plan(card.dit, settings.latent(card.dit), settings.method, settings.seed)
            assert isinstance(settings.rope_keys, int), "a sweep says how many"
            weights_of = layer_weights[settings.rope_keys]
            made[settings] = converted(plan, state, samples, settings, str(path), lambda _: None, weights_of)
        plan, weights, report = made[settings]
        latent = plan.latent.replace(storage=storages[0], key_storage=storages[1])
        dit = DiT(plan.dense.replace(latent=latent)).eval().requires_grad_(False)
        load_into(dit, {n: t for n, t in state.items() if not is_replaced(n)} | weights, "conversion")
        ranks = latent.ranks(card.dit.num_layers)
        layout = latent_layout(ranks, latent.rope(card.dit.head_dim), *storages)
        dense_bytes, num_bytes = report.dense_bytes, layout.bytes_per_token(torch.bfloat16)
        point = SweepPoint(
            kind=kind,
            asked=asked,
            ranks=ranks,
            bytes=num_bytes,
            saved=1 - num_bytes / dense_bytes,
            predicted_loss=_mean([row.predicted_loss for row in report.layers]),
            kv_error=_mean([row.kv_error for row in report.layers]),
            predicted_flow_error=report.predicted_flow_error,
            flow_error=probe.error_of(dit),
        )
        points.append(point)
        progress(line(point))
        return point

    for rank in config.ranks:
        point = take("one rank", rank, wanted.replace(kv_rank=rank))
        for keys in (1, *config.rope_keys):
            kind, settings = _automatic(keys), wanted.replace(budget_bytes=point.bytes, rope_keys=keys)
            try:
                take(kind, point.bytes, settings)
            except ConfigError as error:  # so many keys leave no room for latents
                progress(f"{kind}, {point.bytes} bytes: left out: {error.problem}")
    for loss in config.max_losses:
        try:
            take("max loss", loss, wanted.replace(max_loss=loss))
        except ConfigError as error:  # of some layers no rank holds it; what was measured stays
            progress(f"max loss {loss:g} is left out: {error.problem}")
    if config.stored_rank is not None:
        stored = wanted.replace(kv_rank=config.stored_rank)
        for name, storages in _STORED.items():
            take(name, config.stored_rank, stored, storages)
    return SweepReport(source=str(path), config=config, dense_bytes=dense_bytes, points=tuple(points))


def line(point: SweepPoint) -> str:
    """A conversion in a line."""
    shares = (100 * point.saved, *(100 * v if v is not None else None for v in point.losses))
    told = "".join(f"{value:>11.1f}" if value is not None else f"{'-':>11}" for value in shares)
    ranks = f"{min(point.ranks)} to {max(point.ranks)}" if len(set(point.ranks)) > 1 else str(point.ranks[0])
    return f"{point.kind:<20}{point.asked:>8g}{ranks:>12}{point.bytes:>8}{told}"


def heading() -> str:
    """Above such lines; shares are in percent."""
    shares = "".join(f"{name:>11}" for name in ("saved", "predicted", "k and v", "predicted", "flow"))
    return f"{'kind':<20}{'asked':>8}{'ranks':>12}{'bytes':>8}{shares}"


def draw(report: SweepReport, path: Path) -> None:
    """The flow's error against the cache that is left.

    Raises:
        PackageError: matplotlib is not installed.
    """
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.5), dpi=100)
    drawn = ["one rank", *(_automatic(keys) for keys in (1, *report.config.rope_keys))]
    for index, kind in enumerate(drawn):
        style = "s--" if index else "o-"
        chosen = [point for point in report.points if point.kind == kind]
        axis.plot([p.bytes for p in chosen], [p.flow_error for p in chosen], style, markersize=4, label=kind)
    others = [point for point in report.points if point.kind not in drawn]
    for index, point in enumerate(others):
        axis.plot([point.bytes], [point.flow_error], "k^", markersize=4)
        text, place = f"{point.kind} {point.asked:g}", (4, -10 if index % 2 else 4)  # neighbours apart
        axis.annotate(text, (point.bytes, point.flow_error), place, textcoords="offset points", fontsize=7)
    marked = report.dense_bytes * (1 - PAPER_SAVED)
    axis.axvline(marked, color="gray", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_xlabel(f"bytes a token leaves in all layers' caches (dense: {report.dense_bytes})")
    axis.set_ylabel("error of the flow, share of its variance, untuned")
    axis.set_yscale("log")
    axis.grid(alpha=0.3, which="both")
    axis.text(marked, axis.get_ylim()[0], f" -{100 * PAPER_SAVED:.1f} %", fontsize=8, va="bottom")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _automatic(keys: int) -> str:
    return "automatic" if keys == 1 else f"automatic, {keys} keys"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None

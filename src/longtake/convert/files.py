"""Model files in and out: our own bundles, and bare DiT weights in any known layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.cache.quantized import Storage
from longtake.config import Config
from longtake.convert.calibrate import sample_tokens
from longtake.convert.layer import Method
from longtake.convert.network import Plan, convert_layers, is_replaced, layer_energies
from longtake.convert.ranks import lost, ranks_for_budget, ranks_for_loss
from longtake.convert.report import ConversionReport, LayerReport
from longtake.diffusion.flow import Schedule
from longtake.errors import CheckpointError, ConfigError
from longtake.history.base import HistoryConfig
from longtake.io.checkpoints import (
    STORED_TYPES,
    load_into,
    read_safetensors,
    read_weights,
    write_safetensors_by_one,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.latent import LatentConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import METADATA_KEY, ModelCard, load_networks, save_model
from longtake.stream.pipeline import Pipeline, StreamConfig

WAN_HEAD_DIM = 128
WAN_TEXT_LENGTH = 512
_NEEDED = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "blocks.0.self_attn.q.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
)
_OURS = ("pooled_text.", "spatial_embedding.", "frame_embedding.", "memory.")
DIT_KEY = "longtake dit"
"""Metadata of a file of bare weights: its `DiTConfig`."""


class ConvertConfig(Config):
    """What to make of a dense model.

    Args:
        method: see `network.Plan`.
        kv_rank: of the latent, for all layers or one each; None is an eighth of the width, as in VideoMLA.
        budget_bytes: that a token may leave in all caches (bf16): ranks that make the best of it.
        max_loss: share of keys and values, as errors matter, that no layer may lose: the least such ranks.
        rank_multiple: chosen ranks are multiples of this.
        query_rank: of the queries' latent; None makes queries from tokens directly.
        nope_dim: channels without positions; None keeps as many channels a head as there were.
        rope_bands: see `LatentConfig`; None is the share of each axis's highest bands that VideoMLA keeps.
        storage, debias: see `LatentConfig`.
        num_tokens: that every layer is fitted to; 0 fits to none.
        num_chunks: generated for them.
        seed: of their noise, and of method "random".
    """

    method: Method = "covariance"
    kv_rank: int | tuple[int, ...] | None = None
    budget_bytes: int | None = Field(default=None, ge=1)
    max_loss: float | None = Field(default=None, gt=0, lt=1)
    rank_multiple: int = Field(default=1, ge=1)
    query_rank: int | None = Field(default=None, ge=1)
    nope_dim: int | None = Field(default=None, ge=1)
    rope_bands: tuple[int | tuple[int, ...], int | tuple[int, ...], int | tuple[int, ...]] | None = None
    storage: Storage = "full"
    debias: bool = False
    num_tokens: int = Field(default=6144, ge=0)
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
        return self

    def chosen(
        self, plan: Plan, state: Mapping[str, Tensor], samples: list[Tensor] | None
    ) -> tuple[Plan, tuple[float, ...]]:
        """The plan with ranks chosen, where they are to be, and what each layer is predicted to lose."""
        energies = layer_energies(plan, state, samples)
        if self.budget_bytes is not None:
            ranks = ranks_for_budget(energies, self.budget_bytes, plan.latent.rope_dim, self.rank_multiple)
        elif self.max_loss is not None:
            ranks = ranks_for_loss(energies, self.max_loss, self.rank_multiple)
        else:
            ranks = plan.latent.ranks(plan.dense.num_layers)
        if self.budget_bytes is not None or self.max_loss is not None:
            plan = replace(plan, latent=plan.latent.replace(kv_rank=ranks))
        return plan, tuple(lost(of_layer, rank) for of_layer, rank in zip(energies, ranks, strict=True))

    def latent(self, dense: DiTConfig) -> LatentConfig:
        """Of the attention that replaces a network's own; ranks that are to be chosen have their default."""
        made = LatentConfig.proportional(dense.width, dense.head_dim).replace(
            query_rank=self.query_rank, storage=self.storage, debias=self.debias
        )
        if self.kv_rank is not None:
            made = made.replace(kv_rank=self.kv_rank)
        if self.rope_bands is not None:
            made = made.replace(rope_bands=self.rope_bands)
        if self.nope_dim is not None:
            return made.replace(nope_dim=self.nope_dim)
        if made.rope_dim >= dense.head_dim:
            raise ConfigError(
                f"rope_bands={made.rope_bands} take all {dense.head_dim} channels of a head",
                "use fewer bands, or give nope_dim",
            )
        return made.replace(nope_dim=dense.head_dim - made.rope_dim)


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


Progress = Callable[[str], None]


def convert_bundle(
    path: Path, out: Path, config: ConvertConfig, prompts: list[str], progress: Progress
) -> ConversionReport:
    """One of our model files, text encoder and autoencoder included.

    Args:
        path: of the dense model. ``out``: of the latent one.
        config: what to make.
        prompts: that it generates tokens under.
        progress: told in words what goes on.

    Raises:
        CheckpointError: unreadable, or not writable. ConfigError: sizes that do not fit.
    """
    card, networks = load_networks(path)
    networks.eval().requires_grad_(False)
    dit = networks["dit"]
    assert isinstance(dit, DiT)
    plan = Plan(card.dit, config.latent(card.dit), config.method, config.seed)
    samples = None
    if config.num_tokens > 0:
        progress(f"{config.num_chunks} chunks under {len(prompts)} prompts")
        samples = _tokens_of(card.stream, networks, prompts, config)
    state = dit.state_dict()
    plan, weights, report = _converted(plan, state, samples, config, str(path), progress)
    made = DiT(plan.config)
    _check_policy(made, card.stream, networks)
    load_into(made, {name: t for name, t in state.items() if not is_replaced(name)} | weights, "conversion")
    named = card.replace(name=f"{card.name}-latent", dit=plan.config)
    save_model(out, named, {"vae": networks["vae"], "text": networks["text"], "dit": made})
    return report


def restore_bundle(path: Path, out: Path, config: ConvertConfig) -> ModelCard:
    """A model file that is latent already, with its latents kept otherwise; weights stay. Returns its card.

    Raises:
        CheckpointError: unreadable, not writable, or a dense model.
    """
    card, networks = load_networks(path)
    if card.dit.latent is None:
        raise CheckpointError(f"{path}: the model's attention is dense", "convert it first")
    latent = card.dit.latent.replace(storage=config.storage, debias=config.debias)
    if latent == card.dit.latent:
        raise CheckpointError(
            f"{path}: the model's attention is latent already, and kept so",
            "give a dense model, or another storage",
        )
    changed = card.replace(dit=card.dit.replace(latent=latent))
    _check_policy(DiT(changed.dit), card.stream, networks)
    save_model(out, changed, dict(networks.items()))
    return changed


def convert_weights(
    path: Path,
    out: Path,
    config: ConvertConfig,
    num_heads: int | None,
    calibration: Calibration | None,
    progress: Progress,
) -> ConversionReport:
    """Bare DiT weights with official, diffusers' or our names. Layers are converted one at a time, and
    written one tensor at a time, in the type in which they came.

    Args:
        path: of the dense weights. ``out``: of the latent ones, under our names.
        config: what to make.
        num_heads: of the network; None for heads of 128 channels, as Wan's.
        calibration: None fits to nothing.
        progress: told in words what goes on.

    Raises:
        CheckpointError: unreadable, or not writable. ConfigError: sizes that do not fit.
    """
    state = read_weights(path)
    strange = sorted({str(tensor.dtype) for tensor in state.values()} - {str(kind) for kind in STORED_TYPES})
    if strange:
        raise CheckpointError(
            f"{path} holds numbers of type {', '.join(strange)}", "give weights in bf16, fp16 or fp32"
        )
    dense = dit_config_of(state, num_heads, str(path))
    plan = Plan(dense, config.latent(dense), config.method, config.seed)
    samples = None
    if calibration is not None and config.num_tokens > 0:
        progress(f"{config.num_chunks} chunks for {config.num_tokens} tokens of every layer")
        samples = _tokens_of_bare(dense, state, calibration, config, str(path))
    plan, weights, report = _converted(plan, state, samples, config, str(path), progress)
    kind = state["patch_embedding.weight"].dtype
    kept = {name: tensor for name, tensor in state.items() if not is_replaced(name)}
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()}
    shapes |= {name: (tuple(tensor.shape), kind) for name, tensor in weights.items()}
    progress(f"writing {out}")
    metadata = {DIT_KEY: plan.config.dumps()}
    write_safetensors_by_one(out, shapes, lambda name: (weights if name in weights else kept)[name], metadata)
    return report


def load_converted(path: Path) -> DiT:
    """A network that `convert_weights` wrote, in single precision.

    Raises:
        CheckpointError: unreadable, or no such file.
    """
    state, metadata = read_safetensors(path)
    if DIT_KEY not in metadata:
        raise CheckpointError(f"{path} does not say what network it is of", "give one that convert wrote")
    dit = DiT(DiTConfig.loads(metadata[DIT_KEY], str(path)))
    load_into(dit, state, str(path))
    return dit.eval()


def is_bundle(path: Path) -> bool:
    """Whether a file is one of our model files."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "check the path or fetch it again") from error


def dit_config_of(state: Mapping[str, Tensor], num_heads: int | None, source: str) -> DiTConfig:
    """What dense weights under our names are of, from their shapes.

    Raises:
        CheckpointError: latent weights, weights without a block, or heads that do not fit.
    """
    if any(name.startswith("blocks.0.self_attn.kv_down") for name in state):
        raise CheckpointError(f"{source}: the model's attention is latent already", "give a dense model")
    missing = [name for name in _NEEDED if name not in state]
    if missing:
        raise CheckpointError(
            f"{source} lacks {', '.join(missing)}", "give a whole model, its shards joined in one file"
        )
    ours = [name for name in state if name.startswith(_OURS)]
    if ours:
        raise CheckpointError(
            f"{source} holds {ours[0]!r}, and bare weights do not say how it is used",
            "give the model file that they are from",
        )
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if not blocks or blocks != set(range(len(blocks))):
        raise CheckpointError(f"{source} lacks some of its blocks", "fetch it again")
    width, channels, *patch = state["patch_embedding.weight"].shape
    pt, ph, pw = patch
    heads = num_heads or width // WAN_HEAD_DIM
    if heads == 0 or width % heads or (width // heads) % 2:
        raise CheckpointError(
            f"{source}: a width of {width} does not split into {heads} heads of even size",
            "give the number of heads",
        )
    cross = tuple(i for i in sorted(blocks) if f"blocks.{i}.cross_attn.q.weight" in state)
    return DiTConfig(
        width=width,
        ffn_width=state["blocks.0.ffn.0.weight"].shape[0],
        num_layers=len(blocks),
        num_heads=heads,
        in_channels=channels,
        out_channels=state["head.head.weight"].shape[0] // (pt * ph * pw),
        patch_size=(pt, ph, pw),
        text_width=state["text_embedding.0.weight"].shape[1],
        text_length=WAN_TEXT_LENGTH,
        frequency_width=state["time_embedding.0.weight"].shape[1],
        qk_norm="blocks.0.self_attn.norm_q.weight" in state,
        cross_attention_layers="all" if len(cross) == len(blocks) else cross,
    )


def _check_policy(dit: DiT, stream: StreamConfig, networks: nn.ModuleDict) -> None:
    """Refuse what no stream of the new model could be opened with."""
    vae = networks["vae"]
    assert isinstance(vae, TinyVAE)
    stride = vae.config.spatial_stride
    dit.policy(stream.history.policy, dit.token_grid(stream.height // stride, stream.width // stride))


def _converted(
    plan: Plan,
    state: Mapping[str, Tensor],
    samples: list[Tensor] | None,
    config: ConvertConfig,
    source: str,
    progress: Progress,
) -> tuple[Plan, dict[str, Tensor], ConversionReport]:
    if samples is not None and len(samples[0]) < 2 * plan.dense.width:
        progress(
            f"only {len(samples[0])} tokens for {plan.dense.width} channels: what is fitted to so few may "
            "not hold for others; generate more chunks"
        )
    plan, predicted = config.chosen(plan, state, samples)
    weights: dict[str, Tensor] = {}
    rows: list[LayerReport] = []
    dense, ranks = plan.dense, plan.latent.ranks(plan.dense.num_layers)
    for layer, made in convert_layers(plan, state, samples):
        weights |= {f"blocks.{layer}.self_attn.{name}": t for name, t in made.weights.items()}
        rows.append(LayerReport.of(layer, ranks[layer], predicted[layer], made))
        progress(f"layer {layer + 1} of {dense.num_layers}")
    return (
        plan,
        weights,
        ConversionReport(
            source=source,
            method=config.method,
            num_tokens=0 if samples is None else len(samples[0]),
            dense_numbers=2 * dense.width * dense.num_layers,
            latent_numbers=sum(ranks) + dense.num_layers * plan.latent.rope_dim,
            layers=tuple(rows),
        ),
    )


def _tokens_of(
    stream: StreamConfig, networks: nn.ModuleDict, prompts: list[str], config: ConvertConfig
) -> list[Tensor]:
    dit, vae, text = networks["dit"], networks["vae"], networks["text"]
    assert isinstance(dit, DiT)
    assert isinstance(vae, TinyVAE)
    assert isinstance(text, TinyTextEncoder)
    pipeline = Pipeline(dit, vae, text, stream)
    named = [*prompts, stream.negative_prompt] if stream.guidance is not None else prompts
    texts = [pipeline.encode_prompt(prompt) for prompt in named]
    return sample_tokens(
        pipeline.dit,
        texts,
        stream.history,
        stream.schedule.resolve(),
        pipeline.latent_shape[1:],
        config.num_chunks,
        config.num_tokens,
        config.seed,
    )


def _tokens_of_bare(
    dense: DiTConfig,
    state: Mapping[str, Tensor],
    calibration: Calibration,
    config: ConvertConfig,
    source: str,
) -> list[Tensor]:
    with torch.device("meta"):
        dit = DiT(dense)
    dit.to_empty(device="cpu")
    load_into(dit, state, source)
    dit.eval().requires_grad_(False)
    with torch.no_grad():
        texts = [dit.encode_text(row[None].float()) for row in calibration.embeddings_nlw]
    return sample_tokens(
        dit,
        texts,
        calibration.history,
        calibration.schedule.resolve(),
        (dense.in_channels, *calibration.latent_size),
        config.num_chunks,
        config.num_tokens,
        config.seed,
    )


def read_embeddings(path: Path, width: int) -> Tensor:
    """Prompt embeddings ``[n, l, width]`` under the name ``embeddings`` in a safetensors file.

    Raises:
        CheckpointError: none there, or of another width.
    """
    tensors, _ = read_safetensors(path)
    found = tensors.get("embeddings")
    if found is None or found.dim() != 3 or found.shape[2] != width or 0 in found.shape:
        shape = None if found is None else tuple(found.shape)
        raise CheckpointError(
            f"{path}: 'embeddings' is {shape}, not [prompts, tokens, {width}]",
            "store the text encoder's output under that name",
        )
    return found


def report_json(report: ConversionReport) -> str:
    """With what follows from its figures."""
    return json.dumps({**json.loads(report.dumps()), "saved": report.saved}, indent=2) + "\n"

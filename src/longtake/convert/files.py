"""Dense model files made latent: our own bundles, and bare DiT weights (`convert.bare`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.convert.bare import DIT_KEY, dit_config_of
from longtake.convert.calibrate import sample_tokens
from longtake.convert.network import Plan, convert_layers, is_replaced
from longtake.convert.report import ConversionReport, LayerReport
from longtake.convert.settings import Calibration, ConvertConfig
from longtake.errors import CheckpointError
from longtake.io.checkpoints import (
    STORED_TYPES,
    check_finite,
    check_names,
    load_into,
    read_weights,
    write_safetensors_by_one,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import METADATA_KEY, ModelCard, load_networks, save_model
from longtake.stream.pipeline import Pipeline, StreamConfig

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
    with torch.device("meta"):
        names = DiT(dense).state_dict()
    check_names(names, state, str(path), "fetch it again, or give the whole model")
    check_finite(state, str(path))
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


def is_bundle(path: Path) -> bool:
    """Whether a file is one of our model files."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return METADATA_KEY in (file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}", "check the path or fetch it again") from error


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


def report_json(report: ConversionReport) -> str:
    """With what follows from its figures."""
    return json.dumps({**json.loads(report.dumps()), "saved": report.saved}, indent=2) + "\n"

"""Dense model files made latent: our own bundles, and bare DiT weights (`convert.bare`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.cache.dense import dense_layout
from longtake.cache.latent import latent_layout
from longtake.convert.bare import BareWeights
from longtake.convert.calibrate import sample_tokens
from longtake.convert.factor import Samples
from longtake.convert.network import Plan, convert_layers, is_replaced
from longtake.convert.report import ConversionReport, LayerReport
from longtake.convert.settings import Calibration, ConvertConfig
from longtake.errors import CheckpointError, ConfigError, PromptError
from longtake.io.checkpoints import (
    NETWORK_KEY,
    STREAM_KEY,
    load_into,
    write_safetensors_by_one,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import METADATA_KEY, ModelCard, load_networks, save_model
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.world import sample_scene
from longtake.world.vocabulary import LEVELS

_NUM_CAPTIONS = 24
Progress = Callable[[str], None]


def convert_bundle(
    path: Path, out: Path, config: ConvertConfig, prompts: list[str] | None, progress: Progress
) -> ConversionReport:
    """One of our model files, text encoder and autoencoder included.

    Args:
        path: of the dense model. ``out``: of the latent one.
        config: what to make.
        prompts: that it generates tokens under; None for captions of the world, as long as it reads them.
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
        if prompts is None:
            prompts = captions_for(networks["text"], config.seed)
        progress(f"{config.num_chunks} chunks under {len(prompts)} prompts")
        samples = tokens_of(pipeline_of(card.stream, networks), prompts, config)
    state = dit.state_dict()
    plan, weights, report = converted(plan, state, samples, config, str(path), progress)
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
    latent = _kept_otherwise(card.dit.latent, config, str(path))
    changed = card.replace(dit=card.dit.replace(latent=latent))
    _check_policy(DiT(changed.dit), card.stream, networks)
    save_model(out, changed, dict(networks.items()))
    return changed


def convert_weights(
    bare: BareWeights,
    out: Path,
    config: ConvertConfig,
    calibration: Calibration | None,
    progress: Progress,
) -> ConversionReport:
    """Bare DiT weights. Layers are converted one at a time, in double precision; the file keeps the type in
    which the weights came.

    Args:
        bare: the dense weights.
        out: file of the latent ones, under our names, which says what network it is of.
        config: what to make.
        calibration: None fits to nothing.
        progress: told in words what goes on.

    Raises:
        CheckpointError: not writable. ConfigError: sizes that do not fit.
    """
    plan = Plan(bare.config, config.latent(bare.config), config.method, config.seed)
    samples = None
    if calibration is not None and config.num_tokens > 0:
        progress(f"{config.num_chunks} chunks a stream for {config.num_tokens} tokens of every layer")
        samples = _tokens_of_bare(bare, calibration, config)
    plan, weights, report = converted(plan, bare.state, samples, config, bare.source, progress)
    kept = {name: tensor for name, tensor in bare.state.items() if not is_replaced(name)}
    progress(f"writing {out}")
    _write_bare(out, plan.config, {**kept, **weights}, bare)
    return report


def restore_weights(bare: BareWeights, out: Path, config: ConvertConfig) -> DiTConfig:
    """Bare weights that are latent already, with their latents kept otherwise; weights stay. Returns what
    they are then.

    Raises:
        CheckpointError: not writable, or latents that are kept so.
    """
    assert bare.config.latent is not None
    changed = bare.config.replace(latent=_kept_otherwise(bare.config.latent, config, bare.source))
    _write_bare(out, changed, bare.state, bare)
    return changed


def _write_bare(out: Path, dit: DiTConfig, state: Mapping[str, Tensor], origin: BareWeights) -> None:
    """Weights in the type of those that they come from, saying what they are."""
    kind = origin.state["patch_embedding.weight"].dtype
    shapes = {
        name: (tuple(tensor.shape), origin.state[name].dtype if name in origin.state else kind)
        for name, tensor in state.items()
    }
    told = {NETWORK_KEY: dit.dumps()}
    if origin.stream is not None:
        told[STREAM_KEY] = origin.stream.dumps()
    write_safetensors_by_one(out, shapes, state.__getitem__, told)


def _kept_otherwise(latent: LatentConfig, config: ConvertConfig, source: str) -> LatentConfig:
    """What is told of latents that are to be kept as a configuration says."""
    changed = latent.replace(storage=config.storage, key_storage=config.key_storage, debias=config.debias)
    if changed == latent:
        raise CheckpointError(
            f"{source}: the model's attention is latent already, and kept so",
            "give a dense model, or another storage",
        )
    return changed


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


def converted(
    plan: Plan,
    state: Mapping[str, Tensor],
    samples: list[Samples] | None,
    config: ConvertConfig,
    source: str,
    progress: Progress,
) -> tuple[Plan, dict[str, Tensor], ConversionReport]:
    """The plan with ranks chosen, the weights of the new self-attention, and the report.

    Args:
        plan: what to make. ``state``: of the dense network, under our names.
        samples: of every layer tokens that enter it; None for methods that can do without.
        config: how ranks are chosen. ``source``: what the report names.
        progress: told in words what goes on.

    Raises:
        ConfigError: ranks that do not fit.
    """
    num_tokens, num_held_out = (
        (len(samples[0].fitted_nw), len(samples[0].held_out_nw)) if samples is not None else (0, 0)
    )
    if samples is not None and num_tokens < 2 * plan.dense.width:
        progress(
            f"only {num_tokens} tokens for {plan.dense.width} channels: what is fitted to so few may not "
            "hold for others; generate more chunks"
        )
    plan = config.chosen(plan, state, samples)
    weights: dict[str, Tensor] = {}
    rows: list[LayerReport] = []
    dense, ranks = plan.dense, plan.latent.ranks(plan.dense.num_layers)
    for layer, made in convert_layers(plan, state, samples):
        weights |= {f"blocks.{layer}.self_attn.{name}": t for name, t in made.weights.items()}
        rows.append(LayerReport.of(layer, ranks[layer], made))
        progress(f"layer {layer + 1} of {dense.num_layers}")
    before = dense_layout(dense.num_layers, dense.num_heads, dense.head_dim)
    latent = plan.latent
    after = latent_layout(ranks, latent.rope(dense.head_dim), latent.storage, latent.key_storage)
    return (
        plan,
        weights,
        ConversionReport(
            source=source,
            method=config.method,
            num_tokens=num_tokens,
            num_held_out=num_held_out,
            dense_numbers=2 * dense.width * dense.num_layers,
            latent_numbers=sum(ranks) + dense.num_layers * plan.latent.rope_dim,
            dense_bytes=before.bytes_per_token(torch.bfloat16),
            latent_bytes=after.bytes_per_token(torch.bfloat16),
            layers=tuple(rows),
        ),
    )


def captions_for(text: nn.Module, seed: int, count: int = _NUM_CAPTIONS) -> list[str]:
    """Of the world, of all its levels, those that a text encoder reads whole."""
    assert isinstance(text, TinyTextEncoder)
    read: list[str] = []
    for index in range(count * 50):
        caption = sample_scene(seed + index, LEVELS[index % len(LEVELS)]).caption
        try:
            text.tokenize([caption])
        except PromptError:
            continue
        read.append(caption)
        if len(read) == count:
            break
    if not read:
        raise ConfigError("the model reads no caption of the world", "give prompts")
    return read


def pipeline_of(stream: StreamConfig, networks: nn.ModuleDict) -> Pipeline:
    """The networks of one of our model files, to be streamed."""
    dit, vae, text = networks["dit"], networks["vae"], networks["text"]
    assert isinstance(dit, DiT)
    assert isinstance(vae, TinyVAE)
    assert isinstance(text, TinyTextEncoder)
    return Pipeline(dit, vae, text, stream)


def tokens_of(pipeline: Pipeline, prompts: list[str], config: ConvertConfig) -> list[Samples]:
    """Of every layer tokens that enter it while a model generates, under no prompt too where it is guided."""
    stream = pipeline.config
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


def _tokens_of_bare(bare: BareWeights, calibration: Calibration, config: ConvertConfig) -> list[Samples]:
    dit = bare.network()
    dtype = dit.patch_embedding.weight.dtype
    with torch.no_grad():
        texts = [dit.encode_text(row[None].to(dtype)) for row in calibration.embeddings_nlw]
    return sample_tokens(
        dit,
        texts,
        calibration.history,
        calibration.schedule.resolve(),
        (bare.config.in_channels, *calibration.latent_size),
        config.num_chunks,
        config.num_tokens,
        config.seed,
    )

"""Dense model files made latent: our own bundles, and bare DiT weights (`convert.bare`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from longtake.cache.dense import dense_layout
from longtake.cache.latent import latent_layout
from longtake.convert.bare import BareWeights
from longtake.convert.calibrate import held_out_texts, sample_tokens
from longtake.convert.factor import Samples
from longtake.convert.flow_probe import FAR, FlowProbe
from longtake.convert.layer_weights import LayerWeights, Weighing
from longtake.convert.network import Plan, convert_layers, is_replaced
from longtake.convert.report import ConversionReport, LayerReport
from longtake.convert.settings import Calibration, ConvertConfig
from longtake.convert.shared_keys import weighed
from longtake.diffusion.flow import Steps
from longtake.errors import CheckpointError, ConfigError, PromptError
from longtake.history.base import HistoryConfig
from longtake.io.checkpoints import (
    NETWORK_KEY,
    STREAM_KEY,
    load_into,
    write_safetensors_by_one,
)
from longtake.models.dit import DiT, TextContext
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import METADATA_KEY, ModelCard, load_networks, save_model
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.world import sample_scene
from longtake.world.vocabulary import LEVELS

_NUM_CAPTIONS = 24
_NUM_PROBED = 6
"""Streams that layers' weights are measured over."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Generation:
    """How a dense network generates what a conversion is fitted to.

    Args:
        dit: the network. ``texts``: a prompt each.
        history, steps: of its streams. ``latent_shape``: channels, height, width.
    """

    dit: DiT
    texts: Sequence[TextContext]
    history: HistoryConfig
    steps: Steps
    latent_shape: tuple[int, int, int]

    def samples(self, config: ConvertConfig) -> list[Samples]:
        """Of every layer tokens that enter it meanwhile."""
        return sample_tokens(
            self.dit,
            self.texts,
            self.history,
            self.steps,
            self.latent_shape,
            config.num_chunks,
            config.num_tokens,
            config.seed,
        )

    def weighing(self, samples: list[Samples], config: ConvertConfig, progress: Progress) -> Weighing:
        """How it is measured what layers' losses cost the flow, over streams that nothing was fitted to."""
        texts = held_out_texts(self.texts, _NUM_PROBED)
        seed = config.seed + FAR // 2  # others than a sweep judges by
        probe = FlowProbe(
            self.dit, texts, self.history, self.steps, self.latent_shape, config.num_chunks, seed
        )
        return Weighing(self.dit, samples, probe, progress)


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
    config.check_budget(plan)
    samples = layer_weights = None
    if config.num_tokens > 0:
        if prompts is None:
            prompts = captions_for(networks["text"], config.seed)
        progress(f"{config.num_chunks} chunks under {len(prompts)} prompts")
        generation = generation_of(pipeline_of(card.stream, networks), prompts)
        samples = generation.samples(config)
        if config.weighs:
            weighing = generation.weighing(samples, config, progress)
            plan, layer_weights = weighed(config, card.dit, weighing, progress)
    state = dit.state_dict()
    plan, weights, report = converted(plan, state, samples, config, str(path), progress, layer_weights)
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
    config.check_budget(plan)
    samples = layer_weights = None
    if calibration is not None and config.num_tokens > 0:
        progress(f"{config.num_chunks} chunks a stream for {config.num_tokens} tokens of every layer")
        generation = _generation_of_bare(bare, calibration)
        samples = generation.samples(config)
        if config.weighs:
            weighing = generation.weighing(samples, config, progress)
            plan, layer_weights = weighed(config, bare.config, weighing, progress)
            del weighing
        del generation
    plan, weights, report = converted(plan, bare.state, samples, config, bare.source, progress, layer_weights)
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
    changed = latent.replace(
        path=config.path, storage=config.storage, key_storage=config.key_storage, debias=config.debias
    )
    if changed == latent:
        raise CheckpointError(
            f"{source}: the model's attention is latent already, and kept and computed so",
            "give a dense model, or another storage or path",
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
    layer_weights: LayerWeights | None = None,
) -> tuple[Plan, dict[str, Tensor], ConversionReport]:
    """The plan with ranks chosen, the weights of the new self-attention, and the report.

    Args:
        plan: what to make. ``state``: of the dense network, under our names.
        samples: of every layer tokens that enter it; None for methods that can do without.
        config: how ranks are chosen. ``source``: what the report names.
        progress: told in words what goes on. ``layer_weights``: of layers' losses, where they were measured.

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
    plan = config.chosen(plan, state, samples, layer_weights)
    weights: dict[str, Tensor] = {}
    rows: list[LayerReport] = []
    dense, ranks = plan.dense, plan.latent.ranks(plan.dense.num_layers)
    for layer, made in convert_layers(plan, state, samples):
        weights |= {f"blocks.{layer}.self_attn.{name}": t for name, t in made.weights.items()}
        weight = None if layer_weights is None else layer_weights.weights[layer]
        rows.append(LayerReport.of(layer, ranks[layer], made, weight))
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
            predicted_flow_error=_flow_error(rows, layer_weights),
            layers=tuple(rows),
        ),
    )


def _flow_error(rows: Sequence[LayerReport], weights: LayerWeights | None) -> float | None:
    losses = [row.predicted_loss for row in rows if row.predicted_loss is not None]
    return None if weights is None or len(losses) < len(rows) else weights.predicted(losses)


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


def generation_of(pipeline: Pipeline, prompts: list[str]) -> Generation:
    """How a model generates under prompts, and under its negative one too where it is guided."""
    stream = pipeline.config
    named = [*prompts, stream.negative_prompt] if stream.guidance is not None else prompts
    texts = [pipeline.encode_prompt(prompt) for prompt in named]
    steps = stream.schedule.resolve()
    return Generation(pipeline.dit, texts, stream.history, steps, pipeline.latent_shape[1:])


def _generation_of_bare(bare: BareWeights, calibration: Calibration) -> Generation:
    dit = bare.network()
    dtype = dit.patch_embedding.weight.dtype
    with torch.no_grad():
        texts = [dit.encode_text(row[None].to(dtype)) for row in calibration.embeddings_nlw]
    shape = (bare.config.in_channels, *calibration.latent_size)
    return Generation(dit, texts, calibration.history, calibration.schedule.resolve(), shape)

"""From a recipe to a model file: the stages in order, each resumable, each leaving weights for the next."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from longtake.errors import TrainingError
from longtake.io.checkpoints import load_into, read_safetensors, weights_digest, write_safetensors
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import load_networks, save_model
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd import DMDTask
from longtake.train.dmd_config import DMDConfig
from longtake.train.evictions import EvictionsConfig, EvictionsTask, batch_paths, build_evictions
from longtake.train.excerpts import captions_of
from longtake.train.fit import this_machine
from longtake.train.latents import (
    ClipEncoder,
    Clips,
    ClipSource,
    ClipsPerStep,
    EncodedClips,
    build_cache,
)
from longtake.train.layers import LayersConfig, LayersTask
from longtake.train.loop import STOPPED_EARLY, Task, run
from longtake.train.lora import merge_lora
from longtake.train.networks import TextToLatents
from longtake.train.own_rollouts import OwnRollouts
from longtake.train.parents import Parent, load_parent, without_memory
from longtake.train.recall import RecallSource
from longtake.train.recipe import Recipe, Stage
from longtake.train.rendering import ClipRenderer
from longtake.train.samples import SampleRollouts
from longtake.train.sources import clip_renderer, load_clips, step_sources
from longtake.train.start import start_of
from longtake.train.steps import Steps
from longtake.train.trajectory import TrajectoryConfig, TrajectoryTask
from longtake.train.vae import VAETask, VAETrainingConfig, clip_scenes, measure_latents, render_clips
from longtake.train.warm_start import MemoryUse, resized_memory, warm_start
from longtake.world import VERSION

StageSettings = (
    VAETrainingConfig | DiTTrainingConfig | LayersConfig | EvictionsConfig | TrajectoryConfig | DMDConfig
)

_BEFORE_DISTILLATION: tuple[Stage, ...] = ("layers", "first", "windows", "evictions", "memory")
"""Stages of text encoder and DiT whose result is distillation's teacher."""
_NUM_CLIPS_FOR_STATISTICS = 64
_NUM_TEACHER_STEPS = 32
_NUM_SAMPLES = 8


def train(
    recipe: Recipe,
    out: Path,
    stages: Sequence[str] | None = None,
    stop_after_seconds: float | None = None,
    memory_gb: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Run a recipe's stages, going on where `out` shows an earlier run stopped.

    Args:
        recipe: what to train.
        out: one folder per stage with checkpoint, log and weights, and `NAME.safetensors` at the end.
        stages: a part of the recipe's stages; those before must have left their weights in `out`.
        stop_after_seconds: per stage; a stage that stops early ends the run, to be resumed later.
        memory_gb: that training may count on; what this machine has available where None.
        tell: in words, what goes on before the first stage.

    Returns:
        the last stage's evaluation.

    Raises:
        ConfigError: settings that do not fit each other.
        TrainingError: a stage does not fit into memory, its predecessor is missing, or the loss diverged.
    """
    recipe.check(stages or recipe.stages, this_machine(recipe.device, memory_gb))
    if recipe.needs_parent(stages or recipe.stages):
        # Refused now rather than after other stages.
        load_parent(recipe, same_memory="layers" in (stages or recipe.stages))
    torch.manual_seed(recipe.seed)
    networks = _Networks(recipe, out, tell=tell)
    actions: dict[str, Callable[[], dict[str, float]]] = {
        "vae": lambda: _train_vae(recipe, networks, out, stop_after_seconds),
        "latents": lambda: _cache_latents(recipe, networks, out),
        "layers": lambda: _train_layers(recipe, networks, out, stop_after_seconds),
        "first": lambda: _train_dit(recipe, networks, out, "first", recipe.first, stop_after_seconds),
        "windows": lambda: _train_dit(recipe, networks, out, "windows", recipe.windows, stop_after_seconds),
        "evictions": lambda: _train_memory_alone(recipe, networks, out, stop_after_seconds),
        "memory": lambda: _train_dit(recipe, networks, out, "memory", recipe.memory, stop_after_seconds),
        "trajectory": lambda: _follow(recipe, networks, out, stop_after_seconds),
        "dmd": lambda: _match(recipe, networks, out, stop_after_seconds),
        "decoder": lambda: _train_decoder(recipe, networks, out, stop_after_seconds),
        "export": lambda: _export(recipe, networks, out),
    }
    figures: dict[str, float] = {}
    for stage in stages or recipe.stages:
        figures = actions[stage]()
        if STOPPED_EARLY in figures:
            break
    return figures


class _Networks:
    """The networks of a run, each as the newest finished stage left it, or the newest before a given one."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        before: Stage | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.out = out
        self.remembers = False  # whether the memory it starts with was trained
        self.vae: TinyVAE = TinyVAE(recipe.vae_model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.text_to_latents = TextToLatents(TinyTextEncoder(recipe.text_model), DiT(recipe.dit_model))
        for module in (self.vae, self.text_to_latents):
            module.to(recipe.device)
        path = start_of(recipe, out, tell)
        if path is not None:
            card, start = load_networks(path)
            warm_start(self.vae, start["vae"].state_dict(), str(path))
            warm_start(self.text_to_latents.text, start["text"].state_dict(), str(path))
            weights: Mapping[str, Tensor] = start["dit"].state_dict()
            self.remembers = any(name.startswith("memory.") for name in weights)
            dit = self.text_to_latents.dit
            old = MemoryUse.of(card.dit, card.stream.history.policy)
            new = MemoryUse.of(recipe.dit_model, recipe.stream.history.policy)
            if old is not None and new is not None:
                weights = resized_memory(weights, dit.state_dict(), old, new)
            warm_start(dit, weights, str(path))
        self._warm = path is not None
        self.knows = self._warm  # whether text encoder and DiT, at `before`, were trained at all
        for stage in ("vae", "decoder"):
            self._restore(stage, self.vae)
        for stage in _BEFORE_DISTILLATION:
            if stage == before:
                return
            self.knows |= self._path(stage).exists()
            self._restore(stage, self.text_to_latents)
        self.teacher = copy.deepcopy(self.text_to_latents)
        for stage in ("trajectory", "dmd"):
            self._restore(stage, self.text_to_latents)

    def run(
        self, stage: Stage, task: Task, settings: StageSettings, module: nn.Module, seconds: float | None
    ) -> dict[str, float]:
        """Train a stage of which a module is the result, and leave its weights for the next one where it was
        not stopped early.
        """
        figures = run(task, settings.loop, self.out / stage, seconds, settings)
        merge_lora(module)
        if STOPPED_EARLY not in figures:
            self.keep(stage, module)
        return figures

    def keep(self, stage: Stage, module: nn.Module) -> None:
        """Leave a finished stage's weights for the next one, and for distillation's teacher."""
        write_safetensors(self._path(stage), module.state_dict(), {})
        if stage in _BEFORE_DISTILLATION:
            self.teacher = copy.deepcopy(self.text_to_latents)

    def require_vae(self) -> TinyVAE:
        """The trained VAE. Raises TrainingError where there is none yet."""
        if not (self._warm or self._path("vae").exists()):
            raise TrainingError(f"{self.out} holds no trained VAE", "run stage vae first, or set warm_start")
        self.vae.eval().requires_grad_(False)
        return self.vae

    def to_host(self) -> None:
        """Move all to the CPU."""
        for module in (self.vae, self.text_to_latents, self.teacher):
            module.cpu()

    def _path(self, stage: str) -> Path:
        return self.out / stage / "weights.safetensors"

    def _restore(self, stage: str, module: nn.Module) -> None:
        if self._path(stage).exists():
            load_into(module, read_safetensors(self._path(stage))[0], str(self._path(stage)))


def _train_vae(recipe: Recipe, networks: _Networks, out: Path, seconds: float | None) -> dict[str, float]:
    vae, config = networks.vae, recipe.vae
    task = VAETask(vae, config)
    figures = run(task, config.loop, networks.out / "vae", seconds, config)
    if STOPPED_EARLY in figures:
        return figures
    seeds = list(range(_NUM_CLIPS_FOR_STATISTICS))
    scenes = clip_scenes(seeds, config.levels, "train")
    measure_latents(vae, render_clips(scenes, seeds, task.num_frames, config))
    networks.keep("vae", vae)
    return figures


def _train_decoder(recipe: Recipe, networks: _Networks, out: Path, seconds: float | None) -> dict[str, float]:
    vae = networks.require_vae()
    vae.decoder.requires_grad_(True)
    return networks.run("decoder", VAETask(vae, recipe.decoder), recipe.decoder, vae, seconds)


def _cache_latents(recipe: Recipe, networks: _Networks, out: Path) -> dict[str, float]:
    vae = networks.require_vae()
    encoding = {name: t for name, t in vae.state_dict().items() if not name.startswith("decoder.")}
    digest = weights_digest(encoding)
    caches = {"held_out": recipe.held_out}
    walking: list[ClipsPerStep] = [recipe.first, recipe.windows, recipe.trajectory]
    if recipe.parent is not None and recipe.dit_model.latent is not None:
        walking.append(recipe.layers)
    cached = [stage for stage in walking if not stage.fresh_clips]
    if any(stage.num_first_clips > 0 for stage in cached):
        caches["first_latents"] = recipe.first_latents
    if any(stage.num_clips > 0 for stage in cached):
        caches["latents"] = recipe.latents
    for name, config in caches.items():
        build_cache(vae, config, out / name, digest)
    return {"clips": float(sum(config.num_clips for config in caches.values()))}


def _train_dit(
    recipe: Recipe,
    networks: _Networks,
    out: Path,
    stage: Stage,
    config: DiTTrainingConfig,
    seconds: float | None,
) -> dict[str, float]:
    history = recipe.history_of(stage)
    sources, held_out = step_sources(recipe, out, config)
    steps = Steps(sources, ClipEncoder(networks.require_vae()), recipe.num_workers)
    rollouts = _rollouts(recipe, networks, held_out.captions, config.num_chunks)
    parent = _parent(recipe, networks, stage, config)
    own = None
    if config.long_rollouts:
        own = OwnRollouts(networks.require_vae(), recipe.stream.replace(history=history), config.switch)
    task = DiTTask(networks.text_to_latents, history, config, steps, held_out, rollouts, parent, own)
    try:
        return networks.run(stage, task, config, networks.text_to_latents, seconds)
    finally:
        steps.close()


def _parent(recipe: Recipe, networks: _Networks, stage: Stage, config: DiTTrainingConfig) -> Parent | None:
    """Who teaches a stage, if not its clips; `networks` may be past its start already."""
    if config.learns_from == "clips":
        return None
    if config.learns_from == "start":
        start = _Networks(recipe, networks.out, before=stage)
        if not start.knows:
            raise TrainingError(
                f'{stage}.learns_from="start", but nothing before stage {stage} has trained the networks',
                f"run the stages before it, set warm_start, or {stage}.learns_from=clips",
            )
        return without_memory(start.text_to_latents, recipe.history_of(stage))
    parent = load_parent(recipe)
    parent.networks.to(recipe.device)
    return parent


def _train_layers(recipe: Recipe, networks: _Networks, out: Path, seconds: float | None) -> dict[str, float]:
    clips = _encoded_clips(recipe, networks, out, recipe.layers)
    parent = load_parent(recipe, same_memory=True).networks
    task = LayersTask(networks.text_to_latents, parent, recipe.stream.history, recipe.layers, *clips)
    figures = networks.run("layers", task, recipe.layers, networks.text_to_latents, seconds)
    networks.text_to_latents.requires_grad_(True)
    return figures


def _train_memory_alone(
    recipe: Recipe, networks: _Networks, out: Path, seconds: float | None
) -> dict[str, float]:
    config, module, history = recipe.evictions, networks.text_to_latents, recipe.stream.history
    module.requires_grad_(False)
    vae, stride = networks.require_vae(), recipe.vae_model.temporal_stride
    renderer, encoder = ClipRenderer(stride, recipe.vae_model.spatial_stride, guided=True), ClipEncoder(vae)
    walked = {name: t for name, t in module.state_dict().items() if not name.startswith("dit.memory.")}
    sources = {
        name: (RecallSource(renderer, like, history, config.absence), count)
        for name, like, count in (
            ("train", recipe.latents, config.num_batches),
            ("held-out", recipe.held_out, config.num_held_out_batches),
        )
    }
    folder = out / "evicted"
    memory = recipe.dit_model.memory
    assert memory is not None, "checked before"
    identity = {
        "batches": [config.loop.seed, config.loop.precision, config.num_clips, config.absence],
        "clips": [source.config.model_dump(mode="json") for source, _ in sources.values()],
        "history": history.model_dump(mode="json"),
        "memory": memory.model_dump(mode="json"),
        "weights": weights_digest({**walked, **vae.encoder.state_dict(prefix="vae.encoder.")}),
        "world": VERSION,
    }
    build_evictions(module, history, encoder, sources, config, folder, identity)
    paths = [batch_paths(folder, name, count) for name, (_, count) in sources.items()]
    size = recipe.vae_model.spatial_stride
    grid = module.dit.token_grid(recipe.stream.height // size, recipe.stream.width // size)
    task = EvictionsTask(module.dit, grid, config, *paths, fresh=not networks.remembers)
    figures = networks.run("evictions", task, config, module, seconds)
    module.requires_grad_(True)
    return figures


def _follow(recipe: Recipe, networks: _Networks, out: Path, seconds: float | None) -> dict[str, float]:
    stream, config = recipe.stream, recipe.trajectory
    clips = _encoded_clips(recipe, networks, out, config)
    task = TrajectoryTask(
        networks.text_to_latents,
        networks.teacher,
        stream.history,
        stream.schedule,
        config,
        *clips,
        _rollouts(recipe, networks, clips[-1].captions, config.num_chunks),
    )
    return networks.run("trajectory", task, config, networks.text_to_latents, seconds)


def _match(recipe: Recipe, networks: _Networks, out: Path, seconds: float | None) -> dict[str, float]:
    stream, config = recipe.stream, recipe.dmd
    stride, size = recipe.vae_model.temporal_stride, recipe.vae_model.spatial_stride
    held_out = captions_of(recipe.held_out, stride)
    shape = (recipe.vae_model.latent_channels, stream.height // size, stream.width // size)
    task = DMDTask(
        networks.text_to_latents,
        networks.teacher,
        stream.history,
        stream.schedule,
        config,
        captions_of(recipe.first_latents, stride),
        held_out,
        shape,
        rollouts=_rollouts(recipe, networks, held_out, config.num_chunks),
        temperatures=stream.temperatures,
    )
    return networks.run("dmd", task, config, networks.text_to_latents, seconds)


def _encoded_clips(
    recipe: Recipe, networks: _Networks, out: Path, config: ClipsPerStep
) -> tuple[ClipSource[Clips] | None, ClipSource[Clips] | None, Clips]:
    """As `_load_clips`, all of them as latents."""
    first, whole, held_out = load_clips(recipe, out, config, clip_renderer(recipe, config))
    encoder = ClipEncoder(networks.require_vae())
    encoded = [None if source is None else EncodedClips(source, encoder) for source in (first, whole)]
    return encoded[0], encoded[1], held_out


def _rollouts(
    recipe: Recipe, networks: _Networks, held_out: Sequence[str], num_chunks: int
) -> SampleRollouts:
    """Samples for the log: a few held-out prompts, streamed as the finished model will be."""
    return SampleRollouts(networks.require_vae(), recipe.stream, held_out[:_NUM_SAMPLES], num_chunks)


def _export(recipe: Recipe, networks: _Networks, out: Path) -> dict[str, float]:
    """The model's file and, where a stage distilled it, its teacher's: the same with many guided steps."""
    networks.to_host()
    module, teacher = networks.text_to_latents, networks.teacher
    path = out / f"{recipe.name}.safetensors"
    vae = networks.require_vae()
    save_model(path, recipe.card, {"vae": vae, "text": module.text, "dit": module.dit}, recipe.base)
    distilled = [
        settings.guidance
        for stage, settings in (("trajectory", recipe.trajectory), ("dmd", recipe.dmd))
        if (out / stage / "weights.safetensors").exists()
    ]
    if distilled:
        schedule = recipe.stream.schedule.with_num_steps(_NUM_TEACHER_STEPS)
        stream = recipe.stream.replace(
            schedule=schedule,
            opening_schedule=None,
            temperature=1.0,
            guidance=distilled[-1],
            opening_guidance=None,
        )
        card = recipe.card.replace(name=f"{recipe.name}-teacher", stream=stream)
        parts = {"vae": vae, "text": teacher.text, "dit": teacher.dit}
        save_model(out / f"{card.name}.safetensors", card, parts)
    return {"bytes": float(path.stat().st_size)}

"""A large model into a causal few-step one. Without video data: distribution matching on its own rollouts, as
Self-Forcing (arXiv 2506.08009) and Echo-Infinity (arXiv 2606.04527) train Wan2.1-T2V-1.3B. With videos, as
VideoMLA (arXiv 2605.30351): teacher forcing and consistency distillation before that.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from longtake.errors import TrainingError
from longtake.io.checkpoints import (
    NETWORK_KEY,
    STREAM_KEY,
    load_into,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.memory import MemoryEncoder
from longtake.train.distil_recipe import ON_VIDEOS, TRAINING, UNTRAINED, DistillationRecipe, DistillationStage
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd import DMDTask
from longtake.train.fit import this_machine
from longtake.train.latents import Clips, ClipsPerStep
from longtake.train.loop import STOPPED_EARLY, Task, autocast_dtype, run
from longtake.train.lora import merge_lora
from longtake.train.networks import TextToLatents
from longtake.train.prompts import EmbeddedPrompts, embed_prompts, read_prompts
from longtake.train.steps import Steps, StepSources
from longtake.train.trajectory import TrajectoryConfig, TrajectoryTask
from longtake.train.videos import (
    StoredClips,
    WanEncoder,
    captioned_videos,
    encode_videos,
    split_videos,
)

_WEIGHTS_NAME = "weights.safetensors"


def distil(
    recipe: DistillationRecipe,
    out: Path,
    stages: Sequence[str] | None = None,
    stop_after_seconds: float | None = None,
    memory_gb: float | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Run a recipe's stages, going on where `out` shows an earlier run stopped.

    Args:
        recipe: what to train.
        out: holds `prompts` and `clips` (the caches), a folder for every stage that trains (checkpoint, log,
            weights) and `NAME.safetensors` at the end.
        stages: a part of the recipe's stages.
        stop_after_seconds: of a stage that trains, which is then resumed later.
        memory_gb: that training may count on; that of the device where None.
        tell: given a line about every shard of clips, and every video that is left out.

    Returns:
        the last stage's figures.

    Raises:
        ConfigError: settings that do not fit each other.
        TrainingError: files are missing, memory does not suffice, or the loss diverged.
    """
    wanted = stages or recipe.stages
    recipe.check_settings(wanted)
    if any(stage in wanted for stage in TRAINING):
        recipe.check(wanted, this_machine(recipe.device, memory_gb))
    torch.manual_seed(recipe.seed)
    actions: dict[str, Callable[[], dict[str, float]]] = {
        "prompts": lambda: _embed(recipe, out),
        "clips": lambda: _encode(recipe, out, tell),
        "teacher_forcing": lambda: _force(recipe, out, stop_after_seconds),
        "consistency": lambda: _make_consistent(recipe, out, stop_after_seconds),
        "dmd": lambda: _match(recipe, out, stop_after_seconds),
        "export": lambda: _export(recipe, out),
    }
    figures: dict[str, float] = {}
    for stage in wanted:
        figures = actions[stage]()
        gc.collect()  # a task and its learners hold each other: its networks would stay beside the next one's
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if STOPPED_EARLY in figures:
            break
    return figures


def _prompts(recipe: DistillationRecipe) -> tuple[list[str], list[str]]:
    return read_prompts(Path(recipe.prompts)), read_prompts(Path(recipe.held_out_prompts))


def _embed(recipe: DistillationRecipe, out: Path) -> dict[str, float]:
    training, held_out = _prompts(recipe)
    every = [recipe.dmd.negative_prompt, *held_out, *training]
    if any(stage in ON_VIDEOS for stage in recipe.stages):
        captions = [video.text for video in captioned_videos(Path(recipe.videos.folder))]
        every += ["", recipe.consistency.negative_prompt, *captions]
    every = list(dict.fromkeys(every))
    length = recipe.dit_model.text_length
    embed_prompts(every, recipe.text_encoder, out / "prompts", length, recipe.device)
    return {"prompts": float(len(every))}


def _encode(recipe: DistillationRecipe, out: Path, tell: Callable[[str], None]) -> dict[str, float]:
    config, size = recipe.videos, (recipe.stream.height, recipe.stream.width)
    videos = split_videos(captioned_videos(Path(config.folder)), config.num_held_out)

    channels, *cells = recipe.latent_shape

    def encoder() -> WanEncoder:
        made = WanEncoder(recipe.autoencoder, recipe.device)
        found = tuple(made(torch.zeros(1, 1, *size, 3, dtype=torch.uint8)).shape[2:])
        if found != (channels, *cells):
            raise TrainingError(
                f"autoencoder={recipe.autoencoder!r} makes latents of {found} of {size[0]}x{size[1]} "
                f"pixels, and the network reads {(channels, *cells)}",
                "use the autoencoder that the network was trained with",
            )
        return made

    counts = {
        name: encode_videos(some, config, size, out / "clips" / name, recipe.autoencoder, encoder, tell)
        for name, some in zip(("train", "held_out"), videos, strict=True)
    }
    return {f"{name} clips": float(count) for name, count in counts.items()}


def _clips(
    recipe: DistillationRecipe, out: Path, config: ClipsPerStep
) -> tuple[StoredClips | None, StoredClips | None, Clips]:
    """First chunks and whole clips, where a stage reads any, and held-out clips."""
    frames = recipe.stream.history.chunk_frames
    whole, folder = config.num_chunks * frames, out / "clips"
    channels, *cells = recipe.latent_shape
    found = tuple(StoredClips(folder / "held_out").select([0]).latents_bfchw.shape[2:])
    if found != (channels, *cells):
        raise TrainingError(
            f"{folder} holds latents of {found}, and the recipe is for {(channels, *cells)}",
            "encode the videos for its size, in another folder",
        )
    held_out = StoredClips(folder / "held_out", whole)
    return (
        StoredClips(folder / "train", frames) if config.num_first_clips else None,
        StoredClips(folder / "train", whole) if config.num_clips else None,
        held_out.select(range(len(held_out))),
    )


def _prompted(recipe: DistillationRecipe, out: Path, stage: DistillationStage) -> TextToLatents:
    """Embedded prompts, and the network as the stage before left it."""
    weights = recipe.generator
    for before in TRAINING[: TRAINING.index(stage)]:
        if before not in recipe.stages:
            continue
        weights = str(out / before / _WEIGHTS_NAME)
        if not Path(weights).exists():
            raise TrainingError(f"{weights} does not exist", f"run stage {before} first, or leave it out")
    dit = _load_dit("generator", recipe.dit_model, weights, recipe.device, torch.float32)
    text = EmbeddedPrompts.load(out / "prompts", recipe.dit_model.text_width)
    return TextToLatents(text, dit).to(recipe.device)


def _force(recipe: DistillationRecipe, out: Path, seconds: float | None) -> dict[str, float]:
    config = recipe.teacher_forcing
    first, whole, held_out = _clips(recipe, out, config)
    module = _prompted(recipe, out, "teacher_forcing")
    steps = Steps(StepSources(config, first, whole))
    task = DiTTask(module, recipe.stream.history, config, steps, held_out)
    return _run(task, config, module, out / "teacher_forcing", seconds)


def _make_consistent(recipe: DistillationRecipe, out: Path, seconds: float | None) -> dict[str, float]:
    config, stream = recipe.consistency, recipe.stream
    first, whole, held_out = _clips(recipe, out, config)
    module = _prompted(recipe, out, "consistency")
    task = TrajectoryTask(
        module, copy.deepcopy(module), stream.history, stream.schedule, config, first, whole, held_out
    )
    return _run(task, config, module, out / "consistency", seconds)


def _run(
    task: Task,
    config: DiTTrainingConfig | TrajectoryConfig,
    module: TextToLatents,
    folder: Path,
    seconds: float | None,
) -> dict[str, float]:
    """Train a stage, and leave the network's weights where it was not stopped early."""
    figures = run(task, config.loop, folder, seconds, config)
    if STOPPED_EARLY not in figures:
        write_safetensors(folder / _WEIGHTS_NAME, module.dit.state_dict(), {})
    return figures


def _match(recipe: DistillationRecipe, out: Path, seconds: float | None) -> dict[str, float]:
    training, held_out = _prompts(recipe)
    half = autocast_dtype(recipe.dmd.loop.precision, torch.device(recipe.device)) is torch.bfloat16
    frozen_dtype = torch.bfloat16 if half and recipe.half_teacher else torch.float32
    module = _prompted(recipe, out, "dmd")
    critic, teacher = (
        TextToLatents(
            EmbeddedPrompts.load(out / "prompts", model.text_width),
            _load_dit(name, model, weights, recipe.device, dtype),
        ).to(recipe.device)
        for name, model, weights, dtype in (
            ("critic", recipe.critic_model, recipe.critic, torch.float32),
            ("teacher", recipe.teacher_model, recipe.teacher, frozen_dtype),
        )
    )
    task = DMDTask(
        module,
        teacher,
        recipe.stream.history,
        recipe.stream.schedule,
        recipe.dmd,
        training,
        held_out,
        recipe.latent_shape,
        critic,
        temperatures=recipe.stream.temperatures,
    )
    figures = run(task, recipe.dmd.loop, out / "dmd", seconds, recipe.dmd)
    merge_lora(module)
    if STOPPED_EARLY not in figures:
        write_safetensors(out / "dmd" / _WEIGHTS_NAME, module.dit.state_dict(), {})
    return figures


def _load_dit(name: str, model: DiTConfig, weights: str, device: str, dtype: torch.dtype) -> DiT:
    """A network with its weights, on the device; a large one's random start is never computed."""
    if weights == UNTRAINED:
        return DiT(model).to(device, dtype)
    if not Path(weights).exists():
        raise TrainingError(
            f"{name}={weights!r} is neither a file nor a folder",
            f"give the path of its weights with --set {name}=PATH",
        )
    state = read_weights(Path(weights))
    if model.memory is not None and not any(key.startswith("memory.") for key in state):
        memory = MemoryEncoder(model.memory)
        state |= {f"memory.{key}": tensor for key, tensor in memory.state_dict().items()}
    with torch.device("meta"):
        dit = DiT(model).to(dtype)
    dit.to_empty(device=device)
    load_into(dit, state, weights)
    return dit


def _export(recipe: DistillationRecipe, out: Path) -> dict[str, float]:
    """The generator's averaged weights as the last stage left them, bf16, under Wan's names."""
    last = [stage for stage in recipe.stages if stage in TRAINING][-1]
    trained = out / last / _WEIGHTS_NAME
    if not trained.exists():
        raise TrainingError(f"{trained} does not exist", f"run stage {last} first")
    state, _ = read_safetensors(trained)
    path = out / f"{recipe.name}.safetensors"
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    told = {NETWORK_KEY: recipe.dit_model.dumps(), STREAM_KEY: recipe.stream.dumps()}
    write_safetensors(path, halved, {"recipe": recipe.dumps(), **told})
    return {"bytes": float(path.stat().st_size)}

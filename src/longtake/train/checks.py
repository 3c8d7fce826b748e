"""Whether the parts of a small model's recipe fit each other, and what its stages will take."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from longtake.errors import ConfigError
from longtake.history.base import check_ids_fit
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import PolicyConfig
from longtake.history.retention import KeyFramesConfig, MostAttendedConfig
from longtake.models.dit import DiT
from longtake.models.latent_config import LatentConfig
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_plans import plan_dmd
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.fit import check_multiple
from longtake.train.long_clips import first_late_chunk
from longtake.train.plan import Machine, StagePlan
from longtake.train.stage_plans import (
    Sizes,
    plan_dit,
    plan_evictions,
    plan_layers,
    plan_trajectory,
    plan_vae,
)

if TYPE_CHECKING:
    from longtake.train.recipe import Recipe

KeptConfig = KeyFramesConfig | MostAttendedConfig
_CACHES = ("first_latents", "latents", "held_out")
_ON_ANY_DEVICE = ("latents", "first", "windows", "memory", "export")
_WALKING = ("layers", "first", "windows", "memory", "trajectory")  # stages that read clips


def plan_of(recipe: Recipe, stage: str, machine: Machine) -> StagePlan | None:
    """The demands of a recipe's stage; None where it trains nothing."""
    stride = recipe.vae_model.spatial_stride
    sizes = Sizes(
        recipe.vae_model,
        recipe.text_model,
        recipe.dit_model,
        recipe.history_of(stage),
        recipe.stream.schedule,
        recipe.held_out.height // stride,
        recipe.held_out.width // stride,
        recipe.stream.opening_schedule,
        recipe.stream.guidance is not None,
    )
    match stage:
        case "vae":
            return plan_vae(stage, recipe.vae_model, recipe.vae, machine)
        case "decoder":
            return plan_vae(stage, recipe.vae_model, recipe.decoder, machine)
        case "layers":
            return plan_layers(stage, sizes, recipe.layers, machine, _clip_bytes(recipe, stage))
        case "first":
            return plan_dit(stage, sizes, recipe.first, machine, _clip_bytes(recipe, stage))
        case "windows":
            return plan_dit(stage, sizes, recipe.windows, machine, _clip_bytes(recipe, stage))
        case "evictions":
            return plan_evictions(stage, sizes, recipe.evictions, machine)
        case "memory":
            return plan_dit(stage, sizes, recipe.memory, machine, _clip_bytes(recipe, stage))
        case "trajectory":
            return plan_trajectory(stage, sizes, recipe.trajectory, machine, _clip_bytes(recipe, stage))
        case "dmd":
            return plan_dmd(stage, sizes, recipe.dmd, machine)
        case _:
            return None


def _clip_bytes(recipe: Recipe, stage: str) -> int:
    """Cached clips that a stage holds in memory: latents and foreground, in half precision."""
    total = 0
    for name, num_frames in _clips_read(recipe, stage).items():
        cache = getattr(recipe, name)
        if name != "held_out" and getattr(recipe, stage).fresh_clips:
            continue
        stride = recipe.vae_model.spatial_stride
        cells = (cache.height // stride) * (cache.width // stride)
        total += cache.num_clips * num_frames * cells * (recipe.vae_model.latent_channels + 1) * 2
    return total


def _clips_read(recipe: Recipe, stage: str) -> dict[str, int]:
    """Latent frames that a stage reads of each kind of clips."""
    config, chunk_frames = getattr(recipe, stage), recipe.stream.history.chunk_frames
    whole = config.num_chunks * chunk_frames
    read = {}
    if config.num_first_clips > 0:
        read["first_latents"] = chunk_frames
    if config.num_clips > 0:
        read["latents"] = whole
    return {**read, "held_out": whole}


def check_parts(recipe: Recipe, stages: Collection[str]) -> None:
    """Refuse what a stage would stumble over later.

    Raises:
        ConfigError: two settings that do not fit each other, with a change that mends it.
    """
    on_host = [stage for stage in stages if stage not in _ON_ANY_DEVICE]
    if recipe.device != "cpu" and on_host:
        raise ConfigError(
            f"device={recipe.device!r}, but stage {on_host[0]} trains on the CPU",
            f"name other stages, of {', '.join(_ON_ANY_DEVICE)}, or set device=cpu",
        )
    _check_sizes(recipe, stages)
    _check_networks(recipe)
    _check_memory(recipe, stages)
    if any(stage in stages for stage in (*_WALKING, "dmd")):
        check_storage(recipe.dit_model.latent, recipe.stream.history.policy)
    if "layers" in stages and (recipe.dit_model.latent is None or recipe.parent is None):
        raise ConfigError(
            f"stage layers teaches latent attention what a dense parent answers, but dit_model.latent="
            f"{recipe.dit_model.latent} and parent={recipe.parent!r}",
            "set both, and warm_start to the parent or to what `longtake convert` made of it",
        )
    if recipe.needs_parent(stages) and recipe.parent is None:
        raise ConfigError(
            'learns_from="parent" names no model, since parent=None',
            "set parent to the model whose predictions are to be learned",
        )
    for stage in _WALKING:
        if stage in stages:
            _check_clips(recipe, stage)
    path = recipe.stream.schedule.path
    if path is not None and ("dmd" in stages or "trajectory" in stages):
        raise ConfigError(
            f"stream.schedule.path={path}: few-step generators are trained with new noise for every step",
            "set it to null; stream.opening_schedule may have one",
        )
    if "dmd" in stages and recipe.dmd.critic_updates > recipe.dmd.loop.num_steps:
        raise ConfigError(
            f"dmd.critic_updates={recipe.dmd.critic_updates} exceeds "
            f"dmd.loop.num_steps={recipe.dmd.loop.num_steps}: the generator would learn once",
            "train longer or update the critic less often",
        )


def _check_networks(recipe: Recipe) -> None:
    dit, text, channels = recipe.dit_model, recipe.text_model, recipe.vae_model.latent_channels
    pairs = (
        ("dit_model.text_width", dit.text_width, "text_model.width", text.width),
        ("dit_model.text_length", dit.text_length, "text_model.max_words + 1", text.text_length),
        ("dit_model.in_channels", dit.in_channels, "vae_model.latent_channels", channels),
        ("dit_model.out_channels", dit.out_channels, "vae_model.latent_channels", channels),
        ("dit_model.patch_size[0]", dit.patch_size[0], "the frames a history evicts at a time", 1),
    )
    for name, value, other, expected in pairs:
        if value != expected:
            raise ConfigError(f"{name}={value} does not fit {other}={expected}", "make them equal")
    history, stride = recipe.stream.history, recipe.vae_model.spatial_stride
    with torch.device("meta"):
        made = DiT(dit)
    grid = made.token_grid(recipe.stream.height // stride, recipe.stream.width // stride)
    memory = made.policy(history.policy, grid).memory_grid
    check_ids_fit(history, 0 if memory is None else memory.num_frames)


def _check_memory(recipe: Recipe, stages: Collection[str]) -> None:
    policy = recipe.stream.history.policy
    teaching = [stage for stage in ("evictions", "memory") if stage in stages]
    if teaching and not (isinstance(policy, EvolvingConfig) and policy.mode == "update"):
        raise ConfigError(
            f'stage {teaching[0]} teaches a policy that learns, and stream.history.policy is "{policy.kind}"'
            + (f' in mode "{policy.mode}"' if isinstance(policy, EvolvingConfig) else ""),
            'set stream.history.policy.kind="evolving" and its mode="update", or leave the stage out',
        )
    if "evictions" in stages:
        _check_evictions(recipe)
    walking = [stage for stage in _WALKING if stage in stages]
    if isinstance(policy, EvolvingConfig) and policy.timing == "second_pass" and walking:
        raise ConfigError(
            f'policy.timing="second_pass" is of passes that follow each other, which stage {walking[0]} '
            "does not have",
            'set stream.history.policy.timing="chunk", or train by dmd alone',
        )


def _check_evictions(recipe: Recipe) -> None:
    """The memory is compared with frames, token by token."""
    memory, history = recipe.dit_model.memory, recipe.stream.history
    assert memory is not None, "the policy has been made"
    grid = _token_grid(recipe)
    if (memory.rows, memory.columns) != grid or memory.num_frames > history.chunk_frames:
        raise ConfigError(
            f"stage evictions compares a memory of {memory.num_frames} x {memory.rows} x {memory.columns} "
            f"tokens with frames of a chunk, of which there are {history.chunk_frames} of "
            f"{grid[0]} x {grid[1]} tokens",
            "make dit_model.memory as large, or leave the stage out",
        )
    if recipe.dit_model.latent is not None:
        raise ConfigError(
            "stage evictions keeps per-head keys and values, and dit_model.latent is set",
            "teach the dense model and convert it then, or leave the stage out",
        )
    if history.window_frames is None:
        raise ConfigError(
            "stage evictions counts absences in windows, and the history's is unlimited",
            "set stream.history.window_frames",
        )


def _token_grid(recipe: Recipe) -> tuple[int, int]:
    """Rows and columns of a frame's tokens."""
    stride = recipe.vae_model.spatial_stride
    _, height, width = recipe.dit_model.patch_size
    return recipe.stream.height // (stride * height), recipe.stream.width // (stride * width)


def check_storage(latent: LatentConfig | None, policy: PolicyConfig) -> None:
    """Refuse packed latents beside policies that training cannot give bytes to.

    Raises:
        ConfigError: both are there.
    """
    if latent is not None and latent.storage != "full" and isinstance(policy, KeptConfig):
        raise ConfigError(
            f'latent.storage="{latent.storage}" is learned with as rounded numbers, which the policy '
            f'"{policy.kind}" cannot keep as bytes',
            'set dit_model.latent.storage="full" for training, or another policy',
        )


def _check_sizes(recipe: Recipe, stages: Collection[str]) -> None:
    stride = recipe.vae_model.spatial_stride
    _, rows, columns = recipe.dit_model.patch_size
    patches = (stride * rows, stride * columns)
    why = f"which one token covers ({stride} pixels a latent cell)"
    check_multiple("stream", recipe.stream.height, recipe.stream.width, patches, why)
    for name in _CACHES:
        cache = getattr(recipe, name)
        check_multiple(name, cache.height, cache.width, patches, why)
    for name in ("vae", "decoder"):
        if name in stages:
            config = getattr(recipe, name)
            check_multiple(name, config.height, config.width, (stride, stride), "the autoencoder's stride")


def _check_clips(recipe: Recipe, stage: str) -> None:
    config, chunk_frames = getattr(recipe, stage), recipe.stream.history.chunk_frames
    recalls = isinstance(config, DiTTrainingConfig) and config.num_recall_clips > 0
    if recalls and recipe.stream.history.window_frames is None:
        raise ConfigError(
            f"{stage}.num_recall_clips={config.num_recall_clips} counts absences in windows, and the "
            "history's is unlimited",
            "set stream.history.window_frames",
        )
    if isinstance(config, DiTTrainingConfig) and config.memory_guide_weight > 0:
        _check_memory_guide(recipe, stage)
    lasts = isinstance(config, DiTTrainingConfig) and config.num_long_clips > 0
    fewest = first_late_chunk(recipe.stream.history) + config.num_long_learned if lasts else 0
    if lasts and config.num_long_chunks < fewest:
        raise ConfigError(
            f"{stage}.num_long_chunks={config.num_long_chunks} leaves no {config.num_long_learned} chunks "
            "after sink and window have filled",
            f"set {stage}.num_long_chunks={fewest} or more",
        )
    if not config.walks and not recalls and not lasts:
        raise ConfigError(
            f"{stage}.num_clips=0 and {stage}.num_first_clips=0 leave nothing to learn from", "raise either"
        )
    for name, num_frames in _clips_read(recipe, stage).items():
        cache, cached = getattr(recipe, name), name == "held_out" or not config.fresh_clips
        if cached and cache.num_latent_frames < num_frames:
            raise ConfigError(
                f"{name}.num_latent_frames={cache.num_latent_frames}, but {stage} walks {num_frames} frames "
                f"of a clip",
                f"set {name}.num_latent_frames={num_frames} or {stage}.num_chunks="
                f"{cache.num_latent_frames // chunk_frames}",
            )
        if cached and name != "held_out" and _overlap(cache, recipe.held_out):
            raise ConfigError(
                f"{name} and held_out share scenes: both hold seed "
                f"{max(cache.first_seed, recipe.held_out.first_seed)}",
                f"set held_out.first_seed={cache.first_seed + cache.num_clips} or more",
            )


def _check_memory_guide(recipe: Recipe, stage: str) -> None:
    """The guide of a frame is read off memory tokens that stand where the frame's tokens do."""
    memory, grid = recipe.dit_model.memory, _token_grid(recipe)
    if memory is not None and (memory.rows, memory.columns) != grid:
        raise ConfigError(
            f"{stage}.memory_guide_weight={getattr(recipe, stage).memory_guide_weight} reads a memory of "
            f"{memory.rows} x {memory.columns} tokens as a frame of {grid[0]} x {grid[1]}",
            f"set dit_model.memory.rows={grid[0]} and columns={grid[1]}, or the weight to 0",
        )


def _overlap(one: LatentCacheConfig, other: LatentCacheConfig) -> bool:
    ends = [cache.first_seed + cache.num_clips for cache in (one, other)]
    return one.first_seed < ends[1] and other.first_seed < ends[0]

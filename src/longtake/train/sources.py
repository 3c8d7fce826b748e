"""Where the stages of a recipe take their clips from: caches in its folder, or the renderer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.latents import Clips, ClipSource, ClipsPerStep, FreshClips, load_cache
from longtake.train.long_clips import LongSource, first_late_chunk
from longtake.train.recall import RecallSource
from longtake.train.recipe import Recipe
from longtake.train.rendering import ClipRenderer, Rendered
from longtake.train.steps import StepSources


def step_sources(recipe: Recipe, out: Path, config: DiTTrainingConfig) -> tuple[StepSources, Clips]:
    """Of a stage of teacher forcing, and its held-out clips."""
    renderer = clip_renderer(recipe, config)
    first, whole, held_out = load_clips(recipe, out, config, renderer)
    recall, long = _recall(recipe, config, renderer), _long_clips(recipe, config, renderer)
    return StepSources(config, first, whole, recall, long), held_out


def clip_renderer(recipe: Recipe, config: ClipsPerStep) -> ClipRenderer:
    """Of a stage's fresh clips, with what its guide asks for."""
    renderer = ClipRenderer(recipe.vae_model.temporal_stride, recipe.vae_model.spatial_stride)
    if not isinstance(config, DiTTrainingConfig):
        return renderer
    return dataclasses.replace(renderer, guided=config.guided, ahead=config.guide_ahead)


def load_clips(
    recipe: Recipe, out: Path, config: ClipsPerStep, renderer: ClipRenderer
) -> tuple[ClipSource[Clips | Rendered] | None, ClipSource[Clips | Rendered] | None, Clips]:
    """First chunks and whole clips, where the stage reads any, and held-out clips."""
    chunk_frames = recipe.stream.history.chunk_frames
    num_frames = config.num_chunks * chunk_frames

    def source(name: str, count: int, frames: int) -> ClipSource[Clips | Rendered] | None:
        if count == 0:
            return None
        if config.fresh_clips:
            like: LatentCacheConfig = getattr(recipe, name)
            return FreshClips(renderer, like.replace(num_latent_frames=frames))
        return load_cache(out / name, frames)

    return (
        source("first_latents", config.num_first_clips, chunk_frames),
        source("latents", config.num_clips, num_frames),
        load_cache(out / "held_out", num_frames),
    )


def _recall(recipe: Recipe, config: DiTTrainingConfig, renderer: ClipRenderer) -> RecallSource | None:
    if config.num_recall_clips == 0:
        return None
    return RecallSource(
        renderer,
        recipe.latents,
        recipe.stream.history,
        config.recall_absence,
        num_away=config.recall_away_chunks,
        learned_share=config.recall_learned_share,
    )


def _long_clips(recipe: Recipe, config: DiTTrainingConfig, renderer: ClipRenderer) -> LongSource | None:
    if config.num_long_clips == 0:
        return None
    return LongSource(
        renderer,
        recipe.latents,
        config.num_long_chunks,
        config.num_long_learned,
        first_late_chunk(recipe.stream.history),
        config.num_long_returns,
        (recipe.stream.history.window_frames or 0) * recipe.vae_model.temporal_stride,
        config.long_pauses,
        whole=not config.long_rollouts,
    )

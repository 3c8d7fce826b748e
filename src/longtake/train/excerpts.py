"""Which part of a scene a clip of training shows, and under which prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from longtake.config import Config
from longtake.world import Scene, sample_scene
from longtake.world.captions import Split
from longtake.world.motion import Camera
from longtake.world.vocabulary import Motion

Prompts = tuple[tuple[int, str], ...]
"""Of a clip: (latent frame from which it is in force, text), the first at 0."""

_SECOND_DRAW = 1 << 36  # between the seeds of training and those of held-out clips


class LatentCacheConfig(Config):
    """Which clips a cache holds, or fresh clips are like. Clip i shows scene `first_seed + i`."""

    first_seed: int = Field(0, ge=0)
    num_clips: int = Field(4096, ge=1)
    clips_per_shard: int = Field(512, ge=1)
    num_latent_frames: int = Field(21, ge=1)
    chunk_frames: int = Field(3, ge=1, description="latent frames; prompts switch where a chunk begins")
    max_start_frame: int = Field(400, ge=1)
    levels: tuple[int, ...] = Field((1,), min_length=1, description="clip i is of the (i modulo n)-th level")
    turns: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of panning clips that are taken from where the camera turns round, so that "
        "something may come back within the clip",
    )
    favoured_motion: Motion | None = Field(
        None, description="scenes in which nothing moves so are drawn once more: for what is learned last"
    )
    split: Split = "train"
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)

    @property
    def num_shards(self) -> int:
        """Files that the cache is split into."""
        return -(-self.num_clips // self.clips_per_shard)


@dataclass(frozen=True)
class Excerpt:
    """What a clip shows.

    Attributes:
        scene: that it is taken from.
        start: its first pixel frame in the scene.
        prompts: with a switch, if there is one, where a chunk begins.
        opens: whether the first chunk follows from the prompt; in the middle of a pan it does not, since
            no prompt says where the camera is.
    """

    scene: Scene
    start: int
    prompts: Prompts
    opens: bool


def captions_of(config: LatentCacheConfig, stride: int) -> tuple[str, ...]:
    """What the clips of a cache would open with, without making them; `stride` in pixel frames."""
    levels = config.levels
    excerpts = (
        excerpt(config, config.first_seed + index, levels[index % len(levels)], stride)
        for index in range(config.num_clips)
    )
    return tuple(item.prompts[0][1] for item in excerpts)


def excerpt(config: LatentCacheConfig, seed: int, level: int, stride: int) -> Excerpt:
    """The part of a scene that a clip shows.

    Args:
        config: the clips' length, chunks and split.
        seed: of the scene and of the part.
        level: of the scene.
        stride: pixel frames per latent frame.
    """
    scene = _scene(config, seed, level)
    rng = np.random.default_rng((seed, 1))
    first, *later = scene.segments
    if later:
        return _at_switch(config, scene, stride, rng)
    whole: Prompts = ((0, first.caption),)
    if not isinstance(first.camera, Camera) or not first.camera.panning:
        return Excerpt(scene, int(rng.integers(config.max_start_frame)), whole, True)
    several = config.num_latent_frames > config.chunk_frames
    if several and config.turns > 0 and rng.random() < config.turns:
        num_frames = 1 + (config.num_latent_frames - 1) * stride
        return Excerpt(scene, _before_turn(first.camera, num_frames, rng), whole, False)
    if not several or rng.random() < 0.5:
        return Excerpt(scene, 0, whole, True)
    period = round(2 * first.camera.travel / first.camera.speed)
    return Excerpt(scene, 1 + int(rng.integers(period)), whole, False)


def _scene(config: LatentCacheConfig, seed: int, level: int) -> Scene:
    """The scene of a seed, or another one where the favoured motion is missing from its first prompt."""
    scene = sample_scene(seed, level, config.split)
    motions = {item.motion for item in scene.segments[0].objects}
    if config.favoured_motion is None or config.favoured_motion in motions:
        return scene
    return sample_scene(seed + _SECOND_DRAW, level, config.split)


def _before_turn(camera: Camera, num_frames: int, rng: np.random.Generator) -> int:
    """First frame of a part in whose middle half the camera turns round, at the one end or the other."""
    turn = camera.travel / camera.speed * (1 + int(rng.integers(2)))
    return max(1, round(turn - num_frames * rng.uniform(0.25, 0.75)))


def _at_switch(config: LatentCacheConfig, scene: Scene, stride: int, rng: np.random.Generator) -> Excerpt:
    """A part in which the prompt switches where a chunk begins, or, if there is no room, no part with a
    switch.
    """
    num_frames = 1 + (config.num_latent_frames - 1) * stride
    first, switched = scene.segments[:2]
    end = scene.segments[2].start if len(scene.segments) > 2 else None
    starts = []
    for latent in range(config.chunk_frames, config.num_latent_frames, config.chunk_frames):
        start = switched.start - (1 + (latent - 1) * stride)
        if start >= 0 and (end is None or start + num_frames <= end):
            starts.append((start, latent))
    if not starts:
        start = int(rng.integers(max(1, switched.start - num_frames + 1)))
        return Excerpt(scene, start, ((0, first.caption),), True)
    start, latent = starts[int(rng.integers(len(starts)))]
    return Excerpt(scene, start, ((0, first.caption), (latent, switched.caption)), True)


def chunk_at(frame: int, chunk_frames: int, stride: int) -> int:
    """Index of the first chunk that begins at or after a pixel frame; `stride` of them per latent frame."""
    # The first latent frame is one pixel frame.
    return max(0, -(-(frame - 1 + stride) // (chunk_frames * stride))) if frame > 0 else 0


def chunk_start(chunk: int, chunk_frames: int, stride: int) -> int:
    """First pixel frame of a chunk."""
    return 1 + (chunk * chunk_frames - 1) * stride if chunk > 0 else 0


def prompts_in_force(prompts: Sequence[Prompts], frame: int) -> list[str]:
    """Of each clip the prompt at a latent frame."""
    return [next(text for start, text in reversed(of_clip) if start <= frame) for of_clip in prompts]


def changed(before: Sequence[str], now: Sequence[str]) -> list[int]:
    """Which clips' prompts differ."""
    return [row for row, (old, new) in enumerate(zip(before, now, strict=True)) if old != new]

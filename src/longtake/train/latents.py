"""Clips of the world as latents, with their prompts and where the foreground is: cached in shards on disk, or
rendered and encoded anew for every step.

Legend: b clips, f latent frames, t pixel frames, h/w latent rows and columns, c channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.state import PromptSwitch
from longtake.train.excerpts import LatentCacheConfig, Prompts, excerpt
from longtake.train.loop import autocast_dtype
from longtake.train.rendering import ClipRenderer, Rendered
from longtake.world import VERSION

_CLIPS_PER_BATCH = 8
_NUM_FRESH_SEEDS = 1 << 30


@dataclass(frozen=True)
class Clips:
    """Encoded clips: `latents_bfchw` (normalised, half precision), `foreground_bfhw` in 0..1, prompts,
    whether the first chunk follows from the prompt, and world levels; where asked for, `guide_bfkhw` says
    where objects are and go (`train.guide`).
    """

    latents_bfchw: Tensor
    foreground_bfhw: Tensor
    prompts: tuple[Prompts, ...]
    opens: tuple[bool, ...]
    levels: tuple[int, ...]
    guide_bfkhw: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def captions(self) -> tuple[str, ...]:
        """The prompt of each clip's beginning."""
        return tuple(prompts[0][1] for prompts in self.prompts)

    def select(self, rows: Sequence[int]) -> Clips:
        """These clips, in this order."""
        index = torch.tensor(rows, dtype=torch.long)
        return Clips(
            self.latents_bfchw[index],
            self.foreground_bfhw[index],
            tuple(self.prompts[row] for row in rows),
            tuple(self.opens[row] for row in rows),
            tuple(self.levels[row] for row in rows),
            None if self.guide_bfkhw is None else self.guide_bfkhw[index],
        )

    def draw(self, rng: np.random.Generator, count: int) -> Clips:
        """`count` clips at random, perhaps one of them twice."""
        return self.select(rng.integers(len(self), size=count).tolist())


DrawnT = TypeVar("DrawnT", bound=Clips | Rendered)
"""Clips before or after they are encoded."""
_DrawnT_co = TypeVar("_DrawnT_co", bound=Clips | Rendered, covariant=True)


class ClipSource(Protocol[_DrawnT_co]):
    """Where a stage takes its clips from."""

    def draw(self, rng: np.random.Generator, count: int) -> _DrawnT_co:
        """`count` clips that follow from the generator's state alone."""
        ...


class ClipsPerStep(Config):
    """The part of a stage's settings that says which clips it walks in every step."""

    num_clips: int = Field(16, ge=0, description="clips per step that are walked through all chunks")
    num_chunks: int = Field(7, ge=1, description="chunks of a clip")
    num_first_clips: int = Field(
        0, ge=0, description="clips per step of which only the first chunk is trained"
    )
    fresh_clips: bool = Field(
        False, description="render and encode clips anew for every step instead of reading a cache"
    )
    switch: PromptSwitch = Field(
        PromptSwitch(text="", memory="keep"),
        description="what becomes of the past where a clip's prompt switches; its text does not matter",
    )

    @model_validator(mode="after")
    def _switches_alone(self) -> ClipsPerStep:
        if self.switch.sink == "drop":
            raise ConfigError(
                'switch.sink="drop": clips of a batch switch at different times and keep a sink each',
                'use "keep" or "reencode"',
            )
        return self

    @property
    def walks(self) -> tuple[tuple[int, int], ...]:
        """(clips, chunks) of a step's walks."""
        walks = ((self.num_first_clips, 1), (self.num_clips, self.num_chunks))
        return tuple(walk for walk in walks if walk[0] > 0)

    def draw(
        self,
        rng: np.random.Generator,
        first_clips: ClipSource[DrawnT] | None,
        clips: ClipSource[DrawnT] | None,
    ) -> Iterator[tuple[DrawnT, int]]:
        """A step's clips and how many of their chunks are walked; None for a source that is not needed."""
        for source, count, num_chunks in (
            (first_clips, self.num_first_clips, 1),
            (clips, self.num_clips, self.num_chunks),
        ):
            if source is not None and count > 0:
                yield source.draw(rng, count), num_chunks


@dataclass(frozen=True)
class ClipEncoder:
    """Encodes rendered clips, on the VAE's device.

    Args:
        vae: encodes them; None where all clips are latents.
    """

    vae: TinyVAE | None

    @torch.no_grad()
    def encode(self, drawn: Rendered | Clips) -> Clips:
        """The same clips as latents where the VAE is; clips that are latents stay as they are."""
        if isinstance(drawn, Clips):
            return drawn
        assert self.vae is not None, "clips to encode, and no encoder"
        vae, device = self.vae, self.vae.latent_mean.device
        dtype = autocast_dtype("auto", device)
        latents = []
        with torch.autocast(device.type, enabled=False):  # see `train.rendering`
            for frames in torch.split(drawn.frames_bthwc, _CLIPS_PER_BATCH):
                state = vae.init_encode_state(len(frames), *frames.shape[2:4])
                with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                    pixels = frames.to(device, non_blocking=True).float().div(127.5).sub(1)
                    encoded, _ = vae.encode_chunk(pixels, state)
                latents.append(encoded.half())
            return Clips(
                torch.cat(latents),
                drawn.foreground_bfhw,
                drawn.prompts,
                drawn.opens,
                drawn.levels,
                drawn.guide_bfkhw,
            )


@dataclass(frozen=True)
class FreshClips:
    """Clips that no step has seen before, rendered when they are asked for.

    Rendering and encoding cost about a tenth of a training step; a model that goes over some thousand cached
    clips a few times learns them by heart instead (docs/experiments.md).
    """

    renderer: ClipRenderer
    config: LatentCacheConfig

    def draw(self, rng: np.random.Generator, count: int) -> Rendered:
        """`count` clips of scenes from `first_seed` on, their levels at random."""
        seeds = self.config.first_seed + rng.integers(_NUM_FRESH_SEEDS, size=count)
        levels = rng.integers(len(self.config.levels), size=count)
        excerpts = [
            excerpt(self.config, int(seed), self.config.levels[level], self.renderer.stride)
            for seed, level in zip(seeds, levels, strict=True)
        ]
        return self.renderer.render(excerpts, self.config)


@dataclass(frozen=True)
class EncodedClips:
    """A source whose clips come encoded."""

    source: ClipSource[Clips | Rendered]
    encoder: ClipEncoder

    def draw(self, rng: np.random.Generator, count: int) -> Clips:
        """See `ClipSource`."""
        return self.encoder.encode(self.source.draw(rng, count))


def encode_shard(vae: TinyVAE, config: LatentCacheConfig, shard: int) -> Clips:
    """Render and encode the clips of one shard of a cache."""
    first = shard * config.clips_per_shard
    last = min(config.num_clips, first + config.clips_per_shard)
    stride = vae.config.temporal_stride
    excerpts = [
        excerpt(config, config.first_seed + index, config.levels[index % len(config.levels)], stride)
        for index in range(first, last)
    ]
    renderer = ClipRenderer(stride, vae.config.spatial_stride)
    return ClipEncoder(vae).encode(renderer.render(excerpts, config))


def build_cache(vae: TinyVAE, config: LatentCacheConfig, folder: Path, weights_hash: str) -> None:
    """Write every shard that is missing. `weights_hash` ties the cache to the encoder that made it.

    Raises:
        TrainingError: the folder holds a cache of other clips or another encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_identity(config, folder, weights_hash)
    for shard in range(config.num_shards):
        path = _shard_path(folder, shard)
        if path.exists():
            continue
        clips = encode_shard(vae, config, shard)
        aside = path.with_suffix(".part")
        tensors = {"latents": clips.latents_bfchw, "foreground": clips.foreground_bfhw}
        about = {"prompts": clips.prompts, "opens": clips.opens, "levels": clips.levels}
        save_file(tensors, aside, metadata={key: json.dumps(value) for key, value in about.items()})
        os.replace(aside, path)


def _check_identity(config: LatentCacheConfig, folder: Path, weights_hash: str) -> None:
    identity = json.dumps(
        {"clips": config.model_dump(mode="json"), "weights": weights_hash, "world": VERSION}
    )
    path = folder / "cache.json"
    if not path.exists():
        path.write_text(identity)
    elif path.read_text() != identity:
        raise TrainingError(
            f"{folder} caches {path.read_text()}, not {identity}", "use another folder or remove it"
        )


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"clips-{shard:04d}.safetensors"


def load_cache(
    folder: Path, num_latent_frames: int | None = None, shards: Sequence[int] | None = None
) -> Clips:
    """Load a cache into memory, optionally only the first latent frames of each clip, or some shards only.

    Raises:
        TrainingError: there is no cache, or its clips are shorter than asked for.
    """
    paths = (
        sorted(folder.glob("clips-*.safetensors"))
        if shards is None
        else [_shard_path(folder, s) for s in shards]
    )
    if not paths or not all(path.exists() for path in paths):
        raise TrainingError(
            f"{folder} holds no complete latent cache", "run the stage that caches latents first"
        )
    parts = [_read_shard(path, num_latent_frames) for path in paths]
    return Clips(
        torch.cat([part.latents_bfchw for part in parts]),
        torch.cat([part.foreground_bfhw for part in parts]),
        tuple(prompts for part in parts for prompts in part.prompts),
        tuple(opens for part in parts for opens in part.opens),
        tuple(level for part in parts for level in part.levels),
    )


def _read_shard(path: Path, num_latent_frames: int | None) -> Clips:
    with safe_open(path, framework="pt") as file:
        stored, about = file.get_slice("latents"), file.metadata() or {}
        available = stored.get_shape()[1]
        if num_latent_frames is not None and num_latent_frames > available:
            raise TrainingError(
                f"num_latent_frames={num_latent_frames}, but clips in {path.parent} have {available}",
                "cache longer clips or train on shorter ones",
            )
        if "prompts" not in about:
            raise TrainingError(
                f"{path} was cached by an older version", "remove its directory and cache again"
            )
        latents = stored[:, :num_latent_frames]
        foreground = file.get_slice("foreground")[:, :num_latent_frames]
    kept = latents.shape[1]
    prompts = tuple(
        tuple((int(frame), str(text)) for frame, text in clip if frame < kept)
        for clip in json.loads(about["prompts"])
    )
    opens, levels = json.loads(about["opens"]), json.loads(about["levels"])
    return Clips(latents, foreground, prompts, tuple(map(bool, opens)), tuple(map(int, levels)))

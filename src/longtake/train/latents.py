"""Clips of the world, encoded once: latents, captions and where the foreground is, in shards on disk.

Legend: b clips, f latent frames, t pixel frames, h/w latent rows and columns, c channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import TrainingError
from longtake.models.tiny_vae import TinyVAE
from longtake.train.loop import autocast_dtype
from longtake.world import VERSION, Scene, render, render_masks, sample_scene
from longtake.world.captions import Split

_CLIPS_PER_BATCH = 8


class LatentCacheConfig(Config):
    """Which clips a cache holds. Clip i shows scene `first_seed + i`, from a random start frame."""

    first_seed: int = Field(0, ge=0)
    num_clips: int = Field(4096, ge=1)
    clips_per_shard: int = Field(512, ge=1)
    num_latent_frames: int = Field(21, ge=1)
    max_start_frame: int = Field(400, ge=1)
    level: int = 1
    split: Split = "train"
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)

    @property
    def num_shards(self) -> int:
        """Files that the cache is split into."""
        return -(-self.num_clips // self.clips_per_shard)


@dataclass(frozen=True)
class Clips:
    """Encoded clips: `latents_bfchw` (normalised, half precision), `foreground_bfhw` in 0..1, one caption
    each.
    """

    latents_bfchw: Tensor
    foreground_bfhw: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)


def scene_and_start(config: LatentCacheConfig, index: int) -> tuple[Scene, int]:
    """Scene and start frame of clip `index`."""
    seed = config.first_seed + index
    start = int(np.random.default_rng((seed, 1)).integers(config.max_start_frame))
    return sample_scene(seed, config.level, config.split), start


@torch.no_grad()
def encode_shard(vae: TinyVAE, config: LatentCacheConfig, shard: int) -> Clips:
    """Render and encode the clips of one shard."""
    first = shard * config.clips_per_shard
    last = min(config.num_clips, first + config.clips_per_shard)
    stride = vae.config.temporal_stride
    num_frames = 1 + (config.num_latent_frames - 1) * stride
    latents, foregrounds, captions = [], [], []
    for begin in range(first, last, _CLIPS_PER_BATCH):
        scenes = [scene_and_start(config, i) for i in range(begin, min(last, begin + _CLIPS_PER_BATCH))]
        frames = np.stack([render(s, at, at + num_frames, config.height, config.width) for s, at in scenes])
        masks = [render_masks(s, at, at + num_frames, config.height, config.width).sum(1) for s, at in scenes]
        state = vae.init_encode_state(len(scenes), config.height, config.width)
        dtype = autocast_dtype("auto", vae.latent_mean.device)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            encoded, _ = vae.encode_chunk(torch.from_numpy(frames).float().div(127.5).sub(1), state)
        latents.append(encoded.half())
        foregrounds.append(_pool(torch.from_numpy(np.stack(masks)), stride, vae.config.spatial_stride))
        captions += [scene.caption for scene, _ in scenes]
    return Clips(torch.cat(latents), torch.cat(foregrounds), tuple(captions))


def _pool(masks_bthw: Tensor, stride: int, cell: int) -> Tensor:
    """Coverage per latent cell, the strongest over a latent frame's pixel frames, [b,f,h,w] in 0..1."""
    padded = torch.cat([masks_bthw[:, :1].expand(-1, stride - 1, -1, -1), masks_bthw], dim=1)
    cells = F.max_pool2d(padded.clamp(0, 1), cell)
    pooled: Tensor = cells.unflatten(1, (-1, stride)).amax(dim=2).half()  # type: ignore[no-untyped-call]
    return pooled


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
        save_file(tensors, aside, metadata={"captions": json.dumps(clips.captions)})
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
    latents, foregrounds, captions = [], [], []
    for path in paths:
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice("latents")
            available = stored.get_shape()[1]
            if num_latent_frames is not None and num_latent_frames > available:
                raise TrainingError(
                    f"num_latent_frames={num_latent_frames}, but clips in {folder} have {available}",
                    "cache longer clips or train on shorter ones",
                )
            latents.append(stored[:, :num_latent_frames])
            foregrounds.append(file.get_slice("foreground")[:, :num_latent_frames])
            captions += json.loads(file.metadata()["captions"])
    return Clips(torch.cat(latents), torch.cat(foregrounds), tuple(captions))

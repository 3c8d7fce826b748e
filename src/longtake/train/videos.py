"""Clips of videos for a large model: cut from files that have captions, encoded once by Wan's autoencoder,
and cached.

A folder of videos holds `metadata.jsonl` with a line for each, as the datasets library has it for videos:
`{"file_name": "harbour.mp4", "text": "rain over a harbour"}`.

Legend: b clips, f latent frames, c channels, t pixel frames, h/w rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import TrainingError, VideoError
from longtake.io.video import probe_video, read_video
from longtake.train.latents import Clips
from longtake.train.pretrained import loading

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

METADATA_NAME: Final = "metadata.jsonl"
_IDENTITY_NAME: Final = "cache.json"
_TEMPORAL_STRIDE: Final = 4  # of Wan's autoencoder
_READ_AHEAD: Final = 1.0 / 8  # of a frame: how far a frame's time may lie beyond the one that is asked for


class VideoClipsConfig(Config):
    """Which clips are made of a folder of videos: of each its beginning."""

    folder: str = Field("videos", description="holds the files and metadata.jsonl")
    num_latent_frames: int = Field(21, ge=1, description="of every clip; shorter videos are left out")
    fps: float = Field(16.0, gt=0, description="at which frames are taken, whatever a file's own rate")
    num_held_out: int = Field(8, ge=1, description="videos at the end of the list, kept for evaluation")
    clips_per_shard: int = Field(64, ge=1)

    @property
    def num_frames(self) -> int:
        """Pixel frames of a clip."""
        return _TEMPORAL_STRIDE * (self.num_latent_frames - 1) + 1


@dataclass(frozen=True)
class CaptionedVideo:
    """A file and what it shows."""

    path: Path
    text: str


def captioned_videos(folder: Path) -> list[CaptionedVideo]:
    """The videos of a folder's `metadata.jsonl`.

    Raises:
        TrainingError: it cannot be read, or a line of it names no file or no text.
    """
    path = folder / METADATA_NAME
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(
            f"cannot read {path}: {error}", 'write lines of {"file_name": "a.mp4", "text": "its caption"}'
        ) from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            name, text = item["file_name"], item["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}, line {number}: {line[:80]!r} is no object with file_name and text", "mend the line"
            ) from error
        if not (isinstance(name, str) and isinstance(text, str) and (folder / name).is_file()):
            raise TrainingError(f"{path}, line {number}: {name!r} is no file in {folder}", "mend the line")
        found.append(CaptionedVideo(folder / name, text))
    if not found:
        raise TrainingError(f"{path} names no videos", "write a line for each")
    return found


def split_videos(
    videos: Sequence[CaptionedVideo], num_held_out: int
) -> tuple[list[CaptionedVideo], list[CaptionedVideo]]:
    """Videos for training, and the last ones for evaluation.

    Raises:
        TrainingError: none would be left for training.
    """
    if len(videos) <= num_held_out:
        raise TrainingError(
            f"{len(videos)} videos, of which {num_held_out} are held out", "give more, or lower num_held_out"
        )
    return list(videos[:-num_held_out]), list(videos[-num_held_out:])


def clip_frames(path: Path, config: VideoClipsConfig, height: int, width: int) -> Tensor:
    """The beginning of a video, ``[t, h, w, c]`` uint8, at the config's rate, scaled to cover the size and
    cut in the middle.

    Raises:
        VideoError: it cannot be read, or is too short.
    """
    step = probe_video(path).fps / config.fps
    wanted = [int(k * step + _READ_AHEAD) for k in range(config.num_frames)]
    kept: list[Tensor] = []
    for number, frame in enumerate(islice(read_video(path), wanted[-1] + 1)):
        repeats = wanted.count(number)
        if repeats:
            kept += [_covering(torch.from_numpy(frame), height, width)] * repeats
    if len(kept) < config.num_frames:
        raise VideoError(
            f"{str(path)!r} lasts {len(kept)} frames at {config.fps:g} fps, of {config.num_frames}",
            "leave it out, or train on shorter clips",
        )
    return torch.stack(kept)


def _covering(frame_hwc: Tensor, height: int, width: int) -> Tensor:
    """A frame scaled until it covers a size, and its middle."""
    rows, columns = frame_hwc.shape[:2]
    scale = max(height / rows, width / columns)
    size = (max(height, round(rows * scale)), max(width, round(columns * scale)))
    picture = frame_hwc.permute(2, 0, 1)[None].float()
    if size != (rows, columns):
        picture = F.interpolate(picture, size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    middle = picture[0, :, top : top + height, left : left + width].permute(1, 2, 0)
    return middle.round().clamp(0, 255).to(torch.uint8)


class WanEncoder:
    """Wan's video autoencoder, by diffusers: frames to normalised latents.

    Args:
        name: a model in diffusers' layout with `vae` inside: a local folder, or a name that the Hugging Face
            hub knows.
        device: where it runs, in fp32 as Wan's own code does.

    Raises:
        TrainingError: diffusers is missing, or the model cannot be loaded.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        with loading("autoencoder", name, "'vae'", "clips"):
            from diffusers import AutoencoderKLWan

            vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(
                name, subfolder="vae", torch_dtype=torch.float32, low_cpu_mem_usage=False
            )
        self.name, self._device = name, device
        self._vae = vae.to(device).eval().requires_grad_(False)
        config = self._vae.config
        self._mean_c, self._std_c = (
            torch.tensor(values, device=device).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )

    @torch.no_grad()
    def __call__(self, frames_bthwc: Tensor) -> Tensor:
        """Latents ``[b, f, c, h / 8, w / 8]`` in half precision, each channel of mean 0 and variance 1."""
        pixels = frames_bthwc.to(self._device).float().div(127.5).sub(1).permute(0, 4, 1, 2, 3)
        latents_bcfhw = self._vae.encode(pixels).latent_dist.mode()
        normed: Tensor = (latents_bcfhw - self._mean_c) / self._std_c
        return normed.transpose(1, 2).half().cpu()


def encode_videos(
    videos: Sequence[CaptionedVideo],
    config: VideoClipsConfig,
    size: tuple[int, int],
    folder: Path,
    encoder_name: str,
    make_encoder: Callable[[], Callable[[Tensor], Tensor]],
    tell: Callable[[str], None] = lambda line: None,
) -> int:
    """Write the shards of a cache that are missing, each whole or not at all. What cannot be read or is too
    short is told and left out.

    Args:
        videos: in the order of the cache.
        config: which clips.
        size: height and width in pixels.
        folder: of the cache, made if missing.
        encoder_name: of the autoencoder, which the cache is tied to.
        make_encoder: called when the first shard is missing.
        tell: given a line about every video that is left out, and about every shard.

    Returns:
        The clips in the cache.

    Raises:
        TrainingError: the folder caches other clips, or no video can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _check_identity(videos, config, size, folder, encoder_name)
    encode: Callable[[Tensor], Tensor] | None = None
    for first in range(0, len(videos), config.clips_per_shard):
        path = folder / f"clips-{first // config.clips_per_shard:05d}.safetensors"
        if path.exists():
            continue
        encode = encode or make_encoder()
        latents, texts = [], []
        for video in videos[first : first + config.clips_per_shard]:
            try:
                frames = clip_frames(video.path, config, *size)
            except VideoError as error:
                tell(f"left out: {error}")
                continue
            latents.append(encode(frames[None])[0])
            texts.append(video.text)
        aside = path.with_suffix(".part")
        tensors = {str(row): latent.contiguous() for row, latent in enumerate(latents)}
        save_file(tensors, aside, metadata={"prompts": json.dumps(texts)})
        os.replace(aside, path)
        tell(f"{path}: {len(latents)} clips")
    count = len(StoredClips(folder))
    if count == 0:
        shutil.rmtree(folder)  # so that better files are looked at
        raise TrainingError(
            f"none of {len(videos)} videos could be used",
            f"give videos of {config.num_frames} frames or more",
        )
    return count


def _check_identity(
    videos: Sequence[CaptionedVideo],
    config: VideoClipsConfig,
    size: tuple[int, int],
    folder: Path,
    encoder_name: str,
) -> None:
    listed = json.dumps([[str(video.path), video.path.stat().st_size, video.text] for video in videos])
    identity = json.dumps(
        {
            "clips": config.model_dump(mode="json"),
            "size": size,
            "autoencoder": encoder_name,
            "videos": hashlib.sha256(listed.encode()).hexdigest(),
        }
    )
    path = folder / _IDENTITY_NAME
    if not path.exists():
        path.write_text(identity, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != identity:
        raise TrainingError(
            f"{folder} caches other clips, or files have changed", "remove it, or train in another folder"
        )


@dataclass(frozen=True)
class StoredClips:
    """A cache of encoded videos, read from disk clip by clip: thousands do not fit into memory.

    Args:
        folder: of the cache.
        num_latent_frames: read of every clip; None for all.
    """

    folder: Path
    num_latent_frames: int | None = None

    @cached_property
    def index(self) -> tuple[tuple[Path, int, str], ...]:
        """Of every clip its file, its row there and its caption.

        Raises:
            TrainingError: there is no cache.
        """
        found: list[tuple[Path, int, str]] = []
        paths = sorted(self.folder.glob("clips-*.safetensors"))
        if not paths:
            raise TrainingError(f"{self.folder} holds no encoded videos", "run stage clips first")
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    texts = json.loads((file.metadata() or {})["prompts"])
            except (OSError, SafetensorError, KeyError) as error:
                raise TrainingError(
                    f"cannot read {path}: {error}", "remove it and run stage clips again"
                ) from error
            found += [(path, row, text) for row, text in enumerate(texts)]
        return tuple(found)

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Sequence[int]) -> Clips:
        """These clips, all of whose cells count as foreground.

        Raises:
            TrainingError: clips shorter than asked for.
        """
        latents = []
        for row in rows:
            path, number, _ = self.index[row]
            with safe_open(path, framework="pt") as file:
                stored = file.get_slice(str(number))
                available = stored.get_shape()[0]
                if self.num_latent_frames is not None and available < self.num_latent_frames:
                    raise TrainingError(
                        f"clips in {self.folder} have {available} latent frames, not "
                        f"{self.num_latent_frames}",
                        "encode longer clips, or walk fewer chunks",
                    )
                latents.append(stored[: self.num_latent_frames])
        with torch.autocast("cpu", enabled=False):  # which has no half precision of this kind
            latents_bfchw = torch.stack(latents)
        foreground = torch.ones_like(latents_bfchw[:, :, 0])
        prompts = tuple(((0, self.index[row][2]),) for row in rows)
        return Clips(latents_bfchw, foreground, prompts, (True,) * len(rows), (0,) * len(rows))

    def draw(self, rng: np.random.Generator, count: int) -> Clips:
        """`count` clips at random, perhaps one of them twice."""
        return self.select(rng.integers(len(self), size=count).tolist())

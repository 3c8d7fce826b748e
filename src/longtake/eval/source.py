"""Where the videos under evaluation come from.

Legend: b streams, t frames, h rows, w columns, c channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longtake.eval.script import Chunking, Script, scenes_for
from longtake.world import VERSION, render

Frames = NDArray[np.uint8]


class Source(Protocol):
    """Where videos come from.

    Attributes:
        name: Short, for tables and file names ("model", "truth", "vae").
        about: Where it comes from: versions, hashes, settings. Records of another `about` are not resumed.
        chunking: How its frames come.
    """

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def about(self) -> dict[str, str]:
        """Provenance."""
        ...

    @property
    def chunking(self) -> Chunking:
        """Where chunks begin, and how far they look back."""
        ...


class VideoSource(Source, Protocol):
    """Makes a batch of videos from scripts, chunk by chunk."""

    def generate(self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        """Chunks of uint8 [B, T, H, W, 3], in order; together at least `num_frames` frames, T may vary.

        The same script and seed give the same video whatever else is in the batch. Prompts switch at chunk
        boundaries: see `Script.on`.
        """
        ...


class TruthSource:
    """Real clips: the world's renderer. Its scores are the ceiling of every detector and metric.

    Args:
        level: World level, for what a prompt leaves open.
        height: Rows.
        width: Columns.
        chunking: As of the model that it is compared with.
    """

    name = "truth"

    def __init__(
        self,
        level: int = 1,
        height: int = 64,
        width: int = 64,
        chunking: Chunking | None = None,
    ) -> None:
        self.level = level
        self.height = height
        self.width = width
        self.chunking = chunking or Chunking()

    @property
    def about(self) -> dict[str, str]:
        """Version of the world and the size."""
        chunks = f"{self.chunking.first_frames},{self.chunking.frames}"
        return {
            "world": VERSION,
            "size": f"{self.width}x{self.height}",
            "chunk_frames": chunks,
            "window_frames": str(self.chunking.window_frames),
        }

    def generate(self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        """Renders the scene that each script and seed stand for."""
        scenes = scenes_for(scripts, seeds, self.level, self.width / self.height)
        start, stop = 0, min(self.chunking.first_frames, num_frames)
        while start < num_frames:
            yield np.stack([render(scene, start, stop, self.height, self.width) for scene in scenes])
            start, stop = stop, min(stop + self.chunking.frames, num_frames)


class Autoencoder(Protocol):
    """A causal video autoencoder that runs as a stream, such as `models.tiny_vae.TinyVAE`.

    Pixels are floats [b, t, h, w, c] in about -1..1; the first frame of a video stands alone.
    """

    def init_encode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """State before the first frame."""
        ...

    def init_decode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """State before the first latent frame."""
        ...

    def encode_chunk(
        self, frames_bthwc: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents of the next frames."""
        ...

    def decode_chunk(
        self, latents_bfchw: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Frames of the next latents."""
        ...


class ReconstructionSource:
    """Real clips through an autoencoder: the ceiling of whatever model generates in its latent space.

    Args:
        truth: Where the real clips come from; its chunks must fill whole latent frames.
        autoencoder: Encodes and decodes, on `device`.
        temporal_stride: Frames per latent frame after the first.
        about: Provenance of the autoencoder.
        device: Where it lives.
    """

    name = "vae"

    def __init__(
        self,
        truth: TruthSource,
        autoencoder: Autoencoder,
        temporal_stride: int,
        about: dict[str, str],
        device: torch.device | None = None,
    ) -> None:
        self._truth = truth
        self.chunking = truth.chunking
        self._autoencoder = autoencoder
        self._stride = temporal_stride
        self._device = device or torch.device("cpu")
        self.about = {**truth.about, **about}

    def generate(self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        """The real clips' scenes, reconstructed."""
        return (reconstruction for _, reconstruction in self.pairs(scripts, seeds, num_frames))

    def pairs(
        self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int
    ) -> Iterator[tuple[Frames, Frames]]:
        """Real chunks with their reconstructions, the last one filling its latent frame."""
        size = (len(scripts), self._truth.height, self._truth.width)
        encode_state = self._autoencoder.init_encode_state(*size)
        decode_state = self._autoencoder.init_decode_state(*size)
        filled = 1 + -(-(num_frames - 1) // self._stride) * self._stride
        for real_bthwc in self._truth.generate(scripts, seeds, filled):
            pixels = torch.from_numpy(real_bthwc).to(self._device).float() / 127.5 - 1
            with torch.inference_mode():
                latents, encode_state = self._autoencoder.encode_chunk(pixels, encode_state)
                decoded, decode_state = self._autoencoder.decode_chunk(latents, decode_state)
            yield real_bthwc, to_uint8(decoded)


def to_uint8(frames_bthwc: Tensor) -> Frames:
    """Decoded frames, floats in about -1..1, as uint8 pixels (clamped, rounded)."""
    scaled = ((frames_bthwc.float() + 1) * 127.5).clamp(0, 255).round()
    pixels: Frames = scaled.to(torch.uint8).cpu().numpy()
    return pixels

"""What the engine asks of a video autoencoder and a text encoder; implementations need not know of it.

Legend: b batch, f latent frames, c latent channels, t pixel frames, h w rows and columns, l text tokens, d
width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class VAEGeometry(Protocol):
    """Sizes that follow from an autoencoder's configuration."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell, in rows and columns."""

    @property
    def temporal_stride(self) -> int:
        """Pixel frames per latent frame; the first latent frame of a video is one pixel frame."""


class Weighted(Protocol):
    """Something with weights, as every ``torch.nn.Module`` is."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Weights and buffers, for the hash that snapshots carry."""


class VideoVAE(Weighted, Protocol):
    """A causal video autoencoder that runs as a stream: chunk-wise equals one-shot."""

    @property
    def config(self) -> VAEGeometry:
        """Its sizes."""

    def init_decode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        """Decoder state before the first latent frame, every tensor with the batch first; sizes in pixels."""

    def decode_chunk(
        self, latents_bfchw: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Frames ``[b, t, h, w, 3]`` in about -1..1 and the new state; the given state is not changed.

        All streams of a call are before their first frame, or none is.
        """


class TextEncoder(Weighted, Protocol):
    """Turns prompts into what the DiT's cross-attention reads."""

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``[b, l, d]`` and a bool mask ``[b, l]`` of valid tokens."""

    def unknown_words(self, text: str) -> list[str]:
        """Words of a prompt that the encoder does not know."""

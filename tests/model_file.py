"""A model file of small random networks, for tests of commands that take one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.bundle import ModelCard, build, save_model
from longtake.stream.pipeline import StreamConfig

SIZE = 32
WORDS = ("a", "red", "blue", "circle", "square", "on", "grey")

VAE = TinyVAEConfig(latent_channels=4, encoder_widths=(8, 8), decoder_widths=(8, 8, 8), num_blocks=1)
DIT = DiTConfig(
    width=24,
    ffn_width=32,
    num_layers=2,
    num_heads=2,
    in_channels=4,
    out_channels=4,
    patch_size=(1, 1, 1),
    text_width=8,
    text_length=8,
    frequency_width=16,
    mask_text=True,
)


def write_model(path: Path, seed: int = 0, dit: DiTConfig = DIT, **stream: Any) -> Path:
    """Write a model of SIZE x SIZE pixels whose chunks are 3 latent frames (9 pixel frames, then 12)."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "height": SIZE,
        "width": SIZE,
        "history": HistoryConfig(window_frames=7, sink_frames=1, chunk_frames=3),
        "schedule": Schedule(steps=(1000, 500)),
    }
    card = ModelCard(
        name="random",
        level=1,
        recipe="{}",
        vae=VAE,
        text=TinyTextConfig(words=WORDS, width=8, num_layers=1, num_heads=2, max_words=7),
        dit=dit,
        stream=StreamConfig(**{**settings, **stream}),
    )
    networks = build(card)
    with torch.no_grad():
        for parameter in networks.parameters():
            if parameter.ndim > 1:  # the initial heads are zero, and would make every video the same
                parameter.normal_(std=0.5 / parameter[0].numel() ** 0.5)
    save_model(path, card, dict(networks.items()))
    return path

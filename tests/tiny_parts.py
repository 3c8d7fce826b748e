"""Small random networks for engine tests: a DiT, an autoencoder and a text encoder that cost nothing."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.history.compression import AverageConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.retention import MostAttendedConfig
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.stream.state import Chunk

GRID = (2, 3)
LATENT = LatentConfig(kv_rank=(8, 10), query_rank=16, nope_dim=6, rope_bands=(1, 1, (1,)))
MEMORY = MemoryEncoderConfig(width=24, num_heads=2, num_frames=2, rows=2, columns=2, num_layers=1)


def small_dit(seed: int = 0, **changes: Any) -> DiT:
    """A DiT whose random head really predicts something (the initial one is zero)."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "width": 24,
        "ffn_width": 32,
        "num_layers": 2,
        "num_heads": 2,
        "in_channels": 3,
        "out_channels": 3,
        "patch_size": (1, 1, 1),
        "text_width": 8,
        "text_length": 6,
        "frequency_width": 16,
    }
    dit = DiT(DiTConfig(**{**sizes, **changes}))
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            if parameter.ndim > 1 and "modulation" not in name:
                parameter.normal_(std=0.35 / parameter[0].numel() ** 0.5 * 2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    return dit.eval()


class FakeVAE(nn.Module):
    """A causal decoder with a state: every pixel frame mixes the current latent frame with a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(latent_channels=3, spatial_stride=2, temporal_stride=4)
        self.mix = nn.Parameter(torch.tensor([0.6, 0.4]))

    def init_decode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        mean = torch.zeros(batch, 3, height // 2, width // 2)
        return {"mean": mean, "started": torch.zeros(batch, dtype=torch.bool)}

    def decode_chunk(
        self, latents_bfchw: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert bool(state["started"].any()) == bool(state["started"].all())
        mean, frames = state["mean"], []
        for i in range(latents_bfchw.shape[1]):
            mean = self.mix[0] * mean + self.mix[1] * latents_bfchw[:, i]
            pixels = mean.repeat_interleave(2, -1).repeat_interleave(2, -2).permute(0, 2, 3, 1)
            first = i == 0 and not bool(state["started"].all())
            frames += [pixels * (1 - 0.1 * j) for j in range(1 if first else 4)]
        return torch.stack(frames, 1), {"mean": mean, "started": torch.ones_like(state["started"])}


class FakeText(nn.Module):
    """Words hashed to fixed random vectors."""

    def __init__(self, width: int = 8, length: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = nn.Parameter(torch.randn(17, width, generator=generator))
        self.length = length

    def encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = [[sum(word.encode()) % 17 for word in prompt.split()][: self.length] for prompt in prompts]
        length = max(1, *(len(row) for row in ids))
        out = torch.zeros(len(ids), length, self.table.shape[1])
        mask = torch.zeros(len(ids), length, dtype=torch.bool)
        for row, words in enumerate(ids):
            out[row, : len(words)] = self.table[words]
            mask[row, : len(words)] = True
        return out, mask

    def unknown_words(self, text: str) -> list[str]:
        return []


def small_pipeline(
    seed: int = 0,
    guidance: float | None = None,
    opening: tuple[int, ...] | None = None,
    temperature: float | tuple[float, ...] = 1.0,
    opening_guidance: float | None = None,
    latent: LatentConfig | None = None,
    memory: MemoryEncoderConfig | None = None,
    **history: Any,
) -> Pipeline:
    """A pipeline of 2x3 latents; ``history`` overrides a window of 7 with sink 2 and chunk 2, ``opening``
    gives chunks that open something steps of their own. With an evolving policy there is a memory, `MEMORY`
    if no other is given.
    """
    window: dict[str, Any] = {"window_frames": 7, "sink_frames": 2, "chunk_frames": 2, **history}
    config = StreamConfig(
        height=2 * GRID[0],
        width=2 * GRID[1],
        history=HistoryConfig(**window),
        schedule=Schedule(steps=(1000, 500)),
        opening_schedule=Schedule(steps=opening) if opening is not None else None,
        temperature=temperature,
        guidance=guidance,
        opening_guidance=opening_guidance,
        negative_prompt="bad",
    )
    learned = isinstance(config.history.policy, EvolvingConfig)
    dit = small_dit(
        seed,
        mask_text=True,
        pooled_text=True,
        prediction="clean",
        cross_attention_layers=(1,),
        latent=latent,
        memory=(memory or MEMORY) if learned else None,
    )
    vae, text = FakeVAE(), FakeText()
    for module in (dit, vae, text):
        module.requires_grad_(False)
    return Pipeline(dit, vae, text, config)


STREAM_SETTINGS: list[dict[str, Any]] = [
    {},
    {"positions": Relative(f_max=6)},
    {"positions": Relative(f_max=9), "sink_frames": 3, "window_frames": 8, "chunk_frames": 3},
    {"guidance": 2.0},
    {"sink_frames": 0, "window_frames": 3},
    {"opening": (1000, 800, 600, 400, 200)},
    {"opening": (1000, 700, 300), "guidance": 1.5, "temperature": 0.5},
    {"temperature": 0.7},
    {"temperature": (1.0, 0.4)},
    {"opening_guidance": 3.0},
    {"opening_guidance": 3.0, "guidance": 1.5, "positions": Relative(f_max=6)},
    {"policy": EvolvingConfig(), "positions": Relative(f_max=10)},
    {"policy": MostAttendedConfig(num_frames=1), "positions": Relative(f_max=8)},
    {"policy": AverageConfig(decays=(0.5,)), "guidance": 1.5},
    {"policy": EvolvingConfig(timing="second_pass", read_layers=(1,), read_initially=False), "guidance": 2.0},
    {"latent": LATENT, "policy": EvolvingConfig(), "positions": Relative(f_max=10)},
    {
        "latent": LATENT.replace(path="kept", rope_bands=((0, 0), 1, (1,))),
        "policy": EvolvingConfig(timing="second_pass"),
        "positions": Relative(f_max=10),
        "guidance": 1.5,
    },
    {"latent": LATENT.replace(path="absorbed", storage="int4", debias=True), "guidance": 1.5},
    {
        "latent": LATENT.replace(path="kept", rope_bands=((0, 0, 0), 1, (1, 1)), heads_mix="keys"),
        "policy": EvolvingConfig(),
        "positions": Relative(f_max=10),
    },
    {
        "latent": LATENT.replace(kv_rank=8, storage="fp8", key_storage="fp8"),
        "memory": MEMORY.replace(read_as_latent=(8, 6)),
        "policy": EvolvingConfig(),
        "positions": Relative(f_max=10),
    },
]
"""Changes of `small_pipeline` that between them reach every way in which a stream goes on."""


def assert_same(a: Chunk, b: Chunk) -> None:
    """Bit for bit."""
    assert torch.equal(a.latents, b.latents)
    assert (a.index, a.prompt, a.first_frame) == (b.index, b.prompt, b.first_frame)
    assert a.frames is not None
    np.testing.assert_array_equal(a.frames, b.frames)

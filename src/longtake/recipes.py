"""Named recipes: plain functions that return a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError, nearest
from longtake.history.base import HistoryConfig
from longtake.history.positions import Relative
from longtake.models.dit import DiTConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.pipeline import StreamConfig
from longtake.train.dit import DiTTrainingConfig
from longtake.train.dmd import DMDConfig
from longtake.train.latents import LatentCacheConfig
from longtake.train.loop import LoopConfig
from longtake.train.run import Recipe
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.vae import VAETrainingConfig
from longtake.world import FPS, WORDS

_FIRST_SEED = 1 << 30
_HELD_OUT_SEED = 1 << 40  # far from every training scene


def tiny() -> Recipe:
    """The model that ships: world level 1 at 64x64, 16 fps."""
    vae_model = TinyVAEConfig()
    text_model = TinyTextConfig(words=WORDS, max_words=47)
    channels = vae_model.latent_channels
    return Recipe(
        name="tiny",
        level=1,
        vae_model=vae_model,
        text_model=text_model,
        dit_model=DiTConfig(
            width=256,
            ffn_width=1024,
            num_layers=5,
            num_heads=8,
            in_channels=channels,
            out_channels=channels,
            patch_size=(1, 2, 2),
            text_width=text_model.width,
            text_length=text_model.text_length,
            frequency_width=128,
            mask_text=True,
            cross_attention_layers=(0, 2),
            pooled_text=True,
            spatial_embedding=(4, 4),
            prediction="clean",
        ),
        stream=StreamConfig(
            height=64,
            width=64,
            fps=float(FPS),
            history=HistoryConfig(
                window_frames=12, sink_frames=3, chunk_frames=3, positions=Relative(f_max=11)
            ),
            schedule=Schedule(steps=(1000, 800, 550, 250), shift=3.0),
            guidance=1.25,  # stage dmd builds most of it into the weights
        ),
        vae=VAETrainingConfig(
            loop=LoopConfig(num_steps=2100, decay_from=0.2, ema_decay=0.99),
            muon_learning_rate=2e-3,
            adamw_learning_rate=1.5e-3,
        ),
        first_latents=LatentCacheConfig(first_seed=_FIRST_SEED, num_clips=16384, num_latent_frames=3),
        latents=LatentCacheConfig(num_clips=4096, num_latent_frames=21),
        held_out=LatentCacheConfig(
            first_seed=_HELD_OUT_SEED, num_clips=128, clips_per_shard=128, num_latent_frames=21
        ),
        first=DiTTrainingConfig(
            loop=LoopConfig(num_steps=1200, decay_from=1.0, ema_decay=0.995),
            num_clips=0,
            num_first_clips=32,
            num_chunks=1,
            final_foreground_weight=3.0,
        ),
        windows=DiTTrainingConfig(
            loop=LoopConfig(num_steps=3700, decay_from=0.0),
            muon_learning_rate=2e-3,
            adamw_learning_rate=8e-4,
            num_clips=4,
            num_copies=4,
            num_first_clips=12,
            sigma_shift=3.0,
            foreground_weight=3.0,
            final_foreground_weight=2.0,
        ),
        trajectory=TrajectoryConfig(loop=LoopConfig(num_steps=200, decay_from=0.0, ema_decay=0.98)),
        dmd=DMDConfig(
            loop=LoopConfig(num_steps=240, decay_from=0.3, ema_decay=0.98),
            critic_updates=4,
            guidance=2.0,
            min_score_sigma=0.25,
        ),
        decoder=VAETrainingConfig(
            loop=LoopConfig(num_steps=2400, decay_from=0.0, ema_decay=0.99),
            muon_learning_rate=1e-3,
            adamw_learning_rate=8e-4,
            edge_weight=1.0,
            absolute_weight=0.02,
            latent_noise=0.05,
            relative_error=True,
            freeze_encoder=True,
        ),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {"tiny": tiny}


def get_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises ConfigError with the nearest name where there is none."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, RECIPES))
    return RECIPES[name]()

"""Toy configurations and networks shared by the tests of training."""

import copy

import torch

import model_file
from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.pipeline import StreamConfig
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd import DMDTask
from longtake.train.dmd_config import DMDConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.latents import ClipEncoder
from longtake.train.layers import LayersConfig
from longtake.train.loop import LoopConfig
from longtake.train.networks import TextToLatents
from longtake.train.recipe import Recipe
from longtake.train.rendering import ClipRenderer
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.vae import VAETask, VAETrainingConfig
from longtake.world import WORDS

TEXT = TinyTextConfig(words=WORDS, width=16, num_layers=1, num_heads=2)
DIT = model_file.DIT.replace(
    patch_size=(1, 2, 2),
    text_width=16,
    text_length=TEXT.text_length,
    cross_attention_layers=(0,),
    pooled_text=True,
    prediction="clean",
)
VAE = model_file.VAE
HISTORY = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=4))
MEMORY = MemoryEncoderConfig(width=24, num_heads=2, rows=1, columns=1, num_frames=1, num_layers=1)
REMEMBERING = HISTORY.replace(policy=EvolvingConfig(), positions=Relative(f_max=5))
SCHEDULE = Schedule(steps=(1000, 600, 300), shift=2.0)


def loop(num_steps: int, seed: int = 3) -> LoopConfig:
    return LoopConfig(
        seed=seed, num_steps=num_steps, log_every_steps=1, evaluate_every_steps=2, precision="fp32"
    )


CAPTIONS = ["a red circle bouncing on gray", "a blue square", "a green star"]


def networks(dit: DiTConfig = DIT, seed: int = 0) -> TextToLatents:
    """Random networks whose output depends on everything (the initial head is zero)."""
    torch.manual_seed(seed)
    made = TextToLatents(TinyTextEncoder(TEXT), DiT(dit))
    for name, parameter in made.named_parameters():
        if "head.head" in name or "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return made


def renderer(**settings: object) -> ClipRenderer:
    """Of clips for the toy autoencoder."""
    return ClipRenderer(VAE.temporal_stride, VAE.spatial_stride, **settings)  # type: ignore[arg-type]


def clip_encoder() -> ClipEncoder:
    """A random autoencoder, always the same one."""
    torch.manual_seed(0)
    return ClipEncoder(TinyVAE(VAE).eval().requires_grad_(False))


def dmd_task(schedule: Schedule = SCHEDULE, **settings: object) -> DMDTask:
    """Distribution matching whose three networks begin alike."""
    student = networks()
    config = DMDConfig(loop=loop(4), num_clips=3, num_chunks=3).replace(**settings)
    shape = (4, 4, 4)
    return DMDTask(student, copy.deepcopy(student), HISTORY, schedule, config, CAPTIONS, CAPTIONS[:2], shape)


def vae_task() -> VAETask:
    """Reconstruction of two clips of 16x16 pixels."""
    torch.manual_seed(0)
    config = VAETrainingConfig(loop=loop(4), num_clips=2, num_latent_frames=2, height=16, width=16)
    return VAETask(TinyVAE(VAE), config)


def recipe() -> Recipe:
    """All stages at 16x16 pixels, two or three steps each."""
    cache = LatentCacheConfig(
        num_clips=5, clips_per_shard=3, num_latent_frames=4, chunk_frames=2, height=16, width=16
    )
    return Recipe(
        name="toy",
        vae_model=VAE,
        text_model=TEXT,
        dit_model=DIT,
        stream=StreamConfig(
            height=16, width=16, history=HISTORY, schedule=Schedule(steps=(1000, 500), shift=1.0)
        ),
        vae=VAETrainingConfig(loop=loop(3), num_clips=2, num_latent_frames=2, height=16, width=16),
        first_latents=cache.replace(first_seed=100, num_latent_frames=2),
        latents=cache,
        held_out=cache.replace(first_seed=200),
        layers=LayersConfig(loop=loop(2), num_clips=2, num_first_clips=2, num_chunks=2),
        first=DiTTrainingConfig(loop=loop(2), num_clips=0, num_first_clips=3, num_chunks=1),
        windows=DiTTrainingConfig(loop=loop(2), num_clips=2, num_first_clips=2, num_chunks=2),
        trajectory=TrajectoryConfig(
            loop=loop(2), num_clips=1, num_first_clips=2, num_chunks=2, steps_per_level=1
        ),
        dmd=DMDConfig(loop=loop(3), num_clips=2, num_chunks=3, critic_updates=2),
        decoder=VAETrainingConfig(
            loop=loop(2),
            num_clips=2,
            num_latent_frames=2,
            height=16,
            width=16,
            learns="decoder",
            relative_error=True,
        ),
    )

"""Recipes of the small models, which train on CPUs."""

from __future__ import annotations

from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.pipeline import StreamConfig
from longtake.stream.state import PromptSwitch
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_config import DMDConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.layers import LayersConfig
from longtake.train.loop import LoopConfig
from longtake.train.recipe import Recipe
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.vae import VAETrainingConfig
from longtake.world import FPS, WORDS
from longtake.world.vocabulary import LEVELS

_FIRST_SEED = 1 << 30
_HELD_OUT_SEED = 1 << 40  # far from every training scene
_MIXED_LEVELS = (1, 2, 1, 3)
_WINDOW_LEVELS = (1, 1, 2, 2, 3)  # half of level 3 pans, half switches prompts
_FIRST_LEVELS = (1, 2, 2, 2, 3)  # several objects are decided in the first chunk


def tiny_window() -> Recipe:
    """The small model with a window alone: all levels of the world at 64x64, 16 fps."""
    vae_model = TinyVAEConfig(
        latent_channels=24,
        decoder_widths=(96, 128, 192),
        num_encoder_blocks=4,
        fine_mixes=True,
        carries_pixels=True,
    )
    text_model = TinyTextConfig(words=WORDS, max_words=47)
    channels = vae_model.latent_channels
    windows = DiTTrainingConfig(
        loop=LoopConfig(num_steps=6270, num_warmup_steps=60, decay_from=0.0),
        muon_learning_rate=1.5e-3,
        adamw_learning_rate=8e-4,
        num_clips=6,
        num_first_clips=24,
        resampled_sigmas=(0.92, 0.79, 0.5),
        first_weight=4.0,
        fresh_clips=True,
        sigma_shift=3.0,
        guide_weight=0.3,
        guide_layer=3,
        guide_ahead=(8, 16, 24),
        guide_relative=True,
        prompt_guide_weight=0.1,
        foreground_weight=2.0,
        final_foreground_weight=2.0,
    )
    return Recipe(
        name="tiny-window",
        level=3,
        # Distilled it is not better yet (docs/experiments.md): --stage trajectory, --stage dmd.
        stages=("vae", "latents", "first", "windows", "decoder", "export"),
        vae_model=vae_model,
        text_model=text_model,
        dit_model=DiTConfig(
            width=256,
            ffn_width=1024,
            num_layers=8,
            num_heads=8,
            in_channels=channels,
            out_channels=channels,
            patch_size=(1, 2, 2),
            text_width=text_model.width,
            text_length=text_model.text_length,
            frequency_width=128,
            mask_text=True,
            cross_attention_layers=(0, 2, 4, 6),
            pooled_text=True,
            spatial_embedding=(4, 4),
            frame_embedding=3,
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
            opening_schedule=Schedule(shift=3.0).with_num_steps(16),
            guidance=2.0,
            opening_guidance=2.5,
        ),
        vae=VAETrainingConfig(
            loop=LoopConfig(num_steps=3600, decay_from=0.2, ema_decay=0.99),
            muon_learning_rate=2e-3,
            adamw_learning_rate=1.5e-3,
            levels=_MIXED_LEVELS,
            edge_weight=2.0,
            absolute_weight=0.05,
            relative_error=True,
            difference_weight=0.5,
            scale_weight=0.02,
            guide_weight=1.0,
            guide_noise=0.3,
        ),
        first_latents=LatentCacheConfig(
            first_seed=_FIRST_SEED, num_clips=16384, num_latent_frames=3, levels=_FIRST_LEVELS
        ),
        latents=LatentCacheConfig(num_latent_frames=21, levels=_WINDOW_LEVELS, turns=0.5),
        held_out=LatentCacheConfig(
            first_seed=_HELD_OUT_SEED,
            num_clips=192,
            clips_per_shard=192,
            num_latent_frames=21,
            levels=LEVELS,
        ),
        first=DiTTrainingConfig(
            loop=LoopConfig(num_steps=1200, decay_from=1.0, ema_decay=0.995),
            num_clips=0,
            num_first_clips=32,
            num_chunks=1,
            fresh_clips=True,
            sigma_shift=3.0,
            final_foreground_weight=3.0,
        ),
        windows=windows,
        trajectory=TrajectoryConfig(
            loop=LoopConfig(num_steps=200, decay_from=0.0, ema_decay=0.98), fresh_clips=True
        ),
        dmd=DMDConfig(
            loop=LoopConfig(num_steps=240, decay_from=0.3, ema_decay=0.98),
            critic_updates=4,
            switch_share=0.25,
            guidance=1.5,
            min_score_sigma=0.25,
        ),
        decoder=VAETrainingConfig(
            loop=LoopConfig(num_steps=3600, decay_from=0.0, ema_decay=0.995),
            muon_learning_rate=7e-4,
            adamw_learning_rate=6e-4,
            num_clips=8,
            edge_weight=1.0,
            absolute_weight=0.02,
            levels=_MIXED_LEVELS,
            difference_weight=1.0,
            absolute_difference_weight=0.1,
            seam_weight=2.0,
            cut_share=0.15,
            latent_noise=0.15,
            relative_error=True,
            learns="decoder",
        ),
    )


def tiny() -> Recipe:
    """The model that ships: `tiny_window` with a memory of one frame, which is learned alone first, then by
    the whole network; what that knew before it goes on teaching all but recall.
    """
    plain = tiny_window()
    readers = (0, 1, 4, 7)  # the other layers hardly need it
    windows = plain.windows
    return plain.replace(
        name="tiny",
        stages=("vae", "latents", "first", "windows", "decoder", "evictions", "memory", "export"),
        dit_model=plain.dit_model.replace(
            memory=MemoryEncoderConfig(
                width=256,
                num_heads=8,
                num_frames=1,
                rows=4,
                columns=4,
                num_layers=1,
                attends="cell",
                ffn_ratio=1,
                num_readings=len(readers),
            )
        ),
        stream=plain.stream.replace(
            history=plain.stream.history.replace(
                positions=Relative(f_max=12), policy=EvolvingConfig(source_layer=5, read_layers=readers)
            ),
            memory_at_switch="keep",
        ),
        dmd=plain.dmd.replace(switch=PromptSwitch(text="", memory="keep")),
        memory=windows.replace(
            # Guides take nine tenths of the gradient from here on, and higher rates throw the network out.
            loop=windows.loop.replace(num_steps=2500, num_warmup_steps=30, ema_decay=0.995),
            muon_learning_rate=3e-4,
            adamw_learning_rate=1.5e-4,
            learns_from="start",
            clips_teach=("recall",),
            num_clips=2,
            num_first_clips=8,
            first_weight=10.0,
            num_recall_clips=2,
            recall_absence=(1.0, 6.0),
            recall_learned_share=0.75,
            recall_away_chunks=2,
            recall_back_weight=4.0,
            num_long_clips=2,
            num_long_learned=5,
            guide_weight=0.0,
            prompt_guide_weight=0.0,
        ),
    )


def tiny_128() -> Recipe:
    """The small model at 128x128: its latents and all its networks, and one more level of the decoder, which
    draws at twice the size. That level alone is trained, and alone is in the model's file.
    """
    small = tiny()
    pixels = {"height": 128, "width": 128}
    caches = {
        name: getattr(small, name).replace(**pixels) for name in ("first_latents", "latents", "held_out")
    }
    return small.replace(
        name="tiny-128",
        warm_start="tiny",
        base="tiny",
        stages=("decoder", "export"),
        vae_model=small.vae_model.replace(detail_width=48),
        stream=small.stream.replace(**pixels),
        vae=small.vae.replace(**pixels),
        **caches,
        decoder=small.decoder.replace(
            loop=small.decoder.loop.replace(num_steps=1200, decay_from=0.1, ema_decay=0.99),
            learns="details",
            levels=(1, 2, 2, 3),
            num_clips=4,
            muon_learning_rate=1.5e-3,
            adamw_learning_rate=1e-3,
            **pixels,
        ),
    )


def tiny_latent() -> Recipe:
    """The small model with latent attention, its memory beside that: the dense one converted, and mended of
    what that lost.
    """
    dense = tiny()
    return dense.replace(
        name="tiny-latent",
        base="tiny",
        parent="tiny",
        warm_start="tiny",
        stages=("latents", "memory", "export"),
        dit_model=dense.dit_model.replace(
            # What `longtake convert tiny --budget-bytes 1664 --rank-multiple 8 --rope-keys auto` chooses.
            latent=LatentConfig(
                kv_rank=(80, 16, 96, 48, 64, 96, 56, 184),
                query_rank=None,
                nope_dim=24,
                rope_bands=((0, 0, 0, 1, 1, 1), (0, 0, 0), (0, 0, 0)),
                heads_mix="keys",
                path="kept",
            )
        ),
        layers=LayersConfig(num_clips=4, num_first_clips=8, fresh_clips=True),
        memory=dense.memory.replace(
            # What the parent predicts has no noise of its own, so that small batches do.
            loop=dense.memory.loop.replace(num_steps=400, num_warmup_steps=10, ema_decay=0.98),
            num_clips=1,
            num_first_clips=4,
            num_recall_clips=3,
            recall_absence=(1.0, 3.0),
            num_long_clips=1,
            learns_from="parent",
            clips_teach=(),
            muon_learning_rate=1e-3,
            adamw_learning_rate=5e-4,
        ),
    )

"""Named recipes: plain functions that return a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError, nearest
from longtake.history.base import HistoryConfig
from longtake.history.positions import Relative
from longtake.models.dit_config import DiTConfig, wan_dit
from longtake.models.latent_config import LatentConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.pipeline import StreamConfig
from longtake.train.distil import DistillationRecipe
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_config import DMDConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.layers import LayersConfig
from longtake.train.loop import LoopConfig
from longtake.train.optim import AdamWConfig
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


def tiny() -> Recipe:
    """The model that ships: all levels of the world at 64x64, 16 fps."""
    vae_model = TinyVAEConfig(
        latent_channels=24,
        decoder_widths=(96, 128, 192),
        num_encoder_blocks=4,
        fine_mixes=True,
        carries_pixels=True,
    )
    text_model = TinyTextConfig(words=WORDS, max_words=47)
    channels = vae_model.latent_channels
    return Recipe(
        name="tiny",
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
        windows=DiTTrainingConfig(
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
        ),
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
            freeze_encoder=True,
        ),
    )


def tiny_128() -> Recipe:
    """The small model at 128x128, from the weights of the one at 64x64: four times the tokens, steps that are
    a quarter as large, and few of them.
    """
    small = tiny()
    caches = {
        name: getattr(small, name).replace(height=128, width=128, num_clips=num_clips)
        for name, num_clips in (("first_latents", 4096), ("latents", 4096), ("held_out", 96))
    }
    pixels = {"height": 128, "width": 128, "num_clips": 3}
    return small.replace(
        name="tiny-128",
        warm_start="tiny",
        stages=("vae", "latents", "windows", "export"),
        dit_model=small.dit_model.replace(spatial_embedding=(8, 8)),
        stream=small.stream.replace(height=128, width=128),
        vae=small.vae.replace(
            loop=small.vae.loop.replace(num_steps=1200, decay_from=0.0),
            muon_learning_rate=1e-3,
            adamw_learning_rate=8e-4,
            **pixels,
        ),
        **caches,
        windows=small.windows.replace(
            loop=small.windows.loop.replace(num_steps=1200),
            muon_learning_rate=1e-3,
            adamw_learning_rate=4e-4,
            num_clips=2,
            num_copies=3,
            num_first_clips=6,
        ),
        trajectory=small.trajectory.replace(num_clips=1, num_first_clips=4),
        dmd=small.dmd.replace(num_clips=4),
        decoder=small.decoder.replace(**pixels),
    )


def tiny_latent() -> Recipe:
    """The small model with latent attention: first `longtake convert tiny`; this mends what that lost."""
    dense = tiny()
    loop = dense.windows.loop.replace(num_steps=600)
    return dense.replace(
        name="tiny-latent",
        parent="tiny",
        warm_start="outputs/latent.safetensors",
        stages=("latents", "layers", "windows", "export"),
        dit_model=dense.dit_model.replace(
            latent=LatentConfig(kv_rank=32, query_rank=None, nope_dim=24, rope_bands=(2, 1, 1))
        ),
        layers=LayersConfig(num_clips=4, num_first_clips=8, fresh_clips=True),
        windows=dense.windows.replace(loop=loop, muon_learning_rate=7e-4, adamw_learning_rate=4e-4),
    )


_WAN_NEGATIVE_WORDS = (
    "色调艳丽",
    "过曝",
    "静态",
    "细节模糊不清",
    "字幕",
    "风格",
    "作品",
    "画作",
    "画面",
    "静止",
    "整体发灰",
    "最差质量",
    "低质量",
    "JPEG压缩残留",
    "丑陋的",
    "残缺的",
    "多余的手指",
    "画得不好的手部",
    "画得不好的脸部",
    "畸形的",
    "毁容的",
    "形态畸形的肢体",
    "手指融合",
    "静止不动的画面",
    "杂乱的背景",
    "三条腿",
    "背景人很多",
    "倒着走",
)

WAN_NEGATIVE_PROMPT = "\uff0c".join(_WAN_NEGATIVE_WORDS)  # a full-width comma
"""Wan2.1's own: garish, overexposed, static, blurred, subtitles, malformed hands and so on."""


def wan_1_3b_dmd() -> DistillationRecipe:
    """Wan2.1-T2V-1.3B at 480x832, causal and in four steps, by the published settings of Self-Forcing and of
    Echo-Infinity's first stage (without its memory).
    """
    adamw = AdamWConfig(learning_rate=2e-6, betas=(0.0, 0.999), weight_decay=0.01)
    return DistillationRecipe(
        name="wan-1.3b-dmd",
        dit_model=wan_dit(),
        teacher_model=wan_dit(),
        stream=StreamConfig(
            height=480,
            width=832,
            history=HistoryConfig(
                window_frames=15, sink_frames=3, chunk_frames=3, positions=Relative(f_max=20)
            ),
            schedule=Schedule(steps=(1000, 750, 500, 250), shift=5.0),
        ),
        text_encoder="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        generator="models/causal-forcing.pt",
        critic="models/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        teacher="models/Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors",
        dmd=DMDConfig(
            loop=LoopConfig(
                num_steps=400,
                num_warmup_steps=0,
                decay_from=1.0,
                accumulation_steps=64,
                recompute="blocks",
                gradient_clip=10.0,
                ema_decay=0.99,
                ema_from_step=200,
                log_every_steps=1,
                evaluate_every_steps=50,
                checkpoint_every_seconds=1800.0,
            ),
            num_clips=1,
            num_chunks=7,
            critic_updates=5,
            num_critic_copies=1,
            scores="clips",
            guidance=4.0,  # published as 3, of caption + 3 (caption - negative)
            negative_prompt=WAN_NEGATIVE_PROMPT,
            score_shift=5.0,
            critic_error="flow",
            generator_optimizer=adamw,
            critic_optimizer=adamw.replace(learning_rate=4e-7),
            num_evaluation_clips=4,
        ),
    )


def wan_1_3b_latent_dmd() -> DistillationRecipe:
    """Wan2.1-T2V-1.3B with latent attention, the last of VideoMLA's three stages by its published settings,
    which leave the number of steps open. Generator and critic start from what `longtake convert
    --query-rank 768` made of a causal few-step model.
    """
    dense = wan_1_3b_dmd()
    converted = "models/wan-1.3b-latent.safetensors"
    return dense.replace(
        name="wan-1.3b-latent-dmd",
        dit_model=dense.dit_model.replace(latent=LatentConfig()),
        stream=dense.stream.replace(
            history=HistoryConfig(window_frames=7, sink_frames=1, chunk_frames=3, positions=Relative(f_max=6))
        ),
        generator=converted,
        critic=converted,
        dmd=dense.dmd.replace(
            loop=dense.dmd.loop.replace(num_steps=2500, accumulation_steps=128, ema_from_step=0)
        ),
    )


AnyRecipe = Recipe | DistillationRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    "tiny": tiny,
    "tiny-128": tiny_128,
    "tiny-latent": tiny_latent,
    "wan-1.3b-dmd": wan_1_3b_dmd,
    "wan-1.3b-latent-dmd": wan_1_3b_latent_dmd,
}


def get_recipe(name: str) -> AnyRecipe:
    """The recipe of that name. Raises ConfigError with the nearest name where there is none."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, RECIPES))
    return RECIPES[name]()

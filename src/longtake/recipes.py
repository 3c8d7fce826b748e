"""Named recipes: plain functions that return a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError, nearest
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit_config import DiTConfig, wan_dit
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAEConfig
from longtake.stream.pipeline import StreamConfig
from longtake.stream.state import PromptSwitch
from longtake.train.distil import DistillationRecipe
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_config import DMDConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.layers import LayersConfig
from longtake.train.loop import LoopConfig
from longtake.train.lora import LoRAConfig
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


def tiny_memory() -> Recipe:
    """The small model with a memory of one frame, from the weights of `tiny`: the memory first alone, then
    the whole network. What that gives and what it costs is in docs/experiments.md, section 20.
    """
    plain = tiny()
    readers = (0, 1, 2, 4, 7)  # the other layers hardly need it
    windows = plain.windows
    return plain.replace(
        name="tiny-memory",
        warm_start="tiny",
        stages=("latents", "evictions", "memory", "export"),
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
        latents=plain.latents.replace(levels=(1, 1, 2, 2, 3)),
        memory=windows.replace(
            loop=windows.loop.replace(num_steps=440, num_warmup_steps=30, decay_from=0.3, ema_decay=0.98),
            num_clips=3,
            num_first_clips=12,
            num_recall_clips=3,
            recall_absence=(1.0, 4.0),
            recall_learned_share=0.5,
            recall_away_chunks=2,
            num_long_clips=3,
            memory_guide_weight=1.0,
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


def wan_1_3b_echo() -> DistillationRecipe:
    """Echo-Infinity's first stage with its memory, by its published settings: Wan2.1-T2V-1.3B with three
    frames of memory that all layers read, on clips of 21 latent frames.
    """
    plain = wan_1_3b_dmd()
    return plain.replace(
        name="wan-1.3b-echo",
        dit_model=wan_dit().replace(
            memory=MemoryEncoderConfig(width=1536, num_heads=12, num_frames=3, rows=30, columns=52)
        ),
        stream=plain.stream.replace(
            history=HistoryConfig(
                window_frames=12,
                sink_frames=3,
                chunk_frames=3,
                positions=Relative(f_max=20),
                policy=EvolvingConfig(timing="second_pass"),
            ),
        ),
        dmd=plain.dmd.replace(memory_rate=5.0, memory_credit="first_exit"),
    )


def wan_1_3b_echo_long() -> DistillationRecipe:
    """Echo-Infinity's second stage by its published settings: pieces of 21 latent frames anywhere in 240, of
    which 18 are new, low-rank updates, and a prompt switch before most pieces.
    """
    first = wan_1_3b_echo()
    adamw = AdamWConfig(learning_rate=1e-5, betas=(0.0, 0.999), weight_decay=0.01)
    trained = "runs/wan-1.3b-echo/wan-1.3b-echo.safetensors"
    return first.replace(
        name="wan-1.3b-echo-long",
        generator=trained,
        dmd=first.dmd.replace(
            loop=first.dmd.loop.replace(num_steps=3000, ema_from_step=0),
            max_lead_chunks=73,
            overlap_chunks=1,
            credit_updates=7,
            switch_share=1.0,
            switch=PromptSwitch(text="", memory="rebuild"),
            lora=LoRAConfig(rank=256),
            generator_optimizer=adamw,
            critic_optimizer=adamw.replace(learning_rate=2e-6),
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
    "tiny-memory": tiny_memory,
    "tiny-latent": tiny_latent,
    "wan-1.3b-dmd": wan_1_3b_dmd,
    "wan-1.3b-echo": wan_1_3b_echo,
    "wan-1.3b-echo-long": wan_1_3b_echo_long,
    "wan-1.3b-latent-dmd": wan_1_3b_latent_dmd,
}


def get_recipe(name: str) -> AnyRecipe:
    """The recipe of that name. Raises ConfigError with the nearest name where there is none."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, RECIPES))
    return RECIPES[name]()

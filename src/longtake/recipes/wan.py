"""Recipes at Wan2.1-T2V-1.3B's size, by published settings."""

from __future__ import annotations

from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit_config import wan_dit
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.pipeline import StreamConfig
from longtake.stream.state import PromptSwitch
from longtake.train.distil_recipe import DistillationRecipe
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd_config import DMDConfig
from longtake.train.loop import LoopConfig
from longtake.train.lora import LoRAConfig
from longtake.train.optim import AdamWConfig
from longtake.train.trajectory import TrajectoryConfig

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


def wan_1_3b_latent() -> DistillationRecipe:
    """Wan2.1-T2V-1.3B with latent attention, in VideoMLA's three stages by its published settings: teacher
    forcing and consistency distillation on captioned videos, then distribution matching. The first starts
    from what `longtake convert --query-rank 768` made of Wan's own weights, as the critic does.

    What it leaves open: batches of the first two stages (64 and 128 here), steps of the first and the last,
    the parts of the way in consistency distillation and its guidance (48 and 3, see `train.trajectory`).
    """
    dense = wan_1_3b_dmd()
    converted = "models/wan-1.3b-latent.safetensors"
    adamw = AdamWConfig(learning_rate=5e-6, betas=(0.0, 0.999), weight_decay=0.01)
    loop = dense.dmd.loop.replace(ema_from_step=0, evaluate_every_steps=250)
    num_chunks = 7  # clips of 21 latent frames
    return dense.replace(
        name="wan-1.3b-latent",
        stages=("prompts", "clips", "teacher_forcing", "consistency", "dmd", "export"),
        dit_model=dense.dit_model.replace(latent=LatentConfig()),
        stream=dense.stream.replace(
            history=HistoryConfig(window_frames=7, sink_frames=1, chunk_frames=3, positions=Relative(f_max=6))
        ),
        generator=converted,
        critic=converted,
        teacher_forcing=DiTTrainingConfig(
            loop=loop.replace(num_steps=5000, accumulation_steps=64),
            num_clips=1,
            num_chunks=num_chunks,
            num_copies=1,
            sigma_shift=5.0,
            context_noise=0.0,
            foreground_weight=1.0,  # of videos nothing is told apart
            final_foreground_weight=1.0,
            optimizer=adamw,
        ),
        consistency=TrajectoryConfig(
            loop=loop.replace(num_steps=2500, accumulation_steps=128),
            target="consistency",
            num_clips=1,
            num_first_clips=0,
            num_chunks=num_chunks,
            num_copies=1,
            guidance=4.0,  # of caption + 3 (caption - negative)
            negative_prompt=WAN_NEGATIVE_PROMPT,
            foreground_weight=1.0,
            context_noise=0.0,
            optimizer=adamw.replace(learning_rate=2e-6),
        ),
        dmd=dense.dmd.replace(loop=loop.replace(num_steps=2500, accumulation_steps=128)),
    )

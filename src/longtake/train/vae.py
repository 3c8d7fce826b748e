"""Training of the small video VAE on rendered clips of the world.

Legend: b clips, t pixel frames, f latent frames, h/w pixels, c channels.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from longtake.config import Config
from longtake.models.tiny_vae import TinyVAE
from longtake.train.loop import Learner, LoopConfig, build_optimizer
from longtake.train.optim import AdamWConfig
from longtake.world.captions import Split
from longtake.world.render import render
from longtake.world.sampling import sample_scene

_MAX_START_FRAME = 400
_HELD_OUT_SEED = 1 << 41
_NUM_SAMPLES = 4
_EDGE_STEP = 0.2  # between neighbouring pixels, of a range of 2: above any background's gradient


class VAETrainingConfig(Config):
    """Stages `vae` and `decoder`: reconstruction with weighted edges, a decoder that tolerates noisy latents,
    unit-scale latents.
    """

    loop: LoopConfig = LoopConfig()
    levels: tuple[int, ...] = (1,)
    height: int = Field(64, ge=8)
    width: int = Field(64, ge=8)
    num_clips: int = Field(10, ge=1, description="clips per step")
    num_latent_frames: int = Field(
        5, ge=2, description="latent frames per clip, the single first frame included"
    )
    muon_learning_rate: float = Field(3e-3, gt=0)
    adamw_learning_rate: float = Field(2e-3, gt=0)
    optimizer: AdamWConfig | None = Field(None, description="for everything, instead of Muon with AdamW")
    edge_weight: float = Field(8.0, ge=0, description="extra weight of pixels beside an edge")
    absolute_weight: float = Field(0.1, ge=0, description="share of absolute beside squared error")
    difference_weight: float = Field(
        0.0, ge=0, description="weight of the squared error of differences from frame to frame"
    )
    latent_noise: float = Field(
        0.15, ge=0, description="upper end of the noise added to latents when decoding"
    )
    relative_error: bool = Field(
        False, description="take the logarithm of each clip's error, so that the mean PSNR is what is trained"
    )
    freeze_encoder: bool = Field(False, description="train the decoder alone; the latents stay as they are")
    scale_weight: float = Field(1e-3, ge=0, description="pull of the latents towards unit variance")


def render_clips(
    seeds: list[int], starts: list[int], num_frames: int, config: VAETrainingConfig, split: Split
) -> Tensor:
    """Frames of scenes, floats in [-1, 1], [b,t,h,w,c]; the scenes' levels take turns."""
    clips = [
        render(
            sample_scene(seed, config.levels[i % len(config.levels)], split),
            start,
            start + num_frames,
            config.height,
            config.width,
        )
        for i, (seed, start) in enumerate(zip(seeds, starts, strict=True))
    ]
    return torch.from_numpy(np.stack(clips)).float().div_(127.5).sub_(1.0)


def edge_map(frames_bthwc: Tensor) -> Tensor:
    """1 beside edges, 0 in flat regions and smooth gradients, [b,t,h,w,1]."""
    across = (frames_bthwc[:, :, :, 1:] - frames_bthwc[:, :, :, :-1]).abs().amax(dim=-1)
    down = (frames_bthwc[:, :, 1:] - frames_bthwc[:, :, :-1]).abs().amax(dim=-1)
    edges = F.pad(across, (0, 1)).maximum(F.pad(down, (0, 0, 0, 1))) > _EDGE_STEP
    blurred = F.avg_pool2d(edges.to(frames_bthwc.dtype), 5, stride=1, padding=2)
    return blurred.mul_(5).clamp_(max=1)[..., None]


class VAETask:
    """The stage's module, optimiser, loss and evaluation (see `train.loop.Task`)."""

    def __init__(self, module: TinyVAE, config: VAETrainingConfig) -> None:
        self.module = module
        self.config = config
        module.encoder.requires_grad_(not config.freeze_encoder)
        self.optimizer = build_optimizer(
            module,
            config.muon_learning_rate,
            config.adamw_learning_rate,
            config.loop.precision,
            only_adamw=config.optimizer,
        )
        self.learners = {"": Learner(module, self.optimizer, self.loss)}

    @property
    def num_frames(self) -> int:
        """Pixel frames per clip."""
        return 1 + (self.config.num_latent_frames - 1) * self.module.config.temporal_stride

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Weighted reconstruction error of freshly rendered clips, through noisy latents."""
        config = self.config
        rng = np.random.default_rng((config.loop.seed, step))
        seeds = [int(seed) for seed in rng.integers(1 << 40, size=config.num_clips)]
        starts = [int(start) for start in rng.integers(_MAX_START_FRAME, size=config.num_clips)]
        frames = render_clips(seeds, starts, self.num_frames, config, "train")
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
        state = self.module.init_encode_state(config.num_clips, config.height, config.width)
        with torch.set_grad_enabled(not config.freeze_encoder):
            latents, _ = self.module.encode_raw(frames, state)
        amount = torch.rand(config.num_clips, 1, 1, 1, 1, generator=generator) * config.latent_noise
        noisy = latents + amount * torch.randn(latents.shape, generator=generator)
        decoded, _ = self.module.decode_raw(
            noisy, self.module.init_decode_state(config.num_clips, config.height, config.width)
        )
        error = decoded.float() - frames
        weight = 1 + config.edge_weight * edge_map(frames)
        squared = error.square()
        by_clip = (weight * (squared + config.absolute_weight * error.abs())).flatten(1).mean(dim=1)
        if config.difference_weight > 0:
            jumps = (weight[:, 1:] * error.diff(dim=1).square()).flatten(1).mean(dim=1)
            by_clip = by_clip + config.difference_weight * jumps
        reconstruction = (by_clip.log() if config.relative_error else by_clip).mean()
        psnr = -10 * torch.log10(squared.detach().mean() / 4)
        if config.freeze_encoder:
            return reconstruction, {"psnr": float(psnr)}
        variance_c = latents.float().var(dim=(0, 1, 3, 4))
        scale = latents.float().square().mean() + variance_c.clamp_min(1e-4).log().square().mean()
        return reconstruction + config.scale_weight * scale, {
            "psnr": float(psnr),
            "scale": float(scale.detach()),
        }

    @torch.no_grad()
    def evaluate(self, num_clips: int = 32) -> dict[str, float]:
        """PSNR in dB over whole clips of scenes that are never trained on, weights as they are."""
        seeds = [_HELD_OUT_SEED + i for i in range(num_clips)]
        frames = render_clips(seeds, [7 * i for i in range(num_clips)], self.num_frames, self.config, "any")
        decoded = reconstruct(self.module, frames)
        squared = (decoded.clamp(-1, 1) - frames).square()
        by_clip = -10 * torch.log10(squared.flatten(1).mean(dim=1) / 4)
        first = -10 * torch.log10(squared[:, 0].mean() / 4)
        return {
            "psnr": float(-10 * torch.log10(squared.mean() / 4)),
            "psnr_mean_over_clips": float(by_clip.mean()),
            "psnr_worst_clip": float(by_clip.min()),
            "psnr_first_frame": float(first),
        }

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Four held-out clips, each above its reconstruction; see `train.loop.Task`."""
        seeds = [_HELD_OUT_SEED + i for i in range(_NUM_SAMPLES)]
        frames = render_clips(
            seeds, [7 * i for i in range(_NUM_SAMPLES)], self.num_frames, self.config, "any"
        )
        pairs = torch.stack([frames, reconstruct(self.module, frames)], dim=1).flatten(0, 1)
        return pairs.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def reconstruct(vae: TinyVAE, frames_bthwc: Tensor) -> Tensor:
    """Encode and decode clips in one go; same shape, floats in about [-1, 1]."""
    batch, _, height, width, _ = frames_bthwc.shape
    latents, _ = vae.encode_chunk(frames_bthwc, vae.init_encode_state(batch, height, width))
    decoded, _ = vae.decode_chunk(latents, vae.init_decode_state(batch, height, width))
    return decoded


@torch.no_grad()
def measure_latents(vae: TinyVAE, frames_bthwc: Tensor) -> None:
    """Set `latent_mean` and `latent_std` so that these clips' normalised latents have mean 0, variance 1."""
    batch, _, height, width, _ = frames_bthwc.shape
    raw, _ = vae.encode_raw(frames_bthwc, vae.init_encode_state(batch, height, width))
    vae.latent_mean.copy_(raw.mean(dim=(0, 1, 3, 4)))
    vae.latent_std.copy_(raw.std(dim=(0, 1, 3, 4)))

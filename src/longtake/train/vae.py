"""Training of the small video VAE on rendered clips of the world.

Legend: b clips, t pixel frames, f latent frames, h/w pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.models.tiny_vae import TinyVAE, TinyVAEConfig
from longtake.train.guide import NUM_GUIDE_CHANNELS, guide_errors, guide_of
from longtake.train.loop import Learner, LoopConfig, build_optimizer
from longtake.train.optim import AdamWConfig, MuonAdamW
from longtake.world import Scene
from longtake.world.captions import Split
from longtake.world.render import render, render_masks
from longtake.world.sampling import sample_scene

_MAX_START_FRAME = 400
_HELD_OUT_SEED = 1 << 41
_NUM_SAMPLES = 4
_PART_WEIGHTS = {"velocity": 4.0, "shape": 4.0}  # of the guide; the others are learned anyway
_EDGE_STEP = 0.2  # between neighbouring pixels, of a range of 2: above any background's gradient


Learned = Literal["all", "decoder", "details"]
"""Which part of the autoencoder a stage trains."""


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
    seam_weight: float = Field(
        0.0, ge=0, description="extra weight of differences from one latent frame's last frame to the next's"
    )
    absolute_difference_weight: float = Field(
        0.0, ge=0, description="share of absolute beside squared error of these differences: small ones count"
    )
    cut_share: float = Field(
        0.0, ge=0, le=1, description="share of clips that cut to another scene at a random latent frame"
    )
    latent_noise: float = Field(
        0.15, ge=0, description="upper end of the noise added to latents when decoding"
    )
    relative_error: bool = Field(
        False, description="take the logarithm of each clip's error, so that the mean PSNR is what is trained"
    )
    learns: Learned = Field(
        "all",
        description="all of the network; the decoder, so that latents stay as they are; or its details alone "
        "(`detail_width`), so that small pictures stay as they are too",
    )
    scale_weight: float = Field(1e-3, ge=0, description="pull of the latents towards unit variance")
    guide_weight: float = Field(
        0.0, ge=0, description="of the logarithmic error of reading off latents where objects are and go"
    )
    guide_noise: float = Field(
        0.5, ge=0, description="noise added to latents that are read, in standard deviations of each channel"
    )

    @model_validator(mode="after")
    def _cuts(self) -> VAETrainingConfig:
        if self.cut_share > 0 and (self.guide_weight > 0 or self.num_clips < 2):
            raise ConfigError(
                f"cut_share={self.cut_share} with guide_weight={self.guide_weight} and num_clips="
                f"{self.num_clips}: a clip cuts to another of its batch, of which no guide tells",
                "use guide_weight=0 and two clips or more, or cut_share=0",
            )
        return self


def clip_scenes(seeds: Sequence[int], levels: Sequence[int], split: Split) -> list[Scene]:
    """Scenes whose levels take turns."""
    return [sample_scene(seed, levels[i % len(levels)], split) for i, seed in enumerate(seeds)]


def render_clips(
    scenes: Sequence[Scene], starts: Sequence[int], num_frames: int, config: VAETrainingConfig
) -> Tensor:
    """Frames of scenes, floats in [-1, 1], [b,t,h,w,c]."""
    clips = [
        render(scene, start, start + num_frames, config.height, config.width)
        for scene, start in zip(scenes, starts, strict=True)
    ]
    return torch.from_numpy(np.stack(clips)).float().div_(127.5).sub_(1.0)


def cut_clips(frames_bthwc: Tensor, share: float, stride: int, generator: torch.Generator) -> Tensor:
    """Some clips, each going over to the next one's frames where a latent frame begins."""
    num_clips, num_frames = frames_bthwc.shape[:2]
    cut = torch.rand(num_clips, generator=generator) < share
    at = 1 + stride * torch.randint((num_frames - 1) // stride, (num_clips,), generator=generator)
    other = cut[:, None] & (torch.arange(num_frames) >= at[:, None])
    return torch.where(other[..., None, None, None], frames_bthwc.roll(1, dims=0), frames_bthwc)


def edge_map(frames_bthwc: Tensor) -> Tensor:
    """1 beside edges, 0 in flat regions and smooth gradients, [b,t,h,w,1]."""
    across = (frames_bthwc[:, :, :, 1:] - frames_bthwc[:, :, :, :-1]).abs().amax(dim=-1)
    down = (frames_bthwc[:, :, 1:] - frames_bthwc[:, :, :-1]).abs().amax(dim=-1)
    edges = F.pad(across, (0, 1)).maximum(F.pad(down, (0, 0, 0, 1))) > _EDGE_STEP
    blurred = F.avg_pool2d(edges.to(frames_bthwc.dtype), 5, stride=1, padding=2)
    return blurred.mul_(5).clamp_(max=1)[..., None]


def select_learned(vae: TinyVAE, learns: Learned) -> None:
    """Leave gradients to a part of the network alone.

    Raises:
        ConfigError: details of a network that draws none.
    """
    vae.requires_grad_(learns == "all")
    part = {"all": vae, "decoder": vae.decoder, "details": vae.decoder.details}[learns]
    if part is None:
        raise ConfigError(
            f'learns="{learns}", but the decoder draws no details',
            'set vae_model.detail_width, or learns="decoder"',
        )
    part.requires_grad_(True)


def latent_probe(model: TinyVAEConfig) -> nn.Linear:
    """What reads the guide off each cell of the latents, trained beside the autoencoder; reads 0 at first."""
    probe = nn.Linear(model.latent_channels, NUM_GUIDE_CHANNELS)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    return probe


def vae_optimizer(module: nn.Module, config: VAETrainingConfig) -> MuonAdamW:
    """Muon on convolutions, AdamW on the rest and on the probe, or AdamW on everything."""
    return build_optimizer(
        module,
        config.muon_learning_rate,
        config.adamw_learning_rate,
        config.loop.precision,
        ("probe",),
        only_adamw=config.optimizer,
    )


class VAETask:
    """The stage's module, optimiser, loss and evaluation (see `train.loop.Task`)."""

    def __init__(self, module: TinyVAE, config: VAETrainingConfig) -> None:
        self.vae = module
        self.config = config
        self.module: nn.Module = module
        self._probe: nn.Linear | None = None
        if config.guide_weight > 0:
            self._probe = latent_probe(module.config)
            self.module = nn.ModuleDict({"vae": module, "probe": self._probe})
        select_learned(module, config.learns)
        self.optimizer = vae_optimizer(self.module, config)
        self.learners = {"": Learner(self.module, self.optimizer, self.loss)}

    @property
    def num_frames(self) -> int:
        """Pixel frames per clip."""
        return 1 + (self.config.num_latent_frames - 1) * self.vae.config.temporal_stride

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Weighted reconstruction error of freshly rendered clips, through noisy latents."""
        config = self.config
        rng = np.random.default_rng((config.loop.seed, step))
        seeds = [int(seed) for seed in rng.integers(1 << 40, size=config.num_clips)]
        starts = [int(start) for start in rng.integers(_MAX_START_FRAME, size=config.num_clips)]
        scenes = clip_scenes(seeds, config.levels, "train")
        frames = render_clips(scenes, starts, self.num_frames, config)
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
        if config.cut_share > 0:
            frames = cut_clips(frames, config.cut_share, self.vae.config.temporal_stride, generator)
        state = self.vae.init_encode_state(config.num_clips, config.height, config.width)
        with torch.set_grad_enabled(config.learns == "all"):
            latents, _ = self.vae.encode_raw(frames, state)
        amount = torch.rand(config.num_clips, 1, 1, 1, 1, generator=generator) * config.latent_noise
        noisy = latents + amount * torch.randn(latents.shape, generator=generator)
        decoded, _ = self.vae.decode_raw(
            noisy, self.vae.init_decode_state(config.num_clips, config.height, config.width)
        )
        error = decoded.float() - frames
        weight = 1 + config.edge_weight * edge_map(frames)
        squared = error.square()
        by_clip = (weight * (squared + config.absolute_weight * error.abs())).flatten(1).mean(dim=1)
        if config.difference_weight > 0:
            stride = self.vae.config.temporal_stride
            at_seam_t111 = torch.arange(self.num_frames - 1).remainder(stride).eq(0)[:, None, None, None]
            jump = error.diff(dim=1)
            size = jump.square() + config.absolute_difference_weight * jump.abs()
            jumps = (weight[:, 1:] * (1 + config.seam_weight * at_seam_t111) * size).flatten(1).mean(dim=1)
            by_clip = by_clip + config.difference_weight * jumps
        reconstruction = (by_clip.log() if config.relative_error else by_clip).mean()
        psnr = -10 * torch.log10(squared.detach().mean() / 4)
        if config.learns != "all":
            return reconstruction, {"psnr": float(psnr)}
        variance_c = latents.float().var(dim=(0, 1, 3, 4))
        scale = latents.float().square().mean() + variance_c.clamp_min(1e-4).log().square().mean()
        figures = {"psnr": float(psnr), "scale": float(scale.detach())}
        loss = reconstruction + config.scale_weight * scale
        if self._probe is not None:
            errors = self._read(self._probe, latents, scenes, starts, generator)
            logs = torch.stack([_PART_WEIGHTS.get(name, 1.0) * error.log() for name, error in errors.items()])
            loss = loss + config.guide_weight * logs.mean()
            figures |= {f"guide_{name}": float(error.detach()) for name, error in errors.items()}
        return loss, figures

    def _read(
        self,
        probe: nn.Linear,
        latents_bfchw: Tensor,
        scenes: Sequence[Scene],
        starts: Sequence[int],
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """Errors of what the probe reads off each cell of the latents, seen through noise."""
        size, stride = (self.config.height, self.config.width), self.vae.config.temporal_stride
        guides = [
            guide_of(scene, start, masks, stride, self.vae.config.spatial_stride)
            for scene, start in zip(scenes, starts, strict=True)
            for masks in [torch.from_numpy(render_masks(scene, start, start + self.num_frames, *size))]
        ]
        latents = latents_bfchw.float()
        mean, std = latents.mean((0, 1, 3, 4), keepdim=True), latents.std((0, 1, 3, 4), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator)
        seen = (latents - mean) / std + self.config.guide_noise * noise
        return guide_errors(probe(seen.movedim(2, -1)), torch.stack(guides).movedim(2, -1), -1)

    @torch.no_grad()
    def evaluate(self, num_clips: int = 32) -> dict[str, float]:
        """PSNR in dB over whole clips of scenes that are never trained on, weights as they are."""
        seeds = [_HELD_OUT_SEED + i for i in range(num_clips)]
        scenes = clip_scenes(seeds, self.config.levels, "any")
        frames = render_clips(scenes, [7 * i for i in range(num_clips)], self.num_frames, self.config)
        decoded = reconstruct(self.vae, frames)
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
        scenes = clip_scenes(seeds, self.config.levels, "any")
        frames = render_clips(scenes, [7 * i for i in range(_NUM_SAMPLES)], self.num_frames, self.config)
        pairs = torch.stack([frames, reconstruct(self.vae, frames)], dim=1).flatten(0, 1)
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

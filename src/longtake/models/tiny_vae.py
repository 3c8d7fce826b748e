"""The small causal video VAE that ships: 4x in time, 8x8 or 16x16 in space, run whole or as a stream.

A latent frame covers `temporal_stride` pixel frames; the first latent frame of a video covers one pixel frame
(as in Wan's VAE), which the encoder sees as a group of identical frames and of which the decoder keeps the
last. Groups are folded into channels, so that every layer is a 2D convolution; time is mixed by causal layers
at the coarsest resolution, and in the decoder at the finer ones too where the config says so, each of which
looks one latent frame back. That one kept frame per layer, and the last picture where pixels are carried, is
the whole streaming state, so chunk-wise and one-shot runs are the same computation.

Legend: b batch, t pixel frames, f latent frames, h/w height and width, c channels, n = b*f rows.
"""

from __future__ import annotations

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.config import Config
from longtake.errors import ModelError

State = dict[str, Tensor]
STARTED = "started"
_MIDDLE, _FINE, _LAST, _SHOWN = "middle", "fine", "last", "shown"


class TinyVAEConfig(Config):
    """Shape of the small VAE. Widths are channels per level, from the finest to the coarsest.

    Args:
        num_blocks: residual blocks per level.
        num_encoder_blocks: residual blocks at the encoder's coarse level, where it sees whole objects; None:
            as many as elsewhere.
        fine_mixes: whether the decoder mixes time at its two finer levels as well, and once more before its
            last layer, so that a group of frames sees how the one before it was drawn and joins on smoothly.
        carries_pixels: every picture is the one before it and, pixel by pixel, a learned share of what is to
            change, so that what stands still is not drawn anew with other errors for every latent frame.
        detail_width: channels of one more level at twice the size, in the decoder alone: the encoder sees
            pictures at half their size, so that a latent cell covers 16x16 pixels and whatever makes latents
            costs what it did.
    """

    pixel_channels: int = Field(3, ge=1)
    latent_channels: int = Field(16, ge=1)
    temporal_stride: int = Field(4, ge=1)
    encoder_widths: tuple[int, int] = (96, 192)
    decoder_widths: tuple[int, int, int] = (64, 96, 192)
    num_blocks: int = Field(2, ge=1)
    num_encoder_blocks: int | None = Field(None, ge=1)
    fine_mixes: bool = False
    carries_pixels: bool = False
    detail_width: int | None = Field(None, ge=1)

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell along height and width: 4 by folding, 2 by the strided layer, and 2 where
        details are added.
        """
        return 8 if self.detail_width is None else 16


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind ReLU, added to the input; the second starts small so that depth is free."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.normal_(self.conv2.weight, std=0.1 * (9 * width) ** -0.5)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Same shape."""
        out: Tensor = x_nchw + self.conv2(F.relu(self.conv1(F.relu(x_nchw))))
        return out


class CausalTimeMix(nn.Module):
    """Adds a projection of the previous latent frame's features (zeros before the first)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1, bias=False)
        nn.init.normal_(self.conv.weight, std=0.1 * width**-0.5)

    def forward(self, x_nchw: Tensor, previous_bchw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mixed features [b*f,c,h,w] and the last frame's input [b,c,h,w], which is the new
        state.
        """
        batch = previous_bchw.shape[0]
        x_bfchw = x_nchw.unflatten(0, (batch, -1))  # type: ignore[no-untyped-call]
        past_bfchw = torch.cat([previous_bchw.to(x_nchw.dtype)[:, None], x_bfchw[:, :-1]], dim=1)
        return x_nchw + self.conv(F.relu(past_bfchw.flatten(0, 1))), x_bfchw[:, -1]


class _Trunk(nn.Module):
    """The coarsest level of either half: residual blocks with a causal time mix before each."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(CausalTimeMix(width) for _ in range(num_blocks))
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(num_blocks))

    def forward(self, x_nchw: Tensor, state: State) -> tuple[Tensor, State]:
        new_state: State = {}
        for i, (mix, block) in enumerate(zip(self.mixes, self.blocks, strict=True)):
            x_nchw, new_state[f"mix{i}"] = mix(x_nchw, state[f"mix{i}"])
            x_nchw = block(x_nchw)
        return x_nchw, new_state


class PixelCarry(nn.Module):
    """Pictures that change from one to the next by a share of the difference to what was drawn.

    The share of a pixel is a sigmoid of what the decoder says of it and of how large its difference is: small
    where a surface was drawn twice with different errors, all of it where something moves or the scene
    changes.
    """

    def __init__(self, width: int, temporal_stride: int) -> None:
        super().__init__()
        self.gate = nn.Conv2d(width, 4 * temporal_stride, 3, padding=1)
        # A tenth of what cannot be told from errors, nine tenths of a difference of 18 of 255: before any
        # training this takes a quarter off the flicker of a decoder of 36 dB and none of its sharpness.
        self.slope = nn.Parameter(torch.tensor(30.0))
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.get_parameter("bias"), -2.0)

    def logits(self, x_nchw: Tensor) -> Tensor:
        """What the decoder's last features say of every pixel of a group, [n,g,h,w]."""
        return F.pixel_shuffle(self.gate(F.relu(x_nchw)), 2)

    def forward(self, drawn_bthwc: Tensor, logits_bthw: Tensor, shown_bhwc: Tensor | None) -> Tensor:
        """The pictures to show; `shown_bhwc` is the last one before them, None before a video's first."""
        # A small share of a small difference would be lost in bf16.
        drawn_bthwc, logits_bthw = drawn_bthwc.float(), logits_bthw.float()
        pictures = []
        for drawn_bhwc, logit_bhw in zip(drawn_bthwc.unbind(1), logits_bthw.unbind(1), strict=True):
            if shown_bhwc is not None:
                change = drawn_bhwc - shown_bhwc
                size_bhw = change.abs().mean(-1)
                share = torch.sigmoid(logit_bhw + self.slope * size_bhw)
                drawn_bhwc = shown_bhwc + share.unsqueeze(-1) * change
            shown_bhwc = drawn_bhwc
            pictures.append(shown_bhwc)
        return torch.stack(pictures, dim=1)


class PixelDetails(nn.Module):
    """Pictures at twice the size: the small ones, enlarged, and what they look like from nearer. New details
    are nothing.
    """

    def __init__(self, fine: int, width: int, num_blocks: int, channels: int) -> None:
        super().__init__()
        self.up = nn.Conv2d(fine, 4 * width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(num_blocks)))
        self.head = nn.Conv2d(width, 4 * channels, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.get_parameter("bias"))

    def forward(self, x_nchw: Tensor, small_nghw: Tensor) -> Tensor:
        """[n,g,4h,4w] from the decoder's last features [n,c,h,w] and the pictures they became [n,g,2h,2w]."""
        enlarged = F.interpolate(small_nghw, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.blocks(F.pixel_shuffle(self.up(F.relu(x_nchw)), 2))
        return enlarged + F.pixel_shuffle(self.head(F.relu(x)), 2)


class TinyEncoder(nn.Module):
    """Groups of pixel frames -> latent frames."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self._halves = config.detail_width is not None
        fine, coarse = config.encoder_widths
        self.stem = nn.Conv2d(config.pixel_channels * config.temporal_stride * 16, fine, 3, padding=1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(config.num_blocks)))
        self.down = nn.Conv2d(fine, coarse, 4, stride=2, padding=1)
        self.trunk = _Trunk(coarse, config.num_encoder_blocks or config.num_blocks)
        self.head = nn.Conv2d(coarse, config.latent_channels, 3, padding=1)

    def forward(self, groups_nchw: Tensor, state: State) -> tuple[Tensor, State]:
        """Raw latents [n,c,h,w] of groups of frames folded into channels, and the new state."""
        if self._halves:
            groups_nchw = F.avg_pool2d(groups_nchw, 2)
        x = self.fine(self.stem(F.pixel_unshuffle(groups_nchw, 4)))
        x, state = self.trunk(self.down(x), state)
        return self.head(F.relu(x)), state


class TinyDecoder(nn.Module):
    """Latent frames -> groups of pixel frames."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        fine, middle, coarse = config.decoder_widths
        self.stem = nn.Conv2d(config.latent_channels, coarse, 3, padding=1)
        self.trunk = _Trunk(coarse, config.num_blocks)
        self.up1 = nn.Conv2d(coarse, 4 * middle, 1)
        self.middle = nn.Sequential(*(ResidualBlock(middle) for _ in range(config.num_blocks)))
        self.up2 = nn.Conv2d(middle, 4 * fine, 1)
        self.fine = nn.Sequential(*(ResidualBlock(fine) for _ in range(config.num_blocks)))
        self.middle_mix = CausalTimeMix(middle) if config.fine_mixes else None
        self.fine_mix = CausalTimeMix(fine) if config.fine_mixes else None
        self.last_mix = CausalTimeMix(fine) if config.fine_mixes else None
        channels = config.pixel_channels * config.temporal_stride
        self.head = nn.Conv2d(fine, 4 * channels, 3, padding=1)
        width = config.detail_width
        self.details = None if width is None else PixelDetails(fine, width, config.num_blocks, channels)
        self.carry = PixelCarry(fine, config.temporal_stride) if config.carries_pixels else None

    def forward(self, latents_nchw: Tensor, state: State) -> tuple[Tensor, Tensor | None, State]:
        """Groups of frames folded into channels as they are drawn, what a carry is to make of them (see
        `PixelCarry`), and the new state.
        """
        x, new_state = self.trunk(self.stem(latents_nchw), state)
        x = F.pixel_shuffle(self.up1(F.relu(x)), 2)
        if self.middle_mix is not None:
            x, new_state[_MIDDLE] = self.middle_mix(x, state[_MIDDLE])
        x = F.pixel_shuffle(self.up2(F.relu(self.middle(x))), 2)
        if self.fine_mix is not None:
            x, new_state[_FINE] = self.fine_mix(x, state[_FINE])
        x = self.fine(x)
        if self.last_mix is not None:
            x, new_state[_LAST] = self.last_mix(x, state[_LAST])
        logits = None if self.carry is None else self.carry.logits(x)
        drawn = F.pixel_shuffle(self.head(F.relu(x)), 2)
        if self.details is not None:
            drawn = self.details(x, drawn)
            if logits is not None:
                logits = F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)
        return drawn, logits, new_state


class TinyVAE(nn.Module):
    """Causal video VAE: pixels in [-1, 1], latents normalised to about unit variance per channel.

    `latent_mean` and `latent_std` are measured after training; they start as 0 and 1.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config)
        self.decoder = TinyDecoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def init_encode_state(self, batch: int, height: int, width: int) -> State:
        """State before the first frame. `height` and `width` in pixels; raises ModelError unless multiples of
        the stride.
        """
        return self._init_state(self.encoder.trunk, self.config.encoder_widths[-1], batch, height, width)

    def init_decode_state(self, batch: int, height: int, width: int) -> State:
        """State before the first latent frame; sizes in pixels, ModelError unless multiples of the stride."""
        fine, middle, coarse = self.config.decoder_widths
        stride = self.config.spatial_stride
        state = self._init_state(self.decoder.trunk, coarse, batch, height, width)
        if self.config.fine_mixes:
            like = self.latent_mean
            state[_MIDDLE] = like.new_zeros(batch, middle, 2 * height // stride, 2 * width // stride)
            state[_FINE] = like.new_zeros(batch, fine, 4 * height // stride, 4 * width // stride)
            state[_LAST] = state[_FINE].clone()
        if self.config.carries_pixels:
            state[_SHOWN] = self.latent_mean.new_zeros(batch, height, width, self.config.pixel_channels)
        return state

    def encode_chunk(self, frames_bthwc: Tensor, state: State) -> tuple[Tensor, State]:
        """Encode the next pixel frames of every stream in the batch.

        Args:
            frames_bthwc: floats in [-1, 1]; t = 1 + k*stride frames at the start of a video, k*stride later.
            state: from `init_encode_state` or the previous call. Never changed in place.

        Returns:
            normalised latents [b,f,c,h,w] and the new state.

        Raises:
            ModelError: the number of frames does not fill whole latent frames.
        """
        raw, state = self.encode_raw(frames_bthwc, state)
        return (raw - self.latent_mean[:, None, None]) / self.latent_std[:, None, None], state

    def encode_raw(self, frames_bthwc: Tensor, state: State) -> tuple[Tensor, State]:
        """As `encode_chunk`, without the normalisation (what training the VAE itself uses)."""
        stride, batch = self.config.temporal_stride, frames_bthwc.shape[0]
        first = not self._started(state)
        num_frames = frames_bthwc.shape[1]
        if num_frames < 1 or (num_frames - first) % stride != 0:
            expected = f"1 + k*{stride}" if first else f"k*{stride}"
            raise ModelError(
                f"{num_frames} pixel frames do not fill whole latent frames; pass {expected} of them here"
            )
        if first:
            frames_bthwc = torch.cat(
                [frames_bthwc[:, :1].expand(-1, stride, -1, -1, -1), frames_bthwc[:, 1:]], dim=1
            )
        groups = rearrange(frames_bthwc, "b (f g) h w c -> (b f) (g c) h w", g=stride)
        latents, trunk = self.encoder(groups.contiguous(memory_format=torch.channels_last), state)
        return latents.unflatten(0, (batch, -1)), self._after(state, trunk)

    def decode_chunk(self, latents_bfchw: Tensor, state: State) -> tuple[Tensor, State]:
        """Decode the next latent frames of every stream in the batch.

        Args:
            latents_bfchw: normalised latents.
            state: from `init_decode_state` or the previous call. Never changed in place.

        Returns:
            frames [b,t,h,w,c] in about [-1, 1] (not clamped) and the new state. The first latent frame of a
            video gives one pixel frame, every other `temporal_stride`.
        """
        raw = latents_bfchw * self.latent_std[:, None, None] + self.latent_mean[:, None, None]
        return self.decode_raw(raw, state)

    def decode_raw(self, raw_bfchw: Tensor, state: State) -> tuple[Tensor, State]:
        """As `decode_chunk`, from latents that are not normalised."""
        batch, stride = raw_bfchw.shape[0], self.config.temporal_stride
        rows = raw_bfchw.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        groups, logits, new_state = self.decoder(rows, state)
        frames = rearrange(groups, "(b f) (g c) h w -> b (f g) h w c", b=batch, g=stride)
        started = self._started(state)
        skipped = 0 if started else stride - 1
        frames = frames[:, skipped:]
        if logits is not None:
            assert self.decoder.carry is not None
            logits_bthw = rearrange(logits, "(b f) g h w -> b (f g) h w", b=batch)[:, skipped:]
            frames = self.decoder.carry(frames, logits_bthw, state[_SHOWN] if started else None)
            new_state[_SHOWN] = frames[:, -1]
        return frames, self._after(state, new_state)

    def _init_state(self, trunk: _Trunk, width: int, batch: int, height: int, pixel_width: int) -> State:
        stride = self.config.spatial_stride
        if height % stride or pixel_width % stride or height < stride or pixel_width < stride:
            raise ModelError(f"{height}x{pixel_width} pixels: height and width must be multiples of {stride}")
        like = self.latent_mean
        shape = (batch, width, height // stride, pixel_width // stride)
        state = {f"mix{i}": like.new_zeros(shape) for i in range(len(trunk.mixes))}
        state[STARTED] = torch.zeros(batch, dtype=torch.bool)  # on the host: it decides shapes
        return state

    @staticmethod
    def _started(state: State) -> bool:
        started = state[STARTED]
        if bool(started.any()) != bool(started.all()):
            raise ModelError("a batch mixes streams before and after their first frame; group them by state")
        return bool(started.all())

    @staticmethod
    def _after(state: State, trunk: State) -> State:
        return {**trunk, STARTED: torch.ones_like(state[STARTED])}

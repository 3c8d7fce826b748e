"""What networks cost in training, counted from their shapes: FLOPs, and the bytes autograd keeps.

A product of [m,k] and [k,n] counts 2mkn FLOPs, forward; its backward pass twice that. Elementwise work counts
nothing. Kept bytes are those of the tensors that operations save for the backward pass, one by one as
`models.layers` is written; tests hold both against torch's own counters.

Legend: b clips, r rows of a forward pass, t own tokens, k keys, w width, f latent frames, l text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longtake.models.tiny_text import TinyTextConfig
from longtake.models.tiny_vae import TinyVAE, TinyVAEConfig
from longtake.train.vae import Learned, select_learned

SINGLE_BYTES, HALF_BYTES = 4, 2
"""Of a number."""


@dataclass(frozen=True)
class Arithmetic:
    """How products are made.

    Args:
        half: under bf16 autocast; else in fp32.
        keeps_scores: attention that gradients flow through keeps its score matrix, as `ops.attention` does
            in bf16 on a CPU; fused kernels compute it again, which costs half a forward pass.
    """

    half: bool = False
    keeps_scores: bool = False

    @property
    def product_bytes(self) -> int:
        """Of a number that a product takes or makes."""
        return HALF_BYTES if self.half else SINGLE_BYTES


@dataclass(frozen=True)
class Cost:
    """Of some work: FLOPs, and bytes kept for a backward pass, as they are and where blocks are recomputed.

    Args:
        flops: of the forward and, where there is one, the backward pass.
        recompute_flops: on top, where blocks are recomputed.
        kept: bytes for the backward pass.
        kept_recomputing: the same where blocks are recomputed; without the block that is, at any time, whole.
        block: bytes of one block, which exist while it is recomputed.
        working: bytes that a pass without gradients has at a time.
        history: bytes of keys and values that the walk holds.
    """

    flops: float = 0.0
    recompute_flops: float = 0.0
    kept: float = 0.0
    kept_recomputing: float = 0.0
    block: float = 0.0
    working: float = 0.0
    history: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One after the other, both kept until a backward pass of both."""
        return Cost(
            self.flops + other.flops,
            self.recompute_flops + other.recompute_flops,
            self.kept + other.kept,
            self.kept_recomputing + other.kept_recomputing,
            max(self.block, other.block),
            max(self.working, other.working),
            self.history + other.history,
        )

    def beside(self, other: Cost) -> Cost:
        """This work, while what the other holds of it is there too; its FLOPs are not counted here."""
        return replace(self + other, flops=self.flops)

    def repeated(self, count: int) -> Cost:
        """The same work so many times over, all of it kept until a backward pass."""
        total = Cost()
        for _ in range(count):
            total += self
        return total

    def times(self, count: float) -> Cost:
        """The same pass without gradients so many times over."""
        assert self.kept == 0, "what is kept adds up, pass by pass"
        return replace(self, flops=self.flops * count)


def text_encoder_cost(config: TinyTextConfig, rows: int, learns: bool, arithmetic: Arithmetic) -> Cost:
    """Of the small text encoder on some prompts."""
    tokens, width = rows * config.text_length, config.width
    per_layer = 16 * tokens * width**2 + 4 * tokens * config.text_length * width
    flops = config.num_layers * per_layer
    if not learns:
        return Cost(flops=flops)
    size = arithmetic.product_bytes
    scores = config.num_heads * config.text_length * size
    kept = tokens * config.num_layers * (width * (2 * SINGLE_BYTES + 10 * size) + scores)
    return Cost(flops=3 * flops, kept=kept, kept_recomputing=kept)


def vae_cost(
    config: TinyVAEConfig,
    frames: tuple[int, int, int, int],
    arithmetic: Arithmetic,
    learns: Learned | None,
    loss_numbers: int = 0,
) -> Cost:
    """Of the small autoencoder, whose layers are run on shapes alone (torch's meta device) and counted.

    Args:
        config: the network.
        frames: clips, latent frames of each, and height and width in pixels.
        arithmetic: how products are made.
        learns: the part that gradients reach; None runs the encoder alone, without any.
        loss_numbers: kept by the loss for every pixel.
    """
    num_clips, num_latent_frames, height, width = frames
    with torch.device("meta"):
        vae = TinyVAE(config)
        if learns is not None:
            select_learned(vae, learns)
        pixels = torch.empty(
            num_clips,
            1 + (num_latent_frames - 1) * config.temporal_stride,
            height,
            width,
            config.pixel_channels,
        )
    weights = {parameter.untyped_storage()._cdata for parameter in vae.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        with torch.set_grad_enabled(learns == "all"):
            latents, _ = vae.encode_raw(pixels, vae.init_encode_state(num_clips, height, width))
        if learns is not None:
            decoded, _ = vae.decode_raw(latents, vae.init_decode_state(num_clips, height, width))
            decoded.mean().backward()  # type: ignore[no-untyped-call]
    layers = sum(kept.values()) * arithmetic.product_bytes / SINGLE_BYTES
    errors = pixels[..., 0].numel() * SINGLE_BYTES * loss_numbers
    return Cost(flops=counter.get_total_flops(), kept=layers + errors, kept_recomputing=layers + errors)

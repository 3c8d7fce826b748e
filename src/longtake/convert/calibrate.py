"""Tokens that enter every layer's self-attention while a model generates: what conversion is fitted to, and
judged by. Streams are sampled without guidance; a guided model's negative prompt is one prompt more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longtake.convert.factor import Samples
from longtake.diffusion.flow import Steps
from longtake.diffusion.sampler import chunk_noise, context_pass, sample_chunk
from longtake.history.base import HistoryConfig
from longtake.history.pure import PureHistory
from longtake.models.dit import DiT, TextContext
from longtake.models.layers import Block

_STREAMS_AT_ONCE = 8
_KEPT_AS = torch.bfloat16  # in fp32 those of Wan2.1-1.3B alone take 4.5 GB
_HELD_OUT_OF = 4
"""One stream of so many is held out."""


def held_out_texts(texts: Sequence[TextContext], count: int) -> list[TextContext]:
    """Prompts of streams that `sample_tokens` holds out, so many of them, some more than once if need be."""
    last = range(_HELD_OUT_OF - 1, max(len(texts), _HELD_OUT_OF), _HELD_OUT_OF)
    return [texts[stream % len(texts)] for stream in itertools.islice(itertools.cycle(last), count)]


class TokenSampler:
    """Keeps some of the tokens that enter every layer, those of some streams apart.

    Args:
        dit: the network.
        num_tokens: kept of a layer, of each row that a forward pass has.
        seed: of the choice.
    """

    def __init__(self, dit: DiT, num_tokens: int, seed: int = 0) -> None:
        self._share = num_tokens
        self._generator = torch.Generator().manual_seed(seed)
        self._first_row = 0
        self._fitted: list[list[Tensor]] = [[] for _ in dit.blocks]
        self._held_out: list[list[Tensor]] = [[] for _ in dit.blocks]
        self._hooks = []
        for layer, block in enumerate(dit.blocks):
            assert isinstance(block, Block)
            self._hooks.append(block.self_attn.register_forward_pre_hook(self._hook(layer)))

    def begin(self, first_row: int) -> None:
        """The rows of the passes that follow are streams from this one on."""
        self._first_row = first_row

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for row, tokens_nw in enumerate(inputs[0].detach(), self._first_row):
                chosen = torch.randperm(len(tokens_nw), generator=self._generator)[: self._share]
                is_held_out = row % _HELD_OUT_OF == _HELD_OUT_OF - 1
                kept = self._held_out if is_held_out else self._fitted
                kept[layer].append(tokens_nw[chosen.to(tokens_nw.device)].cpu().to(_KEPT_AS))

        return keep

    def close(self) -> None:
        """No more is kept."""
        for hook in self._hooks:
            hook.remove()

    def samples(self) -> list[Samples]:
        """Of every layer what was kept. It is rounded, which makes other tokens of them, hardly different
        ones: what layers make of them is computed from what they are now.
        """
        return [
            Samples(torch.cat(fitted), torch.cat(held_out))
            for fitted, held_out in zip(self._fitted, self._held_out, strict=True)
        ]


@torch.no_grad()
def sample_tokens(
    dit: DiT,
    texts: Sequence[TextContext],
    history: HistoryConfig,
    steps: Steps,
    latent_shape: tuple[int, int, int],
    num_chunks: int,
    num_tokens: int,
    seed: int = 0,
) -> list[Samples]:
    """Generate chunks under some prompts and keep tokens of all passes.

    Args:
        dit: the network, dense or latent.
        texts: a prompt each, streamed once; or, where they are less than four, several times.
        history: window, sink, chunk and positions.
        steps: of the sampler.
        latent_shape: channels, height, width.
        num_chunks: of every stream.
        num_tokens: kept of every layer in all: a few more, or fewer where passes do not have their share.
        seed: of noise and choice.
    """
    num_streams = max(len(texts), _HELD_OUT_OF)
    streams = list(itertools.islice(itertools.cycle(texts), num_streams))
    passes = num_streams * num_chunks * (len(steps.timesteps) + 1)
    sampler = TokenSampler(dit, -(-num_tokens // passes), seed)
    device = dit.patch_embedding.weight.device
    grid = dit.token_grid(*latent_shape[1:])
    shape = (history.chunk_frames, *latent_shape)
    try:
        for first in range(0, num_streams, _STREAMS_AT_ONCE):
            text = TextContext.stack(streams[first : first + _STREAMS_AT_ONCE])
            seeds = [seed + row for row in range(first, min(first + _STREAMS_AT_ONCE, num_streams))]
            past = PureHistory(history, dit.cache_spec(), grid, dit.policy(history.policy, grid), device)
            sampler.begin(first)
            for chunk in range(num_chunks):
                noise = chunk_noise(seeds, [chunk] * len(seeds), len(steps.timesteps), shape)
                view = past.view()
                clean = sample_chunk(dit, text, view, [each.to(device) for each in noise], steps)
                past = past.commit(context_pass(dit, text, view, clean))
    finally:
        sampler.close()
    return sampler.samples()

"""Tokens that enter every layer's self-attention while a model generates: what conversion is fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from longtake.diffusion.flow import Steps
from longtake.diffusion.sampler import chunk_noise, context_pass, sample_chunk
from longtake.history.base import HistoryConfig
from longtake.history.pure import PureHistory
from longtake.models.dit import DiT, TextContext
from longtake.models.layers import Block


class TokenSampler:
    """Keeps some of the tokens that enter every layer.

    Args:
        dit: the network.
        num_tokens: kept of each layer.
        num_calls: forward passes that will come, each of which gives equally many.
        seed: of the choice.
    """

    def __init__(self, dit: DiT, num_tokens: int, num_calls: int, seed: int = 0) -> None:
        self._share = -(-num_tokens // num_calls)
        self._generator = torch.Generator().manual_seed(seed)
        self._kept: list[list[Tensor]] = [[] for _ in dit.blocks]
        self._hooks = []
        for layer, block in enumerate(dit.blocks):
            assert isinstance(block, Block)
            self._hooks.append(block.self_attn.register_forward_pre_hook(self._hook(layer)))

    def _hook(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            tokens_nw = inputs[0].detach().flatten(0, 1)
            chosen = torch.randperm(len(tokens_nw), generator=self._generator)[: self._share]
            self._kept[layer].append(tokens_nw[chosen.to(tokens_nw.device)].float().cpu())

        return keep

    def close(self) -> list[Tensor]:
        """Of every layer the tokens kept, ``[n, w]``; nothing is kept any more."""
        for hook in self._hooks:
            hook.remove()
        return [torch.cat(kept) for kept in self._kept]


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
) -> list[Tensor]:
    """Generate chunks under some prompts and keep tokens of all passes, ``[n, w]`` of each layer.

    Args:
        dit: the network, dense or latent.
        texts: a prompt each; all streams run in one batch.
        history: window, sink, chunk and positions.
        steps: of the sampler.
        latent_shape: channels, height, width.
        num_chunks: of every stream.
        num_tokens: kept of every layer: a few more, or fewer where passes do not have their share.
        seed: of noise and choice.
    """
    sampler = TokenSampler(dit, num_tokens, num_chunks * (len(steps.timesteps) + 1), seed)
    try:
        text, device = TextContext.stack(texts), dit.patch_embedding.weight.device
        grid = dit.token_grid(*latent_shape[1:])
        past = PureHistory(history, dit.cache_spec(), grid, dit.policy(history.policy, grid), device)
        seeds = [seed + row for row in range(len(texts))]
        for chunk in range(num_chunks):
            shape = (history.chunk_frames, *latent_shape)
            noise = chunk_noise(seeds, [chunk] * len(seeds), len(steps.timesteps), shape)
            view = past.view()
            clean = sample_chunk(dit, text, view, [each.to(device) for each in noise], steps)
            past = past.commit(context_pass(dit, text, view, clean))
    finally:
        kept = sampler.close()
    return kept

"""How far another network's flow is from a dense one's, over streams of the dense one.

The dense network streams; at some noise levels of every chunk each says what the flow is, over its own cache
of the same past.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from longtake.diffusion.flow import NUM_TRAIN_STEPS, Steps, add_noise
from longtake.diffusion.sampler import chunk_noise, context_pass, sample_chunk
from longtake.history.base import HistoryConfig
from longtake.history.pure import PureHistory
from longtake.models.dit import DiT, TextContext

FAR: Final = 1 << 20
"""Between the seeds of what is fitted to and what is judged."""
_SIGMAS: Final = (0.9, 0.6, 0.3)


class FlowProbe:
    """Streams of a dense model, and what it says the flow is at some noise levels of every chunk.

    Args:
        dense: the network.
        texts: a prompt for each stream.
        history, steps: of its streams. ``latent_shape``: channels, height, width.
        num_chunks: of every stream. ``seed``: of noise.
    """

    def __init__(
        self,
        dense: DiT,
        texts: Sequence[TextContext],
        history: HistoryConfig,
        steps: Steps,
        latent_shape: tuple[int, int, int],
        num_chunks: int,
        seed: int,
    ) -> None:
        self._text = TextContext.stack(list(texts))
        self._history, self._grid = history, dense.token_grid(*latent_shape[1:])
        shape = (history.chunk_frames, *latent_shape)
        seeds = [seed + row for row in range(len(texts))]
        self._chunks: list[Tensor] = []
        self._noise: list[list[Tensor]] = []
        device = dense.patch_embedding.weight.device
        past = self._past(dense)
        with torch.no_grad():
            for chunk in range(num_chunks):
                indices = [chunk] * len(seeds)
                view = past.view()
                noise = chunk_noise(seeds, indices, len(steps.timesteps), shape)
                clean = sample_chunk(dense, self._text, view, [each.to(device) for each in noise], steps)
                past = past.commit(context_pass(dense, self._text, view, clean))
                fresh = chunk_noise([each + FAR for each in seeds], indices, len(_SIGMAS), shape)
                self._chunks.append(clean)
                self._noise.append([each.to(device) for each in fresh])
        self._flows = self._flows_of(dense)

    def error_of(self, dit: DiT) -> float:
        """Of another network's flow, as a share of the variance of the dense one's."""
        wrong = torch.stack([(flow - truth).float().square().mean() for flow, truth in self._pairs(dit)])
        spread = torch.stack([truth.float().var(correction=0) for truth in self._flows])
        return float(wrong.mean() / spread.mean())

    def _pairs(self, dit: DiT) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self._flows_of(dit), self._flows, strict=True))

    def _past(self, dit: DiT) -> PureHistory:
        policy = dit.policy(self._history.policy, self._grid)
        device = dit.patch_embedding.weight.device
        return PureHistory(self._history, dit.cache_spec(), self._grid, policy, device)

    @torch.no_grad()
    def _flows_of(self, dit: DiT) -> list[Tensor]:
        past, flows = self._past(dit), []
        dtype = dit.patch_embedding.weight.dtype
        for clean, noise in zip(self._chunks, self._noise, strict=True):
            view = past.view()
            for sigma, fresh in zip(_SIGMAS, noise, strict=True):
                times = clean.new_full(clean.shape[:2], sigma * NUM_TRAIN_STEPS)
                flow, _ = dit(add_noise(clean, fresh, sigma).to(dtype), times, self._text, view)
                flows.append(flow)
            past = past.commit(context_pass(dit, self._text, view, clean))
        return flows

"""Layer-wise distillation: every latent attention layer learns to answer as the dense layer that it replaced.

The dense parent walks through clips; what enters each of its layers enters the latent layer of the same
index, beside a history of that layer's own entries, and the answers are compared. No layer waits for
another, so the first steps already mend what conversion broke; teacher forcing of the whole follows.

Legend: b clips, r rows, t tokens, w width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from longtake.cache.base import Entries
from longtake.diffusion.flow import NUM_TRAIN_STEPS, shift_sigmas
from longtake.history.base import HistoryConfig, HistoryView
from longtake.history.pure import PureHistory
from longtake.models.dit import DiT
from longtake.models.layers import Block
from longtake.train.excerpts import prompts_in_force
from longtake.train.latents import Clips, ClipSource, ClipsPerStep
from longtake.train.loop import Learner, LoopConfig, build_optimizer
from longtake.train.networks import TextToLatents
from longtake.train.optim import MuonAdamW
from longtake.train.walk import at_sigma, stratified

_EVALUATED_SIGMA = 0.5


class LayersConfig(ClipsPerStep):
    """The stage's settings. Prompts stay as at a clip's beginning: self-attention hardly knows of them."""

    loop: LoopConfig = LoopConfig(num_steps=200, decay_from=0.0, ema_decay=0.98)
    num_clips: int = Field(4, ge=0, description="clips per step that are walked through all chunks")
    num_copies: int = Field(1, ge=1, description="noisy copies of each chunk")
    sigma_shift: float = Field(3.0, gt=0, description="shift of the training sigmas, as in sampling")
    muon_learning_rate: float = Field(1e-3, gt=0)
    adamw_learning_rate: float = Field(5e-4, gt=0)


class LayersTask:
    """The stage's module, optimiser, loss and evaluation (see `train.loop.Task`).

    Args:
        module: with the latent network; of it self-attention alone learns, and alone is left requiring
            gradients.
        parent: with the dense one.
        history: window, sink, chunk and positions.
        config: the stage.
        first_clips, clips: sources, see `DiTTask`.
        held_out: for evaluation.
    """

    def __init__(
        self,
        module: TextToLatents,
        parent: TextToLatents,
        history: HistoryConfig,
        config: LayersConfig,
        first_clips: ClipSource[Clips] | None,
        clips: ClipSource[Clips] | None,
        held_out: Clips,
    ) -> None:
        assert module.dit.config.latent is not None, "checked before"
        assert parent.dit.config.latent is None, "checked before"
        self._dit, self._parent, self._history = module.dit, parent, history
        self.config, self.held_out = config, held_out
        self._first_clips, self._clips = first_clips, clips
        module.requires_grad_(False)  # so that nothing else collects gradients meanwhile
        self.module: nn.Module = nn.ModuleList(attention_of(self._dit)).requires_grad_(True)
        self.optimizer = layers_optimizer(self.module, config)
        self.learners = {"": Learner(self.module, self.optimizer, self.loss)}

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Mean over layers and chunks of the answers' squared error, as a share of their variance."""
        rng = np.random.default_rng((self.config.loop.seed, step))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
        errors = []
        for clips, num_chunks in self.config.draw(rng, self._first_clips, self._clips):
            errors += self._walk(clips, num_chunks, lambda rows: self._sigmas(rows, generator), generator)
        by_layer = torch.stack(errors).mean(0)
        return by_layer.mean(), {f"layer_{i}": float(error) for i, error in enumerate(by_layer.detach())}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The same on held-out clips, at one noise level."""
        generator = torch.Generator().manual_seed(0)
        num_chunks = min(
            self.config.num_chunks, self.held_out.latents_bfchw.shape[1] // self._history.chunk_frames
        )

        def half(rows: int) -> Tensor:
            return torch.full((rows,), _EVALUATED_SIGMA)

        errors = torch.stack(self._walk(self.held_out, num_chunks, half, generator)).mean(0)
        return {"error": float(errors.mean())} | {f"layer_{i}": float(e) for i, e in enumerate(errors)}

    def samples(self) -> Tensor | None:
        """None, see `train.loop.Task`."""
        return None

    def _sigmas(self, rows: int, generator: torch.Generator) -> Tensor:
        return shift_sigmas(stratified(rows, generator), self.config.sigma_shift)

    def _walk(
        self,
        clips: Clips,
        num_chunks: int,
        sigmas: Callable[[int], Tensor],
        generator: torch.Generator,
    ) -> list[Tensor]:
        """Every chunk's errors ``[layers]``; rows are noisy copies of the chunk, then its clean context."""
        parent, num_clips = self._parent.dit, len(clips)
        frames, copies = self._history.chunk_frames, self.config.num_copies
        latents = clips.latents_bfchw.float()
        text = self._parent.encode(prompts_in_force(clips.prompts, 0)).repeat(copies + 1)
        dense, latent = (_empty(dit, self._history, latents) for dit in (parent, self._dit))
        results = []
        for chunk in range(num_chunks):
            clean = latents[:, chunk * frames : (chunk + 1) * frames]
            sigma = sigmas(copies * num_clips)
            target = clean.repeat(copies, 1, 1, 1, 1)
            noisy = at_sigma(target, torch.randn(target.shape, generator=generator), sigma)
            rows = torch.cat([noisy, clean])
            times = NUM_TRAIN_STEPS * torch.cat([sigma, sigma.new_zeros(num_clips)])
            with torch.no_grad(), _watched(parent) as seen:
                view = dense.view().repeat(copies + 1)
                _, entries = parent(rows, times[:, None].expand(-1, frames), text, view)
            committed = slice(copies * num_clips, None)
            dense = dense.commit(entries.select(committed))
            errors, own = self._answers(seen, latent.view().repeat(copies + 1))
            latent = latent.commit(own.select(committed))
            results.append(errors)
        return results

    def _answers(self, seen: list[tuple[Tensor, Tensor]], view: HistoryView) -> tuple[Tensor, Entries]:
        """Errors of all layers on what entered their dense ones, and the entries that they leave."""
        errors, entries = [], []
        for layer, (attention, (x_rtw, expected)) in enumerate(
            zip(attention_of(self._dit), seen, strict=True)
        ):
            answer, left = attention(x_rtw, view, layer)
            error = (answer.float() - expected).square().mean() / expected.var().clamp_min(1e-12)
            errors.append(error)
            entries.append(left)
        return torch.stack(errors), Entries(tuple(entries))


def layers_optimizer(module: nn.Module, config: LayersConfig) -> MuonAdamW:
    """Muon on the matrices, AdamW on the rest."""
    return build_optimizer(
        module, config.muon_learning_rate, config.adamw_learning_rate, config.loop.precision
    )


def attention_of(dit: DiT) -> list[nn.Module]:
    """Every layer's self-attention."""
    found = []
    for block in dit.blocks:
        assert isinstance(block, Block)
        found.append(block.self_attn)
    return found


@contextmanager
def _watched(dit: DiT) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """What enters and leaves every layer's self-attention meanwhile."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, object]) -> None:
        seen.append((inputs[0], output[0].float()))

    hooks = [attention.register_forward_hook(keep) for attention in attention_of(dit)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _empty(dit: DiT, history: HistoryConfig, latents_bfchw: Tensor) -> PureHistory:
    grid = dit.token_grid(*latents_bfchw.shape[-2:])
    policy, device = dit.policy(history.policy, grid), latents_bfchw.device
    return PureHistory(history, dit.cache_spec(), grid, policy, device, packs=False)

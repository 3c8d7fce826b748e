"""Distribution matching distillation on the model's own rollouts (Self-Forcing, arXiv 2506.08009; DMD2, arXiv
2405.14867).

The generator rolls chunks out through its own history, as in serving, and stops denoising at a step drawn for
the whole rollout; gradients flow through that step alone. The finished chunks are noised again, and two
networks say where they should go: the frozen teacher, towards real clips of the caption, and a critic that
follows the generator's own distribution, away from what is made too often. Both score chunk by chunk, each
given the generated past, or, where they are bidirectional models, the whole clip at one noise level. In some
rollouts every prompt switches where a chunk begins, for all three networks.

Legend: b rollouts, r = copies * b rows, f latent frames, c channels, h/w latent rows and columns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from longtake.diffusion.flow import Schedule, shift_sigmas
from longtake.diffusion.sampler import few_steps
from longtake.history.base import HistoryConfig
from longtake.train.dmd_config import DMDConfig, score_history
from longtake.train.loop import Learner
from longtake.train.lora import add_lora
from longtake.train.networks import TextToLatents, dit_optimizer
from longtake.train.optim import MuonAdamW
from longtake.train.samples import SampleRollouts
from longtake.train.walk import GuidedWalk, Walk, at_sigma, stratified

_GENERATOR, _CRITIC = 0, 1


@dataclass(frozen=True)
class _Script:
    """The prompts of a batch of rollouts: `before`, and from scored chunk `switch` on `after`; `lead` chunks
    precede the scored ones (below 0 the switch is among them), the first `overlap` of which teach nothing.
    """

    before: list[str]
    after: list[str]
    switch: int
    lead: int = 0
    overlap: int = 0

    @property
    def num_clips(self) -> int:
        return len(self.before)

    @property
    def scored(self) -> list[str]:
        """Prompts with which scored chunks begin."""
        return self.after if self.switch <= 0 else self.before


def dmd_optimizers(config: DMDConfig, generator: nn.Module, critic: nn.Module) -> tuple[MuonAdamW, MuonAdamW]:
    """What updates the generator and the critic."""
    precision = config.loop.precision
    of_generator = dit_optimizer(
        generator,
        config.muon_learning_rate,
        config.adamw_learning_rate,
        precision,
        config.momentum,
        config.generator_optimizer,
    )
    of_memory = [p for name, p in generator.named_parameters() if name.startswith("dit.memory.")]
    of_generator.scale_rates_of(of_memory, config.memory_rate)
    of_critic = dit_optimizer(
        critic,
        config.critic_muon_learning_rate,
        config.critic_adamw_learning_rate,
        precision,
        only_adamw=config.critic_optimizer,
    )
    return of_generator, of_critic


class DMDTask:
    """The stage's learners and evaluation (see `train.loop.Task`).

    Args:
        module: the generator, which should make something sensible in few steps already. Where the config has
            `lora` it gets low-rank updates, which `train.lora.merge_lora` takes away again.
        teacher: the frozen multi-step model.
        history: of all three, where scores go by chunks; else of the generator.
        schedule: the generator's denoising steps.
        config: the stage.
        captions: for training.
        held_out: captions for evaluation.
        latent_shape: of a latent frame, (channels, height, width).
        critic: what follows the generator; a copy of the teacher where None.
        rollouts: what to show of the generator at evaluations.
        temperatures: scale of each step's noise in chunks that open nothing, as the generator will be served
            with; None for 1.
    """

    def __init__(
        self,
        module: TextToLatents,
        teacher: TextToLatents,
        history: HistoryConfig,
        schedule: Schedule,
        config: DMDConfig,
        captions: Sequence[str],
        held_out: Sequence[str],
        latent_shape: tuple[int, int, int],
        critic: TextToLatents | None = None,
        rollouts: SampleRollouts | None = None,
        temperatures: Sequence[float] | None = None,
    ) -> None:
        self.module = module
        self.critic = (copy.deepcopy(teacher) if critic is None else critic).requires_grad_(True)
        if config.lora is not None:
            add_lora(module, config.lora)
            add_lora(self.critic, config.lora)
        self.history = history
        self._rollouts = rollouts
        self._score_history = score_history(config, history)
        self._device = module.dit.patch_embedding.weight.device
        self._half = teacher.dit.patch_embedding.weight.dtype == torch.bfloat16
        self.config = config
        self._teacher = teacher.eval().requires_grad_(False)
        self._steps = schedule.resolve()
        self._temperatures = (1.0,) * len(self._steps.sigmas) if temperatures is None else tuple(temperatures)
        self._captions = captions
        self._held_out = held_out
        self._shape = (history.chunk_frames, *latent_shape)
        of_generator, of_critic = dmd_optimizers(config, module, self.critic)
        self.learners = {
            "generator": Learner(module, of_generator, self.generator_loss, every=config.critic_updates),
            "critic": Learner(self.critic, of_critic, self.critic_loss),
        }

    def generator_loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Half the squared distance to where the difference of the scores points (DMD's surrogate)."""
        script, generator = self._draw(step, _GENERATOR)
        lead, chunks = self._rollout(script, generator, learn=True)
        pieces, skipped = self._pieces(chunks), script.overlap * self.history.chunk_frames
        with torch.no_grad():
            critic = self._score_walk(script.scored)
            teacher = self._guided_teacher(script.scored)
            for chunk in self._seen(lead):
                critic.commit(chunk)
                teacher.commit(chunk)
        losses, sizes, moves = [], [], []
        for index, chunk in enumerate(pieces):
            if index == script.switch > 0:
                with torch.no_grad():
                    switch = self.config.switch
                    critic.switch(self.critic.encode(script.after), switch)
                    teacher.switch(self._teacher.encode(self._with_negative(script.after)), switch)
            clean = chunk.detach()
            sigma = self._score_sigmas(len(clean), generator)
            noisy = at_sigma(clean, self._noise(clean.shape, generator), sigma)
            last = index == len(pieces) - 1
            with torch.no_grad():
                fake = critic.predict(noisy, sigma) if last else critic.advance(noisy, sigma, clean)
                real = teacher.predict(noisy, sigma) if last else teacher.advance(noisy, sigma, clean)
            chunk, clean, real, fake = (each[:, skipped:] for each in (chunk, clean, real, fake))
            scale = (clean - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-3)
            move = (real - fake) / scale
            losses.append(0.5 * (chunk - (clean + move)).square().mean())
            sizes.append(float((clean - real).abs().mean()))
            moves.append(float((real - fake).abs().mean()))
        spread = float(torch.cat([chunk.detach() for chunk in pieces]).std())
        return torch.stack(losses).mean(), {
            "move": float(np.mean(moves)),
            "distance": float(np.mean(sizes)),
            "spread": spread,
        }

    def critic_loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Weighted error of the clean latents on the generator's rollouts (flow matching)."""
        config = self.config
        script, generator = self._draw(step, _CRITIC)
        with torch.no_grad():
            lead, chunks = self._rollout(script, generator, learn=False)
        pieces, skipped = self._pieces(chunks), script.overlap * self.history.chunk_frames
        walk = self._score_walk(script.scored)
        with torch.no_grad():
            for chunk in self._seen(lead):
                walk.commit(chunk)
        losses = []
        for index, clean in enumerate(pieces):
            if index == script.switch > 0:
                walk.switch(self.critic.encode(script.after), config.switch)
            target = clean.repeat(config.num_critic_copies, 1, 1, 1, 1)
            sigma = self._score_sigmas(len(target), generator)
            noisy = at_sigma(target, self._noise(target.shape, generator), sigma)
            last = index == len(pieces) - 1
            predicted = walk.predict(noisy, sigma) if last else walk.advance(noisy, sigma, clean)
            squared = (predicted - target)[:, skipped:].square().mean(dim=(1, 2, 3, 4))
            flow = config.critic_error == "flow"  # whose error is that of the clean latents over sigma
            losses.append((squared / (sigma**2 if flow else sigma.clamp_min(config.min_weight_sigma))).mean())
        return torch.stack(losses).mean(), {}

    def _guided_teacher(self, captions: list[str]) -> GuidedWalk:
        with torch.no_grad():
            text = self._teacher.encode(self._with_negative(captions))
        size, guidance = self._shape[-2:], self.config.guidance
        return GuidedWalk(self._teacher.dit, self._score_history, text, len(captions), guidance, *size)

    def _score_walk(self, captions: list[str]) -> Walk:
        return self._walk(self.critic, captions, self._score_history)

    def _walk(self, networks: TextToLatents, captions: list[str], history: HistoryConfig) -> Walk:
        size, recompute = self._shape[-2:], self.config.loop.recompute == "blocks"
        return Walk(
            networks.dit, history, networks.encode(captions), len(captions), *size, recompute=recompute
        )

    def _with_negative(self, captions: list[str]) -> list[str]:
        return captions + [self.config.negative_prompt] * len(captions)

    def _pieces(self, chunks: list[Tensor]) -> list[Tensor]:
        """What is scored at a time, [b,f,c,h,w] each."""
        return chunks if self.config.scores == "chunks" else [torch.cat(chunks, dim=1)]

    def _seen(self, lead: list[Tensor]) -> list[Tensor]:
        """What of the past is committed before scores are taken."""
        return lead if self.config.scores == "chunks" else []

    def _noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Drawn on the CPU, so that it is the same on every device."""
        return torch.randn(shape, generator=generator).to(self._device)

    def _draw(self, step: int, who: int) -> tuple[_Script, torch.Generator]:
        config = self.config
        rng = np.random.default_rng((config.loop.seed, step, who))
        before, after = rng.integers(len(self._captions), size=(2, config.num_clips))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 40)))
        causal = config.scores == "chunks"
        switches = (config.num_chunks > 1 or not causal) and rng.random() < config.switch_share
        switch = 1 + int(rng.integers(config.num_chunks - 1)) if switches and causal else config.num_chunks
        texts = [[self._captions[int(row)] for row in rows] for rows in (before, after)]
        lead = int(rng.integers(config.max_lead_chunks + 1)) if config.max_lead_chunks else 0
        if switches and not causal and lead > 0:
            switch = -int(rng.integers(lead))
        overlap = config.overlap_chunks if lead > 0 else 0
        return _Script(texts[0], texts[1], switch, lead, overlap), generator

    def _rollout(
        self, script: _Script, generator: torch.Generator, learn: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Chunks [b,f,c,h,w] as serving would make them, but ending at one random step for all: those of the
        lead, which learn nothing, and those to be scored.
        """
        config = self.config
        exit_step = int(torch.randint(len(self._steps.sigmas), (1,), generator=generator))
        walk = self._walk(self.module, script.before, self.history)
        shape = (script.num_clips, *self._shape)
        chunks: list[Tensor] = []
        total, switch = script.lead + config.num_chunks, script.lead + script.switch
        credits_memory = config.memory_credit == "chain" or (
            config.memory_credit == "first_exit" and exit_step == 0
        )
        for number in range(total):
            if number == switch:
                text = self.module.encode(script.after)
                with torch.set_grad_enabled(learn and credits_memory):
                    walk.switch(text, config.switch, learns=False)
            scales = (1.0,) * len(self._steps.sigmas) if number in (0, switch) else self._temperatures
            clean = self._denoised(
                walk,
                shape,
                scales,
                generator,
                exit_step + 1,
                learns=learn and number >= script.lead + script.overlap,
            )
            chunks.append(clean)
            if number == total - 1:
                break  # nobody reads it
            with torch.set_grad_enabled(learn and credits_memory):
                walk.commit(clean.detach(), learns=False)
            if config.credit_updates is not None and number < total - 1 - config.credit_updates:
                walk.detach()
        return chunks[: script.lead], chunks[script.lead :]

    def _denoised(
        self,
        walk: Walk,
        shape: tuple[int, int, int, int, int],
        scales: Sequence[float],
        generator: torch.Generator,
        num_steps: int,
        *,
        learns: bool,
    ) -> Tensor:
        """The next chunk after some of the sampler's steps; where it learns, through the last of them."""

        def predict(step: int, noisy: Tensor) -> Tensor:
            sigma = torch.full((len(noisy),), self._steps.sigmas[step], device=self._device)
            with torch.set_grad_enabled(learns and step == num_steps - 1):
                return walk.predict(noisy, sigma, first_pass=step == 0)

        def noise(step: int) -> Tensor:
            return scales[step] * self._noise(shape, generator)

        return few_steps(predict, noise, self._steps, num_steps)

    def _score_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        sigmas = shift_sigmas(stratified(count, generator), self.config.score_shift)
        return sigmas.clamp(self.config.min_score_sigma, self.config.max_score_sigma).to(self._device)

    def evaluate(self) -> dict[str, float]:
        """On rollouts of held-out captions with all steps: how far teacher and critic disagree, relative to
        the teacher's own distance, at three noise levels; and the spread of the latents.
        """
        # In fp32, unless the teacher's weights are bf16 already.
        with torch.no_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            return self._evaluate()

    def _evaluate(self) -> dict[str, float]:
        generator = torch.Generator().manual_seed(0)
        captions = list(self._held_out[: self.config.num_evaluation_clips])
        walk = self._walk(self.module, captions, self.history)
        shape = (len(captions), *self._shape)
        chunks = []
        for number in range(self.config.num_chunks):
            scales = (1.0,) * len(self._steps.sigmas) if number == 0 else self._temperatures
            clean = self._denoised(walk, shape, scales, generator, len(self._steps.sigmas), learns=False)
            walk.commit(clean)
            chunks.append(clean)
        critic, teacher = self._score_walk(captions), self._guided_teacher(captions)
        moves: dict[str, list[float]] = {}
        for clean in self._pieces(chunks):
            for value in (0.25, 0.5, 0.75):
                sigma = torch.full((len(captions),), value, device=self._device)
                noisy = at_sigma(clean, self._noise(clean.shape, generator), sigma)
                real, fake = teacher.predict(noisy, sigma), critic.predict(noisy, sigma)
                ratio = (real - fake).abs().mean() / (clean - real).abs().mean()
                moves.setdefault(f"move_{value}", []).append(float(ratio))
            if self.config.scores == "chunks":
                critic.commit(clean)
                teacher.commit(clean)
        return {
            **{name: float(np.mean(values)) for name, values in moves.items()},
            "spread": float(torch.cat(chunks).std()),
        }

    def samples(self) -> Tensor | None:
        """Rollouts, see `train.loop.Task`."""
        return None if self._rollouts is None else self._rollouts(self.module.dit, self.module.text)

"""Chunk-causal training of the small DiT with teacher forcing: clips are walked as `train.walk` says.

Legend: b clips, f latent frames, c channels, h/w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.diffusion.flow import shift_sigmas
from longtake.history.base import HistoryConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.train.dit_config import ClipKind, DiTTrainingConfig
from longtake.train.excerpts import changed, prompts_in_force
from longtake.train.latents import Clips
from longtake.train.long_clips import LongBatch
from longtake.train.loop import Learner
from longtake.train.networks import TextToLatents, dit_optimizer
from longtake.train.own_rollouts import OwnRollouts
from longtake.train.parents import Parent, ParentsWalk
from longtake.train.probes import MemoryReading, probes_of, token_guide_error
from longtake.train.prompt_guide import PromptProbe
from longtake.train.samples import SampleRollouts
from longtake.train.steps import Steps
from longtake.train.walk import Noise, Walk, at_sigma

_EVALUATION_TIMES = (0.25, 0.5, 0.75, 0.95)


class DiTTask:
    """The stage's module, optimiser, loss and evaluation (see `train.loop.Task`).

    Args:
        module: what is trained.
        history: window, sink, chunk and positions.
        config: the stage.
        steps: what every step walks through.
        held_out: for evaluation.
        rollouts: what to show of the model at evaluations.
        parent: whose predictions are the targets, in place of the clips.
        own_rollouts: make long clips anew with the networks as they are; None: long clips are as drawn.
    """

    def __init__(
        self,
        module: TextToLatents,
        history: HistoryConfig,
        config: DiTTrainingConfig,
        steps: Steps,
        held_out: Clips,
        rollouts: SampleRollouts | None = None,
        parent: Parent | None = None,
        own_rollouts: OwnRollouts | None = None,
    ) -> None:
        assert (parent is not None) == (config.learns_from != "clips"), "checked before"
        self.networks = module
        self._parent = parent
        self._own_rollouts = own_rollouts
        if parent is not None:
            parent.networks.eval().requires_grad_(False)
        self.device = module.dit.patch_embedding.weight.device
        self.module: nn.Module = module
        self._probe: nn.Linear | None = None
        self._memory_probe: nn.Linear | None = None
        self._prompt_probe: PromptProbe | None = None
        probes = probes_of(module, config)
        if probes:
            self.module = nn.ModuleDict({"networks": module, **probes}).to(self.device)
            self._probe, self._prompt_probe = probes.get("probe"), probes.get("prompt_probe")
            self._memory_probe = probes.get("memory_probe")
        self._rollouts = rollouts
        self.history = history
        self.config = config
        self.steps = steps
        self.held_out = held_out
        self.optimizer = dit_optimizer(
            self.module,
            config.muon_learning_rate,
            config.adamw_learning_rate,
            config.loop.precision,
            only_adamw=config.optimizer,
        )
        self.learners = {"": Learner(self.module, self.optimizer, self.loss)}

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Weighted error of the clean latents over all chunks of the step's clips."""
        config, drawn = self.config, self.steps(step)
        noise = Noise(drawn.noise_seed, self.device)
        weight = config.foreground_weight + progress * (
            config.final_foreground_weight - config.foreground_weight
        )
        parts: list[_Errors] = []
        prompts: list[str] = []
        weights: list[float] = []
        for clips, num_chunks in drawn.walks:
            kind: ClipKind = "first" if num_chunks == 1 else "whole"
            parts += self._walk(clips, num_chunks, weight, noise, kind=kind)
            prompts += [text for of_clip in clips.prompts for _, text in of_clip]
            weights += [config.first_weight if num_chunks == 1 else 1.0] * num_chunks
        if drawn.long is not None:
            clips, num_chunks = drawn.long.clips, len(drawn.long.learned)
            if self._own_rollouts is not None:
                clips = self._own_rollouts(self.networks, clips, num_chunks, drawn.noise_seed)
            late = self._walk(
                clips,
                num_chunks,
                weight,
                noise,
                drawn.long.learned,
                kind="long",
                told=_told(drawn.long, "returns" in config.clips_teach),
            )
            parts += late
            prompts += [text for of_clip in drawn.long.clips.prompts for _, text in of_clip]
            weights += [1.0] * len(late)
        if drawn.recall is not None:
            batch = drawn.recall
            reading = MemoryReading(batch, self._memory_probe, self.networks.dit.config.patch_size[-1])
            asked = self._walk(
                batch.clips, len(batch.learned), weight, noise, batch.learned, reading, kind="recall"
            )
            parts += asked
            weights += [
                config.recall_back_weight if chunk >= batch.back_chunk else 1.0
                for chunk, learned in enumerate(batch.learned)
                if learned
            ]
        shares = torch.tensor(weights, device=self.device) / sum(weights)
        loss = (torch.stack([part for part, _, _ in parts]) * shares).sum()
        foreground = torch.stack([error for _, error, _ in parts])
        figures = {"foreground_first": float(foreground[0]), "foreground": float(foreground.mean())}
        if drawn.long is not None:
            figures["long"] = float(torch.stack([error.detach() for error, _, _ in late]).mean())
            figures["foreground_long"] = float(torch.stack([error for _, error, _ in late]).mean())
        if drawn.recall is not None:
            figures["foreground_recall"] = float(torch.stack([error for _, error, _ in asked]).mean())
        read = [error for _, _, error in parts if error is not None]
        if read:
            guide = torch.stack(read).mean()
            loss = loss + config.guide_weight * guide
            figures["guide"] = float(guide.detach())
        if drawn.recall is not None and reading.errors:
            memory_guide = torch.stack(reading.errors).mean()
            loss = loss + config.memory_guide_weight * memory_guide
            figures["memory_guide"] = float(memory_guide.detach())
        if self._prompt_probe is not None and isinstance(self.networks.text, TinyTextEncoder):
            prompt_guide = self._prompt_probe(self.networks.text, prompts)
            loss = loss + config.prompt_guide_weight * prompt_guide
            figures["prompt_guide"] = float(prompt_guide.detach())
        return loss, figures

    def _walk(
        self,
        clips: Clips,
        num_chunks: int,
        foreground_weight: float,
        noise: Noise,
        learned: Sequence[bool] | None = None,
        recall: MemoryReading | None = None,
        *,
        kind: ClipKind = "whole",
        told: Sequence[Sequence[bool]] | None = None,
    ) -> list[_Errors]:
        """The errors of every chunk of the clips, or of those that are learned; the others are committed.

        `told`: of every clip, of every chunk whether the clip teaches it whoever teaches the others.
        """
        config, frames, num_clips = self.config, self.history.chunk_frames, len(clips)
        num_copies = config.copies_of(num_chunks)
        dropped = (torch.rand(num_clips, generator=noise.host) < config.text_dropout).tolist()
        prompts = [
            ((0, ""),) if drop else of_clip for of_clip, drop in zip(clips.prompts, dropped, strict=True)
        ]
        latents, foreground = (
            self._here(part).float() for part in (clips.latents_bfchw, clips.foreground_bfhw)
        )
        guide_bfkhw = None if clips.guide_bfkhw is None else self._here(clips.guide_bfkhw)
        captions = prompts_in_force(prompts, 0)
        text = self.networks.encode(captions)
        dit, size = self.networks.dit, latents.shape[-2:]
        patch = dit.config.patch_size[-1]
        recompute = config.loop.recompute == "blocks"
        walk = Walk(dit, self.history, text, num_clips, *size, recompute=recompute)
        parents = None
        if self._parent is not None and kind not in config.clips_teach:
            parents = ParentsWalk(self._parent, captions, num_clips, *size)
        opens = self._here(torch.tensor(clips.opens, dtype=torch.float32))
        results = []
        for chunk in range(num_chunks):
            span = slice(chunk * frames, (chunk + 1) * frames)
            before, captions = captions, prompts_in_force(prompts, span.start)
            switched = changed(before, captions)
            if switched:
                walk.switch(self.networks.encode(captions), config.switch, switched)
                if parents is not None:
                    parents.switch(captions, config.switch, switched)
            clean = latents[:, span]
            if recall is not None:
                recall.read(walk, chunk)
            if learned is not None and not learned[chunk]:
                walk.commit(clean, learns=False)
                if parents is not None:
                    parents.commit(clean)
                continue
            sigma = shift_sigmas(noise.stratified(num_copies * num_clips), config.sigma_shift)
            target = clean.repeat(num_copies, 1, 1, 1, 1)
            noisy = at_sigma(target, noise.normal(target.shape), sigma)
            amount = config.context_noise * noise.uniform(num_clips, 1, 1, 1, 1)
            last = chunk == num_chunks - 1
            past = clean if last else self._resampled(walk, clean, noise)
            context = past + amount * noise.normal(clean.shape)
            reading = _Reading(config.guide_layer) if self._probe and guide_bfkhw is not None else None
            if last:
                predicted = walk.predict(noisy, sigma, reading)
            else:
                predicted = walk.advance(noisy, sigma, context, reading)
            if parents is not None:
                predicts = parents.predict(noisy, sigma, None if last else context)
                if told is None:
                    target = predicts
                else:
                    by_clip = self._here(torch.tensor([of_clip[chunk] for of_clip in told]))
                    target = torch.where(by_clip.repeat(num_copies).view(-1, 1, 1, 1, 1), target, predicts)
            counted = (opens if chunk == 0 else torch.ones_like(opens)).repeat(num_copies)
            errors = self._errors(predicted, target, sigma, foreground[:, span], foreground_weight, counted)
            guide = None
            if reading is not None and self._probe is not None and guide_bfkhw is not None:
                guide = self._guide_error(reading.tokens, guide_bfkhw[:, span], patch, len(target))
            results.append((*errors, guide))
        return results

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _guide_error(self, tokens_ruw: Tensor, guide_bfkhw: Tensor, patch: int, num_noisy: int) -> Tensor:
        """Of reading the guide off the tokens of noisy rows, and of context where it comes after them."""
        assert self._probe is not None
        if not self.config.guide_relative:
            return token_guide_error(self._probe, tokens_ruw, guide_bfkhw, patch)
        rows = [part for part in (tokens_ruw[:num_noisy], tokens_ruw[num_noisy:]) if len(part)]
        errors = [token_guide_error(self._probe, part, guide_bfkhw, patch, relative=True) for part in rows]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def _resampled(self, walk: Walk, clean: Tensor, noise: Noise) -> Tensor:
        """A chunk as the network itself would have finished it, from one of the sampler's last steps on
        (self-resampling, arXiv 2512.15702).
        """
        sigmas = self.config.resampled_sigmas
        if not sigmas:
            return clean
        start = int(torch.randint(len(sigmas) + 1, (1,), generator=noise.host))
        for value in sigmas[start:]:
            sigma = clean.new_full((len(clean),), value)
            clean = walk.predict(at_sigma(clean, noise.normal(clean.shape), sigma), sigma)
        return clean

    def _errors(
        self,
        predicted: Tensor,
        target: Tensor,
        sigma: Tensor,
        foreground_bfhw: Tensor,
        foreground_weight: float,
        counted_r: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and foreground error of the rows that count."""
        squared = (predicted - target).square().mean(dim=2)
        mask = foreground_bfhw.repeat(len(target) // len(foreground_bfhw), 1, 1, 1)
        weight = 1 + (foreground_weight - 1) * mask
        by_row = (squared * weight).mean(dim=(1, 2, 3)) / sigma.clamp_min(self.config.min_weight_sigma)
        with torch.no_grad():
            mask = mask * counted_r.view(-1, 1, 1, 1)
            foreground = (squared * mask).sum() / mask.sum().clamp_min(1)
        return (by_row * counted_r).sum() / counted_r.sum().clamp_min(1), foreground

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Error of the clean latents on held-out clips, of the first and of the last chunk by sigma: over all
        clips, of the foreground and of the background, and of the foreground by world level.
        """
        frames, clips = self.history.chunk_frames, self.held_out
        latents, foreground = (
            self._here(part).float() for part in (clips.latents_bfchw, clips.foreground_bfhw)
        )
        num_chunks = min(self.config.num_chunks, latents.shape[1] // frames)
        captions = prompts_in_force(clips.prompts, 0)
        text = self.networks.encode(captions)
        walk = Walk(self.networks.dit, self.history, text, len(clips), *latents.shape[-2:])
        noise = Noise(0, self.device)
        level_b = self._here(torch.tensor(clips.levels)).view(-1, 1, 1, 1)
        told_b = self._here(torch.tensor(clips.opens)).view(-1, 1, 1, 1)
        figures: dict[str, float] = {}
        for chunk in range(num_chunks):
            span = slice(chunk * frames, (chunk + 1) * frames)
            before, captions = captions, prompts_in_force(clips.prompts, span.start)
            switched = changed(before, captions)
            if switched:
                walk.switch(self.networks.encode(captions), self.config.switch, switched)
            clean, mask = latents[:, span], foreground[:, span]
            if chunk in (0, num_chunks - 1):
                name = "first" if chunk == 0 else "last"
                counted = told_b if chunk == 0 else torch.ones_like(told_b)
                for time in _EVALUATION_TIMES:
                    sigma = clean.new_full((len(clips),), time)
                    noisy = at_sigma(clean, noise.normal(clean.shape), sigma)
                    squared = (walk.predict(noisy, sigma) - clean).square().mean(dim=2)
                    key = f"{name}_{time}"
                    weights = {"foreground": mask * counted, "background": (1 - mask) * counted}
                    for level in sorted(set(clips.levels)):
                        weights[f"level_{level}"] = mask * counted * (level_b == level)
                    figures |= {
                        f"{kind}_{key}": _weighted(squared, weight)
                        for kind, weight in weights.items()
                        if kind == "foreground" or bool(weight.any())
                    }
            if chunk < num_chunks - 1:
                walk.commit(clean)
        return figures

    def samples(self) -> Tensor | None:
        """Rollouts, see `train.loop.Task`."""
        return None if self._rollouts is None else self._rollouts(self.networks.dit, self.networks.text)


_Errors = tuple[Tensor, Tensor, Tensor | None]
"""Of a chunk: the loss, the foreground's error, and that of reading the guide where there is one."""


def _told(batch: LongBatch[Clips], returns: bool) -> list[list[bool]]:
    """Of every long clip, of every chunk whether the clip teaches it: where its camera goes on, and where
    something returns if that is asked for.
    """
    return [
        [goes_on or (returns and comes_back) for goes_on, comes_back in zip(*of_clip, strict=True)]
        for of_clip in zip(batch.resumes, batch.returns, strict=True)
    ]


class _Reading:
    """Keeps the tokens that leave one layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer

    def __call__(self, layer: int, tokens_ruw: Tensor) -> None:
        if layer == self._layer:
            self.tokens = tokens_ruw


def _weighted(squared: Tensor, weight: Tensor) -> float:
    return float((squared * weight).sum() / weight.sum().clamp_min(1e-6))

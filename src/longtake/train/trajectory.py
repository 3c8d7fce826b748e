"""Trajectory distillation: from any step of the few-step schedule, straight to where the teacher's path ends.

The guided teacher walks real clips; for the next chunk it follows its probability-flow path from pure noise
down to a clean chunk, passing through the noise levels of the student's schedule. The student is shown those
states and regresses the path's end (the ODE initialisation of CausVid, arXiv 2412.07772, and of Self-Forcing,
arXiv 2506.08009). Which end follows from the noise, so that one step of the student makes a sharp sample
instead of the mean of all, and guidance becomes part of its weights. No target depends on the student: unlike
bootstrapped consistency training this cannot run away.

That is here too, since VideoMLA (arXiv 2605.30351) is trained so between teacher forcing and distribution
matching: consistency distillation (Consistency Models, arXiv 2303.01469, algorithm 2, with the student itself
in place of its average, arXiv 2310.14189). The student is to predict at a noise level of a real clip what it
predicts where one step of the guided teacher leads from there, a little less noisy. A lesson costs two passes
of the teacher in place of a path of them.

Legend: b clips, r = levels * b rows (level-major), f latent frames, c channels, h/w latent rows and columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from longtake.diffusion.flow import Schedule, along_path, shift_sigmas
from longtake.history.base import HistoryConfig
from longtake.models.dit import TextContext
from longtake.train.excerpts import changed, prompts_in_force
from longtake.train.latents import Clips, ClipSource, ClipsPerStep
from longtake.train.loop import Learner, LoopConfig
from longtake.train.networks import TextToLatents, dit_optimizer
from longtake.train.optim import AdamWConfig
from longtake.train.samples import SampleRollouts
from longtake.train.walk import GuidedWalk, Noise, Walk, at_sigma

_NUM_EVALUATION_CLIPS = 48


class TrajectoryConfig(ClipsPerStep):
    """Stage `trajectory`."""

    loop: LoopConfig = LoopConfig()
    num_clips: int = Field(2, ge=0, description="clips per step that are walked through all chunks")
    num_first_clips: int = Field(
        8, ge=0, description="clips per step of which only the first chunk is trained"
    )
    target: Literal["ends", "consistency"] = Field(
        "ends", description="where the teacher's paths end, or what the student predicts one step further"
    )
    num_intervals: int = Field(
        48,
        ge=2,
        description="of consistency: parts of the way from noise to a clip, evenly in shifted levels",
    )
    num_copies: int = Field(4, ge=1, description="of consistency: noise levels of each chunk in every step")
    guidance: float = Field(2.0, ge=0, description="scale of classifier-free guidance of the teacher")
    negative_prompt: str = Field("", description="what guidance leads away from")
    steps_per_level: int = Field(
        3, ge=1, description="Euler steps of the teacher from one level of the schedule to the next"
    )
    foreground_weight: float = Field(2.0, ge=1, description="weight of foreground cells")
    context_noise: float = Field(0.05, ge=0, description="upper end of the noise added to clean context")
    muon_learning_rate: float = Field(3e-4, gt=0)
    adamw_learning_rate: float = Field(1.2e-4, gt=0)
    optimizer: AdamWConfig | None = Field(None, description="for everything, instead of Muon with AdamW")


class TrajectoryTask:
    """The stage's module (the student), optimiser, loss and evaluation (see `train.loop.Task`).

    Args:
        module: the student, which starts from the teacher's weights.
        teacher: a multi-step model; never changed.
        history: of both.
        schedule: the student's denoising steps.
        config: the stage.
        first_clips: source of clips of which only the first chunk is read; None where the stage has none.
        clips: source of whole clips; None likewise.
        held_out: clips for evaluation.
        rollouts: what to show of the student at evaluations.
    """

    def __init__(
        self,
        module: TextToLatents,
        teacher: TextToLatents,
        history: HistoryConfig,
        schedule: Schedule,
        config: TrajectoryConfig,
        first_clips: ClipSource[Clips] | None,
        clips: ClipSource[Clips] | None,
        held_out: Clips,
        rollouts: SampleRollouts | None = None,
    ) -> None:
        self.module = module
        self._rollouts = rollouts
        self.history = history
        self.config = config
        self.first_clips = first_clips
        self.clips = clips
        self.held_out = held_out
        self._teacher = teacher.eval().requires_grad_(False)
        self.device = module.dit.patch_embedding.weight.device
        self._sigmas = schedule.resolve().sigmas
        evenly = torch.linspace(1.0, 0.0, config.num_intervals + 1, device=self.device)
        self._grid = shift_sigmas(evenly, schedule.shift)
        self.learners = {
            "": Learner(
                module,
                dit_optimizer(
                    module,
                    config.muon_learning_rate,
                    config.adamw_learning_rate,
                    config.loop.precision,
                    only_adamw=config.optimizer,
                ),
                self.loss,
            )
        }

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Squared distance to what the lessons say, over all chunks of the step's clips."""
        config = self.config
        rng = np.random.default_rng((config.loop.seed, step))
        noise = Noise(int(rng.integers(1 << 40)), self.device)
        losses: list[Tensor] = []
        for clips, num_chunks in config.draw(rng, self.first_clips, self.clips):
            losses += self._walk(clips, num_chunks, noise)
        return torch.stack(losses).mean(), {"first": float(losses[0].detach())}

    def _walk(self, clips: Clips, num_chunks: int, noise: Noise) -> list[Tensor]:
        """The loss of every chunk of the clips."""
        config, frames = self.config, self.history.chunk_frames
        pair = _Pair(self, clips)
        latents, foreground = self._tensors(clips)
        losses = []
        for chunk in range(num_chunks):
            span = slice(chunk * frames, (chunk + 1) * frames)
            clean = latents[:, span]
            pair.prompt(span.start)
            with torch.no_grad():
                lesson = self._lesson(pair, clean, noise)
            amount = config.context_noise * noise.uniform(len(clips), 1, 1, 1, 1)
            context = clean + amount * noise.normal(clean.shape)
            last = chunk == num_chunks - 1
            walk = pair.student
            predicted = walk.predict(*lesson[:2]) if last else walk.advance(*lesson[:2], context)
            if not last:
                with torch.no_grad():
                    pair.teacher.commit(context)
            weight = 1 + (config.foreground_weight - 1) * foreground[:, span]
            squared = (predicted - lesson.target_rfchw).square().mean(dim=2)
            losses.append((squared * weight.repeat(len(predicted) // len(clips), 1, 1, 1)).mean())
        return losses

    def _tensors(self, clips: Clips) -> tuple[Tensor, Tensor]:
        """Latents and foreground, in single precision, on the device."""
        latents, foreground = clips.latents_bfchw, clips.foreground_bfhw
        return latents.to(self.device).float(), foreground.to(self.device).float()

    def _lesson(self, pair: _Pair, clean_bfchw: Tensor, noise: Noise) -> _Lesson:
        """What the student is shown of a chunk, and what it is to make of it."""
        if self.config.target == "ends":
            states, end = pair.path(noise.normal(clean_bfchw.shape))
            sigma = torch.tensor(self._sigmas, device=self.device).repeat_interleave(len(clean_bfchw))
            return _Lesson(states, sigma, end.repeat(len(self._sigmas), 1, 1, 1, 1))
        clean = clean_bfchw.repeat(self.config.num_copies, 1, 1, 1, 1)
        drawn = noise.stratified(len(clean)) * self.config.num_intervals
        above = drawn.ceil().long() - 1  # strata are open below
        sigma, following = self._grid[above], self._grid[above + 1]
        noisy = at_sigma(clean, noise.normal(clean.shape), sigma)
        return _Lesson(noisy, sigma, pair.one_step_further(noisy, sigma, following))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Foreground error against the path's end on held-out clips, first and last chunk, by level."""
        config, frames = self.config, self.history.chunk_frames
        clips = self.held_out.select(range(min(_NUM_EVALUATION_CLIPS, len(self.held_out))))
        latents, foreground = self._tensors(clips)
        num_chunks = min(config.num_chunks, latents.shape[1] // frames)
        noise = Noise(0, self.device)
        pair = _Pair(self, clips)
        figures: dict[str, float] = {}
        for chunk in range(num_chunks):
            span = slice(chunk * frames, (chunk + 1) * frames)
            clean, mask = latents[:, span], foreground[:, span]
            pair.prompt(span.start)
            if chunk in (0, num_chunks - 1):
                states, end = pair.path(noise.normal(clean.shape))
                name = "first" if chunk == 0 else "last"
                for value, state in zip(self._sigmas, states.chunk(len(self._sigmas)), strict=True):
                    predicted = pair.student.predict(state, state.new_full((len(clips),), value))
                    squared = (predicted - end).square().mean(dim=2)
                    figures[f"path_{name}_{value:.2f}"] = float((squared * mask).sum() / mask.sum())
            if chunk < num_chunks - 1:
                pair.student.commit(clean)
                pair.teacher.commit(clean)
        return figures

    def samples(self) -> Tensor | None:
        """Rollouts, see `train.loop.Task`."""
        return None if self._rollouts is None else self._rollouts(self.module.dit, self.module.text)


class _Lesson(NamedTuple):
    """States of a chunk ``[r,f,c,h,w]``, their noise levels, and the clean latents to be predicted."""

    state_rfchw: Tensor
    sigma_r: Tensor
    target_rfchw: Tensor


class _Pair:
    """Student and guided teacher on their way through the same clips."""

    def __init__(self, task: TrajectoryTask, clips: Clips) -> None:
        self._task = task
        self._clips = clips
        size = clips.latents_bfchw.shape[-2:]
        self._captions = prompts_in_force(clips.prompts, 0)
        module, history = task.module, task.history
        recompute = task.config.loop.recompute == "blocks"
        encoded = module.encode(self._captions)
        self.student = Walk(module.dit, history, encoded, len(clips), *size, recompute=recompute)
        guidance = task.config.guidance
        text = self._teachers_text()
        self.teacher = GuidedWalk(task._teacher.dit, history, text, len(clips), guidance, *size)

    def prompt(self, frame: int) -> None:
        """Let both read the prompts in force at a latent frame."""
        captions = prompts_in_force(self._clips.prompts, frame)
        switched = changed(self._captions, captions)
        if switched:
            self._captions = captions
            switch = self._task.config.switch
            self.student.switch(self._task.module.encode(captions), switch, switched)
            self.teacher.switch(self._teachers_text(), switch, switched)

    def path(self, noise_bfchw: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's states at the schedule's levels, [r,f,c,h,w], and its path's end, [b,f,c,h,w]."""
        levels = (*self._task._sigmas, 0.0)
        state, states = noise_bfchw, []
        for upper, lower in pairwise(levels):
            states.append(state)
            steps = torch.linspace(upper, lower, self._task.config.steps_per_level + 1).tolist()
            for above, below in pairwise(steps):
                clean = self.teacher.predict(state, state.new_full((len(state),), above))
                state = along_path(state, clean, above, below)
        return torch.cat(states), state

    def one_step_further(self, state_rfchw: Tensor, sigma_r: Tensor, following_r: Tensor) -> Tensor:
        """The student's predictions where one step of the teacher leads, [r,f,c,h,w]; at the end of the way
        that is the prediction.
        """
        following = following_r.view(-1, 1, 1, 1, 1)
        clean = self.teacher.predict(state_rfchw, sigma_r)
        less_noisy = along_path(state_rfchw, clean, sigma_r.view(-1, 1, 1, 1, 1), following)
        return torch.where(following > 0, self.student.predict(less_noisy, following_r), less_noisy)

    def _teachers_text(self) -> TextContext:
        with torch.no_grad():
            away_from = [self._task.config.negative_prompt] * len(self._captions)
            return self._task._teacher.encode(self._captions + away_from)

"""Context that the network has made again itself, so that it meets its own mistakes in the past."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.latents import Clips
from longtake.train.steps import Steps, StepSources
from longtake.train.walk import Observe, Walk
from toy_training import HISTORY, loop, networks

_NUM_STEPS = 8


def _clips() -> Clips:
    latents = torch.randn(6, 6, 4, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    prompts = (((0, "a red circle"),),) * 6
    return Clips(latents, torch.ones(6, 6, 4, 4).half(), prompts, (True,) * 6, (1,) * 6)


def _contexts(monkeypatch: pytest.MonkeyPatch, sigmas: tuple[float, ...]) -> list[Tensor]:
    """What several steps commit."""
    seen: list[Tensor] = []
    advance = Walk.advance

    def recorded(
        walk: Walk, noisy: Tensor, sigma: Tensor, context: Tensor, observe: Observe | None = None
    ) -> Tensor:
        assert not context.requires_grad
        seen.append(context)
        return advance(walk, noisy, sigma, context, observe)

    monkeypatch.setattr(Walk, "advance", recorded)
    torch.manual_seed(0)
    config = DiTTrainingConfig(
        loop=loop(_NUM_STEPS), num_clips=2, num_chunks=3, context_noise=0.0, resampled_sigmas=sigmas
    )
    clips = _clips()
    task = DiTTask(networks(), HISTORY, config, Steps(StepSources(config, None, clips)), clips)
    for step in range(_NUM_STEPS):
        task.loss(step, 0.0)
    return seen


def _is_real(context: Tensor) -> bool:
    frames = HISTORY.chunk_frames
    real = _clips().latents_bfchw.float()
    chunks = [real[:, start : start + frames] for start in range(0, real.shape[1], frames)]
    return all(any(torch.equal(row, own) for chunk in chunks for own in chunk) for row in context)


def test_the_past_is_real_where_nothing_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(map(_is_real, _contexts(monkeypatch, ())))


def test_the_past_is_partly_real_and_partly_the_networks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts = _contexts(monkeypatch, (0.9, 0.5))
    num_real = sum(map(_is_real, contexts))
    assert len(contexts) / 6 < num_real < len(contexts) * 2 / 3, "one start of three leaves it as it is"


@pytest.mark.parametrize("sigmas", [(0.5, 0.8), (1.0, 0.5), (0.5, 0.5), (0.5, 0.0)])
def test_levels_that_do_not_fall_are_refused(sigmas: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="resampled_sigmas"):
        DiTTrainingConfig(resampled_sigmas=sigmas)

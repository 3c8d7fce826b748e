"""Schedules, the flow algebra, and noise that depends on nothing but seed, chunk and step."""

import pytest
import torch
from torch import Tensor, nn

from longtake.diffusion.flow import (
    Schedule,
    Steps,
    add_noise,
    flow_target,
    nearest_sigma,
    shifted_sigmas,
    steps_at,
    to_clean,
)
from longtake.diffusion.sampler import chunk_noise, context_pass, sample_chunk
from longtake.errors import ConfigError
from longtake.history.base import full_view
from longtake.models.dit import TextContext
from tiny_parts import GRID, small_dit


def test_the_schedule_of_self_forcing() -> None:
    steps = Schedule(steps=(1000, 750, 500, 250), shift=5.0).resolve()
    assert steps.timesteps == pytest.approx((1000, 937.5, 2500 / 3, 625))
    assert steps.sigmas == pytest.approx((1, 0.9375, 5 / 6, 0.625))
    plain = Schedule(steps=(1000, 750), shift=5.0, warp=False).resolve()
    assert plain.timesteps == (1000, 750)
    assert abs(plain.sigmas[1] - 0.75) < 1e-3
    assert Schedule(steps=(1000,), shift=1.0).resolve() == Steps((1000.0,), (1.0,))


def test_sigmas_are_looked_up_in_the_shifted_schedule() -> None:
    sigmas = shifted_sigmas(3.0)
    assert (float(sigmas[0]), len(sigmas)) == (1.0, 1000)
    assert bool((sigmas.diff() < 0).all())
    assert float(sigmas[500]) == pytest.approx(0.75)
    assert nearest_sigma(751.0, 3.0) == pytest.approx(
        min(sigmas.tolist(), key=lambda s: abs(1000 * s - 751.0))
    )
    assert steps_at([937.5], 5.0).sigmas == (0.9375,)


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, 1000), (1001,), (500, 0)])
def test_steps_must_descend_within_the_schedule(steps: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="steps="):
        Schedule(steps=steps)


def test_the_algebra_inverts() -> None:
    clean, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for sigma in (0.0, 0.3, 1.0):
        x = add_noise(clean, noise, sigma)
        torch.testing.assert_close(to_clean(x, flow_target(clean, noise), sigma), clean)
    sigma_b11 = torch.tensor([0.2, 0.9])[:, None, None]
    x = add_noise(clean, noise, sigma_b11)
    torch.testing.assert_close(to_clean(x, flow_target(clean, noise), sigma_b11), clean)


def test_noise_depends_on_seed_chunk_and_step_alone() -> None:
    shape = (2, 3, 4, 5)
    torch.manual_seed(1)
    batch = chunk_noise([7, 8, 7], [0, 3, 5], 3, shape)
    torch.manual_seed(2)
    assert [tuple(step.shape) for step in batch] == [(3, *shape)] * 3
    for row, (seed, chunk) in enumerate(((7, 0), (8, 3), (7, 5))):
        alone = chunk_noise([seed], [chunk], 2, shape)
        assert all(torch.equal(alone[step][0], batch[step][row]) for step in range(2))
    different = {float(batch[step][row].sum()) for step in range(3) for row in range(3)}
    assert len(different) == 9
    values = torch.cat([step.flatten() for step in chunk_noise([2**70], [10**6], 50, (4, 4, 4, 4))])
    assert abs(float(values.mean())) < 0.05
    assert abs(float(values.std()) - 1) < 0.05


def test_guidance_moves_away_from_the_negative() -> None:
    dit = small_dit()
    steps = Schedule(steps=(1000, 400)).resolve()
    generator = torch.Generator().manual_seed(0)
    positive, negative = (dit.encode_text(torch.randn(1, 3, 8, generator=generator)) for _ in range(2))
    view = full_view(dit.cache_spec(), range(2), GRID)
    noise = chunk_noise([1], [0], 2, (2, 3, *GRID))
    both = TextContext.stack([positive, negative])
    with torch.no_grad():
        plain = sample_chunk(dit, positive, view, noise, steps)
        other = sample_chunk(dit, negative, view, noise, steps)
        torch.testing.assert_close(
            sample_chunk(dit, both, view, noise, steps, guidance=1.0), plain, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            sample_chunk(dit, both, view, noise, steps, guidance=0.0), other, atol=1e-5, rtol=1e-5
        )
        flows: list[torch.Tensor] = []
        sample_chunk(dit, both, view, noise, steps, guidance=2.5, on_flow=flows.append)
        at = torch.full((1, 2), 1000.0)
        ours, theirs = dit(noise[0], at, positive, view)[0], dit(noise[0], at, negative, view)[0]
        torch.testing.assert_close(flows[0], theirs + 2.5 * (ours - theirs), atol=1e-5, rtol=1e-5)
        guided = context_pass(dit, both, view, plain, guided=True)
        alone = context_pass(dit, positive, view, plain)
        torch.testing.assert_close(
            guided.select([0]).layers[1]["v"], alone.layers[1]["v"], atol=1e-5, rtol=1e-5
        )


class Pull(nn.Module):
    """Always points to one clean latent; otherwise nothing."""

    def __init__(self, clean: Tensor) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(1, 1)
        self.clean = clean
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timesteps: Tensor, *_: object) -> tuple[Tensor, None]:
        self.seen.append(x)
        return (x - self.clean) / (timesteps[0, 0] / 1000), None


@pytest.mark.parametrize("path", [None, (1.0, 0.01), (0.85, 0.4)])
def test_noise_is_kept_along_the_path_and_drawn_anew_elsewhere(path: tuple[float, float] | None) -> None:
    steps = Schedule(steps=(1000, 900, 800, 500, 200), shift=1.0, path=path).resolve()
    generator = torch.Generator().manual_seed(0)
    clean, *noise = (torch.randn(1, 2, 3, 4, 4, generator=generator) for _ in range(6))
    dit, view = Pull(clean), full_view(small_dit().cache_spec(), range(2), GRID)
    text = TextContext(())
    made = sample_chunk(dit, text, view, noise, steps)  # type: ignore[arg-type]
    torch.testing.assert_close(made, clean)
    last = 0
    for step, (x, sigma) in enumerate(zip(dit.seen, steps.sigmas, strict=True)):
        on_path = step > 0 and path is not None and path[1] <= sigma <= path[0]
        last = last if on_path else step
        torch.testing.assert_close(x, (1 - sigma) * clean + sigma * noise[last], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", [(0.4, 0.9), (1.1, 0.5), (0.5, 0.0)])
def test_a_path_is_a_range_of_noise_levels(path: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="path="):
        Schedule(path=path)


def test_a_schedule_of_another_length_is_even() -> None:
    own = Schedule(steps=(1000, 800, 550, 250), shift=3.0)
    assert own.with_num_steps(4) is own
    assert own.with_num_steps(2).steps == (1000, 500)
    fine = own.with_num_steps(32)
    assert len(fine.steps) == 32
    assert fine.steps[:2] == (1000, 969)
    assert fine.shift == 3.0
    with pytest.raises(ConfigError, match="num_steps=1001"):
        own.with_num_steps(1001)

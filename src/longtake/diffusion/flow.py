"""Flow-matching algebra as pure functions: ``x = (1 - sigma) * clean + sigma * noise``, flow = noise - clean.

A timestep is 1000 * sigma. Schedules are warped by ``shift`` as in SD3 and Wan2.1, with sigma_min 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.config import Config
from longtake.errors import ConfigError

NUM_TRAIN_STEPS = 1000


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Sigmas moved towards noise: ``shift * s / (1 + (shift - 1) * s)``."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shifted_sigmas(shift: float) -> Tensor:
    """The 1000 shifted sigmas, descending from 1, float64."""
    return shift_sigmas(torch.linspace(1.0, 0.0, NUM_TRAIN_STEPS + 1, dtype=torch.float64)[:-1], shift)


def nearest_sigma(timestep: float, shift: float) -> float:
    """The sigma of the shifted schedule whose timestep is nearest, as the reference looks it up."""
    sigmas = shifted_sigmas(shift)
    return float(sigmas[(sigmas * NUM_TRAIN_STEPS - timestep).abs().argmin()])


class Steps(NamedTuple):
    """What a sampler runs: at each step what the network is told, and the noise level."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    path: tuple[float, float] | None = None
    """Where noise is kept, see `Schedule`."""

    def keeps_noise(self, step: int) -> bool:
        """Whether a step after the first goes on with the noise of the one before it."""
        return self.path is not None and self.path[1] <= self.sigmas[step] <= self.path[0]


def steps_at(timesteps: Sequence[float], shift: float) -> Steps:
    """Steps at given (already warped) timesteps; each takes the sigma of the nearest shifted timestep."""
    return Steps(tuple(timesteps), tuple(nearest_sigma(timestep, shift) for timestep in timesteps))


class Schedule(Config):
    """Denoising steps of the few-step sampler.

    Args:
        steps: as Self-Forcing's YAML writes ``denoising_step_list``: descending, 1000 is pure noise.
        shift: warps the schedule towards noise; 1 leaves it.
        warp: the steps count the shifted schedule (``warp_denoising_step: true``), so that 750 is the 250th
            of its 1000 timesteps; False takes them as timesteps.
        path: highest and lowest noise level that a step reaches with the noise it has, along the flow's path
            (Euler's method). All others draw new noise, as few-step generators do: that mends errors, but
            leads what is not decided yet, such as which way a path bends, to the mean of what is possible.
            None draws always.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = Field(default=5.0, gt=0)
    warp: bool = True
    path: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _has_path(self) -> Schedule:
        if self.path is not None and not 1 >= self.path[0] >= self.path[1] > 0:
            raise ConfigError(f"path={self.path} is no range of noise levels", "use for instance [0.95, 0.4]")
        return self

    @model_validator(mode="after")
    def _descends(self) -> Schedule:
        if not self.steps or any(a <= b for a, b in zip(self.steps, self.steps[1:], strict=False)):
            raise ConfigError(f"steps={self.steps} do not descend", "use a list like [1000, 750, 500, 250]")
        if not 0 < self.steps[-1] <= self.steps[0] <= NUM_TRAIN_STEPS:
            raise ConfigError(
                f"steps={self.steps} leave 1..{NUM_TRAIN_STEPS}", "use steps between 1 and 1000"
            )
        return self

    def with_num_steps(self, num_steps: int) -> Schedule:
        """The same schedule where it has that many steps already, else one of `num_steps` evenly spaced ones.

        Raises:
            ConfigError: not 1 to 1000 steps.
        """
        if num_steps == len(self.steps):
            return self
        if not 1 <= num_steps <= NUM_TRAIN_STEPS:
            raise ConfigError(f"num_steps={num_steps} is not in 1..{NUM_TRAIN_STEPS}", "use for instance 4")
        counted = range(num_steps)
        return self.replace(steps=tuple(round(NUM_TRAIN_STEPS * (1 - i / num_steps)) for i in counted))

    def resolve(self) -> Steps:
        """The timesteps and noise levels to run."""
        timesteps = [float(step) for step in self.steps]
        if self.warp:
            shifted = shifted_sigmas(self.shift) * NUM_TRAIN_STEPS
            timesteps = [float(shifted[NUM_TRAIN_STEPS - step]) for step in self.steps]
        return steps_at(timesteps, self.shift)._replace(path=self.path)


def to_clean(x: Tensor, flow: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latent that a flow points to, ``x - sigma * flow``, in float64 and then cast back."""
    return (x.double() - sigma * flow.double()).type_as(x)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """``(1 - sigma) * clean + sigma * noise``; a tensor sigma must broadcast."""
    return (1 - sigma) * clean + sigma * noise


def along_path(x: Tensor, clean: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """One step of Euler's method: where the straight line from a clean latent through ``x``, which is at
    noise level sigma (not 0), is at the following level.
    """
    return clean + following / sigma * (x - clean)


def flow_target(clean: Tensor, noise: Tensor) -> Tensor:
    """What a flow-matching network learns to predict."""
    return noise - clean

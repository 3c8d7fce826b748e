"""A resumable training loop: everything random follows from (seed, step), so an interrupted run continues
exactly.

A stage is a `Task`: it owns one or several learners, each a network, an optimiser and a loss. The loop owns
schedule, precision, averaging of weights, clipping, the log (JSON lines) and checkpoints (written aside, then
renamed, so that a kill loses only the steps since the last one).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from longtake.config import Config
from longtake.errors import TrainingError
from longtake.train.optim import MuonAdamW, split_parameters

Precision = Literal["auto", "fp32", "bf16"]

STOPPED_EARLY = "stopped_early_at_step"
"""Key in a stage's figures where it was stopped before its last step."""


class LoopConfig(Config):
    """Length, schedule and bookkeeping of one stage."""

    seed: int = 0
    num_steps: int = Field(1000, ge=1)
    num_warmup_steps: int = Field(20, ge=0)
    decay_from: float = Field(
        0.4, ge=0, le=1, description="share of the run after which the rate falls (cosine)"
    )
    final_learning_rate: float = Field(
        0.02, ge=0, le=1, description="the rate at the end, as a share of the peak"
    )
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    precision: Precision = Field("auto", description="auto: bf16 where the processor multiplies it natively")
    log_every_steps: int = Field(20, ge=1)
    evaluate_every_steps: int = Field(500, ge=1)
    checkpoint_every_seconds: float = Field(120.0, gt=0)


Loss = Callable[[int, float], tuple[Tensor, dict[str, float]]]
"""Of (step, progress from 0 to 1 over the stage): the loss to descend, and figures for the log."""


@dataclass(frozen=True)
class Learner:
    """A network under training.

    Args:
        module: the network.
        optimizer: updates it.
        loss: of a step; everything random in it must follow from the step.
        every: it learns on every so many-th step, first on step 0.
    """

    module: nn.Module
    optimizer: MuonAdamW
    loss: Loss
    every: int = 1


class Task(Protocol):
    """What a stage trains."""

    @property
    def module(self) -> nn.Module:
        """The network whose averaged weights are the stage's result; one of the learners'."""
        ...

    @property
    def learners(self) -> Mapping[str, Learner]:
        """By name, in the order in which they learn. The names prefix figures in the log where there are
        several.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, with the module's present (averaged) weights."""
        ...


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype matrix products run in, or None for fp32 throughout."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16", False) else None


def build_optimizer(
    module: nn.Module,
    muon_learning_rate: float,
    adamw_learning_rate: float,
    precision: Precision,
    adamw_names: tuple[str, ...] = (),
    momentum: float = 0.95,
) -> MuonAdamW:
    """Muon on matrices and convolutions, AdamW on the rest and on names that contain a given part.

    `momentum` is Muon's; AdamW's first average forgets as fast where that is faster than the usual 0.9.
    """
    muon, adamw = split_parameters(module, adamw_names)
    dtype = autocast_dtype(precision, next(module.parameters()).device) or torch.float32
    return MuonAdamW(
        muon,
        adamw,
        muon_learning_rate,
        adamw_learning_rate,
        momentum=momentum,
        betas=(min(momentum, 0.9), 0.99),
        iteration_dtype=dtype,
    )


def learning_rate_factor(step: int, config: LoopConfig) -> float:
    """Linear warm-up, flat, then a cosine down to `final_learning_rate`."""
    warm = min(1.0, (step + 1) / max(1, config.num_warmup_steps))
    start = config.decay_from * config.num_steps
    if step <= start:
        return warm
    phase = min(1.0, (step - start) / max(1.0, config.num_steps - start))
    cosine = 0.5 * (1 + float(torch.cos(torch.tensor(phase * torch.pi))))
    return warm * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


class WeightAverage:
    """Exponential moving average of a module's parameters, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move the averages towards the module's weights after optimiser step `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in module.named_parameters():
            self.shadow[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the averages; calling it twice restores both."""
        for name, parameter in module.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)


def run(
    task: Task, config: LoopConfig, out: Path, stop_after_seconds: float | None = None
) -> dict[str, float]:
    """Train until `num_steps`, resuming from `out/checkpoint.pt` where there is one.

    Args:
        task: the stage; its module ends up holding the averaged weights.
        config: schedule and bookkeeping.
        out: folder for `checkpoint.pt` and `log.jsonl`; made if missing.
        stop_after_seconds: stop early (with a checkpoint) after this long, to be resumed later.

    Returns:
        the last evaluation's figures, with `STOPPED_EARLY` where that happened.

    Raises:
        TrainingError: the loss became NaN or infinite, or the checkpoint is of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    average = WeightAverage(task.module, config.ema_decay)
    step = _resume(task, config, average, out)
    device = next(task.module.parameters()).device
    dtype = autocast_dtype(config.precision, device)
    started = saved = time.monotonic()
    window: list[dict[str, float]] = []
    figures: dict[str, float] = {}
    with (out / "log.jsonl").open("a") as log:
        while step < config.num_steps:
            tick = time.monotonic()
            row: dict[str, float] = {}
            for name, learner in task.learners.items():
                if step % learner.every == 0:
                    prefix = f"{name}_" if len(task.learners) > 1 else ""
                    for key, value in _learn(learner, step, config, dtype).items():
                        row[prefix + key] = value
                    if learner.module is task.module:
                        average.update(task.module, step // learner.every)
            step += 1
            window.append({**row, "seconds": time.monotonic() - tick})
            if step % config.log_every_steps == 0:
                _log(log, {"step": step, **_means(window)})
                window.clear()
            late = stop_after_seconds is not None and time.monotonic() - started > stop_after_seconds
            if late or step == config.num_steps or time.monotonic() - saved > config.checkpoint_every_seconds:
                _save(task, config, average, step, out)
                saved = time.monotonic()
            if step % config.evaluate_every_steps == 0 or step == config.num_steps:
                average.swap(task.module)
                figures = task.evaluate()
                average.swap(task.module)
                _log(log, {"step": step, "evaluation": figures})
            if late and step < config.num_steps:
                figures = {**figures, STOPPED_EARLY: float(step)}
                break
    average.swap(task.module)
    return figures


def _learn(learner: Learner, step: int, config: LoopConfig, dtype: torch.dtype | None) -> dict[str, float]:
    """One update of one learner; its figures."""
    device = next(learner.module.parameters()).device
    learner.optimizer.scale_learning_rates(learning_rate_factor(step, config))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        loss, parts = learner.loss(step, step / config.num_steps)
    learner.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(learner.module.parameters(), config.gradient_clip)
    value = float(loss.detach())
    if not torch.isfinite(norm):
        raise TrainingError(
            f"step {step}: loss {value}, gradient norm {float(norm)}", "lower the learning rate"
        )
    learner.optimizer.step()
    return {"loss": value, "norm": float(norm), **parts}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure over the rows that have it."""
    means = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        means[key] = sum(values) / len(values)
    return means


def _log(log: Any, row: dict[str, Any]) -> None:
    log.write(json.dumps(row) + "\n")
    log.flush()


def _save(task: Task, config: LoopConfig, average: WeightAverage, step: int, out: Path) -> None:
    state = {
        "step": step,
        "config": config.model_dump_json(),
        "average": average.shadow,
        "modules": {name: learner.module.state_dict() for name, learner in task.learners.items()},
        "optimizers": {name: learner.optimizer.state_dict() for name, learner in task.learners.items()},
    }
    aside = out / "checkpoint.pt.part"
    torch.save(state, aside)
    os.replace(aside, out / "checkpoint.pt")


def _resume(task: Task, config: LoopConfig, average: WeightAverage, out: Path) -> int:
    path = out / "checkpoint.pt"
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["config"] != config.model_dump_json():
        raise TrainingError(
            f"{path} was written under {state['config']}", "remove it or train with that configuration"
        )
    for name, learner in task.learners.items():
        learner.module.load_state_dict(state["modules"][name])
        learner.optimizer.load_state_dict(state["optimizers"][name])
    average.shadow = state["average"]
    return int(state["step"])

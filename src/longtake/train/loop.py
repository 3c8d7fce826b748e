"""A resumable training loop: everything random follows from (seed, draw), so an interrupted run continues
exactly.

A stage is a `Task`: it owns one or several learners, each a network, an optimiser and a loss. The loop owns
schedule, precision, accumulation of gradients, averaging of weights, clipping, the log and checkpoints
(written aside, then renamed, so that a kill loses only the steps since the last one).
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.train.logs import TrainingLog
from longtake.train.optim import AdamWConfig, MuonAdamW, split_parameters

Precision = Literal["auto", "fp32", "bf16"]

Recompute = Literal["none", "blocks"]

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
    accumulation_steps: int = Field(
        1, ge=1, description="batches whose mean gradient makes one update; each is new data"
    )
    recompute: Recompute = Field(
        "none", description="blocks: forget what the DiT's blocks computed and redo it in the backward pass"
    )
    gradient_clip: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    ema_from_step: int = Field(
        0, ge=0, description="the average follows the weights until then; 0: its decay warms up instead"
    )
    precision: Precision = Field(
        "auto", description="of products, weights stay fp32; auto: bf16 where the processor is faster in it"
    )
    log_every_steps: int = Field(20, ge=1)
    evaluate_every_steps: int = Field(500, ge=1)
    checkpoint_every_seconds: float = Field(120.0, gt=0)

    @model_validator(mode="after")
    def _averages(self) -> LoopConfig:
        if self.ema_from_step >= self.num_steps:
            raise ConfigError(
                f"ema_from_step={self.ema_from_step} lies beyond num_steps={self.num_steps}",
                "average earlier or train longer",
            )
        return self


Loss = Callable[[int, float], tuple[Tensor, dict[str, float]]]
"""Of (draw, progress from 0 to 1 over the stage): the loss to descend, the mean over a batch that draw alone
decides, and figures for the log. Draws count up from 0, `accumulation_steps` to a step.
"""


@dataclass(frozen=True)
class Learner:
    """A network under training.

    Args:
        module: the network.
        optimizer: updates it.
        loss: of a draw; everything random in it must follow from the draw.
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

    def samples(self) -> Tensor | None:
        """Clips to look at, uint8 [b,t,h,w,3], with the module's present weights; None: there are none."""
        ...


def autocast_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype matrix products run in, or None for fp32 throughout."""
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16
    return torch.bfloat16 if _multiplies_bf16_faster() else None


@functools.cache
def _multiplies_bf16_faster() -> bool:
    """Whether this processor does; measured (some milliseconds), as having bf16 does not say it: AMD's Zen 4
    is twice as fast in it as in fp32, Intel's Emerald Rapids without AMX takes 1.7 times as long.
    """
    if not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return False
    seconds = {dtype: _seconds_of_a_product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    return seconds[torch.bfloat16] < seconds[torch.float32]


@torch.no_grad()
def _seconds_of_a_product(dtype: torch.dtype) -> float:
    """The least time of several of 512 x 512 by 512 x 1024."""
    a, b = torch.ones(512, 512, dtype=dtype), torch.ones(1024, 512, dtype=dtype)
    times = []
    for _ in range(8):
        tick = time.perf_counter()
        nn.functional.linear(a, b)
        times.append(time.perf_counter() - tick)
    return min(times)


def build_optimizer(
    module: nn.Module,
    muon_learning_rate: float,
    adamw_learning_rate: float,
    precision: Precision,
    adamw_names: tuple[str, ...] = (),
    momentum: float = 0.95,
    only_adamw: AdamWConfig | None = None,
) -> MuonAdamW:
    """Muon on matrices and convolutions, AdamW on the rest and on names that contain a given part.

    `momentum` is Muon's; AdamW's first average forgets as fast where that is faster than the usual 0.9.
    `only_adamw` puts AdamW on everything, and no other argument but the module counts.
    """
    if only_adamw is not None:
        return only_adamw.build(module)
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
    """Exponential moving average of a module's parameters that learn.

    Args:
        module: whose.
        decay: share of the average that an update keeps. It warms up over the first updates, unless they are
            those of weights that have settled (`from_step`).
        from_step: until this step of the stage the average equals the weights.
    """

    def __init__(self, module: nn.Module, decay: float, from_step: int = 0) -> None:
        self.decay = decay
        self.from_step = from_step
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int, num_updates: int) -> None:
        """Move the averages towards the module's weights after step `step`, its `num_updates`-th update."""
        decay = self.decay
        if step < self.from_step:
            decay = 0.0
        elif self.from_step == 0:
            decay = min(decay, num_updates / (9 + num_updates))
        for name, average in self.shadow.items():
            average.lerp_(module.get_parameter(name), 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange the module's weights with the averages; calling it twice restores both."""
        for name, average in self.shadow.items():
            parameter = module.get_parameter(name)
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)


@dataclass
class _Progress:
    """Steps done, what products run in, the figures since the last line of the log, and those of the last
    evaluation.
    """

    step: int = 0
    dtype: str | None = None
    window: list[dict[str, float]] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)


def run(
    task: Task,
    config: LoopConfig,
    out: Path,
    stop_after_seconds: float | None = None,
    settings: Config | None = None,
) -> dict[str, float]:
    """Train until `num_steps`, resuming from `out/checkpoint.pt` where there is one.

    Args:
        task: the stage; its module ends up holding the averaged weights.
        config: schedule and bookkeeping.
        out: folder for the checkpoint and for what `train.logs` writes; made if missing.
        stop_after_seconds: stop early (with a checkpoint) after this long, to be resumed later.
        settings: all of the stage's, to which a checkpoint is held; those of the loop alone where None.

    Returns:
        the last evaluation's figures, with `STOPPED_EARLY` where that happened.

    Raises:
        TrainingError: the loss became NaN or infinite, or the checkpoint is of another configuration.
    """
    out.mkdir(parents=True, exist_ok=True)
    average = WeightAverage(task.module, config.ema_decay, config.ema_from_step)
    settings = config if settings is None else settings
    done = _resume(task, settings, average, out)
    dtype = autocast_dtype(config.precision, next(task.module.parameters()).device)
    if done.dtype is not None:  # "auto" is measured, and a run goes on as it began
        dtype = None if done.dtype == str(None) else dtype or torch.bfloat16
    done.dtype = str(dtype)
    started = saved = time.monotonic()
    with TrainingLog(out, done.step) as log:
        while done.step < config.num_steps:
            tick = time.monotonic()
            row: dict[str, float] = {}
            for name, learner in task.learners.items():
                if done.step % learner.every == 0:
                    prefix = f"{name}_" if len(task.learners) > 1 else ""
                    for key, value in _learn(learner, done.step, config, dtype).items():
                        row[prefix + key] = value
                    if learner.module is task.module:
                        average.update(task.module, done.step, done.step // learner.every + 1)
            done.step += 1
            done.window.append({**row, "seconds": time.monotonic() - tick})
            if done.step % config.log_every_steps == 0:
                log.figures(done.step, _means(done.window))
                done.window.clear()
            is_last = done.step == config.num_steps
            if done.step % config.evaluate_every_steps == 0 or is_last:
                average.swap(task.module)
                done.figures = task.evaluate()
                log.evaluation(done.step, done.figures)
                pictures = task.samples()
                if pictures is not None:
                    log.samples(done.step, pictures)
                average.swap(task.module)
            late = stop_after_seconds is not None and time.monotonic() - started > stop_after_seconds
            if late or is_last or time.monotonic() - saved > config.checkpoint_every_seconds:
                _save(task, settings, average, done, out)
                saved = time.monotonic()
            if late and not is_last:
                done.figures = {**done.figures, STOPPED_EARLY: float(done.step)}
                break
    average.swap(task.module)
    return done.figures


def _learn(learner: Learner, step: int, config: LoopConfig, dtype: torch.dtype | None) -> dict[str, float]:
    """One update of one learner from the mean gradient of its draws; its figures."""
    device = next(learner.module.parameters()).device
    learner.optimizer.scale_learning_rates(learning_rate_factor(step, config))
    rows = []
    for micro in range(config.accumulation_steps):
        draw = step * config.accumulation_steps + micro
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss, parts = learner.loss(draw, step / config.num_steps)
        (loss / config.accumulation_steps).backward()  # type: ignore[no-untyped-call]
        rows.append({"loss": float(loss.detach()), **parts})
    norm = nn.utils.clip_grad_norm_(learner.module.parameters(), config.gradient_clip)
    means = _means(rows)
    if not torch.isfinite(norm):
        raise TrainingError(
            f"step {step}: loss {means['loss']}, gradient norm {float(norm)}", "lower the learning rate"
        )
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)  # so that one learner's gradients exist at a time
    return {"loss": means.pop("loss"), "norm": float(norm), **means}


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure over the rows that have it."""
    means = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [row[key] for row in rows if key in row]
        means[key] = sum(values) / len(values)
    return means


def _save(task: Task, settings: Config, average: WeightAverage, done: _Progress, out: Path) -> None:
    state = {
        "step": done.step,
        "config": settings.model_dump_json(),
        "dtype": done.dtype,
        "average": average.shadow,
        "modules": {name: learner.module.state_dict() for name, learner in task.learners.items()},
        "optimizers": {name: learner.optimizer.state_dict() for name, learner in task.learners.items()},
        "window": done.window,
        "figures": done.figures,
        "rng": torch.get_rng_state(),
    }
    aside = out / "checkpoint.pt.part"
    torch.save(state, aside)
    os.replace(aside, out / "checkpoint.pt")


def _resume(task: Task, settings: Config, average: WeightAverage, out: Path) -> _Progress:
    path = out / "checkpoint.pt"
    if not path.exists():
        return _Progress()
    state = torch.load(path, weights_only=True, map_location=next(task.module.parameters()).device)
    _check_same(state["config"], settings, path)
    for name, learner in task.learners.items():
        learner.module.load_state_dict(state["modules"][name])
        learner.optimizer.load_state_dict(state["optimizers"][name])
    average.shadow = state["average"]
    if "rng" in state:  # older checkpoints have neither this nor those below
        torch.set_rng_state(state["rng"].cpu())
    return _Progress(
        int(state["step"]), state.get("dtype"), state.get("window", []), state.get("figures", {})
    )


def _check_same(stored: str, settings: Config, path: Path) -> None:
    """Refuse to go on under another configuration; settings that are newer than the file were at their
    defaults.
    """
    remedy = "remove it or train with that configuration"
    try:
        before = type(settings).loads(stored, str(path))
    except ConfigError as error:
        raise TrainingError(f"{path} was written by another version: {error.problem}", remedy) from error
    changes = [f"{name}={old!r}, not {new!r}" for name, old, new in _differences(before, settings)]
    if changes:
        raise TrainingError(f"{path} was written under {'; '.join(changes)}", remedy)


def _differences(before: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    """The settings of two configurations of one kind that differ, by their dotted names."""
    for name in type(now).model_fields:
        old, new = getattr(before, name), getattr(now, name)
        if isinstance(new, Config) and type(old) is type(new):
            for inner, a, b in _differences(old, new):
                yield f"{name}.{inner}", a, b
        elif old != new:
            yield name, old, new

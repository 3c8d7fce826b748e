"""Whether a recipe can be trained: its parts fit each other, and its stages fit into memory.

Both are checked before anything is trained, and every refusal says what to change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.train.plan import DeviceKind, Machine, StagePlan, gigabytes

USABLE = 0.9
"""Share of a machine's memory that plans may fill: they count neither libraries nor fragmentation."""

_MEMINFO = Path("/proc/meminfo")
_MOST_HALVINGS = 10


class Planned(Protocol):
    """A recipe, seen from here: a config whose stages are configs under their names."""

    def plan(self, stage: str, machine: Machine) -> StagePlan | None:
        """The stage's demands; None where it trains nothing."""
        ...

    def replace(self, **changes: Any) -> Self:
        """A copy with other values."""
        ...


def this_machine(device: DeviceKind = "cpu", memory_gb: float | None = None) -> Machine:
    """The machine that runs this, or one like it with so many GB (10^9 bytes).

    Memory is that of the first CUDA device, or what is available to a new process on this computer.

    Raises:
        TrainingError: there is no such device here, and no memory is given.
    """
    if memory_gb is not None:
        return Machine(device, round(memory_gb * 1e9))
    if device == "cpu":
        return Machine(device, _available_bytes())
    if not torch.cuda.is_available():
        raise TrainingError(
            "the recipe trains on a CUDA device, and there is none here",
            "run it where there is one, or plan for one with --memory-gb",
        )
    return Machine(device, torch.cuda.get_device_properties(0).total_memory)


def _available_bytes() -> int:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Change:
    """Settings that make a stage smaller without changing what it learns, and what it takes then."""

    settings: Mapping[str, object]
    num_bytes: int

    def __str__(self) -> str:
        settings = " ".join(f"--set {key}={value}" for key, value in self.settings.items())
        return f"{settings} takes {gigabytes(self.num_bytes)}"


def check_fits(recipe: Planned, stage: str, plan: StagePlan, machine: Machine) -> None:
    """Refuse a stage that needs more than `USABLE` of a machine's memory.

    Raises:
        TrainingError: with the demand, the memory, and changes of settings with what they save.
    """
    limit = round(USABLE * machine.num_bytes)
    if plan.num_bytes <= limit:
        return
    items = {**plan.fixed, **plan.by_batch}
    parts = ", ".join(
        f"{name} {gigabytes(size)}" for name, size in items.items() if size > 0.01 * plan.num_bytes
    )
    problem = (
        f"stage {stage} takes {gigabytes(plan.num_bytes)} ({parts}), but of this {machine.device}'s "
        f"{gigabytes(machine.num_bytes)} at most {gigabytes(limit)} may be planned with"
    )
    options = changes(recipe, stage, plan, machine, limit)
    fitting = [change for change in options if change.num_bytes <= limit]
    if fitting:
        raise TrainingError(problem, ", or ".join(map(str, fitting)))
    fixed = sum(plan.fixed.values())
    least = min([plan.num_bytes, *(change.num_bytes for change in options)])
    remedy = "; ".join([*map(str, options), f"networks and optimizer alone take {gigabytes(fixed)}"])
    raise TrainingError(
        problem,
        f"no setting makes it fit: {remedy}; use a device of {gigabytes(least / USABLE)}, a smaller model, "
        f"or shard over {-(-least // limit)} such devices or more, which longtake does not do yet",
    )


def changes(recipe: Planned, stage: str, plan: StagePlan, machine: Machine, limit: int) -> list[Change]:
    """What can be set so that a stage takes less, each alone and then all together.

    Batches are halved until they fit, with as many more of them to an update, or until they are single clips.
    """
    config = getattr(recipe, stage)
    alone: list[Change] = []
    if plan.activations[1] is not None and config.loop.recompute == "none":
        alone.append(_changed(recipe, stage, {"loop.recompute": "blocks"}, machine))
    last: Change | None = None
    for settings in _halved_batches(config):
        last = _changed(recipe, stage, settings, machine)
        if last.num_bytes <= limit:
            break
    if last is not None:
        alone.append(last)
    alone = [change for change in alone if change.num_bytes < plan.num_bytes]
    if len(alone) < 2 or any(change.num_bytes <= limit for change in alone):
        return alone
    together = {key.removeprefix(f"{stage}."): v for change in alone for key, v in change.settings.items()}
    return [*alone, _changed(recipe, stage, together, machine)]


def _halved_batches(config: Config) -> Iterator[dict[str, object]]:
    """Settings for half the clips and twice the batches, a quarter of them and so on."""
    counts = {
        name: getattr(config, name)
        for name in ("num_clips", "num_first_clips", "num_recall_clips", "num_long_clips")
        if name in type(config).model_fields and getattr(config, name) > 0
    }
    steps = config.loop.accumulation_steps  # type: ignore[attr-defined]
    for halving in range(1, _MOST_HALVINGS):
        parts = 2**halving
        if not counts or any(count % parts for count in counts.values()):
            return
        yield {
            **{name: count // parts for name, count in counts.items()},
            "loop.accumulation_steps": steps * parts,
        }


def _changed(recipe: Planned, stage: str, settings: Mapping[str, object], machine: Machine) -> Change:
    config = getattr(recipe, stage)
    for key, value in settings.items():
        outer, _, inner = key.rpartition(".")
        changed = {inner: value} if not outer else {outer: getattr(config, outer).replace(**{inner: value})}
        config = config.replace(**changed)
    plan = recipe.replace(**{stage: config}).plan(stage, machine)
    assert plan is not None, "a stage that trains goes on training"
    return Change({f"{stage}.{key}": value for key, value in settings.items()}, plan.num_bytes)


def check_multiple(name: str, height: int, width: int, unit: tuple[int, int], why: str) -> None:
    """Refuse a size that is no multiple of (rows, columns). Raises ConfigError with the nearest that is."""
    rows, columns = unit
    if height % rows or width % columns:
        nearest = (max(1, round(height / rows)) * rows, max(1, round(width / columns)) * columns)
        raise ConfigError(
            f"{name} is {height}x{width}, no multiple of {rows}x{columns}, {why}",
            f"use for instance {nearest[0]}x{nearest[1]}",
        )

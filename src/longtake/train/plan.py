"""What a stage of training will take, from its configuration alone: parameters, memory, FLOPs.

Nothing is allocated: networks are built on torch's meta device, and their passes counted by `train.costs`.
Evaluations are not in the FLOPs; the interpreter, its libraries and fragmentation are not in the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from longtake.train.costs import Arithmetic, Cost
from longtake.train.loop import LoopConfig, Precision, autocast_dtype
from longtake.train.optim import MuonAdamW

DeviceKind = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Machine:
    """What a plan is made for.

    Args:
        device: where networks and latents live.
        num_bytes: memory there.
    """

    device: DeviceKind
    num_bytes: int

    def arithmetic(self, precision: Precision) -> Arithmetic:
        """How products are made on it."""
        half = autocast_dtype(precision, torch.device(self.device)) is torch.bfloat16
        return Arithmetic(half, keeps_scores=half and self.device == "cpu")


@dataclass(frozen=True)
class NetworkPlan:
    """A network of a stage: its parameters, and how many of them learn."""

    name: str
    num_parameters: int
    num_trained: int


@dataclass(frozen=True)
class StagePlan:
    """A stage's demands.

    Args:
        stage: its name.
        num_steps: of the stage.
        networks: that are in memory.
        fixed: bytes by item that follow from the networks.
        by_batch: bytes by item that follow from the batch, with blocks recomputed where the stage does so.
        activations: bytes kept for the backward pass, without and with recomputed blocks; the second is None
            where there are no blocks.
        flops: of a step by part; of what happens every so-many-th step its share.
    """

    stage: str
    num_steps: int
    networks: tuple[NetworkPlan, ...]
    fixed: Mapping[str, int]
    by_batch: Mapping[str, int]
    activations: tuple[int, int | None]
    flops: Mapping[str, float]

    @property
    def num_bytes(self) -> int:
        """Memory in all."""
        return sum(self.fixed.values()) + sum(self.by_batch.values())

    @property
    def flops_per_step(self) -> float:
        """Of all parts."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Phase:
    """What a learner does with one batch. Of several phases one at a time has its activations in memory.

    Args:
        name: for the table.
        cost: of one batch.
        every: on which steps it happens, the first and then every so-many-th.
    """

    name: str
    cost: Cost
    every: int = 1


def plan_stage(
    stage: str,
    loop: LoopConfig,
    networks: Mapping[str, nn.Module],
    learners: Sequence[tuple[nn.Module, MuonAdamW]],
    phases: Sequence[Phase],
    arithmetic: Arithmetic,
    data_bytes: int = 0,
) -> StagePlan:
    """A stage's demands from its parts.

    Args:
        stage: its name.
        loop: its length, its batches per step and what is recomputed.
        networks: all that are in memory, by name, on the meta device; none inside another.
        learners: those under training, the one whose averaged weights are the result first.
        phases: what happens in a step.
        arithmetic: how products are made.
        data_bytes: of clips held in memory.
    """
    trained = [trained_bytes(module) for module, _ in learners]
    fixed = {
        "weights": sum(
            tensor.nbytes for module in networks.values() for tensor in module.state_dict().values()
        ),
        "gradients": max(trained),
        "optimizer state": sum(optimizer.state_bytes for _, optimizer in learners),
        "averaged weights": trained[0],
    }
    if arithmetic.half:
        fixed["bf16 copies of weights"] = sum(trained) // 2
    if data_bytes > 0:
        fixed["clips"] = data_bytes
    costs = [phase.cost for phase in phases]
    plain = round(max(cost.kept + cost.working for cost in costs))
    recomputed = round(max(cost.kept_recomputing + max(cost.block, cost.working) for cost in costs))
    has_blocks = any(cost.recompute_flops > 0 for cost in costs)
    recomputes = has_blocks and loop.recompute == "blocks"
    by_batch = {"activations": recomputed if recomputes else plain}
    if has_blocks:
        by_batch["keys and values"] = round(max(cost.history for cost in costs))
    flops = {
        phase.name: loop.accumulation_steps
        / phase.every
        * (phase.cost.flops + (phase.cost.recompute_flops if recomputes else 0.0))
        for phase in phases
    }
    return StagePlan(
        stage=stage,
        num_steps=loop.num_steps,
        networks=tuple(
            NetworkPlan(name, _count(module), _count(module, trained=True))
            for name, module in networks.items()
        ),
        fixed=fixed,
        by_batch=by_batch,
        activations=(plain, recomputed if has_blocks else None),
        flops=flops,
    )


def trained_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters that learn."""
    return sum(p.nbytes for p in module.parameters() if p.requires_grad)


def plan_lines(plan: StagePlan) -> list[str]:
    """A plan as a table of text, one item to a line."""
    lines = [f"stage {plan.stage}, {plan.num_steps} steps"]

    def row(name: str, value: str, note: str = "") -> None:
        lines.append(f"    {name:<32}{value:>10}  {note}".rstrip())

    lines.append("  parameters")
    for network in plan.networks:
        frozen = network.num_parameters - network.num_trained
        kinds = [f"{_short(network.num_trained)} trained"] * (network.num_trained > 0)
        kinds += [f"{_short(frozen)} frozen"] * (frozen > 0)
        row(network.name, _short(network.num_parameters), ", ".join(kinds))
    lines.append("  memory")
    for name, size in {**plan.fixed, **plan.by_batch}.items():
        row(name, gigabytes(size), _recompute_note(plan) if name == "activations" else "")
    row("total", gigabytes(plan.num_bytes))
    lines.append("  FLOPs per step")
    for name, amount in plan.flops.items():
        row(name, _flops(amount))
    row("total", _flops(plan.flops_per_step), f"{_flops(plan.flops_per_step * plan.num_steps)} in all steps")
    return lines


def gigabytes(size: float) -> str:
    """Bytes for people: GB (10^9), or MB where they are few."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB" if size < 1e12 else f"{size / 1e9:.0f} GB"


def _recompute_note(plan: StagePlan) -> str:
    plain, recomputed = plan.activations
    if recomputed is None:
        return ""
    return f"recompute none: {gigabytes(plain)}, blocks: {gigabytes(recomputed)}"


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _short(count: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {letter}"
    return f"{count:.0f}"


def _flops(amount: float) -> str:
    for size, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if amount >= size:
            return f"{amount / size:.2f} {letter}"
    return f"{amount / 1e6:.2f} M"

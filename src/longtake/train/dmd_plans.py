"""Plans of distribution matching, beside what its task does with a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from longtake.diffusion.flow import Schedule
from longtake.train.costs import Cost
from longtake.train.dit_costs import DiTCosts
from longtake.train.dmd import dmd_optimizers
from longtake.train.dmd_config import DMDConfig, score_history
from longtake.train.lora import add_lora
from longtake.train.plan import Machine, Phase, StagePlan, plan_stage
from longtake.train.stage_plans import Sizes


@dataclass(frozen=True)
class Role:
    """A network of distribution matching: what its passes cost, by the history that it reads, and prompts."""

    costs: DiTCosts
    text: Callable[[int, bool], Cost]


def dmd_phases(
    config: DMDConfig, schedule: Schedule, generator: Role, critic: Role, teacher: Role
) -> list[Phase]:
    """What distribution matching does with a batch, for whatever networks.

    A rollout ends at a step drawn uniformly, so that on average (S + 1) / 2 of S denoising passes run, of
    which the last of each chunk learns. A lead has half of its most chunks; clips are scored without it. Of
    low-rank updates neither their own products are counted nor the gradients that they save, which about
    cancel.
    """
    count, num_early = config.num_clips, (len(schedule.steps) - 1) / 2
    rollout, learning = generator.text(count, False), generator.text(count, True)
    scores = critic.text(count, False) + teacher.text(2 * count, False)
    follows = critic.text(count, True)
    causal = config.scores == "chunks"
    num_pieces = config.num_chunks if causal else 1
    lead = config.max_lead_chunks // 2
    seen = lead if causal else 0
    for chunk in range(lead + config.num_chunks):
        plain = generator.costs.forward(count, chunk)
        context = generator.costs.forward(count, chunk, num_committed=generator.costs.kept_rows(count, chunk))
        if chunk == lead + config.num_chunks - 1:
            context = Cost()  # nobody reads it
        rollout += plain.times(num_early + 1) + context
        memory = generator.costs.memory(count, chunk, config.memory_credit != "none")
        if chunk < lead:
            learning += plain.times(num_early + 1) + context + memory
            for role, rows in ((critic, count), (teacher, 2 * count)) if causal else ():
                commit = role.costs.forward(rows, chunk, num_committed=role.costs.kept_rows(rows, chunk))
                scores += commit
                follows += commit if role is critic else Cost()
        else:
            learning += plain.times(num_early) + context + memory
            learning += generator.costs.forward(count, chunk, True)
    for piece in range(seen, seen + num_pieces):
        commits = int(piece < seen + num_pieces - 1)
        for role, rows in ((critic, count), (teacher, 2 * count)):
            kept = commits * role.costs.kept_rows(rows, piece)
            scores += role.costs.forward((1 + commits) * rows, piece, num_committed=kept, base_rows=rows)
        rows = (config.num_critic_copies + commits) * count
        follows += critic.costs.forward(rows, piece, True, commits * count, count)
    every = config.critic_updates
    return [
        Phase("generator: rollout and backward", learning.beside(scores), every),
        Phase("generator: scores", Cost(flops=scores.flops), every),
        Phase("critic: rollout", Cost(flops=rollout.flops)),
        Phase("critic: error and backward", follows.beside(rollout)),
    ]


def plan_dmd(stage: str, sizes: Sizes, config: DMDConfig, machine: Machine) -> StagePlan:
    """Of distribution matching on the small model, all of whose networks are alike."""
    arithmetic = machine.arithmetic(config.loop.precision)
    text = partial(sizes.text_cost, arithmetic=arithmetic)
    scoring = replace(sizes, history=score_history(config, sizes.history))
    generator, scorer = Role(sizes.costs(arithmetic), text), Role(scoring.costs(arithmetic), text)
    module, critic, frozen = sizes.networks(), sizes.networks(), sizes.networks(frozen=True)
    if config.lora is not None:
        add_lora(module, config.lora)
        add_lora(critic, config.lora)
    optimizers = dmd_optimizers(config, module, critic)
    learners = list(zip((module, critic), optimizers, strict=True))
    networks = {
        "generator text": module.text,
        "generator dit": module.dit,
        "critic text": critic.text,
        "critic dit": critic.dit,
        "teacher text": frozen.text,
        "teacher dit": frozen.dit,
        **sizes.frozen_vae(),
    }
    phases = dmd_phases(config, sizes.schedule, generator, scorer, scorer)
    return plan_stage(stage, config.loop, networks, learners, phases, arithmetic)

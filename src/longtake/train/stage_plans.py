"""Plans of the stages that there are, each beside what its task does with a batch.

Legend: b clips, r rows of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from longtake.diffusion.flow import Schedule
from longtake.history.base import HistoryConfig
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.tiny_text import TinyTextConfig, TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE, TinyVAEConfig
from longtake.train.costs import Arithmetic, Cost, text_encoder_cost, vae_cost
from longtake.train.dit_config import ClipKind, DiTTrainingConfig
from longtake.train.dit_costs import DiTCosts
from longtake.train.evictions import EvictionsConfig, evictions_optimizer
from longtake.train.latents import ClipsPerStep
from longtake.train.layers import LayersConfig, attention_of, layers_optimizer
from longtake.train.networks import TextToLatents, dit_optimizer
from longtake.train.plan import Machine, Phase, StagePlan, plan_stage
from longtake.train.probes import guide_probe, probes_of
from longtake.train.prompts import EmbeddedPrompts
from longtake.train.recall import longest_chunks
from longtake.train.trajectory import TrajectoryConfig
from longtake.train.vae import VAETrainingConfig, latent_probe, select_learned, vae_optimizer

_RECALL_PROMPTS = 4
_LONG_PROMPTS = 3


def on_meta(make: Callable[[], nn.Module], frozen: bool = False) -> nn.Module:
    """A network that has shapes and no memory."""
    with torch.device("meta"):
        return make().requires_grad_(not frozen)


@dataclass(frozen=True)
class Sizes:
    """What the stages of a model share.

    Args:
        vae, text, dit: its networks; no autoencoder where clips come encoded, no text encoder where prompts
            come embedded.
        history: of the walks.
        schedule: of few-step sampling.
        height, width: of the latents.
        opening_schedule: of a stream's first chunk, where it has one of its own.
        guided: chunks are sampled with classifier-free guidance.
    """

    vae: TinyVAEConfig | None
    text: TinyTextConfig | None
    dit: DiTConfig
    history: HistoryConfig
    schedule: Schedule
    height: int
    width: int
    opening_schedule: Schedule | None = None
    guided: bool = False

    def networks(self, frozen: bool = False) -> TextToLatents:
        """Text encoder and DiT on the meta device."""
        with torch.device("meta"):
            prompts = EmbeddedPrompts({}, self.dit.text_width)
            text = prompts if self.text is None else TinyTextEncoder(self.text)
            made = TextToLatents(text, DiT(self.dit))
        return made.requires_grad_(not frozen)

    def costs(self, arithmetic: Arithmetic) -> DiTCosts:
        """Of the DiT's passes."""
        return DiTCosts(self.dit, self.history, self.height, self.width, arithmetic)

    def recall_chunks(
        self, absence: tuple[float, float], num_away: int = 0, learned_share: float = 1.0
    ) -> tuple[int, int]:
        """The most chunks of a clip that asks for recall, and the most that are learned from; absences in
        windows, the rest as in `train.recall`.
        """
        assert self.vae is not None, "clips that ask for recall are rendered"
        stride, window = self.vae.temporal_stride, self.history.window_frames
        assert window is not None, "recipes with recall clips have a window"
        chunk = self.history.chunk_frames * stride
        aspect = self.width / self.height
        return longest_chunks(round(absence[1] * window * stride), chunk, aspect, num_away, learned_share)

    def text_cost(self, rows: int, learns: bool, arithmetic: Arithmetic) -> Cost:
        """Of encoding prompts, to the end."""
        own = self.costs(arithmetic).text(rows, learns)
        return own if self.text is None else text_encoder_cost(self.text, rows, learns, arithmetic) + own

    def frozen_vae(self) -> dict[str, nn.Module]:
        """The autoencoder, where there is one."""
        vae = self.vae
        return {} if vae is None else {"vae": on_meta(lambda: TinyVAE(vae), frozen=True)}


def plan_vae(stage: str, model: TinyVAEConfig, config: VAETrainingConfig, machine: Machine) -> StagePlan:
    """Of a stage that trains the small autoencoder."""
    with torch.device("meta"):
        module = TinyVAE(model)
    select_learned(module, config.learns)
    probe = on_meta(lambda: latent_probe(model)) if config.guide_weight > 0 else None
    learned: nn.Module = module if probe is None else nn.ModuleDict({"vae": module, "probe": probe})
    optimizer = vae_optimizer(learned, config)
    arithmetic = machine.arithmetic(config.loop.precision)
    frames = (config.num_clips, config.num_latent_frames, config.height, config.width)
    errors = model.pixel_channels * (1 + (config.difference_weight > 0)) + 1  # and their weight
    cost = vae_cost(model, frames, arithmetic, config.learns, errors)
    phases = [Phase("reconstruction", cost)]
    networks: dict[str, nn.Module] = {"vae": module}
    if probe is not None:
        networks["probe"] = probe
    return plan_stage(stage, config.loop, networks, [(learned, optimizer)], phases, arithmetic)


def plan_dit(
    stage: str,
    sizes: Sizes,
    config: DiTTrainingConfig,
    machine: Machine,
    data_bytes: int,
    *,
    keeps_copy: bool = True,
) -> StagePlan:
    """Of a stage of teacher forcing; it `keeps_copy` of the network where a later one is taught by it."""
    arithmetic = machine.arithmetic(config.loop.precision)
    costs = sizes.costs(arithmetic)
    cost = Cost()
    for count, num_chunks in config.walks:
        cost += sizes.text_cost(count, True, arithmetic)
        copies = config.copies_of(num_chunks)
        for chunk in range(num_chunks):
            commits = count if chunk < num_chunks - 1 else 0
            cost += costs.forward(copies * count + commits, chunk, True, commits, count)
            cost += costs.memory(count, chunk, True)
            if commits > 0 and config.resampled_sigmas:
                expected = len(config.resampled_sigmas) / 2  # passes without gradients
                cost += costs.forward(count, chunk).times(expected)
    for walk in _sparse_walks(sizes, config):
        cost += _sparse_walk(sizes, config, walk, arithmetic)
    module, teacher = sizes.networks(), sizes.networks(frozen=True)
    with torch.device("meta"):
        probes = probes_of(module, config)
    learned: nn.Module = nn.ModuleDict({"networks": module, **probes}) if probes else module
    optimizer = dit_optimizer(
        learned,
        config.muon_learning_rate,
        config.adamw_learning_rate,
        config.loop.precision,
        only_adamw=config.optimizer,
    )
    networks: dict[str, nn.Module] = {"text": module.text, "dit": module.dit, **sizes.frozen_vae()}
    networks |= probes | ({"copy for later stages": teacher} if keeps_copy else {})
    phases = [Phase("walks", cost)]
    if config.learns_from != "clips":
        dense = replace(sizes, dit=sizes.dit.dense())
        networks["parent"] = dense.networks(frozen=True)
        phases = _side_by_side(("walks", cost), ("parent", _parents_walks(dense, config, arithmetic)))
    if config.long_rollouts:
        phases.append(Phase("own rollouts", Cost(flops=_own_rollouts(sizes, config, arithmetic).flops)))
    phases += _fresh_clips(sizes, config, arithmetic)
    return plan_stage(stage, config.loop, networks, [(learned, optimizer)], phases, arithmetic, data_bytes)


def plan_layers(
    stage: str, sizes: Sizes, config: LayersConfig, machine: Machine, data_bytes: int
) -> StagePlan:
    """Of layer-wise distillation."""
    arithmetic = machine.arithmetic(config.loop.precision)
    dense = replace(sizes, dit=sizes.dit.dense())
    parents, costs = dense.costs(arithmetic), sizes.costs(arithmetic)
    parent, layers = Cost(), Cost()
    for count, num_chunks in config.walks:
        rows = (config.num_copies + 1) * count
        parent += sizes.text_cost(count, False, arithmetic)
        for chunk in range(num_chunks):
            held = parents.kept_rows(count, chunk)
            parent += parents.forward(rows, chunk, num_committed=held, base_rows=count)
            layers += costs.self_attention(rows, chunk, count, count)
    module, frozen = sizes.networks(), dense.networks(frozen=True)
    module.requires_grad_(False)
    learned = nn.ModuleList(attention_of(module.dit)).requires_grad_(True)
    optimizer = layers_optimizer(learned, config)
    phases = _side_by_side(("latent layers", layers), ("dense parent", parent))
    phases += _fresh_clips(sizes, config, arithmetic)
    networks = _beside_frozen(module, "parent", frozen, sizes)
    networks["copy for later stages"] = sizes.networks(frozen=True)
    return plan_stage(stage, config.loop, networks, [(learned, optimizer)], phases, arithmetic, data_bytes)


@dataclass(frozen=True)
class _SparseWalk:
    """Clips of whose chunks some are learned from, at the most."""

    kind: ClipKind
    num_clips: int
    num_chunks: int
    num_learned: int
    num_prompts: int


def _sparse_walks(sizes: Sizes, config: DiTTrainingConfig) -> list[_SparseWalk]:
    """Of a step: the longest clips that ask for recall, and those of several windows."""
    walks = []
    if config.num_long_clips > 0:
        walks.append(
            _SparseWalk(
                "long", config.num_long_clips, config.num_long_chunks, config.num_long_learned, _LONG_PROMPTS
            )
        )
    if config.num_recall_clips > 0:
        num_chunks, num_learned = sizes.recall_chunks(
            config.recall_absence, config.recall_away_chunks, config.recall_learned_share
        )
        walks.append(_SparseWalk("recall", config.num_recall_clips, num_chunks, num_learned, _RECALL_PROMPTS))
    return walks


def _sparse_walk(sizes: Sizes, config: DiTTrainingConfig, walk: _SparseWalk, arithmetic: Arithmetic) -> Cost:
    """Its chunks that are learned from come last, which costs the most."""
    costs, count = sizes.costs(arithmetic), walk.num_clips
    cost = sizes.text_cost(count, True, arithmetic).repeated(walk.num_prompts)
    for chunk in range(walk.num_chunks):
        if chunk < walk.num_chunks - walk.num_learned:
            cost += costs.forward(count, chunk, num_committed=costs.kept_rows(count, chunk))
        else:
            cost += costs.forward((config.num_copies + 1) * count, chunk, True, count, count)
        cost += costs.memory(count, chunk, True)
    return cost


def _parents_walks(sizes: Sizes, config: DiTTrainingConfig, arithmetic: Arithmetic) -> Cost:
    """What the parent, of the sizes given, sees of what it teaches, without gradients."""
    costs, cost = sizes.costs(arithmetic), Cost()
    walks = [
        _SparseWalk("first" if chunks == 1 else "whole", count, chunks, chunks, 1)
        for count, chunks in config.walks
    ]
    for walk in [*walks, *_sparse_walks(sizes, config)]:
        if walk.kind in config.clips_teach:
            continue
        count, num_chunks, num_learned = walk.num_clips, walk.num_chunks, walk.num_learned
        copies = config.copies_of(num_chunks)
        cost += sizes.text_cost(count, False, arithmetic).repeated(walk.num_prompts)
        for chunk in range(num_chunks):
            noisy = 0 if chunk < num_chunks - num_learned else copies * count
            commits = 0 if chunk == num_chunks - 1 else count
            held = costs.kept_rows(count, chunk) if commits else 0
            cost += costs.forward(noisy + commits, chunk, num_committed=held, base_rows=count)
            cost += costs.memory(count, chunk, False)
    return cost


def _own_rollouts(sizes: Sizes, config: DiTTrainingConfig, arithmetic: Arithmetic) -> Cost:
    """Of sampling long clips; that a switch of prompts may take more steps is not in it."""
    costs, rows = sizes.costs(arithmetic), (1 + sizes.guided) * config.num_long_clips
    cost = sizes.text_cost(rows, False, arithmetic)
    for chunk in range(config.num_long_chunks):
        schedule = (sizes.opening_schedule if chunk == 0 else None) or sizes.schedule
        cost += costs.forward(rows, chunk).times(len(schedule.steps) + 1)  # and the context pass
        cost += costs.memory(rows, chunk, False)
    return cost


def plan_evictions(stage: str, sizes: Sizes, config: EvictionsConfig, machine: Machine) -> StagePlan:
    """Of a memory that learns alone; walking the clips once, before, is not in it."""
    arithmetic = machine.arithmetic(config.loop.precision)
    costs, count = sizes.costs(arithmetic), config.num_clips
    num_chunks, num_last = sizes.recall_chunks(config.absence)
    updates = Cost()
    for chunk in range(num_chunks - num_last):
        updates += costs.memory(count, chunk, True)
    module = sizes.networks(frozen=True)
    assert module.dit.memory is not None, "checked before"
    memory = module.dit.memory.requires_grad_(True)
    with torch.device("meta"):
        probe = guide_probe(sizes.dit)
    learned = nn.ModuleDict({"memory": memory, "probe": probe})
    networks = {
        "text": module.text,
        "dit": module.dit,
        **sizes.frozen_vae(),
        "copy for later stages": sizes.networks(frozen=True),
        "probe": probe,
    }
    optimizer = evictions_optimizer(learned, config)
    phases = [Phase("updates and readings", updates)]
    return plan_stage(stage, config.loop, networks, [(learned, optimizer)], phases, arithmetic)


def plan_trajectory(
    stage: str, sizes: Sizes, config: TrajectoryConfig, machine: Machine, data_bytes: int
) -> StagePlan:
    """Of trajectory distillation."""
    arithmetic = machine.arithmetic(config.loop.precision)
    costs, ends = sizes.costs(arithmetic), config.target == "ends"
    num_levels = len(sizes.schedule.steps) if ends else config.num_copies
    student, teacher = Cost(), Cost()
    for count, num_chunks in config.walks:
        student += sizes.text_cost(count, True, arithmetic)
        teacher += sizes.text_cost(2 * count, False, arithmetic)
        for chunk in range(num_chunks):
            commits = count if chunk < num_chunks - 1 else 0
            student += costs.forward(num_levels * count + commits, chunk, True, commits, count)
            if ends:
                teacher += costs.forward(2 * count, chunk).times(num_levels * config.steps_per_level)
            else:
                teacher += costs.forward(2 * num_levels * count, chunk, base_rows=2 * count)
                student += costs.forward(num_levels * count, chunk, base_rows=count)
            if commits:
                teacher += costs.forward(2 * count, chunk, num_committed=costs.kept_rows(2 * count, chunk))
    module, frozen = sizes.networks(), sizes.networks(frozen=True)
    optimizer = dit_optimizer(
        module,
        config.muon_learning_rate,
        config.adamw_learning_rate,
        config.loop.precision,
        only_adamw=config.optimizer,
    )
    phases = _side_by_side(("student", student), ("teacher", teacher))
    phases += _fresh_clips(sizes, config, arithmetic)
    networks = _beside_frozen(module, "teacher", frozen, sizes)
    return plan_stage(stage, config.loop, networks, [(module, optimizer)], phases, arithmetic, data_bytes)


def _side_by_side(learner: tuple[str, Cost], frozen: tuple[str, Cost]) -> list[Phase]:
    """Both walk at the same time, so that the keys and values of what is frozen are there beside what the
    learner keeps.
    """
    (name, cost), (frozen_name, frozen_cost) = learner, frozen
    return [Phase(name, cost.beside(frozen_cost)), Phase(frozen_name, Cost(flops=frozen_cost.flops))]


def _beside_frozen(
    module: TextToLatents, role: str, frozen: TextToLatents, sizes: Sizes
) -> dict[str, nn.Module]:
    return {
        "text": module.text,
        "dit": module.dit,
        f"{role} text": frozen.text,
        f"{role} dit": frozen.dit,
        **sizes.frozen_vae(),
    }


def _fresh_clips(sizes: Sizes, config: ClipsPerStep, arithmetic: Arithmetic) -> list[Phase]:
    """Encoding what is rendered anew; rendering itself multiplies nothing."""
    if not config.fresh_clips:
        return []
    assert sizes.vae is not None, "fresh clips are rendered"
    stride, cost = sizes.vae.spatial_stride, Cost()
    walks = list(config.walks)
    if isinstance(config, DiTTrainingConfig):
        for walk in _sparse_walks(sizes, config):
            rolled = walk.kind == "long" and config.long_rollouts  # only the first chunk is rendered
            walks.append((walk.num_clips, 1 if rolled else walk.num_chunks))
    for count, num_chunks in walks:
        frames = (
            count,
            num_chunks * sizes.history.chunk_frames,
            sizes.height * stride,
            sizes.width * stride,
        )
        cost += vae_cost(sizes.vae, frames, arithmetic, None)
    return [Phase("encoding of fresh clips", cost)]

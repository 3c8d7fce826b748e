"""A large model into a causal few-step one, without video data: distribution matching on its own rollouts, as
Self-Forcing (arXiv 2506.08009) and Echo-Infinity (arXiv 2606.04527) train Wan2.1-T2V-1.3B.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from pydantic import Field

from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.io.checkpoints import (
    NETWORK_KEY,
    STREAM_KEY,
    load_into,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.memory import MemoryEncoder
from longtake.stream.pipeline import StreamConfig
from longtake.train.checks import check_storage
from longtake.train.dit_costs import DiTCosts
from longtake.train.dmd import DMDTask, dmd_optimizers
from longtake.train.dmd_config import DMDConfig, score_history
from longtake.train.fit import check_fits, check_multiple, this_machine
from longtake.train.loop import STOPPED_EARLY, autocast_dtype, run
from longtake.train.lora import add_lora, merge_lora
from longtake.train.networks import TextToLatents
from longtake.train.plan import DeviceKind, Machine, StagePlan, plan_stage
from longtake.train.prompts import EmbeddedPrompts, embed_prompts, read_prompts
from longtake.train.stage_plans import Role, dmd_phases

DistillationStage = Literal["prompts", "dmd", "export"]

UNTRAINED = "untrained"
"""In the place of a path of weights: random ones, to try a setup out."""


class DistillationRecipe(Config):
    """A causal few-step model from a bidirectional many-step one.

    Args:
        stages: prompts (embed them once), dmd, export (write the generator's weights).
        dit_model: generator and critic. A memory that the generator's weights lack starts untrained.
        teacher_model: the real score, perhaps larger.
        stream: what the generator is trained to stream; its guidance and fps play no part.
        spatial_stride: pixels per latent cell of the autoencoder, which itself is not needed.
        prompts, held_out_prompts: text files, one prompt per line, for training and for evaluation.
        text_encoder: folder or hub name of the model in diffusers' layout whose text encoder is used.
        generator: weights that stream in few steps already: a file, or a folder of safetensors files, with
            official, diffusers' or own names; or "untrained".
        critic, teacher: the many-step model's weights, likewise.
        half_teacher: under bf16 arithmetic the frozen teacher is kept in bf16.
        device: where everything lives.
    """

    name: str = Field(min_length=1)
    seed: int = 0
    stages: tuple[DistillationStage, ...] = get_args(DistillationStage)
    dit_model: DiTConfig
    teacher_model: DiTConfig
    stream: StreamConfig
    spatial_stride: int = Field(8, ge=1)
    prompts: str = "prompts.txt"
    held_out_prompts: str = "held-out-prompts.txt"
    text_encoder: str
    generator: str
    critic: str
    teacher: str
    half_teacher: bool = True
    device: DeviceKind = "cuda"
    dmd: DMDConfig

    @property
    def critic_model(self) -> DiTConfig:
        """The generator's; without its memory where the critic sees whole clips, of which none leaves."""
        return self.dit_model.replace(memory=None) if self.dmd.scores == "clips" else self.dit_model

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        height, width = self.stream.height // self.spatial_stride, self.stream.width // self.spatial_stride
        return self.dit_model.in_channels, height, width

    def plan(self, stage: str, machine: Machine) -> StagePlan | None:
        """What a stage will take on a machine; None where it trains nothing."""
        if stage != "dmd":
            return None
        config, history = self.dmd, self.stream.history
        arithmetic = machine.arithmetic(config.loop.precision)
        with torch.device("meta"):
            generator, critic, teacher = (
                TextToLatents(EmbeddedPrompts({}, model.text_width), DiT(model))
                for model in (self.dit_model, self.critic_model, self.teacher_model)
            )
        teacher.requires_grad_(False)
        if config.lora is not None:
            add_lora(generator, config.lora)
            add_lora(critic, config.lora)
        if arithmetic.half and self.half_teacher:
            teacher.to(torch.bfloat16)
        learning = DiTCosts(self.dit_model, history, *self.latent_shape[1:], arithmetic)
        scoring = replace(learning, config=self.critic_model, history=score_history(config, history))
        real = replace(scoring, config=self.teacher_model)
        phases = dmd_phases(
            config,
            self.stream.schedule,
            Role(learning, learning.text),
            Role(scoring, scoring.text),
            Role(real, real.text),
        )
        networks = {"generator": generator, "critic": critic, "teacher": teacher}
        optimizers = dmd_optimizers(config, generator, critic)
        learners = list(zip((generator, critic), optimizers, strict=True))
        return plan_stage(stage, config.loop, networks, learners, phases, arithmetic)

    def check(self, stages: Sequence[str], machine: Machine) -> None:
        """Refuse stages that cannot be trained on a machine, before they are.

        Raises:
            ConfigError: settings that do not fit each other.
            TrainingError: more memory is needed than there is, with settings that need less.
        """
        ours, theirs = self.dit_model, self.teacher_model
        for name in ("in_channels", "out_channels", "text_width", "text_length"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(
                    f"dit_model.{name}={getattr(ours, name)}, but teacher_model has {getattr(theirs, name)}",
                    "use a teacher of the same latents and prompts",
                )
        if ours.patch_size[0] != 1:
            raise ConfigError(f"dit_model.patch_size={ours.patch_size} joins frames", "use 1 frame a patch")
        for name, model in (("dit_model", ours), ("teacher_model", theirs)):
            unit = (self.spatial_stride * model.patch_size[1], self.spatial_stride * model.patch_size[2])
            check_multiple(
                "stream", self.stream.height, self.stream.width, unit, f"a token's place in {name}"
            )
        check_storage(ours.latent, self.stream.history.policy)
        plan = self.plan("dmd", machine)
        if "dmd" in stages and plan is not None:
            check_fits(self, "dmd", plan, machine)


def distil(
    recipe: DistillationRecipe,
    out: Path,
    stages: Sequence[str] | None = None,
    stop_after_seconds: float | None = None,
    memory_gb: float | None = None,
) -> dict[str, float]:
    """Run a recipe's stages, going on where `out` shows an earlier run stopped.

    Args:
        recipe: what to train.
        out: holds `prompts` (the cache), `dmd` (checkpoint, log, weights) and `NAME.safetensors` at the end.
        stages: a part of the recipe's stages.
        stop_after_seconds: of stage dmd, which is then resumed later.
        memory_gb: that training may count on; that of the device where None.

    Returns:
        the last stage's figures.

    Raises:
        ConfigError: settings that do not fit each other.
        TrainingError: files are missing, memory does not suffice, or the loss diverged.
    """
    wanted = stages or recipe.stages
    if "dmd" in wanted:
        recipe.check(wanted, this_machine(recipe.device, memory_gb))
    torch.manual_seed(recipe.seed)
    actions: dict[str, Callable[[], dict[str, float]]] = {
        "prompts": lambda: _embed(recipe, out),
        "dmd": lambda: _match(recipe, out, stop_after_seconds),
        "export": lambda: _export(recipe, out),
    }
    figures: dict[str, float] = {}
    for stage in wanted:
        figures = actions[stage]()
        if STOPPED_EARLY in figures:
            break
    return figures


def _prompts(recipe: DistillationRecipe) -> tuple[list[str], list[str]]:
    return read_prompts(Path(recipe.prompts)), read_prompts(Path(recipe.held_out_prompts))


def _embed(recipe: DistillationRecipe, out: Path) -> dict[str, float]:
    training, held_out = _prompts(recipe)
    every = list(dict.fromkeys([recipe.dmd.negative_prompt, *held_out, *training]))
    length = recipe.dit_model.text_length
    embed_prompts(every, recipe.text_encoder, out / "prompts", length, recipe.device)
    return {"prompts": float(len(every))}


def _match(recipe: DistillationRecipe, out: Path, seconds: float | None) -> dict[str, float]:
    training, held_out = _prompts(recipe)
    half = autocast_dtype(recipe.dmd.loop.precision, torch.device(recipe.device)) is torch.bfloat16
    frozen_dtype = torch.bfloat16 if half and recipe.half_teacher else torch.float32
    module, critic, teacher = (
        TextToLatents(
            EmbeddedPrompts.load(out / "prompts", model.text_width),
            _load_dit(name, model, weights, recipe.device, dtype),
        ).to(recipe.device)
        for name, model, weights, dtype in (
            ("generator", recipe.dit_model, recipe.generator, torch.float32),
            ("critic", recipe.critic_model, recipe.critic, torch.float32),
            ("teacher", recipe.teacher_model, recipe.teacher, frozen_dtype),
        )
    )
    task = DMDTask(
        module,
        teacher,
        recipe.stream.history,
        recipe.stream.schedule,
        recipe.dmd,
        training,
        held_out,
        recipe.latent_shape,
        critic,
        temperatures=recipe.stream.temperatures,
    )
    figures = run(task, recipe.dmd.loop, out / "dmd", seconds, recipe.dmd)
    merge_lora(module)
    if STOPPED_EARLY not in figures:
        write_safetensors(out / "dmd" / "weights.safetensors", module.dit.state_dict(), {})
    return figures


def _load_dit(name: str, model: DiTConfig, weights: str, device: str, dtype: torch.dtype) -> DiT:
    """A network with its weights, on the device; a large one's random start is never computed."""
    if weights == UNTRAINED:
        return DiT(model).to(device, dtype)
    if not Path(weights).exists():
        raise TrainingError(
            f"{name}={weights!r} is neither a file nor a folder",
            f"give the path of its weights with --set {name}=PATH",
        )
    state = read_weights(Path(weights))
    if model.memory is not None and not any(key.startswith("memory.") for key in state):
        memory = MemoryEncoder(model.memory)
        state |= {f"memory.{key}": tensor for key, tensor in memory.state_dict().items()}
    with torch.device("meta"):
        dit = DiT(model).to(dtype)
    dit.to_empty(device=device)
    load_into(dit, state, weights)
    return dit


def _export(recipe: DistillationRecipe, out: Path) -> dict[str, float]:
    """The generator's averaged weights, bf16, under Wan's names."""
    trained = out / "dmd" / "weights.safetensors"
    if not trained.exists():
        raise TrainingError(f"{trained} does not exist", "run stage dmd first")
    state, _ = read_safetensors(trained)
    path = out / f"{recipe.name}.safetensors"
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
    told = {NETWORK_KEY: recipe.dit_model.dumps(), STREAM_KEY: recipe.stream.dumps()}
    write_safetensors(path, halved, {"recipe": recipe.dumps(), **told})
    return {"bytes": float(path.stat().st_size)}

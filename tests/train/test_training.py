"""Stages end to end at toy size: exact resume, caches tied to their encoder, files that load."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.diffusion.flow import Schedule
from longtake.errors import CheckpointError, ConfigError, TrainingError
from longtake.io.checkpoints import read_safetensors
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextEncoder
from longtake.recipes import RECIPES, get_recipe
from longtake.stream.bundle import load_model, read_card, shipped_models
from longtake.stream.state import PromptSwitch
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.dmd import DMDTask
from longtake.train.dmd_config import DMDConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.latents import Clips, FreshClips
from longtake.train.loop import STOPPED_EARLY, run
from longtake.train.networks import TextToLatents
from longtake.train.optim import AdamWConfig
from longtake.train.recipe import Recipe
from longtake.train.run import train
from longtake.train.steps import Steps, StepSources
from longtake.train.trajectory import TrajectoryConfig, TrajectoryTask
from longtake.train.vae import VAETask
from longtake.train.walk import Noise
from toy_training import (
    CAPTIONS,
    DIT,
    HISTORY,
    TEXT,
    clip_encoder,
    loop,
    networks,
    recipe,
    renderer,
    vae_task,
)


def dit_task(seed: int = 0) -> DiTTask:
    torch.manual_seed(seed)
    module = TextToLatents(TinyTextEncoder(TEXT), DiT(DIT))
    latents = torch.randn(6, 6, 4, 4, 4).half()
    prompts = (((0, "a red circle"),),) * 3 + (((0, "a blue square"),),) * 3
    clips = Clips(latents, torch.rand(6, 6, 4, 4).half(), prompts, (True,) * 6, (1,) * 6)
    config = DiTTrainingConfig(loop=loop(4), num_clips=2, num_first_clips=2, num_chunks=3)
    return DiTTask(module, HISTORY, config, Steps(StepSources(config, clips, clips)), clips)


def guided_vae_task() -> VAETask:
    task = vae_task()
    return VAETask(task.vae, task.config.replace(guide_weight=1.0))


def dmd_task() -> DMDTask:
    student = networks()
    config = DMDConfig(loop=loop(4), num_clips=2, num_chunks=3, critic_updates=2)
    schedule = Schedule(steps=(1000, 500), shift=1.0)
    return DMDTask(student, copy.deepcopy(student), HISTORY, schedule, config, CAPTIONS, CAPTIONS, (4, 4, 4))


def guided_task() -> DiTTask:
    torch.manual_seed(0)
    module = TextToLatents(TinyTextEncoder(TEXT), DiT(DIT))
    cache = LatentCacheConfig(num_latent_frames=4, chunk_frames=2, levels=(2, 3), height=32, width=32)
    encoder = clip_encoder()
    clips = FreshClips(renderer(guided=True), cache)
    held_out = encoder.encode(clips.draw(np.random.default_rng(0), 2))
    config = DiTTrainingConfig(
        loop=loop(4),
        num_clips=2,
        num_chunks=2,
        num_copies=2,
        num_first_clips=2,
        num_first_copies=1,
        first_weight=3.0,
        fresh_clips=True,
        guide_weight=1.0,
        guide_layer=1,
        prompt_guide_weight=0.5,
        resampled_sigmas=(0.8, 0.5),
    )
    return DiTTask(module, HISTORY, config, Steps(StepSources(config, held_out, clips), encoder), held_out)


def trajectory_task() -> TrajectoryTask:
    student, clips = networks(), dit_task().held_out
    config = TrajectoryConfig(loop=loop(4), num_clips=2, num_first_clips=2, num_chunks=3, steps_per_level=2)
    teacher, schedule = copy.deepcopy(student), Schedule(steps=(1000, 500), shift=1.0)
    return TrajectoryTask(student, teacher, HISTORY, schedule, config, clips, clips, clips)


def distillation_task() -> DMDTask:
    """Distribution matching as the 1.3B recipe sets it up."""
    student = networks()
    config = DMDConfig(
        loop=loop(4).replace(accumulation_steps=2, recompute="blocks", ema_from_step=2),
        num_clips=1,
        num_chunks=3,
        critic_updates=2,
        num_critic_copies=1,
        scores="clips",
        critic_error="flow",
        generator_optimizer=AdamWConfig(learning_rate=1e-3, betas=(0.0, 0.999), weight_decay=0.01),
        critic_optimizer=AdamWConfig(learning_rate=1e-3, betas=(0.0, 0.999), weight_decay=0.01),
    )
    schedule = Schedule(steps=(1000, 500), shift=1.0)
    return DMDTask(student, copy.deepcopy(student), HISTORY, schedule, config, CAPTIONS, CAPTIONS, (4, 4, 4))


@pytest.mark.parametrize(
    "make", [dit_task, guided_task, vae_task, guided_vae_task, dmd_task, distillation_task, trajectory_task]
)
def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path: Path, make: type) -> None:
    whole = make()
    run(whole, whole.config.loop, tmp_path / "whole")
    first = make()
    stopped = run(first, first.config.loop, tmp_path / "parts", stop_after_seconds=0.0)
    assert stopped[STOPPED_EARLY] == 1
    second = make()
    assert STOPPED_EARLY not in run(second, second.config.loop, tmp_path / "parts")
    for name, tensor in whole.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name]), name


def test_a_sink_that_a_batch_cannot_drop_is_refused() -> None:
    with pytest.raises(ConfigError, match='switch.sink="drop"'):
        DiTTrainingConfig(switch=PromptSwitch(text="", sink="drop"))


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    task = vae_task()
    run(task, loop(1), tmp_path)
    with pytest.raises(TrainingError, match="remove it or train with that"):
        run(task, loop(2), tmp_path)


def test_every_parameter_of_the_dit_is_trained() -> None:
    task = dit_task()
    torch.nn.init.normal_(task.module.dit.head.head.weight, std=0.1)
    loss, parts = task.loss(0, 0.0)
    loss.backward()
    untouched = [
        name
        for name, parameter in task.module.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    assert untouched == []
    assert set(parts) == {"foreground", "foreground_first"}


def test_gradients_flow_through_the_committed_history() -> None:
    """The loss of the last chunk alone must move the weights that wrote the first chunk's entries."""
    task = dit_task()
    clips = task.held_out.select([0, 3])
    latents = clips.latents_bfchw.float().requires_grad_()
    torch.nn.init.normal_(task.module.dit.head.head.weight, std=0.1)
    clips = dataclasses.replace(clips, latents_bfchw=latents)
    parts = task._walk(clips, 3, 1.0, Noise(0, task.device))
    (gradient,) = torch.autograd.grad(parts[-1][0], latents)
    assert (gradient[:, 0].flatten(1).abs().sum(1) > 0).all()  # the sink frame, read three chunks later


def test_a_chunk_that_no_prompt_tells_is_not_trained() -> None:
    task = dit_task()
    torch.nn.init.normal_(task.module.dit.head.head.weight, std=0.1)
    for opens in (True, False):
        clips = dataclasses.replace(task.held_out.select([0, 3]), opens=(opens, opens))
        parts = task._walk(clips, 2, 1.0, Noise(0, task.device))
        assert (float(parts[0][0].detach()) > 0) == opens
        assert float(parts[1][0].detach()) > 0


def test_a_switched_prompt_changes_the_chunks_from_there_on() -> None:
    task = dit_task()
    torch.nn.init.normal_(task.module.dit.head.head.weight, std=0.1)
    clips = task.held_out.select([0, 1])
    switched = tuple((*prompts, (4, "a blue square")) for prompts in clips.prompts)
    losses = []
    for item in (clips, dataclasses.replace(clips, prompts=switched)):
        parts = task._walk(item, 3, 1.0, Noise(0, task.device))
        losses.append([float(part.detach()) for part, _, _ in parts])
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2] != losses[1][2]


def test_a_recipe_runs_from_nothing_to_a_model_that_streams(tmp_path: Path) -> None:
    toy = recipe()
    figures = train(toy, tmp_path)
    path = tmp_path / "toy.safetensors"
    assert figures["bytes"] == path.stat().st_size
    assert read_card(path) == toy.card
    model = load_model(str(path))
    assert Recipe.loads(model.card.recipe) == toy
    teacher = load_model(str(tmp_path / "toy-teacher.safetensors"))
    assert (teacher.card.name, len(teacher.card.stream.schedule.steps)) == ("toy-teacher", 32)
    assert teacher.card.stream.guidance == toy.dmd.guidance
    taught, _ = read_safetensors(tmp_path / "windows" / "weights.safetensors")
    learned = model.pipeline.dit.state_dict()
    for name, tensor in teacher.pipeline.dit.state_dict().items():
        torch.testing.assert_close(tensor, taught[f"dit.{name}"], atol=0.02, rtol=0.02)  # stored as bf16
    assert any(
        not torch.equal(tensor, learned[name]) for name, tensor in teacher.pipeline.dit.state_dict().items()
    )
    for stage in ("vae", "first", "windows", "trajectory", "dmd", "decoder"):
        assert list((tmp_path / stage / "samples").glob("step-*.png")), stage
    warm = train(toy.replace(warm_start=str(path)), tmp_path / "warm", stages=("latents", "first"))
    assert warm["foreground_first_0.5"] > 0
    with pytest.raises(TrainingError, match="no trained VAE"):
        train(toy, tmp_path / "empty", stages=("latents",))


def test_a_recipe_that_is_stopped_again_and_again_ends_as_one_that_is_not(tmp_path: Path) -> None:
    toy = recipe()
    train(toy, tmp_path / "whole")
    stopped, figures = 0, {STOPPED_EARLY: 1.0}
    while STOPPED_EARLY in figures:  # the stages before the one that was stopped run once more and do nothing
        figures = train(toy, tmp_path / "stopped", stop_after_seconds=0.0)
        stopped += STOPPED_EARLY in figures
        assert stopped < 50
    assert stopped >= 6  # every stage at least once
    for name in ("toy.safetensors", "toy-teacher.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_distillation_is_taught_by_what_the_stages_before_it_left(tmp_path: Path) -> None:
    toy = recipe()
    fast = toy.windows.loop.replace(num_warmup_steps=0)
    toy = toy.replace(windows=toy.windows.replace(loop=fast, muon_learning_rate=0.5, adamw_learning_rate=0.5))
    train(toy, tmp_path, ["vae", "latents", "first", "windows", "trajectory", "export"])
    teacher = load_model(str(tmp_path / "toy-teacher.safetensors"))
    assert (teacher.card.stream.guidance, teacher.card.stream.opening_guidance) == (
        toy.trajectory.guidance,
        None,
    )
    before, _ = read_safetensors(tmp_path / "first" / "weights.safetensors")
    taught, _ = read_safetensors(tmp_path / "windows" / "weights.safetensors")
    name = "blocks.0.ffn.0.weight"
    assert (before[f"dit.{name}"] - taught[f"dit.{name}"]).abs().max() > 0.1
    torch.testing.assert_close(
        teacher.pipeline.dit.get_parameter(name), taught[f"dit.{name}"], atol=0.02, rtol=0.02
    )


def test_damaged_and_foreign_model_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    train(recipe(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot read"):
        load_model(str(path))
    path.write_bytes(whole.replace(b"dit.head.head.weight", b"dit.head.head.wrong_"))
    with pytest.raises(CheckpointError, match=r"missing: dit\.head\.head\.weight"):
        load_model(str(path))
    with pytest.raises(CheckpointError, match="no streamable model"):
        read_card(tmp_path / "latents" / "clips-0000.safetensors")
    with pytest.raises(CheckpointError, match="no model file"):
        load_model(str(tmp_path / "missing.safetensors"))
    with pytest.raises(CheckpointError, match="unknown model 'tinny'"):
        load_model("tinny")


def test_shipped_models_load_by_name() -> None:
    shipped = shipped_models()
    for name, path in shipped.items():
        card = read_card(path)
        assert card.name == name
        if card.base is not None:  # whose version is checked on loading
            assert load_model(name).pipeline.config == card.stream
    assert sum(path.stat().st_size for path in shipped.values()) <= 20_000_000


def test_recipes_are_valid_and_found_by_name() -> None:
    for name in RECIPES:
        made = get_recipe(name)
        assert type(made).loads(made.dumps()) == made
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        get_recipe("tinny")

"""Plans against what training really takes, and refusals that say what to change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from counting import measured, some_clips
from longtake.cli import main
from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError, TrainingError
from longtake.models.latent_config import LatentConfig
from longtake.models.tiny_vae import TinyVAE
from longtake.recipes import RECIPES, get_recipe
from longtake.train.dit import DiTTask
from longtake.train.dmd import DMDTask
from longtake.train.fit import this_machine
from longtake.train.layers import LayersTask
from longtake.train.loop import WeightAverage
from longtake.train.plan import Machine, StagePlan, plan_lines
from longtake.train.recipe import Recipe
from longtake.train.run import train
from longtake.train.steps import Steps, StepSources
from longtake.train.trajectory import TrajectoryTask
from longtake.train.vae import VAETask
from toy_training import CAPTIONS, networks, recipe

PLENTY = Machine("cpu", 10**15)


LATENT = LatentConfig(kv_rank=(6, 9), query_rank=10, nope_dim=6, rope_bands=(1, 1, 1))
MIXED = LATENT.replace(rope_bands=((0, 0), (0, 0), (0, 0)), heads_mix="keys")


def toy(precision: str = "fp32", latent: LatentConfig | None = None, **changes: dict[str, object]) -> Recipe:
    """The toy recipe at 32x32, so that a frame has four tokens."""
    made = recipe()
    made = made.replace(dit_model=made.dit_model.replace(latent=latent))
    size = {"height": 32, "width": 32}
    caches = {name: getattr(made, name).replace(**size) for name in ("first_latents", "latents", "held_out")}
    made = made.replace(stream=made.stream.replace(**size), **caches)
    for stage in ("vae", "layers", "first", "windows", "trajectory", "dmd", "decoder"):
        config = getattr(made, stage)
        settings = {"loop": config.loop.replace(precision=precision), **changes.get(stage, {})}
        made = made.replace(**{stage: config.replace(**settings)})
    return made


def task_of(made: Recipe, stage: str) -> DiTTask | TrajectoryTask | DMDTask | VAETask | LayersTask:
    history, schedule, some = made.stream.history, made.stream.schedule, some_clips()
    dit = made.dit_model
    if stage in ("vae", "decoder"):
        return VAETask(TinyVAE(made.vae_model), getattr(made, stage))
    if stage == "trajectory":
        return TrajectoryTask(
            networks(dit), networks(dit), history, schedule, made.trajectory, some, some, some
        )
    if stage == "layers":
        parent = networks(dit.replace(latent=None)).requires_grad_(False)
        return LayersTask(networks(dit), parent, history, made.layers, some, some, some)
    if stage == "dmd":
        return DMDTask(
            networks(dit), networks(dit), history, schedule, made.dmd, CAPTIONS, CAPTIONS, (4, 4, 4)
        )
    config = getattr(made, stage)
    return DiTTask(networks(dit), history, config, Steps(StepSources(config, some, some)), some)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "latent"),
    [(stage, None) for stage in ("vae", "decoder", "first", "windows", "trajectory")]
    + [(stage, LATENT) for stage in ("first", "windows", "trajectory", "layers")]
    + [("windows", MIXED)],
)
def test_a_plan_foretells_what_a_step_takes(stage: str, latent: LatentConfig | None, precision: str) -> None:
    made = toy(precision, latent)
    plan, task = made.plan(stage, PLENTY), task_of(made, stage)
    assert plan is not None
    flops, kept = measured(task.learners[""], [task.module], 0, precision == "bf16")
    assert plan.flops_per_step == pytest.approx(flops, rel=0.05)
    expected = plan.activations[0] + plan.fixed.get("bf16 copies of weights", 0)
    assert expected == pytest.approx(kept, rel=0.25)


@pytest.mark.parametrize("scores", ["chunks", "clips"])
@pytest.mark.parametrize("learner", ["generator", "critic"])
def test_a_plan_expects_the_mean_exit_of_rollouts(learner: str, scores: str) -> None:
    made = toy(dmd={"critic_updates": 1, "scores": scores})
    plan, task = made.plan("dmd", PLENTY), task_of(made, "dmd")
    assert plan is not None
    modules = [task.module, task.critic]  # type: ignore[union-attr]
    by_exit = {measured(task.learners[learner], modules, draw, False) for draw in range(5)}
    flops, kept = ({pair[i] for pair in by_exit} for i in (0, 1))
    assert len(flops) == 2, "five draws of two exits hold both"
    expected = sum(amount for name, amount in plan.flops.items() if name.startswith(learner))
    assert expected == pytest.approx(sum(flops) / 2, rel=0.05)
    assert plan.activations[0] > 0.9 * max(kept)


def test_a_plan_expects_half_of_the_levels_that_context_may_be_made_again_from() -> None:
    made = toy(windows={"resampled_sigmas": (0.8, 0.5), "num_first_clips": 0})
    plan, task = made.plan("windows", PLENTY), task_of(made, "windows")
    assert plan is not None
    learner = task.learners[""]
    flops = [measured(learner, [task.module], draw, False)[0] for draw in range(24)]
    assert len(set(flops)) > 2
    assert plan.flops_per_step == pytest.approx(sum(flops) / len(flops), rel=0.05)


def test_weights_state_and_averages_are_counted_to_the_byte() -> None:
    made = toy()
    plan, task = made.plan("dmd", PLENTY), task_of(made, "dmd")
    assert plan is not None
    assert isinstance(task, DMDTask)
    vae = TinyVAE(made.vae_model)
    held = [task.module, task.critic, task._teacher, vae]
    assert plan.fixed["weights"] == sum(t.nbytes for m in held for t in m.state_dict().values())
    gradients = 0
    for learner in task.learners.values():
        learner.loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
        gradients = max(
            gradients, sum(p.grad.nbytes for p in learner.module.parameters() if p.grad is not None)
        )
        learner.optimizer.step()
        learner.optimizer.zero_grad()
    assert plan.fixed["gradients"] == gradients
    states = [s for each in task.learners.values() for s in each.optimizer.state.values()]
    tensors = [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
    assert plan.fixed["optimizer state"] == sum(tensor.nbytes for tensor in tensors)
    shadow = WeightAverage(task.module, 0.9).shadow
    assert plan.fixed["averaged weights"] == sum(tensor.nbytes for tensor in shadow.values())
    text = {network.name: (network.num_parameters, network.num_trained) for network in plan.networks}
    size = sum(p.numel() for p in task.module.dit.parameters())
    assert text["generator dit"] == text["critic dit"] == (size, size)
    assert text["teacher dit"] == (size, 0)


def test_a_probe_is_counted_with_what_it_reads() -> None:
    guided = {"guide_weight": 1.0, "guide_layer": 1, "guide_ahead": (4, 8), "prompt_guide_weight": 1.0}
    made = toy(windows={**guided, "fresh_clips": True})
    plan, task = made.plan("windows", PLENTY), task_of(made, "windows")
    assert plan is not None
    assert plan.fixed["gradients"] == sum(p.nbytes for p in task.module.parameters())
    made = toy(vae={"guide_weight": 1.0})
    plan, task = made.plan("vae", PLENTY), task_of(made, "vae")
    assert plan is not None
    assert plan.fixed["gradients"] == sum(p.nbytes for p in task.module.parameters())


def windows(**changes: object) -> StagePlan:
    plan = toy(windows=changes).plan("windows", PLENTY)
    assert plan is not None
    return plan


def test_consistency_is_planned_as_it_is_done() -> None:
    # Of a single clip torch's counter refuses the view that its text is made of.
    made = toy(trajectory={"target": "consistency", "num_copies": 3, "num_clips": 2})
    plan, task = made.plan("trajectory", PLENTY), task_of(made, "trajectory")
    assert plan is not None
    flops, _ = measured(task.learners[""], [task.module], 0, False)
    assert plan.flops_per_step == pytest.approx(flops, rel=0.05)


def test_settings_do_to_a_plan_what_they_do_to_training() -> None:
    base, loop = windows(), toy().windows.loop
    twice = windows(loop=loop.replace(accumulation_steps=2))
    assert twice.flops_per_step == 2 * base.flops_per_step
    assert twice.num_bytes == base.num_bytes
    again = windows(loop=loop.replace(recompute="blocks"))
    assert 1.1 < again.flops_per_step / base.flops_per_step < 1.4  # one more forward pass of the blocks
    assert again.by_batch["activations"] == base.activations[1] < base.activations[0]
    assert base.fixed == again.fixed


def test_lines_tell_the_plan() -> None:
    plan = toy().plan("dmd", PLENTY)
    assert plan is not None
    lines = "\n".join(plan_lines(plan))
    for words in (
        "stage dmd, 3 steps",
        "teacher dit",
        "frozen",
        "optimizer state",
        "recompute none",
        "in all steps",
    ):
        assert words in lines


TRAINING_STAGES = {"vae", "layers", "first", "windows", "trajectory", "dmd", "decoder", "evictions", "memory"}
TRAINING_STAGES |= {"teacher_forcing", "consistency"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_plan_every_stage_that_trains(name: str) -> None:
    made = get_recipe(name)
    plans = {stage: made.plan(stage, PLENTY) for stage in made.stages}
    assert {stage for stage, plan in plans.items() if plan is None} == set(made.stages) - TRAINING_STAGES


def test_what_does_not_fit_is_refused_with_what_would(tmp_path: Path) -> None:
    made = toy(windows={"num_clips": 4, "num_first_clips": 4})
    total = made.plan("windows", PLENTY)
    assert total is not None
    roomy = Machine("cpu", round(total.num_bytes / 0.9) + 1)
    made.check(["windows"], roomy)
    with pytest.raises(TrainingError) as refused:
        made.check(["windows"], Machine("cpu", round(total.num_bytes / 0.9) - 10))
    text = str(refused.value)
    assert f"stage windows takes {total.num_bytes / 1e6:.1f} MB (weights" in text
    assert "--set windows.loop.recompute=blocks takes" in text
    assert "--set windows.num_clips=2 --set windows.num_first_clips=2 --set windows.loop.accumul" in text
    with pytest.raises(TrainingError, match=r"no setting makes it fit: .*shard over \d+ such devices"):
        made.check(["windows"], Machine("cpu", total.num_bytes // 100))
    with pytest.raises(TrainingError, match="stage vae takes"):
        train(made, tmp_path, memory_gb=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_this_machine_has_memory() -> None:
    assert this_machine().num_bytes > 1e8
    assert this_machine("cuda", memory_gb=80) == Machine("cuda", 80_000_000_000)
    if not torch.cuda.is_available():
        with pytest.raises(TrainingError, match="--memory-gb"):
            this_machine("cuda")


@pytest.mark.parametrize(
    ("stage", "changes", "words"),
    [
        (
            "windows",
            {"num_chunks": 9},
            r"latents.num_latent_frames=4, .*walks 18 .*set .*=18 or windows.num_chunks=2",
        ),
        ("windows", {"num_clips": 0, "num_first_clips": 0}, "leave nothing to learn from"),
        ("dmd", {"critic_updates": 7}, r"dmd.critic_updates=7 exceeds dmd.loop.num_steps=3"),
        (
            "stream",
            {"schedule": Schedule(path=(0.9, 0.4))},
            r"stream.schedule.path=\(0.9, 0.4\).*set it to null",
        ),
        ("vae", {"height": 20}, r"vae is 20x16, no multiple of 8x8.*use for instance 16x16"),
        ("latents", {"width": 40}, r"latents is 32x40, no multiple of 16x16.*32x32"),
        ("stream", {"height": 24}, r"stream is 24x32, no multiple of 16x16"),
        (
            "held_out",
            {"first_seed": 2},
            r"latents and held_out share scenes: both hold seed 2; set .*=5 or more",
        ),
        ("text_model", {"width": 8}, r"dit_model.text_width=16 does not fit text_model.width=8"),
        (
            "vae_model",
            {"latent_channels": 3},
            r"dit_model.in_channels=4 does not fit vae_model.latent_channels=3",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(stage: str, changes: dict[str, object], words: str) -> None:
    made = toy()
    made = made.replace(**{stage: getattr(made, stage).replace(**changes)})
    with pytest.raises(ConfigError, match=words):
        made.check(made.stages, PLENTY)


def test_the_command_prints_plans_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny", "--dry-run", "--stage", "windows", "--memory-gb", "64"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("stage windows, ")
    assert "walks" in out
    assert main(["train", "tiny", "--dry-run", "--stage", "windows", "--memory-gb", "0.9"]) == 2
    out, err = capsys.readouterr()
    assert "stage windows" in out
    assert "--set windows.loop.recompute=blocks takes" in err
    assert err.count("\n") == 1


def test_the_documented_dry_run_is_todays(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    commands = re.findall(r"^`longtake (train .*--dry-run.*)`(?: prints|:)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        main(command.split())
        out, err = capsys.readouterr()
        assert f"```\n{out}```" in page
        assert err.partition("--set ")[2] in page


def test_encoding_of_fresh_clips_is_counted_for_every_walk() -> None:
    name = "encoding of fresh clips"
    whole = windows(fresh_clips=True, num_clips=2, num_first_clips=0).flops[name]
    first = windows(fresh_clips=True, num_clips=0, num_first_clips=2).flops[name]
    assert 0 < first < whole
    assert windows(fresh_clips=True, num_clips=2, num_first_clips=2).flops[name] == first + whole
    assert name not in windows(fresh_clips=False).flops

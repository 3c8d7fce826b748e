"""Learning what a parent predicts: over its own past, of the same noise, prompts and context."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from counting import measured, some_clips
from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit import DiT
from longtake.models.latent_config import LatentConfig
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import save_model
from longtake.stream.state import PromptSwitch
from longtake.train.dit import DiTTask
from longtake.train.dit_config import ClipKind, DiTTrainingConfig
from longtake.train.latents import Clips
from longtake.train.networks import TextToLatents
from longtake.train.parents import Parent, load_parent
from longtake.train.plan import Machine
from longtake.train.steps import Steps, StepSources
from longtake.train.walk import Noise
from toy_training import DIT, HISTORY, MEMORY, REMEMBERING, loop, networks, recipe

LATENT = LatentConfig(kv_rank=12, query_rank=None, nope_dim=6, rope_bands=(1, 1, 1))
CONFIG = DiTTrainingConfig(
    loop=loop(4),
    learns_from="parent",
    num_clips=2,
    num_first_clips=2,
    num_chunks=3,
    switch=PromptSwitch(text="", window="reencode"),
)


def task(module: TextToLatents, parent: TextToLatents | None, config: DiTTrainingConfig = CONFIG) -> DiTTask:
    clips = some_clips()
    prompts = tuple((*of_clip, (2, "a green star")) for of_clip in clips.prompts)
    clips = dataclasses.replace(clips, prompts=prompts)
    steps = Steps(StepSources(config, clips, clips))
    teaching = None if parent is None else Parent(parent, HISTORY)
    return DiTTask(module, HISTORY, config, steps, clips, parent=teaching)


def test_a_copy_of_the_parent_has_nothing_to_learn() -> None:
    """Prompts that are left out or switch, and noise on the context, are the same for both."""
    module = networks()
    made = task(module, copy.deepcopy(module))
    for step in range(3):
        loss, figures = made.loss(step, 0.0)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-9)
        assert figures["foreground"] == pytest.approx(0, abs=1e-9)
    against_clips = task(module, None, CONFIG.replace(learns_from="clips")).loss(0, 0.0)[0]
    assert float(against_clips.detach()) > 0.1


def test_another_parent_teaches_and_stays_as_it_is() -> None:
    module, parent = networks(DIT.replace(latent=LATENT)), networks()
    before = copy.deepcopy(parent.state_dict())
    made = task(module, parent)
    first = float(made.loss(0, 0.0)[0].detach())
    for _ in range(30):
        made.learners[""].loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
        made.optimizer.step()
        made.optimizer.zero_grad()
    assert float(made.loss(0, 0.0)[0].detach()) < 0.7 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())
    assert all(parameter.grad is None for parameter in parent.parameters())


def test_chunks_that_are_only_committed_are_in_the_parents_past_too() -> None:
    """A batch of which only the last chunk is learned from; both have seen the others."""
    module = networks()
    made = task(module, copy.deepcopy(module))
    clips: Clips = made.held_out
    results = made._walk(clips, 3, 1.0, Noise(0, torch.device("cpu")), learned=(False, False, True))
    assert len(results) == 1
    assert float(results[0][0].detach()) == pytest.approx(0, abs=1e-9)


def test_a_parent_without_a_memory_teaches_all_but_recall() -> None:
    """It walks over its own window, beside a learner that has a memory (here one that is not read)."""
    torch.manual_seed(0)
    memory = networks(DIT.replace(memory=MEMORY))
    parent = networks()
    memory.load_state_dict(parent.state_dict(), strict=False)
    clips: Clips = some_clips()
    whole = task(memory, parent)
    whole.history = HISTORY.replace(policy=EvolvingConfig(mode="off"))
    noise = torch.device("cpu")

    def error(kind: ClipKind, made: DiTTask) -> float:
        with torch.no_grad():
            return float(made._walk(clips, 2, 1.0, Noise(0, noise), kind=kind)[-1][0])

    assert error("whole", whole) == pytest.approx(0, abs=1e-9)
    taught = task(memory, parent, CONFIG.replace(clips_teach=("recall",)))
    taught.history = whole.history
    assert error("long", taught) == pytest.approx(0, abs=1e-9)
    assert error("recall", taught) > 0.1


def test_of_long_clips_the_chunks_that_bring_something_back_may_teach_alone() -> None:
    """A learner that is its own parent has something to learn there and nowhere else."""
    module = networks()
    made = task(module, copy.deepcopy(module))
    clips: Clips = some_clips()
    told = [[False, True, False] for _ in range(len(clips))]
    with torch.no_grad():
        walked = made._walk(clips, 3, 1.0, Noise(0, torch.device("cpu")), kind="long", told=told)
        told[1:] = [[False] * 3] * (len(clips) - 1)
        first = made._walk(clips, 3, 1.0, Noise(0, torch.device("cpu")), kind="long", told=told)
    errors = [float(error) for error, _, _ in walked]
    assert errors[0] == pytest.approx(0, abs=1e-9)
    assert errors[1] > 0.1
    assert errors[2] == pytest.approx(0, abs=1e-9)
    assert 0 < float(first[1][0]) < errors[1]


def test_clips_that_teach_anyway_are_refused() -> None:
    with pytest.raises(ConfigError, match="set learns_from=parent or start"):
        DiTTrainingConfig(clips_teach=("recall",))


def test_a_parent_is_of_the_same_sizes_and_chunks(tmp_path: Path) -> None:
    """With a memory or without; what history it walks is its own."""
    made = recipe()
    made = made.replace(windows=made.windows.replace(learns_from="parent"))
    remembering = made.replace(
        dit_model=DIT.replace(memory=MEMORY), stream=made.stream.replace(history=REMEMBERING)
    )
    for name, given in (("plain", made), ("remembering", remembering)):
        parts = {"vae": TinyVAE(given.vae_model), "text": networks().text, "dit": DiT(given.dit_model)}
        path = tmp_path / f"{name}.safetensors"
        save_model(path, given.card, parts)
        for learner in (made, remembering):
            assert load_parent(learner.replace(parent=str(path))).history == given.stream.history
    with pytest.raises(ConfigError, match="is of other sizes"):
        load_parent(made.replace(parent=str(tmp_path / "remembering.safetensors")), same_memory=True)
    history = HISTORY.replace(window_frames=4, chunk_frames=1)
    other = made.replace(
        parent=str(tmp_path / "plain.safetensors"),
        stream=made.stream.replace(history=history),
        **{
            name: getattr(made, name).replace(chunk_frames=1)
            for name in ("first_latents", "latents", "held_out")
        },
    )
    with pytest.raises(ConfigError, match="has chunks of 2 frames, the recipe of 1"):
        load_parent(other)


def test_the_parent_is_planned() -> None:
    made = recipe()
    size = {"height": 32, "width": 32}
    caches = {name: getattr(made, name).replace(**size) for name in ("first_latents", "latents", "held_out")}
    windows = made.windows.replace(learns_from="parent")
    made = made.replace(
        dit_model=DIT.replace(latent=LATENT),
        stream=made.stream.replace(**size),
        windows=windows,
        parent="tiny",
        **caches,
    )
    some = some_clips()
    module, parent = networks(made.dit_model), networks()
    walked = DiTTask(
        module,
        HISTORY,
        windows,
        Steps(StepSources(windows, some, some)),
        some,
        parent=Parent(parent, HISTORY),
    )
    plan = made.plan("windows", Machine("cpu", 10**15))
    assert plan is not None
    flops, _ = measured(walked.learners[""], [walked.module], 0, False)
    assert plan.flops_per_step == pytest.approx(flops, rel=0.05)
    assert plan.flops["parent"] > 0
    spared = made.replace(windows=windows.replace(clips_teach=("first", "whole")))
    spared_plan = spared.plan("windows", Machine("cpu", 10**15))
    assert spared_plan is not None
    assert spared_plan.flops["parent"] == 0
    counted = {network.name: network.num_trained for network in plan.networks}
    assert counted["parent"] == 0


def test_a_recipe_without_a_parent_is_refused() -> None:
    made = recipe()
    made = made.replace(windows=made.windows.replace(learns_from="parent"))
    with pytest.raises(ConfigError, match='learns_from="parent" names no model'):
        made.check(["windows"], Machine("cpu", 10**15))
    made.check(["first"], Machine("cpu", 10**15))

"""Long clips that the network makes itself: those that serving would make, and who teaches what of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from counting import counter, some_clips
from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.models.tiny_vae import TinyVAE
from longtake.stream import Pipeline, Stream
from longtake.stream.state import PromptSwitch
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.long_clips import LongSource
from longtake.train.own_rollouts import OwnRollouts
from longtake.train.parents import Parent
from longtake.train.plan import Machine
from longtake.train.recipe import Recipe
from longtake.train.run import train
from longtake.train.steps import Steps, StepSources
from toy_training import (
    CAPTIONS,
    DIT,
    HISTORY,
    MEMORY,
    REMEMBERING,
    VAE,
    clip_encoder,
    loop,
    networks,
    recipe,
    renderer,
)

SWITCH = PromptSwitch(text="", memory="keep")


def test_rollouts_are_what_is_served_where_prompts_switch_too() -> None:
    clips, module = some_clips(), networks(DIT.replace(memory=MEMORY))
    clips = dataclasses.replace(clips, prompts=(*clips.prompts[:2], (*clips.prompts[2], (4, "a cyan star"))))
    torch.manual_seed(0)
    vae = TinyVAE(VAE).eval()
    stream = recipe().stream.replace(height=32, width=32, history=REMEMBERING, guidance=1.5)
    made = OwnRollouts(vae, stream, SWITCH)(module, clips, 3, seed=7)
    assert made.prompts == clips.prompts
    assert made.latents_bfchw.shape == clips.latents_bfchw.shape
    assert not made.latents_bfchw.requires_grad
    for row in range(3):
        served = Stream(
            Pipeline(module.dit, vae, module.text, stream), clips.prompts[row][0][1], seed=21 + row
        )
        chunks = []
        for chunk in range(3):
            if chunk == 2 and row == 2:
                served.set_prompt("a cyan star", memory="keep")
            chunks.append(next(served).latents)
        assert torch.allclose(torch.cat(chunks), made.latents_bfchw[row], atol=1e-4)


def remembering(**changes: object) -> Recipe:
    made = recipe()
    memory = DiTTrainingConfig(
        loop=loop(2),
        learns_from="start",
        long_rollouts=True,
        num_clips=0,
        num_first_clips=0,
        num_chunks=2,
        num_copies=1,
        num_long_clips=2,
        num_long_chunks=6,
        num_long_learned=2,
        fresh_clips=True,
    )
    return made.replace(
        stages=("vae", "latents", "windows", "memory", "export"),
        dit_model=DIT.replace(memory=MEMORY),
        stream=made.stream.replace(history=REMEMBERING),
        memory=memory.replace(**changes),
    )


def test_a_stage_learns_along_them_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    made = remembering()
    train(made, tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole/memory/log.jsonl").read_text().splitlines()]
    assert any(line.get("long", 0) > 0 for line in lines)
    train(made, tmp_path / "stopped", stages=("vae", "latents", "windows"))
    train(made, tmp_path / "stopped", stages=("memory",), stop_after_seconds=0)
    train(made, tmp_path / "stopped")
    for name in ("memory/weights.safetensors", "toy.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_the_teacher_sees_what_the_learner_made() -> None:
    """A learner whose memory is off makes, of the same seed, what it learns from: nothing is left to learn.
    With noise that another step draws it makes other clips.
    """
    config = remembering().memory
    module = networks(DIT.replace(memory=MEMORY))
    history = HISTORY.replace(policy=EvolvingConfig(mode="off"))
    cache = recipe().latents
    draws = LongSource(renderer(), cache, 6, 2, 2, whole=False)
    steps = Steps(StepSources(config, long_clips=draws), clip_encoder())
    rolled: list[torch.Tensor] = []

    class Kept(OwnRollouts):
        def __call__(self, *args: object) -> object:  # type: ignore[override]
            made = super().__call__(*args)  # type: ignore[arg-type]
            rolled.append(made.latents_bfchw)
            return made

    torch.manual_seed(0)
    own = Kept(TinyVAE(VAE).eval(), recipe().stream.replace(history=history), SWITCH)
    parent = Parent(networks(), HISTORY)
    parent.networks.load_state_dict(module.state_dict(), strict=False)
    task = DiTTask(module, history, config, steps, some_clips(), parent=parent, own_rollouts=own)
    loss, figures = task.loss(0, 0.0)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-8)
    assert figures["long"] == pytest.approx(0, abs=1e-8)
    task.loss(0, 0.0)
    task.loss(1, 0.0)
    assert torch.equal(rolled[0], rolled[1])
    assert rolled[0].shape[0] == 2
    assert not torch.equal(rolled[0][:, :2], rolled[2][:, :2])


@pytest.mark.parametrize(
    "changes",
    [{"learns_from": "clips"}, {"clips_teach": ("long",)}, {"clips_teach": ("recall", "returns")}],
)
def test_what_is_wrong_in_them_is_not_taught(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="do not say what is right"):
        remembering(**changes)
    with pytest.raises(ConfigError, match="rolls nothing out"):
        remembering(num_long_clips=0)


def test_they_are_planned() -> None:
    made = remembering()
    made = made.replace(stream=made.stream.replace(guidance=2.0))
    plan = made.plan("memory", Machine("cpu", 10**15))
    assert plan is not None
    module, vae = networks(made.dit_model), TinyVAE(VAE).eval()
    prompts = tuple(((0, text),) for text in CAPTIONS[:2])
    clips = dataclasses.replace(some_clips().select([0, 1]), prompts=prompts)
    with counter() as count:
        OwnRollouts(vae, made.stream, SWITCH)(module, clips, 6, 0)
    assert plan.flops["own rollouts"] == pytest.approx(count.get_total_flops(), rel=0.08)
    without = remembering(long_rollouts=False).plan("memory", Machine("cpu", 10**15))
    assert without is not None
    assert "own rollouts" not in without.flops
    name = "encoding of fresh clips"
    assert plan.flops[name] < without.flops[name]


def test_of_what_they_replace_the_first_chunk_alone_is_rendered() -> None:
    draws = LongSource(renderer(), recipe().latents, 6, 2, 2)
    for seed in range(3):
        whole = draws.draw(np.random.default_rng(seed), 2)
        first = dataclasses.replace(draws, whole=False).draw(np.random.default_rng(seed), 2)
        assert first.clips.prompts == whole.clips.prompts
        assert first.learned == whole.learned
        num_frames = 1 + (recipe().latents.chunk_frames - 1) * VAE.temporal_stride
        assert torch.equal(first.clips.frames_bthwc, whole.clips.frames_bthwc[:, :num_frames])

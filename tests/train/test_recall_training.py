"""Clips that ask for recall, walks that learn from the memory's chain alone, and the stage that uses both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from counting import measured, some_clips
from longtake.errors import ConfigError, TrainingError
from longtake.eval.script import Chunking
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.io.checkpoints import read_safetensors
from longtake.stream.bundle import load_model
from longtake.stream.session import Stream
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.plan import Machine
from longtake.train.probes import MemoryReading
from longtake.train.recall import RecallSource, longest_chunks
from longtake.train.recipe import Recipe
from longtake.train.run import _Networks, _parent, train
from longtake.train.steps import Steps, StepSources
from longtake.train.walk import Noise, Walk
from longtake.world import parse_caption
from longtake.world.vocabulary import OBJECT_RGB
from toy_training import (
    CAPTIONS,
    DIT,
    HISTORY,
    MEMORY,
    REMEMBERING,
    clip_encoder,
    loop,
    networks,
    recipe,
    renderer,
)

PLENTY = Machine("cpu", 10**15)


def source(
    chunk_frames: int = 3, size: int = 16, guided: bool = False, window_frames: int = 12, **changes: object
) -> RecallSource:
    config = LatentCacheConfig(chunk_frames=chunk_frames, height=size, width=size)
    history = HistoryConfig(window_frames=window_frames, sink_frames=3, chunk_frames=chunk_frames)
    settings = {"absence": (1.0, 2.0), **changes}
    return RecallSource(renderer(guided=guided), config, history, **settings)  # type: ignore[arg-type]


def test_clips_follow_the_generator_and_have_prompts_where_chunks_begin() -> None:
    made = source()
    batch = made.draw(np.random.default_rng(3), 3)
    again = made.draw(np.random.default_rng(3), 3)
    assert torch.equal(batch.clips.frames_bthwc, again.clips.frames_bthwc)
    encoded = batch.encoded(clip_encoder())
    assert encoded.clips.latents_bfchw.shape[1] == 3 * len(batch.learned)
    for name in ("learned", "shown_frame", "unseen"):
        assert getattr(encoded, name) == getattr(batch, name) == getattr(again, name)
    targets = set()
    for prompts in batch.clips.prompts:
        starts = [start for start, _ in prompts]
        assert len(starts) == 4
        assert all(start % 3 == 0 for start in starts)
        target = parse_caption(prompts[1][1]).objects[0]
        targets.add((target.colour, target.shape, target.size))
        shown, away, back = (start // 3 for start in starts[1:])
        assert all(batch.learned[shown : shown + 2])
        assert all(batch.learned[away : away + 4])
        assert all(batch.learned[back : back + 7])
        assert batch.back_chunk == back
        assert not any(batch.learned[:shown] + batch.learned[shown + 2 : away])
    assert len(targets) == 3
    assert sum(batch.learned) < len(batch.learned)


def test_what_is_to_come_back_is_seen_in_one_frame_and_in_no_unseen_chunk() -> None:
    for seed in range(4):
        batch = source(guided=True).draw(np.random.default_rng(seed), 2)
        for prompts, guide_fkhw in zip(batch.clips.prompts, batch.clips.guide_bfkhw, strict=True):
            target = parse_caption(prompts[1][1]).objects[0]
            assert batch.shown_frame == prompts[2][0] - 1
            assert batch.unseen.index(True) * 3 > prompts[2][0]
            assert (len(batch.unseen) - 1 - batch.unseen[::-1].index(True)) * 3 == prompts[3][0]
            colour = np.array(OBJECT_RGB[target.colour]) / 127.5 - 1
            channels = slice(-3, None)
            seen = guide_fkhw[batch.shown_frame, channels].sum((1, 2)).numpy()
            covered = float(guide_fkhw[batch.shown_frame, 1].sum())
            np.testing.assert_allclose(seen / covered, colour, atol=0.1)
            for chunk, unseen in enumerate(batch.unseen[:-1]):
                if unseen and chunk * 3 < prompts[3][0]:  # whatever is in view now has another colour
                    now = guide_fkhw[3 * chunk : 3 * chunk + 3, channels].sum((0, 2, 3)).numpy()
                    share = float(guide_fkhw[3 * chunk : 3 * chunk + 3, :2].mean(1).sum())
                    assert not np.allclose(now / max(share, 1e-6), colour, atol=0.1)


@pytest.mark.parametrize("window_frames", [12, 21, 33])
def test_unseen_is_what_the_window_has_lost_too(window_frames: int) -> None:
    made = source(window_frames=window_frames, absence=(1.0, 1.5))
    batch = made.draw(np.random.default_rng(0), 2)
    local = window_frames - 3 - 3
    assert any(batch.unseen)
    for chunk, unseen in enumerate(batch.unseen):
        oldest = chunk * 3 - local
        assert not unseen or oldest > batch.shown_frame
    first = batch.unseen.index(True)
    if window_frames > 12:  # the window lasts longer than the camera's way
        assert (first - 1) * 3 - local <= batch.shown_frame


def test_the_memory_is_read_while_what_is_to_come_back_is_away() -> None:
    made = remembering(memory_guide_weight=0.5, context_noise=0.0)
    memory = MEMORY.replace(rows=2, columns=2, num_frames=2)
    history = REMEMBERING.replace(positions=Relative(f_max=6))
    module = networks(DIT.replace(memory=memory))
    draws = source(chunk_frames=2, size=32, guided=True)
    steps = Steps(StepSources(made.memory, recall=draws), clip_encoder())
    task = DiTTask(module, history, made.memory, steps, some_clips())
    assert task._memory_probe is not None
    batch = draws.draw(np.random.default_rng(0), 2).encoded(steps.encoder)
    size = batch.clips.latents_bfchw.shape[-2:]
    assert module.dit.token_grid(*size) == (2, 2)
    reading = MemoryReading(batch, task._memory_probe, 2)
    task._walk(batch.clips, len(batch.learned), 1.0, Noise(0, task.device), batch.learned, reading)
    assert len(reading.errors) == sum(batch.unseen)
    torch.stack(reading.errors).mean().backward()
    network = module.dit.memory
    assert network is not None
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert task._memory_probe.weight.grad is not None
    whole, figures = task.loss(0, 0.0)
    assert "memory_guide" in figures
    task.config = task.config.replace(memory_guide_weight=0.0)
    without, _ = task.loss(0, 0.0)
    assert float(whole.detach() - without.detach()) == pytest.approx(0.5 * figures["memory_guide"], rel=1e-3)


def test_chunks_in_which_it_comes_back_count_for_more() -> None:
    made = remembering(memory_guide_weight=0.0, text_dropout=0.0).memory
    module = networks(DIT.replace(memory=MEMORY))
    draws = source(chunk_frames=2, size=32)
    losses = []
    for config in (made, made.replace(recall_back_weight=3.0)):
        steps = Steps(StepSources(config, recall=draws), clip_encoder())
        task = DiTTask(module, REMEMBERING, config, steps, some_clips())
        losses.append(float(task.loss(0, 0.0)[0].detach()))
    drawn = steps(0)
    batch = drawn.recall
    assert batch is not None
    noise = Noise(drawn.noise_seed, torch.device("cpu"))
    parts = task._walk(batch.clips, len(batch.learned), made.foreground_weight, noise, batch.learned)
    of_chunks = torch.stack([part for part, *_ in parts]).detach()
    learned = [chunk for chunk, learned in enumerate(batch.learned) if learned]
    back = torch.tensor([chunk >= batch.back_chunk for chunk in learned])
    assert 0 < int(back.sum()) < len(learned)
    assert losses[0] == pytest.approx(float(of_chunks.mean()), rel=1e-5)
    weights = 1.0 + 2.0 * back
    assert losses[1] == pytest.approx(float((of_chunks * weights).sum() / weights.sum()), rel=1e-5)


def test_chunks_begin_where_serving_has_them() -> None:
    made = source()
    for frame in range(200):
        assert made._boundary(frame) == Chunking().boundary(frame)


@pytest.mark.parametrize("absence", [0.1, 1.5, 3.0])
def test_some_chunks_are_learned_from_while_the_camera_rests_elsewhere(absence: float) -> None:
    drawn = [source(num_away=n, absence=(absence, absence)).draw(np.random.default_rng(3), 1) for n in (0, 2)]
    plain, made = (batch.learned for batch in drawn)
    away, back = (start // 3 for start, _ in drawn[1].clips.prompts[0][2:])
    added = [chunk for chunk, (before, now) in enumerate(zip(plain, made, strict=True)) if before != now]
    assert len(added) == min(2, max(0, back - away - 4))
    assert all(made[chunk] and away + 4 <= chunk < back for chunk in added)


def test_a_share_of_the_chunks_is_drawn_for_every_batch() -> None:
    whole, some, others = (
        source(learned_share=share).draw(np.random.default_rng(seed), 1).learned
        for share, seed in ((1.0, 3), (0.5, 3), (0.5, 4))
    )
    assert sum(some) == -(-sum(whole) // 2)
    assert all(all_of_them or not drawn for all_of_them, drawn in zip(whole, some, strict=True))
    assert some != others


@pytest.mark.parametrize(("num_away", "share"), [(0, 1.0), (2, 1.0), (2, 0.5)])
@pytest.mark.parametrize("absence", [(1.0, 1.0), (3.0, 3.0), (0.1, 0.1)])
def test_no_batch_is_longer_than_planned(absence: tuple[float, float], num_away: int, share: float) -> None:
    made = source(absence=absence, num_away=num_away, learned_share=share)
    most, most_learned = longest_chunks(round(absence[1] * 48), 12, 1.0, num_away, share)
    for seed in range(5):
        batch = made.draw(np.random.default_rng(seed), 2)
        assert most - 11 <= len(batch.learned) <= most
        assert sum(batch.learned) <= most_learned


def test_commits_that_learn_nothing_still_teach_the_memory() -> None:
    """What left long ago reaches the loss through the chain of updates alone."""
    module = networks(DIT.replace(memory=MEMORY))
    walk = Walk(module.dit, REMEMBERING, module.encode(CAPTIONS), 3, 4, 4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        walk.commit(torch.randn(3, 2, 4, 4, 4, generator=generator), learns=False)
    noisy = torch.randn(3, 2, 4, 4, 4, generator=generator)
    walk.predict(noisy, torch.full((3,), 0.7)).square().mean().backward()
    network = module.dit.memory
    assert network is not None
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    # Keys of the past were made without gradients, so only the last chunk's own pass reaches the DiT.
    history = [torch.randn(3, 2, 4, 4, 4, generator=generator) for _ in range(2)]
    grads = []
    for learns in (False, True):
        learned = Walk(module.dit, REMEMBERING, module.encode(CAPTIONS), 3, 4, 4)
        for chunk in history:
            learned.commit(chunk, learns=learns)
        module.zero_grad()
        learned.predict(noisy, torch.full((3,), 0.7)).square().mean().backward()
        weight = module.dit.patch_embedding.weight.grad
        assert weight is not None
        grads.append(weight.clone())
    assert not torch.allclose(*grads)


def remembering(**memory: object) -> Recipe:
    made = recipe()
    settings = {
        "loop": loop(2),
        "num_clips": 1,
        "num_chunks": 2,
        "num_recall_clips": 2,
        "num_copies": 1,
        "recall_absence": (2.5, 3.0),
        "fresh_clips": True,
        **memory,
    }
    return made.replace(
        stages=("vae", "latents", "memory", "export"),
        dit_model=DIT.replace(memory=MEMORY),
        stream=made.stream.replace(history=REMEMBERING),
        memory=DiTTrainingConfig(**settings),  # type: ignore[arg-type]
    )


def with_policy(policy: EvolvingConfig) -> Recipe:
    made = remembering()
    return made.replace(stream=made.stream.replace(history=REMEMBERING.replace(policy=policy)))


def test_the_stage_trains_the_memory_and_exports_a_model_that_streams_with_it(tmp_path: Path) -> None:
    made = remembering()
    train(made, tmp_path)
    model = load_model(str(tmp_path / "toy.safetensors"))
    assert model.pipeline.dit.memory is not None
    stream = Stream(model.pipeline, "a red circle bouncing on white")
    for _ in range(5):
        next(stream)
    assert stream.engine.history.record(0).num_absorbed > 0
    log = (tmp_path / "memory" / "log.jsonl").read_text()
    assert "foreground_recall" in log
    # A run that was stopped in between ends with the same weights.
    stopped = tmp_path / "stopped"
    train(made, stopped, stages=("vae", "latents"))
    train(made, stopped, stages=("memory",), stop_after_seconds=0)
    assert not (stopped / "memory" / "weights.safetensors").exists()
    train(made, stopped)
    for name in ("memory/weights.safetensors", "toy.safetensors"):
        assert (tmp_path / name).read_bytes() == (stopped / name).read_bytes()


def test_what_was_known_before_the_stage_teaches_also_when_it_is_run_again(tmp_path: Path) -> None:
    """Not what the stage itself has left since, and without a memory."""
    made = remembering(learns_from="start", clips_teach=("recall",))
    made = made.replace(stages=("vae", "latents", "windows", "memory", "export"))
    train(made, tmp_path)
    left = read_safetensors(tmp_path / "windows" / "weights.safetensors")[0]
    learned = _Networks(made, tmp_path)
    parent = _parent(made, learned, "memory", made.memory)
    assert parent is not None
    assert parent.history == REMEMBERING.replace(policy=EvolvingConfig(mode="off"))
    assert all(torch.equal(tensor, left[name]) for name, tensor in parent.networks.state_dict().items())
    newest = learned.text_to_latents.state_dict()
    assert any(not torch.equal(tensor, newest[name]) for name, tensor in left.items())
    assert all(not parameter.requires_grad for parameter in parent.networks.parameters())
    assert all(parameter.requires_grad for parameter in learned.text_to_latents.parameters())


def test_networks_that_know_nothing_yet_teach_nothing(tmp_path: Path) -> None:
    made = remembering(learns_from="start", clips_teach=("recall",))
    made = made.replace(stages=("vae", "latents", "memory", "export"))
    with pytest.raises(TrainingError, match='memory.learns_from="start", but nothing before stage memory'):
        train(made, tmp_path)


def test_flops_of_a_memory_are_counted() -> None:
    made = remembering(num_recall_clips=0, num_clips=2, num_first_clips=0, num_chunks=3)
    size = {"height": 32, "width": 32}
    caches = {name: getattr(made, name).replace(**size) for name in ("first_latents", "latents", "held_out")}
    made = made.replace(stream=made.stream.replace(**size), **caches)
    plan = made.plan("memory", PLENTY)
    assert plan is not None
    some = some_clips()
    steps = Steps(StepSources(made.memory, None, some))
    task = DiTTask(networks(made.dit_model), made.stream.history, made.memory, steps, some)
    flops, _ = measured(task.learners[""], [task.module], 0, False)
    assert plan.flops["walks"] == pytest.approx(flops, rel=0.05)
    without = made.replace(dit_model=DIT, stream=made.stream.replace(history=HISTORY)).plan("memory", PLENTY)
    assert without is not None
    assert plan.flops["walks"] > without.flops["walks"]


def test_recall_clips_are_planned_and_halved() -> None:
    made = remembering()
    plan = made.plan("memory", PLENTY)
    fewer = remembering(num_recall_clips=1).plan("memory", PLENTY)
    assert plan is not None
    assert fewer is not None
    for part in ("walks", "encoding of fresh clips"):
        assert plan.flops[part] > fewer.flops[part]
    assert plan.activations[0] > fewer.activations[0]
    with pytest.raises(TrainingError, match="memory.num_recall_clips=1"):
        remembering(num_clips=0).check(("memory",), Machine("cpu", round(0.9 * plan.num_bytes)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: remembering(recall_absence=(3.0, 1.0)), "no range of absences"),
        (lambda: remembering(recall_absence=(0.5, 1.0)), "no range of absences"),
        (lambda: remembering(fresh_clips=False), "rendered anew"),
        (lambda: remembering().replace(dit_model=DIT), "needs a learned memory"),
        (lambda: remembering(num_recall_clips=0, memory_guide_weight=1.0), "that nothing asks for"),
        (
            lambda: remembering(memory_guide_weight=1.0).replace(
                dit_model=DIT.replace(memory=MEMORY.replace(rows=3))
            ),
            "a memory of 3 x 1 tokens as a frame of",
        ),
        (lambda: remembering().replace(stream=recipe().stream), "teaches a policy that learns"),
        (lambda: with_policy(EvolvingConfig(mode="prior")), 'in mode "prior"'),
        (lambda: with_policy(EvolvingConfig(timing="second_pass")), "passes that follow each other"),
        (lambda: with_policy(EvolvingConfig(source_layer=9)), "source_layer=9"),
        (
            lambda: remembering().replace(
                stream=recipe().stream.replace(history=REMEMBERING.replace(positions=Relative(f_max=4)))
            ),
            "do not fit f_max=4",
        ),
        (lambda: DIT.replace(memory=MEMORY.replace(width=48)), "does not fit a DiT of width 24"),
    ],
)
def test_settings_that_cannot_remember_are_refused(change: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change().check(("memory",), PLENTY)  # type: ignore[operator]

"""Trajectory distillation: where paths lead, and what the student learns of them."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch

from longtake.diffusion.flow import Schedule
from longtake.train.latents import Clips
from longtake.train.trajectory import TrajectoryConfig, TrajectoryTask, _Pair
from longtake.train.walk import Noise, Walk
from toy_training import CAPTIONS, HISTORY, loop, networks

SCHEDULE = Schedule(steps=(1000, 500), shift=1.0)


def clips() -> Clips:
    torch.manual_seed(1)
    prompts = tuple(((0, caption),) for caption in CAPTIONS)
    return Clips(torch.randn(3, 6, 4, 4, 4), torch.rand(3, 6, 4, 4), prompts, (True,) * 3, (1,) * 3)


def task(**changes: object) -> TrajectoryTask:
    student = networks()
    config = TrajectoryConfig(loop=loop(4), num_clips=2, num_first_clips=2, num_chunks=3, steps_per_level=2)
    some = clips()
    return TrajectoryTask(
        student, copy.deepcopy(student), HISTORY, SCHEDULE, config.replace(**changes), some, some, some
    )


@torch.no_grad()
def test_a_path_is_guided_euler_steps_through_the_levels_of_the_schedule() -> None:
    made, some, guidance = task(guidance=2.5), clips(), 2.5
    noise = torch.randn(3, 2, 4, 4, 4)
    states, end = _Pair(made, some).path(noise)
    plain = [
        Walk(made._teacher.dit, HISTORY, made._teacher.encode(texts), 3, 4, 4)
        for texts in (CAPTIONS, [""] * 3)
    ]
    state, sigmas = noise, (1.0, 0.75, 0.5, 0.25, 0.0)
    for above, below in pairwise(sigmas):
        if above == 0.5:
            torch.testing.assert_close(states[3:], state, atol=1e-4, rtol=1e-4)
        with_text, without = (walk.predict(state, torch.full((3,), above)) for walk in plain)
        flow = (state - (without + guidance * (with_text - without))) / above
        state = state + (below - above) * flow
    assert torch.equal(states[:3], noise)
    torch.testing.assert_close(end, state, atol=1e-4, rtol=1e-4)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn() -> None:
    """One Euler step from the only level ends at the teacher's own prediction."""
    made = task(guidance=1.0, steps_per_level=1)
    single = TrajectoryTask(
        made.module, made._teacher, HISTORY, Schedule(steps=(1000,), shift=1.0), made.config, *[clips()] * 3
    )
    loss, _ = single.loss(0, 0.0)
    assert float(loss.detach()) < 1e-10
    figures = single.evaluate()
    assert set(figures) == {"path_first_1.00", "path_last_1.00"}
    assert max(figures.values()) < 1e-10
    assert made.evaluate()["path_first_1.00"] > 1e-4  # two steps a level: the path bends


def test_the_student_learns_the_path_and_the_teacher_stays() -> None:
    made = task(muon_learning_rate=5e-3, adamw_learning_rate=5e-3, num_clips=0, num_chunks=1)
    before = copy.deepcopy(made._teacher.state_dict())
    learner, some = made.learners[""], clips()
    losses = []
    for _ in range(12):
        loss = made._walk(some, 1, Noise(0, made.device))[0]
        learner.optimizer.zero_grad()
        loss.backward()
        learner.optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in made._teacher.state_dict().items())


@torch.no_grad()
def test_both_read_a_switched_prompt() -> None:
    made, some = task(), clips()
    switched = dataclasses.replace(some, prompts=tuple((*p, (2, "a green star")) for p in some.prompts))
    noise = torch.randn(3, 2, 4, 4, 4)
    ends = []
    for item in (some, switched):
        pair = _Pair(made, item)
        pair.student.commit(some.latents_bfchw[:, :2])
        pair.teacher.commit(some.latents_bfchw[:, :2])
        pair.prompt(2)
        ends.append((pair.path(noise)[1], pair.student.predict(noise, torch.ones(3))))
    for one, other in zip(*ends, strict=True):
        assert not torch.allclose(one[:2], other[:2], atol=1e-5)
        torch.testing.assert_close(one[2], other[2])  # it asked for a green star already


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_every_parameter_of_the_student_learns(guidance: float) -> None:
    made = task(guidance=guidance)
    loss, _ = made.loss(0, 0.0)
    loss.backward()
    idle = [
        name for name, p in made.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert idle == []


@torch.no_grad()
def test_a_consistency_target_is_one_guided_euler_step_and_the_students_prediction_there() -> None:
    made, some = task(guidance=2.5, target="consistency", num_intervals=8, num_copies=3), clips()
    made.module.load_state_dict(networks(seed=1).state_dict())  # a student unlike its teacher
    pair, clean = _Pair(made, some), some.latents_bfchw[:, :2]
    lesson = made._lesson(pair, clean, Noise(0, made.device))
    grid = torch.linspace(1, 0, 9)
    torch.testing.assert_close(made._grid, grid)
    assert len(lesson.sigma_r) == 9
    assert len(set(lesson.sigma_r.tolist())) >= 7  # one of every stratum
    plain = [
        Walk(made._teacher.dit, HISTORY, made._teacher.encode(texts), 3, 4, 4)
        for texts in (CAPTIONS, [""] * 3)
    ]
    for row in range(9):
        sigma = lesson.sigma_r[row]
        [index] = torch.nonzero(grid == sigma).flatten().tolist()
        copies = lesson.state_rfchw[row].expand(3, *lesson.state_rfchw.shape[1:])
        with_text, without = (walk.predict(copies, sigma.expand(3)) for walk in plain)
        flow = (copies - (without + 2.5 * (with_text - without))) / sigma
        expected = copies + (grid[index + 1] - sigma) * flow
        if index + 1 < 8:
            expected = pair.student.predict(expected, grid[index + 1].expand(3))
        torch.testing.assert_close(lesson.target_rfchw[row], expected[row % 3], atol=1e-4, rtol=1e-4)


def test_states_of_consistency_are_clips_with_noise() -> None:
    """As far from the clips as their noise levels say."""
    made, some = task(target="consistency", num_intervals=4, num_copies=40), clips()
    clean = some.latents_bfchw[:, :2]
    with torch.no_grad():
        lesson = made._lesson(_Pair(made, some), clean, Noise(0, made.device))
    sigma = lesson.sigma_r.view(-1, 1, 1, 1, 1)
    noise = (lesson.state_rfchw - (1 - sigma) * clean.repeat(40, 1, 1, 1, 1)) / sigma
    assert float(noise.mean()) == pytest.approx(0, abs=0.05)
    assert float(noise.std()) == pytest.approx(1, abs=0.05)
    counts = [int((lesson.sigma_r == level).sum()) for level in (1.0, 0.75, 0.5, 0.25)]
    assert counts == [30, 30, 30, 30]


def test_consistency_gives_targets_no_gradients_and_every_parameter_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, lessons = task(target="consistency", num_intervals=4), []
    give = made._lesson
    monkeypatch.setattr(made, "_lesson", lambda *given: lessons.append(give(*given)) or lessons[-1])
    loss, _ = made.loss(0, 0.0)
    assert lessons
    assert not any(lesson.target_rfchw.requires_grad for lesson in lessons)
    loss.backward()
    assert all(parameter.grad is None for parameter in made._teacher.parameters())
    idle = [
        name for name, p in made.module.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert idle == []


def test_the_student_becomes_consistent_with_its_teacher() -> None:
    """Its one step then ends nearer to where the teacher's path does."""
    made = task(
        target="consistency",
        num_intervals=4,
        guidance=1.0,
        muon_learning_rate=5e-3,
        adamw_learning_rate=5e-3,
        num_chunks=1,
    )
    before = made.evaluate()["path_first_1.00"]
    learner, some = made.learners[""], clips()
    for step in range(60):
        loss = made._walk(some, 1, Noise(step, made.device))[0]
        learner.optimizer.zero_grad()
        loss.backward()
        learner.optimizer.step()
    assert made.evaluate()["path_first_1.00"] < 0.8 * before

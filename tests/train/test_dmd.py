"""Distribution matching on self-rollouts: who learns from what, rollouts as served, and that it converges."""

import pytest
import torch

from longtake.diffusion.sampler import context_pass, sample_chunk
from longtake.errors import ConfigError
from longtake.history.base import HistoryView
from longtake.history.pure import PureHistory
from longtake.train.dmd import DMDTask, _Script
from longtake.train.dmd_config import DMDConfig
from toy_training import CAPTIONS, HISTORY, SCHEDULE, dmd_task, loop


def plain(captions: list[str]) -> _Script:
    return _Script(captions, captions, switch=99)


def touched(module: torch.nn.Module) -> dict[str, bool]:
    return {
        name: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in module.named_parameters()
    }


def test_each_learner_moves_itself_alone() -> None:
    matched = dmd_task()
    with torch.no_grad():  # a critic that disagrees with the teacher
        for parameter in matched.critic.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    matched.learners["generator"].loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
    assert all(touched(matched.module).values())
    assert not any(touched(matched.critic).values())
    matched.module.zero_grad()
    matched.learners["critic"].loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
    assert all(touched(matched.critic).values())
    assert not any(touched(matched.module).values())
    assert not any(touched(matched._teacher).values())


def test_nothing_pulls_where_critic_and_teacher_agree() -> None:
    matched = dmd_task(guidance=1.0)
    loss, figures = matched.generator_loss(0, 0.0)
    assert figures["move"] < 1e-4  # the critic starts as the teacher
    assert float(loss.detach()) < 1e-6


def test_scores_are_taken_at_shifted_levels_within_their_bounds() -> None:
    low, even, shifted = (
        dmd_task(min_score_sigma=0.2, max_score_sigma=0.9, score_shift=shift)._score_sigmas(
            400, torch.Generator().manual_seed(0)
        )
        for shift in (0.2, 1.0, 5.0)
    )
    for sigmas in (low, even, shifted):
        assert (float(sigmas.min()), float(sigmas.max())) == pytest.approx((0.2, 0.9))
    assert float(low.median()) < float(even.median()) < float(shifted.median())
    assert float(even.median()) == pytest.approx(0.5, abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("path", [None, (0.9, 0.5)])
def test_a_rollout_is_what_serving_would_make(path: tuple[float, float] | None) -> None:
    schedule = SCHEDULE.replace(path=path)
    matched = dmd_task(schedule=schedule)
    steps = schedule.resolve()
    kept = [steps.keeps_noise(step) for step in range(1, 3)]
    assert any(kept) == (path is not None)
    seed = next(  # one whose exit is the last step
        seed
        for seed in range(100)
        if int(torch.randint(3, (1,), generator=torch.Generator().manual_seed(seed))) == 2
    )
    _, chunks = matched._rollout(plain(CAPTIONS), torch.Generator().manual_seed(seed), learn=False)
    generator = torch.Generator().manual_seed(seed)
    torch.randint(3, (1,), generator=generator)
    text = matched.module.encode(CAPTIONS)
    history = PureHistory(HISTORY, matched.module.dit.cache_spec(), grid=matched.module.dit.token_grid(4, 4))
    for made in chunks:
        noise = [
            torch.randn(made.shape, generator=generator)
            if step == 0 or not kept[step - 1]
            else torch.empty(0)
            for step in range(3)
        ]
        view = history.view()
        expected = sample_chunk(matched.module.dit, text, view, noise, steps)
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
        history = history.commit(context_pass(matched.module.dit, text, view, expected))


@torch.no_grad()
def test_a_prompt_switch_reaches_all_three_networks() -> None:
    matched = dmd_task()
    other = ["a green star"] * 3
    made = [
        matched._rollout(script, torch.Generator().manual_seed(1), learn=False)[1]
        for script in (plain(CAPTIONS), _Script(CAPTIONS, other, 1))
    ]
    assert torch.equal(made[0][0], made[1][0])
    assert not torch.allclose(made[0][1][:2], made[1][1][:2], atol=1e-5)

    losses = []
    for after in (CAPTIONS, other):
        matched._draw = lambda step, who, after=after: (  # type: ignore[method-assign,misc]
            _Script(CAPTIONS, after, 2),
            torch.Generator().manual_seed(5),
        )
        matched._rollout = lambda script, generator, learn: (  # type: ignore[method-assign,misc]
            [],
            [torch.ones(3, 2, 4, 4, 4) for _ in range(3)],
        )
        losses.append([float(loss(0, 0.0)[0]) for loss in (matched.generator_loss, matched.critic_loss)])
    assert losses[0][1] != losses[1][1]  # the critic reads it
    assert losses[0][0] != losses[1][0]  # so does the guided teacher, or the critic in the generator's loss


@torch.no_grad()
def test_rollouts_are_as_cold_as_serving() -> None:
    """Without noise, chunks after the first and after a switch follow from the past alone."""
    matched = dmd_task()
    matched._temperatures = (0.0,) * len(matched._steps.sigmas)
    first, ends = torch.randn(3, 2, 4, 4, 4), []
    for _ in range(2):
        noises = iter([first, *(torch.randn(3, 2, 4, 4, 4) for _ in range(2))])
        matched._noise = lambda shape, generator, noises=noises: next(noises)  # type: ignore[method-assign,misc]
        exit_at_once = next(
            s for s in range(99) if not torch.randint(3, (1,), generator=torch.Generator().manual_seed(s))
        )
        generator = torch.Generator().manual_seed(exit_at_once)
        ends.append(matched._rollout(plain(CAPTIONS), generator, learn=False)[1])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


def test_the_share_of_rollouts_that_switch() -> None:
    matched = dmd_task(switch_share=0.5)
    switches = [matched._draw(step, 0)[0].switch for step in range(200)]
    assert set(switches) == {1, 2, 3}  # 3: no switch
    assert 70 < sum(at < 3 for at in switches) < 130
    never = dmd_task()
    assert {never._draw(step, 0)[0].switch for step in range(20)} == {3}


@torch.no_grad()
def far(matched: DMDTask) -> float:
    """Mean distance of a rollout's last chunk from the teacher's picture."""
    _, chunks = matched._rollout(plain(CAPTIONS), torch.Generator().manual_seed(0), learn=False)
    teacher = matched._guided_teacher(CAPTIONS)
    picture = teacher.predict(torch.randn(chunks[0].shape), torch.full((len(CAPTIONS),), 0.5))
    return float((chunks[-1] - picture).abs().mean())


def test_the_generator_finds_what_the_teacher_shows() -> None:
    """A teacher that sees one picture in all noise: the generator comes to make it."""
    matched = dmd_task(
        guidance=1.0,
        muon_learning_rate=1e-3,
        adamw_learning_rate=1e-3,
        critic_muon_learning_rate=5e-3,
        critic_adamw_learning_rate=5e-3,
        num_clips=6,
    )
    head = matched._teacher.dit.head.head
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.normal_(head.bias)

    before = far(matched)
    for step in range(60):
        for learner in matched.learners.values():
            loss, _ = learner.loss(step, step / 60)
            learner.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learner.module.parameters(), 1.0)
            learner.optimizer.step()
    assert far(matched) < 0.5 * before


def test_a_range_of_noise_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"min_score_sigma=0\.9 is not below"):
        DMDConfig(min_score_sigma=0.9, max_score_sigma=0.5)


def whole_clips() -> DMDTask:
    return dmd_task(scores="clips", critic_error="flow", num_critic_copies=1, negative_prompt="a blue square")


def test_bidirectional_models_score_the_clip_at_once() -> None:
    """Teacher and critic see every frame of the rollout, all at one noise level."""
    matched = whole_clips()
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor, object, HistoryView]) -> None:
        x, times, _, view = inputs
        levels = {tuple(row.tolist()) for row in times.unique(dim=1)}
        shapes.append((tuple(x.shape), tuple(len(level) for level in levels), len(view.segments)))

    matched._teacher.dit.register_forward_pre_hook(note)
    loss, _ = matched.generator_loss(0, 0.0)
    assert shapes == [((6, 6, 4, 4, 4), (1, 1, 1), 0)]  # three clips, with and without their caption
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(touched(matched.module).values())


def test_flow_errors_are_errors_of_the_flow() -> None:
    matched = whole_clips()
    seen: list[torch.Tensor] = []
    noisy: list[torch.Tensor] = []

    def note(
        module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, object]
    ) -> None:
        noisy.append(inputs[0].detach())
        noisy.append(inputs[1][:, 0].detach() / 1000)
        seen.append(output[0].detach())

    matched.critic.dit.register_forward_hook(note)
    loss, _ = matched.critic_loss(0, 0.0)
    script, generator = matched._draw(0, 1)
    clean = torch.cat(matched._rollout(script, generator, learn=False)[1], dim=1).detach()
    x, sigma = noisy[0], noisy[1].view(-1, 1, 1, 1, 1)
    noise = (x - (1 - sigma) * clean) / sigma
    expected = (seen[0] - (noise - clean)).square().mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=1e-5)


def test_clips_have_one_prompt_each() -> None:
    with pytest.raises(ConfigError, match=r"switch_share=0\.5 switches some"):
        DMDConfig(scores="clips", switch_share=0.5)


def test_recomputed_blocks_change_nothing() -> None:
    plain, again = dmd_task(), dmd_task(loop=loop(4).replace(recompute="blocks"))
    for name in ("generator", "critic"):
        for matched in (plain, again):
            matched.learners[name].loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
        pairs = zip(
            plain.learners[name].module.parameters(), again.learners[name].module.parameters(), strict=True
        )
        for ours, theirs in pairs:
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)

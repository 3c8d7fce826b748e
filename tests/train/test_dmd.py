"""Distribution matching on self-rollouts: who learns from what, rollouts as served, and that it converges."""

import copy

import pytest
import torch

from longtake.diffusion.flow import Schedule
from longtake.diffusion.sampler import context_pass, sample_chunk
from longtake.errors import ConfigError
from longtake.history.base import HistoryView
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.models.memory import MemoryEncoderConfig
from longtake.train.dmd import DMDTask, _Script, dmd_optimizers
from longtake.train.dmd_config import DMDConfig
from toy_training import CAPTIONS, DIT, HISTORY, loop, networks

SCHEDULE = Schedule(steps=(1000, 600, 300), shift=2.0)


def task(schedule: Schedule = SCHEDULE, **settings: object) -> DMDTask:
    student = networks()
    config = DMDConfig(loop=loop(4), num_clips=3, num_chunks=3).replace(**settings)
    shape = (4, 4, 4)
    return DMDTask(student, copy.deepcopy(student), HISTORY, schedule, config, CAPTIONS, CAPTIONS[:2], shape)


def plain(captions: list[str]) -> _Script:
    return _Script(captions, captions, switch=99)


def touched(module: torch.nn.Module) -> dict[str, bool]:
    return {
        name: parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        for name, parameter in module.named_parameters()
    }


def test_each_learner_moves_itself_alone() -> None:
    matched = task()
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
    matched = task(guidance=1.0)
    loss, figures = matched.generator_loss(0, 0.0)
    assert figures["move"] < 1e-4  # the critic starts as the teacher
    assert float(loss.detach()) < 1e-6


def test_scores_are_taken_at_shifted_levels_within_their_bounds() -> None:
    low, even, shifted = (
        task(min_score_sigma=0.2, max_score_sigma=0.9, score_shift=shift)._score_sigmas(
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
    matched = task(schedule=schedule)
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
    matched = task()
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
    matched = task()
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
    matched = task(switch_share=0.5)
    switches = [matched._draw(step, 0)[0].switch for step in range(200)]
    assert set(switches) == {1, 2, 3}  # 3: no switch
    assert 70 < sum(at < 3 for at in switches) < 130
    never = task()
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
    matched = task(
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
    return task(scores="clips", critic_error="flow", num_critic_copies=1, negative_prompt="a blue square")


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
    plain, again = task(), task(loop=loop(4).replace(recompute="blocks"))
    for name in ("generator", "critic"):
        for matched in (plain, again):
            matched.learners[name].loss(0, 0.0)[0].backward()  # type: ignore[no-untyped-call]
        pairs = zip(
            plain.learners[name].module.parameters(), again.learners[name].module.parameters(), strict=True
        )
        for ours, theirs in pairs:
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_lead_is_the_same_stream_from_further_back() -> None:
    matched = task(num_chunks=5)
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    _, whole = matched._rollout(_Script(CAPTIONS, CAPTIONS, 99), seeds[0], learn=False)
    led = task(num_chunks=2, max_lead_chunks=3)
    lead, scored = led._rollout(_Script(CAPTIONS, CAPTIONS, 99, lead=3), seeds[1], learn=False)
    assert (len(lead), len(scored)) == (3, 2)
    for one, other in zip([*lead, *scored], whole, strict=True):
        assert torch.equal(one, other)
    drawn = {led._draw(step, 0)[0].lead for step in range(60)}
    assert drawn == {0, 1, 2, 3}
    for loss in (led.generator_loss, led.critic_loss):
        value, _ = loss(0, 0.0)
        assert torch.isfinite(value)


def test_scores_know_the_lead() -> None:
    """Teacher and critic judge chunks by the past that led to them."""
    losses = []
    for change in (0.0, 1.0):
        matched = task(max_lead_chunks=2)
        with torch.no_grad():
            for parameter in matched.critic.parameters():
                parameter.add_(0.05)
        lead = [torch.full((3, 2, 4, 4, 4), change) for _ in range(2)]
        matched._rollout = lambda script, generator, learn, lead=lead: (  # type: ignore[method-assign,misc]
            lead,
            [torch.ones(3, 2, 4, 4, 4, requires_grad=learn) for _ in range(3)],
        )
        losses.append(
            [float(loss(0, 0.0)[0].detach()) for loss in (matched.generator_loss, matched.critic_loss)]
        )
    assert losses[0][0] != losses[1][0]
    assert losses[0][1] != losses[1][1]


REMEMBERING = HISTORY.replace(policy=EvolvingConfig(), positions=Relative(f_max=5))
MEMORY = MemoryEncoderConfig(width=24, num_heads=2, rows=1, columns=1, num_frames=1, num_layers=1)


def taught(exit_step: int, **settings: object) -> set[str]:
    """Parameters of the memory that a rollout of the generator reaches."""
    student = networks(DIT.replace(memory=MEMORY))
    config = DMDConfig(loop=loop(4), num_clips=3, num_chunks=2).replace(**settings)
    matched = DMDTask(
        student, copy.deepcopy(student), REMEMBERING, SCHEDULE, config, CAPTIONS, CAPTIONS[:2], (4, 4, 4)
    )
    seed = next(
        s
        for s in range(99)
        if int(torch.randint(3, (1,), generator=torch.Generator().manual_seed(s))) == exit_step
    )
    script = _Script(CAPTIONS, CAPTIONS, 99, lead=6)
    _, scored = matched._rollout(script, torch.Generator().manual_seed(seed), learn=True)
    torch.stack(scored).square().mean().backward()  # type: ignore[no-untyped-call]
    assert student.dit.memory is not None
    return {
        name
        for name, parameter in student.dit.memory.named_parameters()
        if parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
    }


def test_credit_of_the_memory() -> None:
    readers = {"to_k.weight", "to_k.bias", "to_v.weight", "to_v.bias"}
    every = taught(1, memory_credit="chain")
    assert every > readers
    assert "gate_linear.weight" in every
    assert "query_init" in every
    assert taught(1, memory_credit="none") <= readers
    # As published, rollouts that stop at a later step than the first one do not teach the updates.
    assert taught(1, memory_credit="first_exit") <= readers
    assert taught(0, memory_credit="first_exit") == every
    # Some updates back the state counts as given, so that the learned start is out of reach.
    for count in (1, 2, 3):
        assert taught(1, credit_updates=count) == every - {"query_init"}, count
    assert taught(1, credit_updates=20) == every


def pieces(**settings: object) -> DMDTask:
    """Rollouts of which the last three chunks are scored as a clip; the first of these teaches nothing."""
    changes = {"num_clips": 2, "max_lead_chunks": 4, "overlap_chunks": 1, **settings}
    return task(scores="clips", critic_error="flow", num_critic_copies=1, **changes)


def test_of_a_piece_only_what_is_new_is_learned_from() -> None:
    matched = pieces()
    scripts = [matched._draw(step, 0)[0] for step in range(40)]
    assert {script.lead for script in scripts} == {0, 1, 2, 3, 4}
    assert all(script.overlap == int(script.lead > 0) for script in scripts)
    step = next(step for step, script in enumerate(scripts) if script.lead == 2)
    script, generator = matched._draw(step, 0)
    lead, scored = matched._rollout(script, generator, learn=True)
    assert (len(lead), [chunk.requires_grad for chunk in scored]) == (2, [False, True, True])

    def disturbed(network: torch.nn.Module, frames: slice) -> list[float]:
        def change(
            module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, object]
        ) -> tuple[torch.Tensor, object]:
            flow = output[0].clone()
            assert flow.shape[1] == 6  # the whole piece, and nothing before it
            flow[:, frames] += 1
            return flow, output[1]

        handle = network.register_forward_hook(change)
        values = [
            float(loss(step, 0.0)[0].detach()) for loss in (matched.generator_loss, matched.critic_loss)
        ]
        handle.remove()
        return values

    plain_loss, plain_error = (
        float(loss(step, 0.0)[0].detach()) for loss in (matched.generator_loss, matched.critic_loss)
    )
    critic_lead = matched._draw(step, 1)[0].lead
    for network in (matched.critic.dit, matched._teacher.dit):
        assert disturbed(network, slice(0, 2))[0] == pytest.approx(plain_loss, rel=1e-5)
        assert disturbed(network, slice(2, 4))[0] != pytest.approx(plain_loss, rel=1e-3)
    counts = slice(0, 2) if critic_lead else slice(0, 0)
    assert disturbed(matched.critic.dit, counts)[1] == pytest.approx(plain_error, rel=1e-5)
    assert disturbed(matched.critic.dit, slice(2, 4))[1] != pytest.approx(plain_error, rel=1e-3)


def test_prompts_of_pieces_switch_before_them() -> None:
    matched = pieces(switch_share=1.0)
    for step in range(40):
        script, _ = matched._draw(step, 0)
        if script.lead == 0:
            assert script.switch == 3  # never
            assert script.scored == script.before
        else:
            assert -script.lead < script.switch <= 0
            assert script.scored == script.after
    scored: list[list[str]] = []
    matched._score_walk = lambda captions: scored.append(captions) or DMDTask._score_walk(matched, captions)  # type: ignore[method-assign,func-returns-value]
    step = next(step for step in range(40) if matched._draw(step, 0)[0].lead > 1)
    matched.generator_loss(step, 0.0)
    assert scored == [matched._draw(step, 0)[0].after]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_chunks": 1}, "sees the past anyway"),
        ({"scores": "clips", "num_chunks": 2, "overlap_chunks": 2}, "leaves nothing new"),
    ],
)
def test_overlaps_that_mean_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMDConfig(**settings)  # type: ignore[arg-type]


def test_a_memory_learns_at_a_rate_of_its_own() -> None:
    student = networks(DIT.replace(memory=MEMORY))
    config = DMDConfig(loop=loop(4), muon_learning_rate=1e-3, adamw_learning_rate=1e-4, memory_rate=5.0)
    of_generator, of_critic = dmd_optimizers(config, student, copy.deepcopy(student))
    memory = {id(parameter) for parameter in student.dit.memory.parameters()}  # type: ignore[union-attr]
    rates: dict[tuple[str, bool], float] = {}
    for group in of_generator.param_groups:
        inside = {id(parameter) in memory for parameter in group["params"]}
        assert len(inside) == 1
        rates[group["kind"], inside.pop()] = group["base_lr"]
    assert rates == {
        ("muon", False): 1e-3,
        ("muon", True): pytest.approx(5e-3),
        ("adamw", False): 1e-4,
        ("adamw", True): pytest.approx(5e-4),
    }
    assert len({id(p) for group in of_generator.param_groups for p in group["params"]}) == len(
        list(student.parameters())
    )
    assert len(of_critic.param_groups) == 2

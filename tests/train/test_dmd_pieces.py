"""Distribution matching on parts of long rollouts: what precedes them, what teaches, and the memory."""

import copy

import pytest
import torch

from longtake.errors import ConfigError
from longtake.train.dmd import DMDTask, _Script, dmd_optimizers
from longtake.train.dmd_config import DMDConfig
from toy_training import CAPTIONS, DIT, MEMORY, REMEMBERING, SCHEDULE, dmd_task, loop, networks


@torch.no_grad()
def test_a_lead_is_the_same_stream_from_further_back() -> None:
    matched = dmd_task(num_chunks=5)
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    _, whole = matched._rollout(_Script(CAPTIONS, CAPTIONS, 99), seeds[0], learn=False)
    led = dmd_task(num_chunks=2, max_lead_chunks=3)
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
        matched = dmd_task(max_lead_chunks=2)
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
    return dmd_task(scores="clips", critic_error="flow", num_critic_copies=1, **changes)


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

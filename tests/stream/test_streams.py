"""Streams: batches equal solo runs, prompts switch where they say, snapshots resume bit for bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from longtake.diffusion.flow import Schedule
from longtake.diffusion.sampler import chunk_noise
from longtake.errors import ConfigError, HistoryError, PromptError
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Absolute, Relative
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.stream.session import Stream
from longtake.stream.state import Chunk, PromptSwitch
from tiny_parts import MEMORY, STREAM_SETTINGS, assert_same, small_dit, small_pipeline


def play(pipeline: Pipeline, chunks: int, prompt: str = "a red ball", seed: int = 3) -> list[Chunk]:
    stream = Stream(pipeline, prompt, seed)
    return [next(stream) for _ in range(chunks)]


def assert_close(a: Chunk, b: Chunk) -> None:
    torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=0)
    assert a.frames is not None
    assert b.frames is not None
    # Rounding to bytes may fall on either side.
    assert a.frames.shape == b.frames.shape
    assert int(np.abs(a.frames.astype(int) - b.frames.astype(int)).max()) <= 1


def test_chunks_follow_each_other() -> None:
    chunks = play(small_pipeline(), 4)
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.first_frame for chunk in chunks] == [0, 5, 13, 21]
    shapes = [chunk.frames.shape for chunk in chunks if chunk.frames is not None]
    assert shapes == [(5, 4, 6, 3), (8, 4, 6, 3), (8, 4, 6, 3), (8, 4, 6, 3)]
    assert small_pipeline().num_pixel_frames(8) == 29
    assert len({float(chunk.latents.sum()) for chunk in chunks}) == 4


def test_seed_prompt_and_repeat() -> None:
    pipeline = small_pipeline()
    first, again = play(pipeline, 3), play(pipeline, 3)
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    assert not torch.equal(first[0].latents, play(pipeline, 1, seed=4)[0].latents)
    assert not torch.equal(first[0].latents, play(pipeline, 1, prompt="a blue ball")[0].latents)


@pytest.mark.parametrize("changes", STREAM_SETTINGS)
def test_batches_equal_solo_runs_joining_and_leaving(changes: dict[str, Any]) -> None:
    pipeline = small_pipeline(**changes)
    solo = {name: play(pipeline, 9, name, seed) for seed, name in enumerate(("one", "two", "three", "four"))}
    engine = Engine(pipeline, num_streams=3)
    seen = Counter[str]()

    def step(states: list[Any]) -> None:
        for state, chunk in zip(states, engine.advance(states), strict=True):
            assert_close(chunk, solo[state.prompt][seen[state.prompt]])
            seen[state.prompt] += 1
        engine.history.check_integrity()

    one = engine.open("one", 0)
    step([one])
    two = engine.open("two", 1)
    step([two, one])
    three = engine.open("three", 2)
    for _ in range(3):
        step([one, two, three])
    step([three, one])
    engine.close(two)
    four = engine.open("four", 3)
    for _ in range(3):
        step([one, four, three])
    engine.close(one)
    step([four])
    step([three, four])
    assert seen == {"one": 9, "two": 4, "three": 8, "four": 5}


def test_chunks_that_open_something_take_the_opening_steps() -> None:
    opening = (1000, 800, 600, 400, 200)
    pipeline = small_pipeline(opening=opening)
    calls: list[int] = []
    pipeline.dit.register_forward_hook(lambda *_: calls.append(1))

    def forwards(stream: Stream) -> tuple[Chunk, int]:
        calls.clear()
        return next(stream), len(calls)

    stream = Stream(pipeline, "a red ball", 3)
    (first, opened), (_, second), (_, third) = (forwards(stream) for _ in range(3))
    assert (opened, second, third) == (6, 3, 3)  # the context pass is one of them
    many = dataclasses.replace(pipeline, config=pipeline.config.replace(schedule=Schedule(steps=opening)))
    assert_same(first, play(many, 1)[0])

    stream.set_prompt("green square", window="keep")
    assert [forwards(stream)[1] for _ in range(2)] == [6, 3]


def test_chunks_that_open_something_may_be_guided_more() -> None:
    plain, opened = play(small_pipeline(), 3), play(small_pipeline(opening_guidance=2.0), 3)
    guided = play(small_pipeline(guidance=2.0), 3)
    # The first chunk has no past, so that it does not matter whose both branches would read.
    assert_same(opened[0], guided[0])
    assert not torch.allclose(opened[0].latents, plain[0].latents, atol=1e-3)
    for one in (plain, guided):
        assert not torch.allclose(opened[1].latents, one[1].latents, atol=1e-3)
    both = play(small_pipeline(guidance=1.5, opening_guidance=2.0), 2)
    assert_same(both[0], guided[0])
    assert not torch.allclose(both[1].latents, guided[1].latents, atol=1e-3)
    stream = Stream(small_pipeline(opening_guidance=2.0), "a red ball", 3)
    rows: list[int] = []
    stream.engine.pipeline.dit.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    for index in range(3):
        if index == 2:
            stream.set_prompt("green square", window="keep")
        rows.clear()
        next(stream)
        assert rows == ([2, 2, 1] if index != 1 else [1, 1, 1])
    assert stream.state.negative_slot is None
    assert small_pipeline(opening_guidance=2.0).with_sampler(guidance=1).config.opening_guidance is None


def test_another_sampler_for_the_same_networks() -> None:
    pipeline = small_pipeline(opening=(1000, 500, 250), guidance=2.0)
    assert pipeline.with_sampler() is pipeline
    other = pipeline.with_sampler(num_steps=3, guidance=1)
    assert other.config.schedule.steps == (1000, 667, 333)
    assert other.config.opening_schedule is None
    assert other.config.guidance is None
    assert other.dit is pipeline.dit
    own = pipeline.with_sampler(num_steps=2)
    assert own.config.schedule == pipeline.config.schedule
    assert (own.config.opening_schedule, own.config.guidance) == (None, 2.0)


def test_temperature_scales_the_noise_of_chunks_that_go_on() -> None:
    plain, cold = play(small_pipeline(), 3), play(small_pipeline(temperature=0.0), 3)
    assert_same(plain[0], cold[0])
    assert not torch.allclose(plain[1].latents, cold[1].latents, atol=1e-3)

    ends = []
    for seed in (1, 2):  # without noise nothing but the past decides
        stream = Stream(small_pipeline(temperature=0.0), "a red ball", 3)
        next(stream)
        stream.state.seed = seed
        ends.append(next(stream))
    torch.testing.assert_close(ends[0].latents, ends[1].latents)


def test_every_step_may_have_a_temperature_of_its_own() -> None:
    """A step at temperature 0 adds no noise: what its noise is does not matter, what the other's is does."""
    for cold in (0, 1):
        pipeline = small_pipeline(temperature=tuple(0.0 if step == cold else 1.0 for step in range(2)))
        made = []
        for changed in (None, 0, 1):
            stream = Stream(pipeline, "a red ball", 3)
            next(stream)

            def other_noise(*args: Any, changed: int | None = changed) -> list[torch.Tensor]:
                noise = chunk_noise(*args)
                return [-step if index == changed else step for index, step in enumerate(noise)]

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("longtake.stream.engine.chunk_noise", other_noise)
                made.append(next(stream).latents)
        same, differs = made[1 + cold], made[2 - cold]
        assert torch.equal(made[0], same)
        assert not torch.allclose(made[0], differs, atol=1e-3)


def test_temperatures_fit_the_steps() -> None:
    config = small_pipeline(temperature=(1.0, 0.4)).config
    assert config.temperatures == (1.0, 0.4)
    assert config.replace(temperature=0.7).temperatures == (0.7, 0.7)
    assert StreamConfig.loads(config.dumps()) == config
    with pytest.raises(ConfigError, match="3 numbers for 2 denoising steps"):
        config.replace(temperature=(1.0, 0.7, 0.4))
    with pytest.raises(ConfigError, match="temperature"):
        config.replace(temperature=(1.0, -0.4))
    pipeline = small_pipeline(temperature=(1.0, 0.4))
    assert pipeline.with_sampler(num_steps=3).config.temperatures == (1.0, 1.0, 1.0)
    assert pipeline.with_sampler(num_steps=2).config.temperatures == (1.0, 0.4)
    assert small_pipeline(temperature=0.5).with_sampler(num_steps=3).config.temperature == 0.5


@pytest.mark.parametrize("changes", STREAM_SETTINGS)
@pytest.mark.parametrize("sink", ["keep", "reencode", "drop"])
@pytest.mark.parametrize("window", ["keep", "reencode"])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_switch_changes_only_later_chunks(changes: dict[str, Any], sink: Any, window: Any, at: int) -> None:
    pipeline = small_pipeline(**changes)
    plain = play(pipeline, at + 3)
    stream = Stream(pipeline, "a red ball", 3)
    for index in range(at):
        assert_same(next(stream), plain[index])
    assert stream.set_prompt("green square", sink=sink, window=window) == at
    for index in range(at, at + 3):
        chunk = next(stream)
        assert chunk.prompt == "green square"
        assert not torch.allclose(chunk.latents, plain[index].latents, atol=1e-3)
        stream.engine.history.check_integrity()


def test_a_switch_to_the_same_prompt_changes_nothing_while_nothing_was_evicted() -> None:
    """Re-encoding equals what the context passes made: it is block-causal as generation was."""
    pipeline = small_pipeline(window_frames=12, sink_frames=3)
    plain = play(pipeline, 7)
    for sink in ("keep", "reencode"):
        stream = Stream(pipeline, "a red ball", 3)
        for index in range(5):
            assert_close(next(stream), plain[index])
        stream.set_prompt("a red ball", sink=sink)  # type: ignore[arg-type]
        for index in range(5, 7):
            assert_close(next(stream), plain[index])


def test_a_switch_treats_the_memory_as_the_model_says_unless_told() -> None:
    pipeline = small_pipeline()
    keeps = Pipeline(
        pipeline.dit,
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.config.replace(memory_at_switch="keep"),
    )
    for made, own in ((pipeline, "rebuild"), (keeps, "keep")):
        stream = Stream(made, "a red ball", 3)
        for told, done in ((None, own), ("reset", "reset"), ("rebuild", "rebuild")):
            stream.set_prompt("green square", memory=told)  # type: ignore[arg-type]
            assert stream.state.pending is not None
            assert stream.state.pending.memory == done


def test_the_last_of_two_switches_counts_and_an_unusable_one_does_not() -> None:
    pipeline = small_pipeline()
    stream, other = Stream(pipeline, "one", 1), Stream(pipeline, "one", 1)
    for each in (stream, other):
        next(each)
    stream.set_prompt("two", sink="drop")
    stream.set_prompt("three")
    with pytest.raises(PromptError, match="empty"):
        stream.set_prompt("   ")
    other.set_prompt("three")
    assert_same(next(stream), next(other))


@pytest.mark.parametrize("sink", ["keep", "drop"])
def test_the_negative_branch_forgets_what_the_positive_one_does(sink: Any) -> None:
    stream = Stream(small_pipeline(guidance=2.0), "a red ball", 3)
    for index in range(8):
        if index == 4:
            stream.set_prompt("green square", sink=sink)
        next(stream)
        own, negative = (stream.engine.history.record(slot) for slot in stream.state.slots)
        assert (own.sink, own.local) == (negative.sink, negative.local)
    assert own.sink == ([0, 1] if sink == "keep" else [5, 6])


def test_misuse_is_told() -> None:
    pipeline = small_pipeline()
    engine = Engine(pipeline, num_streams=1)
    with pytest.raises(PromptError, match="empty"):
        engine.open(" ")
    state = engine.open("one")
    with pytest.raises(HistoryError, match="all 1 streams are taken"):
        engine.open("two")
    engine.advance([state], decode=False)
    with pytest.raises(HistoryError, match="not decoded"):
        engine.advance([state])
    with pytest.raises(HistoryError, match="once"):
        engine.advance([state, state])
    engine.close(state)
    with pytest.raises(HistoryError, match="closed"):
        engine.advance([state])
    with pytest.raises(HistoryError, match="closed"):
        Engine(pipeline).set_prompt(state, PromptSwitch(text="two"))


def test_pipelines_refuse_parts_that_do_not_fit() -> None:
    good = small_pipeline()

    def learned(positions: Absolute | Relative) -> StreamConfig:
        history = good.config.history.replace(policy=EvolvingConfig(), positions=positions)
        return good.config.replace(history=history)

    for dit, config, message in (
        (small_dit(in_channels=4), good.config, "takes 4"),
        (small_dit(patch_size=(2, 1, 1)), good.config, "joins frames"),
        (small_dit(patch_size=(1, 2, 2)), good.config, "do not split"),
        (good.dit, good.config.replace(height=5), "no multiples of 2"),
        (good.dit, learned(Absolute()), "needs a learned memory"),
        (small_dit(memory=MEMORY), learned(Relative(f_max=7)), "window 7 . memory 2 = 9 frames do not fit"),
    ):
        with pytest.raises(ConfigError, match=message):
            Pipeline(dit, good.vae, good.text_encoder, config)


def test_unlimited_windows_declare_their_length() -> None:
    pipeline = small_pipeline(window_frames=None)
    with pytest.raises(HistoryError, match="max_frames"):
        Stream(pipeline, "one")
    stream = Stream(pipeline, "one", max_frames=5)
    next(stream)
    next(stream)
    with pytest.raises(HistoryError, match="6 frames exceed max_frames=5"):
        next(stream)


def test_no_stream_goes_on_where_another_has_no_room() -> None:
    pipeline = small_pipeline(window_frames=None, opening_guidance=2.0)
    engine = Engine(pipeline, num_streams=2, max_frames=5)
    long, young = engine.open("one", 1), engine.open("two", 2)
    engine.advance([long])
    engine.advance([long])
    engine.set_prompt(young, PromptSwitch(text="three"))
    with pytest.raises(HistoryError, match="6 frames exceed max_frames=5"):
        engine.advance([young, long])
    assert (young.chunk, young.prompt) == (0, "two")
    assert engine.history.record(young.slot).next_frame == 0
    engine.close(long)
    alone = Engine(pipeline, num_streams=2, max_frames=5)
    other = alone.open("two", 2)
    alone.set_prompt(other, PromptSwitch(text="three"))
    assert_same(engine.advance([young])[0], alone.advance([other])[0])


@pytest.mark.parametrize("changes", STREAM_SETTINGS)
def test_the_kept_latents_are_those_of_the_frames_held(changes: dict[str, Any]) -> None:
    """What a prompt switch encodes again, through growth, evictions and a dropped sink that refills."""
    pipeline = small_pipeline(**changes)
    stream = Stream(pipeline, "one", 2)
    sink_frames = pipeline.config.history.sink_frames
    frames: list[torch.Tensor] = []
    for index in range(12):
        if index == 6:
            stream.set_prompt("two", sink="drop")
        frames += list(next(stream).latents)
        record = stream.engine.history.record(stream.state.slot)
        places = record.places(sink_frames)
        assert set(places) == {*record.sink, *record.local}
        for frame, block in places.items():
            assert torch.equal(stream.engine.latents[stream.state.slot, block], frames[frame])
    assert len(record.sink) == sink_frames
    assert not sink_frames or record.sink[0] > 0

"""Clips of several windows: which of their chunks teach, and that their prompts tell what they show."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from counting import some_clips
from longtake.cache.base import Entries
from longtake.cache.dense import dense_layout
from longtake.errors import ConfigError, TrainingError
from longtake.history.base import HistoryConfig
from longtake.history.pure import PureHistory
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.excerpts import Excerpt, LatentCacheConfig, chunk_start
from longtake.train.long_clips import LongSource, first_late_chunk
from longtake.train.parents import Parent
from longtake.train.plan import Machine
from longtake.train.recipe import Recipe
from longtake.train.rendering import ClipRenderer, Rendered
from longtake.train.run import train
from longtake.train.steps import Steps, StepSources
from longtake.train.walk import Noise
from longtake.world import Scene, parse_caption
from longtake.world.motion import Paused
from toy_training import HISTORY, clip_encoder, loop, networks, recipe, renderer

SMALL = {"window_frames": 7, "sink_frames": 2, "chunk_frames": 2}
PLENTY = Machine("cpu", 10**15)


def source(**changes: object) -> LongSource:
    config = LatentCacheConfig(chunk_frames=3, height=16, width=16)
    settings = {"num_chunks": 14, "num_learned": 4, "first_learned": 6, **changes}
    return LongSource(renderer(), config, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_learned", "num_chunks"), [(4, 14), (5, 13)])
def test_clips_follow_the_generator_and_teach_late(num_learned: int, num_chunks: int) -> None:
    made, encoder = source(num_learned=num_learned, num_chunks=num_chunks), clip_encoder()
    for seed in range(6):
        batch = made.draw(np.random.default_rng(seed), 2)
        again = made.draw(np.random.default_rng(seed), 2)
        assert torch.equal(batch.clips.frames_bthwc, again.clips.frames_bthwc)
        assert batch.learned == again.learned
        assert sum(batch.learned) == num_learned
        assert not any(batch.learned[:6])
        assert batch.learned[-1]
        assert num_chunks - 2 < len(batch.learned) <= num_chunks
        encoded = batch.encoded(encoder)
        assert encoded.learned == batch.learned
        assert encoded.clips.latents_bfchw.shape[1] == 3 * len(batch.learned)
        assert all(batch.clips.opens)


def test_half_of_them_pan_and_half_have_prompts_that_switch_where_chunks_begin() -> None:
    prompts = source().draw(np.random.default_rng(0), 24).clips.prompts
    pans = [of_clip for of_clip in prompts if "pan" in of_clip[0][1]]
    others = [of_clip for of_clip in prompts if of_clip not in pans]
    assert 6 <= len(pans) <= 18
    assert all(len(of_clip) == 1 for of_clip in pans)
    starts = [start for of_clip in others for start, _ in of_clip]
    assert all(start % 3 == 0 for start in starts)
    assert max(starts) > 15
    assert sum(len(of_clip) > 1 for of_clip in others) > len(others) / 2
    left = [of_clip for of_clip in others if len(of_clip) > 1 and unlike(of_clip[0][1], of_clip[1][1])]
    assert left, "some switches leave a scene altogether"
    assert len(left) < len(others)


def test_chunks_that_bring_something_back_are_learned_from() -> None:
    """As the truth of the scenes has it, whose captions are told beside."""
    settings = {"num_chunks": 26, "num_learned": 6, "num_returns": 4, "away_frames": 48}
    made, found = source(**settings), 0
    for seed in range(12):
        batch = made.draw(np.random.default_rng(seed), 1)
        assert sum(batch.learned) == 6
        assert not any(batch.learned[:6])
        plain = source(**settings | {"num_returns": 0}).draw(np.random.default_rng(seed), 1)
        assert plain.clips.prompts[0][0] == batch.clips.prompts[0][0]
        excerpt = first_drawn(made, seed)
        back = made._returning(excerpt.scene)
        assert not back or len(excerpt.scene.segments) == 1
        for chunk in back:
            frames = range(chunk_start(chunk, 3, 4), chunk_start(chunk + 1, 3, 4))
            assert any(away_before(excerpt.scene, frame, 48) for frame in frames)
        learned = {chunk for chunk, learns in enumerate(batch.learned) if learns}
        assert len(learned & back) >= min(4, len(back))
        (returns,) = batch.encoded(clip_encoder()).returns
        assert len(returns) == len(batch.learned)
        assert {chunk for chunk, comes in enumerate(returns) if comes} == back & set(range(len(returns)))
        found += len(back)
    assert found > 5


def test_a_camera_that_stood_still_goes_on_in_chunks_that_are_learned_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As rendered scenes have it: nothing moves with the view in all of the window before such a chunk."""
    made, found = source(num_chunks=20, num_learned=6, away_frames=48, pauses=0.8), 0
    shown: list[list[Excerpt]] = []
    render = ClipRenderer.render

    def kept(self: ClipRenderer, excerpts: list[Excerpt], config: LatentCacheConfig) -> Rendered:
        shown.append(excerpts)
        return render(self, excerpts, config)

    monkeypatch.setattr(ClipRenderer, "render", kept)
    for seed in range(6):
        batch = made.draw(np.random.default_rng(seed), 2)
        assert sum(batch.learned) == 6
        for item, resumes in zip(shown[-1], batch.resumes, strict=True):
            chunks = [chunk for chunk, resuming in enumerate(resumes) if resuming]
            paused = isinstance(item.scene.segments[0].camera, Paused)
            assert bool(chunks) == paused
            if not paused:
                continue
            assert all(batch.learned[chunk] for chunk in chunks)
            start = chunk_start(chunks[0], 3, 4)
            views = item.scene.truth(0, start + 12).camera_x
            assert np.ptp(views[max(0, start - 48) : start + 1]) == 0
            assert np.ptp(views[start:]) > 0
            found += 1
        assert batch.encoded(clip_encoder()).resumes == batch.resumes
    assert found >= 3
    assert source(pauses=0.0).draw(np.random.default_rng(0), 2).resumes[0].count(True) == 0


def first_drawn(made: LongSource, seed: int) -> Excerpt:
    rng = np.random.default_rng(seed)
    scene = made.config.first_seed + int(rng.integers(1 << 30))
    pans, leaves = bool(rng.integers(2)), bool(rng.integers(2))
    return made._excerpt(scene, made.num_chunks * 3, pans=pans, leaves=leaves)


def away_before(scene: Scene, frame: int, frames: int) -> bool:
    """Whether something is in view that was before, but not in so many frames."""
    truth = scene.truth(0, frame + 1)
    seen = truth.present & (truth.visible > 0)
    away = ~seen[max(0, frame - frames) : -1].any(axis=0) & seen[: max(0, frame - frames)].any(axis=0)
    return bool((seen[-1] & away).any())


def unlike(before: str, after: str) -> bool:
    first, second = parse_caption(before), parse_caption(after)
    looks = [{(item.colour, item.shape) for item in asked.objects} for asked in (first, second)]
    return not looks[0] & looks[1] and first.background != second.background


@pytest.mark.parametrize(
    ("changes", "first"),
    [({}, 4), ({"sink_frames": 0}, 4), ({"chunk_frames": 4}, 3), ({"window_frames": 13}, 4), (SMALL, 3)],
)
def test_the_first_late_chunk_is_the_first_that_frames_have_left(
    changes: dict[str, object], first: int
) -> None:
    config = HistoryConfig(window_frames=12, sink_frames=3, chunk_frames=3).replace(**changes)
    assert first_late_chunk(config) == first
    assert first_late_chunk(config.replace(window_frames=None)) == 0
    spec = dense_layout(num_layers=1, num_heads=1, head_dim=6)
    frames = torch.zeros(1, config.chunk_frames, 1, 6)
    history, chunks = PureHistory(config, spec, (1, 1)), 0
    while history.num_evicted == 0:
        history = history.commit(Entries(({"k": frames, "v": frames},)))
        chunks += 1
    assert chunks == first


def lasting(**changes: object) -> Recipe:
    made = recipe()
    settings = {
        "loop": loop(2),
        "num_clips": 0,
        "num_first_clips": 0,
        "num_chunks": 2,
        "num_copies": 1,
        "num_long_clips": 2,
        "num_long_chunks": 6,
        "num_long_learned": 2,
        "fresh_clips": True,
        **changes,
    }
    return made.replace(stages=("vae", "latents", "windows", "export"), windows=DiTTrainingConfig(**settings))  # type: ignore[arg-type]


def test_a_stage_learns_from_them_alone(tmp_path: Path) -> None:
    train(lasting(), tmp_path)
    assert "foreground_long" in (tmp_path / "windows" / "log.jsonl").read_text()


def test_only_chunks_that_are_learned_from_count() -> None:
    made = lasting()
    draws = source(num_chunks=6, num_learned=2, first_learned=2)
    draws = LongSource(draws.renderer, draws.config.replace(chunk_frames=2), 6, 2, 2)
    module = networks(made.dit_model)
    steps = Steps(StepSources(made.windows, long_clips=draws), clip_encoder())
    task = DiTTask(module, HISTORY, made.windows, steps, some_clips())
    batch = draws.draw(np.random.default_rng(0), 2).encoded(steps.encoder)
    parts = task._walk(batch.clips, len(batch.learned), 1.0, Noise(0, task.device), batch.learned)
    assert len(parts) == 2


def test_where_a_camera_goes_on_the_clip_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that is its own parent learns there alone."""
    made = lasting(learns_from="parent", long_pauses=1.0, num_long_clips=1)
    draws = LongSource(renderer(), LatentCacheConfig(chunk_frames=2, height=16, width=16), 6, 2, 3)
    draws = dataclasses.replace(draws, away_frames=20, pauses=1.0)
    module = networks(made.dit_model)
    steps = Steps(StepSources(made.windows, long_clips=draws), clip_encoder())
    parent = Parent(copy.deepcopy(module), HISTORY)
    task = DiTTask(module, HISTORY, made.windows, steps, some_clips(), parent=parent)
    errors = {False: [], True: []}  # type: dict[bool, list[float]]
    for step in range(6):
        loss, figures = task.loss(step, 0.0)
        assert drawn_resumes(steps, step) == (figures["long"] > 1e-6)
        errors[drawn_resumes(steps, step)].append(float(loss.detach()))
    assert min(errors[True]) > 0.01
    assert max(errors[False]) == pytest.approx(0, abs=1e-9)


def drawn_resumes(steps: Steps, step: int) -> bool:
    long = steps(step).long
    assert long is not None
    return any(long.resumes[0])


def test_they_are_planned_halved_and_refused() -> None:
    plan, fewer = (lasting(num_long_clips=count).plan("windows", PLENTY) for count in (2, 1))
    assert plan is not None
    assert fewer is not None
    for part in ("walks", "encoding of fresh clips"):
        assert plan.flops[part] > fewer.flops[part]
    with pytest.raises(TrainingError, match="windows.num_long_clips=1"):
        lasting().check(("windows",), Machine("cpu", round(0.9 * plan.num_bytes)))
    with pytest.raises(ConfigError, match="rendered anew"):
        lasting(fresh_clips=False)
    with pytest.raises(ConfigError, match="num_long_chunks=3 leaves no 2 chunks"):
        lasting(num_long_chunks=3).check(("windows",), PLENTY)

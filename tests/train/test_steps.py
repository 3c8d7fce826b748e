"""What steps walk through: the same whoever draws it, and rendered as the world is."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from longtake.errors import ConfigError
from longtake.train.checks import check_parts
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.excerpts import LatentCacheConfig, excerpt
from longtake.train.latents import Clips, FreshClips
from longtake.train.long_clips import LongSource
from longtake.train.recall import RecallSource
from longtake.train.steps import StepClips, Steps, StepSources
from longtake.world import render_masks
from toy_training import HISTORY, VAE, clip_encoder, loop, recipe, renderer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core


def steps(num_workers: int) -> Steps:
    """Of a stage that has all that there is to walk through; its draws are 0 to 3."""
    config = DiTTrainingConfig(
        loop=loop(2).replace(accumulation_steps=2),
        num_first_clips=1,
        num_clips=2,
        num_chunks=2,
        num_long_clips=1,
        num_recall_clips=1,
        fresh_clips=True,
        guide_weight=1.0,
    )
    cache = LatentCacheConfig(num_latent_frames=4, chunk_frames=2, levels=(1, 2, 3), height=16, width=16)
    made = renderer(guided=True)
    sources = StepSources(
        config,
        first_clips=FreshClips(made, cache.replace(num_latent_frames=2)),
        clips=FreshClips(made, cache),
        recall=RecallSource(made, cache, HISTORY, absence=(1.0, 2.0)),
        long_clips=LongSource(made, cache, num_chunks=6, num_learned=2, first_learned=2),
    )
    return Steps(sources, clip_encoder(), num_workers)


def clips_of(step: StepClips[Clips]) -> list[Clips]:
    assert step.long is not None
    assert step.recall is not None
    return [*(clips for clips, _ in step.walks), step.long.clips, step.recall.clips]


def assert_equal(one: StepClips[Clips], other: StepClips[Clips]) -> None:
    assert one.noise_seed == other.noise_seed
    assert [num_chunks for _, num_chunks in one.walks] == [num_chunks for _, num_chunks in other.walks]
    assert one.long is not None
    assert other.long is not None
    assert one.long.learned == other.long.learned
    assert one.recall is not None
    assert other.recall is not None
    for name in ("learned", "shown_frame", "unseen", "back_chunk"):
        assert getattr(one.recall, name) == getattr(other.recall, name)
    for mine, theirs in zip(clips_of(one), clips_of(other), strict=True):
        for name in ("prompts", "opens", "levels"):
            assert getattr(mine, name) == getattr(theirs, name)
        for name in ("latents_bfchw", "foreground_bfhw", "guide_bfkhw"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))


@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (2, 3, 1, 2, 3)], ids=["in order", "a run that goes on"])
def test_workers_draw_what_a_step_would(asked: Iterable[int]) -> None:
    alone, ahead = steps(num_workers=0), steps(num_workers=2)
    for draw in asked:
        assert_equal(ahead(draw), alone(draw))


def test_every_draw_is_another_one() -> None:
    made = steps(num_workers=0)
    drawn = [made(draw) for draw in range(4)]
    assert len({step.noise_seed for step in drawn}) == 4
    for before in range(4):
        for after in range(before):
            for one, other in zip(clips_of(drawn[before]), clips_of(drawn[after]), strict=True):
                assert one.prompts != other.prompts
                shared = min(one.latents_bfchw.shape[1], other.latents_bfchw.shape[1])
                assert not torch.equal(one.latents_bfchw[:, :shared], other.latents_bfchw[:, :shared])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_drawing_leaves_torchs_own_random_numbers_alone(num_workers: int) -> None:
    """The loop keeps their state, so that what later stages begin with does not tell where a run stopped."""
    made, before = steps(num_workers), torch.get_rng_state()
    made(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_last_draw_or_when_told() -> None:
    made = steps(num_workers=2)
    made(0)
    assert len(multiprocessing.active_children()) == 2
    made.close()
    assert not multiprocessing.active_children()
    made(2)
    assert len(multiprocessing.active_children()) == 2
    made(3)
    assert not multiprocessing.active_children()
    assert made(4).noise_seed == steps(num_workers=0)(4).noise_seed


def test_a_step_has_all_that_its_stage_asks_for() -> None:
    step = steps(num_workers=0)(0)
    assert [(len(clips), num_chunks) for clips, num_chunks in step.walks] == [(1, 1), (2, 2)]
    assert [clips.latents_bfchw.shape[1] for clips, _ in step.walks] == [2, 4]
    assert step.long is not None
    assert sum(step.long.learned) == 2
    assert step.recall is not None
    assert any(step.recall.unseen)
    for batch in (step.long, step.recall):
        assert len(batch.clips) == 1
        assert batch.clips.latents_bfchw.shape[1] == 2 * len(batch.learned)
    for clips in clips_of(step):
        assert clips.guide_bfkhw is not None
        assert len(clips.guide_bfkhw) == len(clips)
    without = Steps(StepSources(DiTTrainingConfig(num_clips=2), clips=step.walks[1][0]))(0)
    assert (len(without.walks), without.long, without.recall) == (1, None, None)


@pytest.mark.parametrize("stage", ["vae", "layers", "evictions", "trajectory", "dmd", "decoder"])
def test_a_stage_of_the_cpu_is_refused_elsewhere(stage: str) -> None:
    made = recipe()
    elsewhere = made.replace(device="cuda")
    with pytest.raises(ConfigError, match=f"device='cuda', but stage {stage} .*set device=cpu"):
        check_parts(elsewhere, ("latents", stage, "export"))
    check_parts(elsewhere, ("latents", "first", "windows", "export"))
    check_parts(made, made.stages)


def test_the_foreground_is_where_any_frame_of_a_latent_frame_shows_an_object() -> None:
    config = LatentCacheConfig(num_latent_frames=4, chunk_frames=2, height=32, width=32)
    stride, cell = VAE.temporal_stride, VAE.spatial_stride
    shown = excerpt(config, seed=3, level=2, stride=stride)
    (foreground,) = renderer().render([shown], config).foreground_bfhw
    num_frames = 1 + 3 * stride
    masks = render_masks(shown.scene, shown.start, shown.start + num_frames, 32, 32)
    covered_thw = masks.sum(1).clip(0, 1)
    expected = np.empty((4, 32 // cell, 32 // cell), np.float16)
    for frame in range(4):
        frames = covered_thw[max(0, 1 + (frame - 1) * stride) : 1 + frame * stride]
        for row, column in np.ndindex(expected.shape[1:]):
            rows, columns = (slice(at * cell, (at + 1) * cell) for at in (row, column))
            expected[frame, row, column] = frames[:, rows, columns].max()
    assert 0 < np.count_nonzero(expected) < expected.size
    np.testing.assert_array_equal(foreground.numpy(), expected)

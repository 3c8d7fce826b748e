"""The guide: what tokens should know of the objects, from the world's truth."""

import dataclasses

import numpy as np
import pytest
import torch
from einops import rearrange

from longtake.errors import ConfigError
from longtake.models.tiny_vae import TinyVAE
from longtake.train.dit import DiTTask
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.excerpts import LatentCacheConfig
from longtake.train.guide import GUIDE_PARTS, NUM_GUIDE_CHANNELS, guide_errors, guide_of, guide_tokens
from longtake.train.latents import FreshClips
from longtake.train.probes import token_guide_error
from longtake.train.steps import Steps, StepSources
from longtake.train.vae import VAETask, VAETrainingConfig
from longtake.train.walk import Noise
from longtake.world import render_masks, sample_scene
from longtake.world.vocabulary import OBJECT_RGB, SHAPES
from toy_training import HISTORY, VAE, clip_encoder, loop, networks, renderer


def fresh_task(**changes: object) -> DiTTask:
    cache = LatentCacheConfig(num_latent_frames=6, chunk_frames=2, levels=(1, 2), height=32, width=32)
    source = FreshClips(renderer(guided=True, ahead=changes.get("guide_ahead", ())), cache)
    encoder = clip_encoder()
    held_out = encoder.encode(source.draw(np.random.default_rng(9), 2))
    config = DiTTrainingConfig(
        loop=loop(4),
        num_clips=2,
        num_first_clips=1,
        num_chunks=3,
        fresh_clips=True,
        guide_weight=1.0,
        guide_layer=0,
    ).replace(**changes)
    steps = Steps(StepSources(config, held_out, source), encoder)
    return DiTTask(networks(), HISTORY, config, steps, held_out)


@pytest.mark.parametrize(("seed", "level"), [(3, 1), (8, 2), (6, 3)])
def test_it_says_what_objects_are_where_and_how_fast_they_go(seed: int, level: int) -> None:
    scene, start, num_frames = sample_scene(seed, level), 4, 13
    masks = torch.from_numpy(render_masks(scene, start, start + num_frames))
    guide = guide_of(scene, start, masks, 4, 8)
    assert guide.shape == (4, NUM_GUIDE_CHANNELS, 8, 8)

    everything = masks.sum(1)
    cells = everything.unflatten(1, (8, 8)).unflatten(3, (8, 8)).mean(dim=(2, 4))
    torch.testing.assert_close(guide[2, 0], cells[5], atol=1e-5, rtol=0)  # latent frame 2: frames 5 to 8
    torch.testing.assert_close(guide[2, 1], cells[8], atol=1e-5, rtol=0)

    truth = scene.truth(start, start + num_frames)
    shares = masks[5:9].unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean(dim=(0, 3, 5))  # [n,h,w]
    moved = (truth.center_xy[5:9] - truth.center_xy[4:8]).mean(0) * 64
    centers = truth.center_xy[5:9].mean(0) * 8
    objects = scene.segments[0].objects
    for row in range(8):
        for column in range(8):
            share = shares[:, row, column].numpy()
            velocity = np.nansum(share[:, None] * moved, axis=0)
            offset = np.nansum(share[:, None] * (centers - [column + 0.5, row + 0.5]), axis=0)
            np.testing.assert_allclose(guide[2, 2:4, row, column], 4 * velocity, atol=1e-4)
            np.testing.assert_allclose(guide[2, 4:6, row, column], 2 * offset, atol=1e-4)
            for index, shape in enumerate(SHAPES):
                of_shape = sum(share[i] for i, item in enumerate(objects) if item.shape == shape)
                np.testing.assert_allclose(guide[2, 6 + index, row, column], of_shape, atol=1e-4)
            for index in range(3):
                tints = [
                    share[i] * (OBJECT_RGB[item.colour][index] / 127.5 - 1) for i, item in enumerate(objects)
                ]
                np.testing.assert_allclose(guide[2, 10 + index, row, column], sum(tints), atol=1e-4)
    assert not guide[0, 2:4].any()  # a single picture shows no motion


@pytest.mark.parametrize(("seed", "level"), [(3, 1), (8, 2), (6, 3)])
def test_it_says_where_objects_will_be(seed: int, level: int) -> None:
    scene, start, num_frames, ahead = sample_scene(seed, level), 4, 13, (8, 20)
    masks = torch.from_numpy(render_masks(scene, start, start + num_frames))
    plain, guide = guide_of(scene, start, masks, 4, 8), guide_of(scene, start, masks, 4, 8, ahead)
    assert guide.shape == (4, NUM_GUIDE_CHANNELS + 4, 8, 8)
    torch.testing.assert_close(guide[:, :NUM_GUIDE_CHANNELS], plain, atol=0, rtol=0)
    shares = masks[5:9].unflatten(2, (8, 8)).unflatten(4, (8, 8)).mean(dim=(0, 3, 5)).numpy()  # [n,h,w]
    now = scene.truth(start + 5, start + 9).center_xy.mean(0)
    for index, frames in enumerate(ahead):
        later = scene.truth(start + 8 + frames, start + 9 + frames).center_xy[0]
        expected = np.nansum(shares[:, None] * ((later - now) * 64 / 2)[..., None, None], axis=0)
        channels = slice(NUM_GUIDE_CHANNELS + 2 * index, NUM_GUIDE_CHANNELS + 2 * index + 2)
        np.testing.assert_allclose(guide[2, channels], expected, atol=1e-3)


def test_a_guide_that_looks_ahead_is_read_and_small_errors_go_on_counting() -> None:
    task = fresh_task(guide_ahead=(8, 16), guide_relative=True)
    assert isinstance(task.steps.sources.clips, FreshClips)
    loss, figures = task.loss(0, 0.0)
    loss.backward()
    assert task._probe is not None
    assert task._probe.out_features % (NUM_GUIDE_CHANNELS + 4) == 0
    assert task._probe.weight.grad is not None
    assert task._probe.weight.grad.abs().sum(1).min() > 0
    assert np.isfinite(figures["guide"])


def test_relative_errors_go_on_counting_when_they_are_small() -> None:
    probe = torch.nn.Linear(4, NUM_GUIDE_CHANNELS)
    torch.nn.init.zeros_(probe.weight)
    guide = torch.zeros(1, 1, NUM_GUIDE_CHANNELS, 2, 2)
    errors = []
    for wrong in (1.0, 0.1):
        torch.nn.init.constant_(probe.bias, wrong)
        error = token_guide_error(probe, torch.randn(1, 4, 4), guide, 1, relative=True)
        errors.append(float(error.detach()))
    assert errors[0] - errors[1] == pytest.approx(np.log(100), rel=1e-2)


def test_clips_of_a_cache_have_no_guide_to_read() -> None:
    with pytest.raises(ConfigError, match="without a guide; set fresh_clips=true"):
        DiTTrainingConfig(guide_weight=1.0)


def test_looking_back_is_refused() -> None:
    with pytest.raises(ConfigError, match="looks back"):
        DiTTrainingConfig(guide_ahead=(8, 0))


def test_tokens_are_those_of_the_patches() -> None:
    guide = torch.randn(2, 3, NUM_GUIDE_CHANNELS, 4, 6)
    tokens = guide_tokens(guide, 2)
    assert tokens.shape == (2, 3 * 2 * 3, 4 * NUM_GUIDE_CHANNELS)
    corner = rearrange(guide[1, 2, :, 2:4, 4:6], "k p q -> (p q k)")
    assert torch.equal(tokens[1, -1], corner)


def test_errors_are_told_by_part_and_touched_cells_count_five_times() -> None:
    guide = torch.zeros(2, NUM_GUIDE_CHANNELS, 1, 2)
    guide[:, 0, 0, 0] = 1.0
    read = guide.clone()
    read[:, 0] += 1.0  # the first channel of "covered", at both cells
    read[:, -1, 0, 1] += 2.0  # the last of "colour", at the untouched one
    errors = guide_errors(read, guide, 1)
    assert list(errors) == list(GUIDE_PARTS)
    assert errors["covered"] == pytest.approx((5 + 1) / 2 / 2)
    assert errors["colour"] == pytest.approx(4 / 2 / 3)
    assert errors["shape"] == errors["velocity"] == errors["offset"] == 0
    tokens, read_tokens = guide_tokens(guide[:, None], 1), guide_tokens(read[:, None], 1)
    assert guide_errors(read_tokens, tokens, -1)["covered"] == errors["covered"]


def test_the_autoencoder_learns_latents_that_can_be_read() -> None:
    torch.manual_seed(0)
    config = VAETrainingConfig(
        loop=loop(60),
        num_clips=4,
        num_latent_frames=3,
        height=32,
        width=32,
        guide_weight=1.0,
        guide_noise=0.1,
    )
    task = VAETask(TinyVAE(VAE), config)
    seen = []
    for step in range(60):
        loss, figures = task.loss(step, 0.0)
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()
        seen.append(figures)
    before, after = (float(np.mean([f["guide_covered"] for f in some])) for some in (seen[:10], seen[-10:]))
    assert after < 0.7 * before
    assert task.vae.encoder.head.weight.grad is not None
    assert set(task.vae.state_dict()) == set(TinyVAE(VAE).state_dict())


def test_the_probe_learns_to_read_and_its_gradient_reaches_the_network() -> None:
    task = fresh_task()
    loss, figures = task.loss(0, 0.0)
    loss.backward()
    assert set(figures) == {"foreground", "foreground_first", "guide"}
    plain = fresh_task()
    plain_loss = torch.stack([part for part, _, _ in _parts(plain)]).mean()
    plain_loss.backward()
    name = "blocks.0.self_attn.k.weight"
    with_guide = task.networks.dit.get_parameter(name).grad
    without = plain.networks.dit.get_parameter(name).grad
    assert with_guide is not None
    assert not torch.allclose(with_guide, without)

    clips = task.held_out
    before = after = 0.0
    for index in range(30):
        guides = [part[2] for part in task._walk(clips, 3, 1.0, Noise(0, task.device))]
        error = torch.stack([guide for guide in guides if guide is not None]).mean()
        before, after = (float(error.detach()) if index == 0 else before), float(error.detach())
        task.optimizer.zero_grad()
        error.backward()
        task.optimizer.step()
    assert after < 0.7 * before


def _parts(task: DiTTask) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    rng = np.random.default_rng((task.config.loop.seed, 0))
    noise = Noise(int(rng.integers(1 << 40)), task.device)
    sources, encoder, weight = task.steps.sources, task.steps.encoder, task.config.foreground_weight
    assert sources.clips is not None
    assert sources.first_clips is not None
    first = task._walk(encoder.encode(sources.first_clips.draw(rng, 1)), 1, weight, noise)
    return first + task._walk(encoder.encode(sources.clips.draw(rng, 2)), 3, weight, noise)


def test_clips_without_a_guide_are_trained_without() -> None:
    task = fresh_task()
    bare = dataclasses.replace(task.held_out, guide_bfkhw=None)
    assert all(guide is None for *_, guide in task._walk(bare, 2, 1.0, Noise(0, task.device)))


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="guide_layer=2, but the DiT has 2 layers"):
        fresh_task(guide_layer=2)


def test_chunks_that_are_trained_alone_may_weigh_more() -> None:
    light, heavy = (fresh_task(guide_weight=0.0, first_weight=weight) for weight in (1.0, 5.0))
    parts = [float(part.detach()) for part, _, _ in _parts(light)]
    for task, weight in ((light, 1.0), (heavy, 5.0)):
        loss, _ = task.loss(0, 0.0)
        expected = (weight * parts[0] + sum(parts[1:])) / (weight + 3)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)

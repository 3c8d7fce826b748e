"""Clips of training: what they show, under which prompts, and the caches they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.errors import TrainingError
from longtake.models.tiny_vae import TinyVAE
from longtake.train.excerpts import LatentCacheConfig, excerpt
from longtake.train.latents import FreshClips, build_cache, encode_shard, load_cache
from longtake.world import render_masks
from toy_training import VAE, clip_encoder, renderer


def test_clips_are_encoded_where_their_objects_are() -> None:
    config = LatentCacheConfig(num_clips=2, clips_per_shard=2, num_latent_frames=3)
    clips = encode_shard(TinyVAE(VAE).eval(), config, 0)
    assert clips.latents_bfchw.shape == (2, 3, 4, 8, 8)
    shown = excerpt(config, 1, 1, 4)
    scene, start = shown.scene, shown.start
    assert clips.captions[1] == scene.caption
    mask = torch.from_numpy(render_masks(scene, start + 1, start + 5).sum(1))  # frames of latent frame 1
    cells = mask.unfold(1, 8, 8).unfold(2, 8, 8).amax(dim=(0, 3, 4))
    torch.testing.assert_close(clips.foreground_bfhw[1, 1].float(), cells, atol=1e-3, rtol=0)


def test_prompts_switch_where_chunks_begin_and_where_the_scene_does() -> None:
    config = LatentCacheConfig(num_latent_frames=21, chunk_frames=3)
    shown = [excerpt(config, seed, 3, 4) for seed in range(60)]
    switches = [item for item in shown if len(item.prompts) > 1]
    assert len(switches) > 15
    for item in switches:
        (_, before), (latent, after) = item.prompts
        assert latent % 3 == 0
        frame = item.start + 1 + 4 * (latent - 1)
        (_, first), (at, second), *later = item.scene.captions
        assert (at, first, second) == (frame, before, after)
        assert all(start >= item.start + 81 for start, _ in later)
    pans = [item for item in shown if item.scene.segments[0].camera.panning]
    assert {item.start == 0 for item in pans} == {True, False}
    assert all(item.opens == (item.start == 0) for item in pans)
    short = config.replace(num_latent_frames=3)
    assert all(
        excerpt(short.replace(turns=turns), seed, 3, 4).opens for seed in range(20) for turns in (0.0, 1.0)
    )


def test_a_favoured_motion_is_drawn_twice() -> None:
    plain = LatentCacheConfig(num_latent_frames=21)
    favours = plain.replace(favoured_motion="orbiting")

    def orbits(config: LatentCacheConfig) -> list[bool]:
        scenes = (excerpt(config, seed, 1, 4).scene for seed in range(200))
        return [scene.segments[0].objects[0].motion == "orbiting" for scene in scenes]

    once, twice = orbits(plain), orbits(favours)
    assert all(second for first, second in zip(once, twice, strict=True) if first)
    share = sum(once) / 200
    assert abs(sum(twice) / 200 - (1 - (1 - share) ** 2)) < 0.08
    kept = next(seed for seed in range(200) if once[seed])
    assert excerpt(favours, kept, 1, 4) == excerpt(plain, kept, 1, 4)


def test_clips_of_turns_have_the_camera_turn_round() -> None:
    config = LatentCacheConfig(num_latent_frames=21, chunk_frames=3, turns=1.0)
    shown = [excerpt(config, seed, 3, 4) for seed in range(60)]
    pans = [item for item in shown if item.scene.segments[0].camera.panning]
    ends = set()
    for item in pans:
        camera = item.scene.segments[0].camera
        offsets = camera.offsets(np.arange(item.start, item.start + 81))
        (turns,) = np.nonzero(np.diff(np.sign(np.diff(offsets))))
        assert len(turns) in (1, 2)  # a step that holds the turn itself may have either sign
        assert 18 <= turns[0] <= 62
        ends.add(offsets[turns[0]] > camera.travel / 2)
        assert not item.opens
    assert ends == {True, False}


def test_fresh_clips_follow_from_the_generator() -> None:
    config = LatentCacheConfig(num_latent_frames=6, chunk_frames=2, levels=(2, 3), height=16, width=16)
    source, encoder = FreshClips(renderer(), config), clip_encoder()
    drawn, again = (source.draw(np.random.default_rng(5), 3) for _ in range(2))
    assert torch.equal(drawn.frames_bthwc, again.frames_bthwc)
    one = encoder.encode(drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as within a training step
        same = encoder.encode(again)
    assert torch.equal(one.latents_bfchw, same.latents_bfchw)
    assert one.prompts == same.prompts == drawn.prompts
    assert set(one.levels) <= {2, 3}
    assert encoder.encode(one) is one
    rng = np.random.default_rng(5)
    first, second = (encoder.encode(source.draw(rng, 3)) for _ in range(2))
    assert torch.equal(first.latents_bfchw, one.latents_bfchw)
    assert not torch.equal(first.latents_bfchw, second.latents_bfchw)


def test_a_cache_belongs_to_its_encoder(tmp_path: Path) -> None:
    config = LatentCacheConfig(num_clips=3, clips_per_shard=2, num_latent_frames=2, height=16, width=16)
    vae = TinyVAE(VAE).eval()
    build_cache(vae, config, tmp_path, "one")
    clips = load_cache(tmp_path)
    assert len(clips) == 3
    assert load_cache(tmp_path, 1).latents_bfchw.shape[1] == 1
    with pytest.raises(TrainingError, match="another folder"):
        build_cache(vae, config, tmp_path, "two")
    with pytest.raises(TrainingError, match="num_latent_frames=3"):
        load_cache(tmp_path, 3)
    with pytest.raises(TrainingError, match="caches latents first"):
        load_cache(tmp_path / "nowhere")

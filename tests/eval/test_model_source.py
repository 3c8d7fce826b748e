"""A streaming model as a source: any batch gives the same videos; the evaluation runs on it end to end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from longtake.eval.errors import EvalError
from longtake.eval.model import ModelSource, ceilings
from longtake.eval.runner import WorldEvalConfig
from longtake.eval.script import Chunking, Script
from longtake.eval.source import ReconstructionSource, TruthSource
from longtake.eval.world import run_world_eval
from longtake.models.tiny_vae import TinyVAE, TinyVAEConfig
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import PromptSwitch
from tiny_parts import FakeText, small_dit, small_pipeline

PROMPTS = [Script.of("a red circle bouncing on white"), Script.of("a blue star orbiting on sky")]


def world_sized_pipeline() -> Pipeline:
    """An untrained model of 64x64 pixels."""
    torch.manual_seed(0)
    vae = TinyVAE(
        TinyVAEConfig(latent_channels=3, encoder_widths=(8, 8), decoder_widths=(8, 8, 8), num_blocks=1)
    )
    vae.requires_grad_(False)
    config = small_pipeline().config.replace(height=64, width=64)
    dit = small_dit(mask_text=True, pooled_text=True, prediction="clean").requires_grad_(False)
    return Pipeline(dit, vae, FakeText().requires_grad_(False), config)


def test_streams_do_not_depend_on_their_batch() -> None:
    source = ModelSource(small_pipeline(), "tiny")
    together = np.concatenate(list(source.generate(PROMPTS, [3, 1 << 40], 20)), axis=1)
    assert together.shape[:2] == (2, 21)  # 1 + 4, then 8 a chunk
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [3, 1 << 40], strict=True)):
        alone = np.concatenate(list(source.generate([prompt], [seed], 20)), axis=1)[0]
        assert np.abs(alone.astype(int) - together[row]).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_each_stream_switches_its_prompt_at_its_own_chunk() -> None:
    source = ModelSource(small_pipeline(), "tiny")
    assert source.chunking == Chunking(first_frames=5, frames=8, window_frames=28)
    first, other = PROMPTS[0].prompts[0][1], PROMPTS[1].prompts[0][1]
    scripts = [Script(((0, first), (13, other))), Script(((0, first), (21, other))), Script.of(first)]
    switched = np.concatenate(list(source.generate(scripts, [3, 3, 3], 29)), axis=1).astype(int)
    for row, start in ((0, 13), (1, 21)):
        assert np.abs(switched[row, :start] - switched[2, :start]).max() <= 1
        assert np.abs(switched[row, start:] - switched[2, start:]).max() > 1
    kept = ModelSource(small_pipeline(), "tiny", PromptSwitch(text="", window="keep"))
    assert kept.about["switches"] != source.about["switches"]
    one, other_way = (np.concatenate(list(s.generate(scripts[:1], [3], 29)), axis=1) for s in (source, kept))
    assert np.array_equal(one[:, :13], other_way[:, :13])
    assert not np.array_equal(one[:, 13:], other_way[:, 13:])
    with pytest.raises(EvalError, match="use frame 21"):
        next(source.generate([Script(((0, first), (14, other)))], [3], 29))


def test_an_unlimited_window_has_room_for_the_whole_clip() -> None:
    pipeline = small_pipeline(window_frames=None)
    frames = [c.shape[1] for c in ModelSource(pipeline, "tiny").generate(PROMPTS, [0, 1], 50)]
    assert sum(frames) >= 50


def test_provenance_names_weights_and_settings() -> None:
    one, other = ModelSource(small_pipeline(0), "a"), ModelSource(small_pipeline(1), "a")
    assert one.about["weights"] != other.about["weights"]
    assert one.about["stream_config"] == other.about["stream_config"]
    guided = dataclasses.replace(small_pipeline(0), config=small_pipeline(0, guidance=2.0).config)
    assert ModelSource(guided, "a").about["stream_config"] != one.about["stream_config"]


def test_ceilings_are_chunked_like_the_model() -> None:
    pipeline = world_sized_pipeline()
    truth, coded = ceilings(pipeline, 1)
    assert isinstance(truth, TruthSource)
    assert isinstance(coded, ReconstructionSource)
    sizes = [chunk.shape[1] for chunk in ModelSource(pipeline, "m").generate(PROMPTS, [0, 1], 29)]
    assert sizes == [5, 8, 8, 8]
    assert [chunk.shape[1] for chunk in truth.generate(PROMPTS, [0, 1], 29)] == sizes
    assert [chunk.shape[1] for chunk in coded.generate(PROMPTS, [0, 1], 29)] == sizes
    assert len(ceilings(small_pipeline(), 1)) == 1  # a decoder alone has no reconstructions


def test_an_untrained_model_fails_the_bars(tmp_path: Path) -> None:
    pipeline = world_sized_pipeline()
    config = WorldEvalConfig(scenes=2, seconds=2, diversity_prompts=1, diversity_seeds=2)
    summary = run_world_eval(config, ModelSource(pipeline, "m"), ceilings(pipeline, 1), tmp_path)
    assert summary is not None
    assert set(summary.sources) == {"model", "truth", "vae"}
    assert not any(bar.met for bar in summary.bars)
    assert summary.sources["truth"].metrics["all_right"].value == 1
    assert summary.sources["model"].about["weights"] == pipeline.digest

"""Sources: real clips, reconstructions, a streaming model; contact sheets."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from longtake.eval.autoencoder import AutoencoderEvalConfig, evaluate_autoencoder
from longtake.eval.errors import EvalError
from longtake.eval.runner import FIRST_EVAL_SEED
from longtake.eval.script import Script
from longtake.eval.sheet import contact_sheet
from longtake.eval.source import ReconstructionSource, TruthSource
from longtake.world import render, sample_scene, scene_for_prompt

PROMPTS = ["a red circle bouncing on a blue sky", "a green star orbiting on grey"]
SCRIPTS = [Script.of(text) for text in PROMPTS]


class Lossy:
    """An autoencoder whose latents are the pixels, rounded to `step`; checks how it is called."""

    def __init__(self, step: float) -> None:
        self.step = step

    def init_encode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        return {"frames": torch.zeros(batch)}

    def init_decode_state(self, batch: int, height: int, width: int) -> dict[str, Tensor]:
        return {"frames": torch.zeros(batch)}

    def encode_chunk(
        self, frames_bthwc: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        first = float(state["frames"][0]) == 0
        assert (frames_bthwc.shape[1] - first) % 4 == 0
        assert frames_bthwc.abs().max() <= 1
        return (frames_bthwc / self.step).round() * self.step, {"frames": state["frames"] + 1}

    def decode_chunk(
        self, latents_bfchw: Tensor, state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return latents_bfchw, {"frames": state["frames"] + 1}


def test_real_clips_follow_prompt_and_seed_in_model_sized_chunks() -> None:
    chunks = list(TruthSource().generate(SCRIPTS, [5, 6], 30))
    assert [chunk.shape[1] for chunk in chunks] == [9, 12, 9]
    video = np.concatenate(chunks, axis=1)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6], strict=True)):
        np.testing.assert_array_equal(video[row], render(scene_for_prompt(prompt, seed), 0, 30))


def test_a_perfect_autoencoder_changes_nothing() -> None:
    source = ReconstructionSource(TruthSource(), Lossy(1e-6), 4, {"weights": "none"})
    chunks = list(source.generate(SCRIPTS, [5, 6], 30))
    assert sum(chunk.shape[1] for chunk in chunks) == 33  # the last latent frame is filled
    video = np.concatenate(chunks, axis=1)[:, :30]
    np.testing.assert_array_equal(video, np.concatenate(list(TruthSource().generate(SCRIPTS, [5, 6], 30)), 1))


def psnr_by_hand(step: float) -> float:
    """Mean PSNR of the three scenes that seed 0 of the held-out split gives, all frames at once."""
    values = []
    for seed in range(FIRST_EVAL_SEED, FIRST_EVAL_SEED + 3):
        prompt = sample_scene(seed, 1, "heldout").caption
        pixels = render(scene_for_prompt(prompt, seed), 0, 33).astype(np.float64)
        rounded = ((pixels / 127.5 - 1) / step).round() * step
        decoded = ((rounded + 1) * 127.5).clip(0, 255).round()
        values.append(10 * np.log10(255**2 / ((pixels - decoded) ** 2).mean()))
    return float(np.mean(values))


def test_the_autoencoder_bars() -> None:
    config = AutoencoderEvalConfig(scenes=3, seconds=2, batch=2)
    good = evaluate_autoencoder(config, ReconstructionSource(TruthSource(), Lossy(0.02), 4, {}))
    assert good.failed == ()
    assert good.psnr_db.value == pytest.approx(psnr_by_hand(0.02), abs=0.1)
    bad = evaluate_autoencoder(config, ReconstructionSource(TruthSource(), Lossy(1.2), 4, {}))
    assert bad.failed[0].startswith("PSNR")
    assert len(bad.failed) > 1  # the detectors lose attributes too


def test_contact_sheets_show_the_frames(tmp_path: Path) -> None:
    clips = [render(scene_for_prompt(prompt, 0), 0, 20) for prompt in PROMPTS]
    path = tmp_path / "sheet.png"
    contact_sheet(clips, path, columns=3, scale=2, gap=2)
    with av.open(str(path)) as file:
        picture = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert picture.shape == (2 * 130, 3 * 130, 3)
    np.testing.assert_array_equal(picture[130:258:2, 260:388:2], clips[1][19])
    contact_sheet(clips, path, columns=3, labels=PROMPTS)
    with av.open(str(path)) as file:
        labelled = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert labelled.shape == (2 * 146, 390, 3)
    assert labelled[:16].min() < 100  # letters
    with pytest.raises(EvalError, match="make no sheet"):
        contact_sheet([clips[0], clips[1][:, :32]], path)

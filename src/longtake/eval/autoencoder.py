"""How good a video autoencoder is: PSNR on real clips, and what detectors still read in reconstructions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from longtake.config import Config
from longtake.eval.meter import Meter
from longtake.eval.runner import FIRST_EVAL_SEED, SEEDS_APART
from longtake.eval.score import METRICS, PROPORTIONS, Scores, score
from longtake.eval.script import Script
from longtake.eval.stats import Estimate, estimate, paired_difference
from longtake.world import FPS, Split, sample_scene

if TYPE_CHECKING:
    from longtake.eval.source import (
        ReconstructionSource,  # which imports torch; a command's help does without
    )

DETECTED = ("present", "colour", "shape", "background", "size", "motion")
MIN_PSNR = 35.0
MAX_LOSS = 0.03
"""The bars: PSNR in dB, and how far a detector's score may fall below its score on real clips."""


class AutoencoderEvalConfig(Config):
    """An evaluation of an autoencoder.

    Attributes:
        level: World level of the scenes, 1 to 3.
        scenes: How many.
        seconds: Length of each clip.
        seed: Chooses the scenes, which no training seed reaches.
        split: "heldout" by default: combinations, speeds and wordings that training does not see.
        sample_every_frames: Every n-th frame goes to the detectors.
        batch: Clips coded together.
    """

    level: int = Field(1, ge=1, le=3)
    scenes: int = Field(64, ge=1)
    seconds: float = Field(5.0, ge=1.0)
    seed: int = Field(0, ge=0)
    split: Split = "heldout"
    sample_every_frames: int = Field(4, ge=1, le=6)
    batch: int = Field(8, ge=1)


class AutoencoderReport(Config):
    """Its result.

    Attributes:
        config: What was evaluated.
        about: Provenance.
        psnr_db: Mean over clips of each clip's PSNR.
        truth: Metrics of the real clips.
        reconstruction: The same of the reconstructions.
        difference: Reconstruction less truth, paired by clip.
        failed: The bars that are not met, as text; empty where all hold.
    """

    config: AutoencoderEvalConfig
    about: dict[str, str]
    psnr_db: Estimate
    truth: dict[str, Estimate]
    reconstruction: dict[str, Estimate]
    difference: dict[str, Estimate]
    failed: tuple[str, ...]


def evaluate_autoencoder(config: AutoencoderEvalConfig, source: ReconstructionSource) -> AutoencoderReport:
    """Codes real clips and scores both sides against the scenes' captions."""
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    seeds = [first + index for index in range(config.scenes)]
    num_frames = round(config.seconds * FPS)
    scripts = [
        Script(sample_scene(seed, config.level, config.split).captions).on(source.chunking, num_frames)
        for seed in seeds
    ]
    psnr: list[float | None] = []
    real: list[Scores] = []
    coded: list[Scores] = []
    for begin in range(0, config.scenes, config.batch):
        part = slice(begin, begin + config.batch)
        meters = [Meter(num_frames, config.sample_every_frames) for _ in range(2)]
        squares: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
        for pair in source.pairs(scripts[part], seeds[part], num_frames):
            for meter, chunk_bthwc in zip(meters, pair, strict=True):
                meter.feed(chunk_bthwc)
            difference = pair[0].astype(np.float32) - pair[1]
            squares.append((difference**2).mean(axis=(2, 3, 4), dtype=np.float64))
        mean_square_b = np.concatenate(squares, axis=1).mean(axis=1)
        psnr += [float(10 * np.log10(255**2 / max(value, 1e-10))) for value in mean_square_b]
        for listed, meter in zip((real, coded), meters, strict=True):
            for script, measured in zip(scripts[part], meter.results(), strict=True):
                listed.append(score(measured, script, num_frames, source.chunking)[0])
    lost = {
        metric: paired_difference([item[metric] for item in coded], [item[metric] for item in real])
        for metric in METRICS
    }
    report = AutoencoderReport(
        config=config,
        about=source.about,
        psnr_db=estimate(psnr),
        truth=_estimates(real),
        reconstruction=_estimates(coded),
        difference=lost,
        failed=(),
    )
    return report.replace(failed=_failed(report))


def _estimates(scores: list[Scores]) -> dict[str, Estimate]:
    return {
        metric: estimate([item[metric] for item in scores], proportion=metric in PROPORTIONS)
        for metric in METRICS
    }


def _failed(report: AutoencoderReport) -> tuple[str, ...]:
    failed = []
    psnr = report.psnr_db.value
    if psnr is None or psnr < MIN_PSNR:
        failed.append(f"PSNR {psnr:.2f} dB < {MIN_PSNR:g}" if psnr is not None else "PSNR unknown")
    for metric in DETECTED:
        if report.truth[metric].value is None:
            continue  # what real clips do not show, such as the motion under a panning camera
        loss = report.difference[metric].value
        if loss is None or loss < -MAX_LOSS:
            failed.append(f"{metric} {loss:+.3f}" if loss is not None else f"{metric} unknown")
    return tuple(failed)

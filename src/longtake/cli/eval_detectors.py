"""``longtake eval detectors``: how often the detectors are right where truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import config_of, print_estimates, write_report
from longtake.config import Config


class Arguments(Config):
    """Measure the world's detectors on rendered, H.264-coded and degraded frames.

    Attributes:
        level: world level of the scenes.
        scenes: how many.
        seconds: length of each clip.
        seed: chooses the scenes.
        out: file for the report, as JSON.
        sample_every_frames: every n-th frame is judged.
        height: rows of the frames; they are square.
    """

    level: Literal[1, 2, 3] = 1
    scenes: int = Field(200, ge=1)
    seconds: float = Field(5.0, ge=2.0)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-detectors.json")
    sample_every_frames: int = Field(4, ge=1, le=6)
    height: int = Field(64, ge=32)


def run(arguments: Arguments) -> int:
    """Evaluate; returns the exit code."""
    from longtake.eval.detectors import DetectorEvalConfig, evaluate_detectors

    report = evaluate_detectors(config_of(DetectorEvalConfig, arguments))
    write_report(report, arguments.out)
    print_estimates(report.accuracy)
    print(f"report: {arguments.out}")
    return 0

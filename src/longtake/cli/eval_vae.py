"""``longtake eval vae``: what a model's autoencoder loses."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import config_of, print_estimates, write_report
from longtake.config import Config
from longtake.errors import UsageError


class Arguments(Config):
    """Score a model's autoencoder on real clips: PSNR, and what the detectors still read after it.

    Attributes:
        level: world level of the scenes.
        scenes: how many.
        seconds: length of each clip.
        seed: chooses the scenes, which no training seed reaches.
        out: file for the report, as JSON.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        split: scenes that training does not see, those it may see, or any.
        sample_every_frames: every n-th frame goes to the detectors.
        batch: clips coded together.
    """

    level: Literal[1, 2, 3] = 1
    scenes: int = Field(64, ge=1)
    seconds: float = Field(5.0, ge=1.0)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-vae.json")
    model_path: str = "tiny"
    split: Literal["train", "heldout", "any"] = "heldout"
    sample_every_frames: int = Field(4, ge=1, le=6)
    batch: int = Field(8, ge=1)


def run(arguments: Arguments) -> int:
    """Evaluate; returns the exit code, 0 whether or not the bars are met."""
    from longtake.eval.autoencoder import AutoencoderEvalConfig, evaluate_autoencoder
    from longtake.eval.model import ceilings
    from longtake.eval.source import ReconstructionSource
    from longtake.stream.bundle import load_model

    model = load_model(arguments.model_path)
    found = [s for s in ceilings(model.pipeline, arguments.level) if isinstance(s, ReconstructionSource)]
    if not found:
        raise UsageError(f"the model {arguments.model_path!r} has no encoder", "give a model that has one")
    report = evaluate_autoencoder(config_of(AutoencoderEvalConfig, arguments), found[0])
    write_report(report, arguments.out)
    print_estimates(
        {"truth": report.truth, "reconstruction": report.reconstruction, "difference": report.difference}
    )
    print_estimates({"all clips": {"psnr_db": report.psnr_db}})
    print("bars not met: " + "; ".join(report.failed) if report.failed else "all bars met")
    print(f"report: {arguments.out}")
    return 0

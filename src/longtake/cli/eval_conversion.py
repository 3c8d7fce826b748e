"""``longtake eval conversion``: what a model loses at one rank after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import Field

from longtake.cli.evaluation import make_directory, tell, write_report
from longtake.config import Config


class Arguments(Config):
    """Convert a dense model to latent attention at one rank after another, each with one rank for all layers
    and with ranks chosen for every layer at the same bytes, and draw what the untuned network's flow is off
    by against the bytes of its cache. conversion.json and conversion.png go into the output directory.

    Attributes:
        source: name of a dense model that `longtake models` lists, or path of one of our files.
        ranks: one for all layers.
        max_losses: shares of keys and values that no layer may lose: ranks are chosen for each.
        rope_keys: beside one key that heads share of each band so many, with ranks chosen for every layer at
            the same bytes.
        stored_rank: whose latents are stored in 8 and in 4 bits as well; None for none.
        method: as `longtake convert` has it.
        num_streams: of the dense model, that the flow is judged on.
        num_chunks: of each.
        num_tokens: of every layer, that conversions are fitted to and measured with.
        seed: of noise and choices.
        out: directory for what is written; it is created.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    ranks: tuple[int, ...] = (8, 16, 24, 32, 48, 64, 96)
    max_losses: tuple[float, ...] = (0.2, 0.1, 0.05)
    rope_keys: tuple[int, ...] = ()
    stored_rank: int | None = Field(32, ge=1)
    method: Literal["svd", "covariance", "random"] = "covariance"
    num_streams: int = Field(8, ge=1)
    num_chunks: int = Field(6, ge=1)
    num_tokens: int = Field(24576, ge=1)
    seed: int = Field(0, ge=0)
    out: Path = Path("outputs/eval-conversion")


def run(arguments: Arguments) -> int:
    """Evaluate; returns the exit code."""
    from longtake.convert.settings import ConvertConfig
    from longtake.convert.sweep import SweepConfig, draw, heading, run_sweep
    from longtake.io.plot import pyplot
    from longtake.stream.bundle import resolve_model

    pyplot()  # a missing package is told before the work, not after
    config = SweepConfig(
        ranks=arguments.ranks,
        max_losses=arguments.max_losses,
        rope_keys=arguments.rope_keys,
        stored_rank=arguments.stored_rank,
        num_streams=arguments.num_streams,
        num_chunks=arguments.num_chunks,
        conversion=ConvertConfig(
            method=arguments.method, num_tokens=arguments.num_tokens, seed=arguments.seed
        ),
    )
    make_directory(arguments.out)
    tell(heading())
    report = run_sweep(resolve_model(arguments.source), config, tell)
    write_report(report, arguments.out / "conversion.json")
    draw(report, arguments.out / "conversion.png")
    print(f"report: {arguments.out / 'conversion.json'}")
    return 0

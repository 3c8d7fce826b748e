"""What the ``longtake bench`` commands share: arguments, a model to measure, the printed bars."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from longtake.cli.evaluation import check_writable
from longtake.config import Config

if TYPE_CHECKING:
    from longtake.stream.bundle import LoadedModel


class BenchArguments(Config):
    """What every benchmark of a model asks for.

    Attributes:
        out: file for the report, as JSON.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        prompt: of the streams.
        seed: of their noise.
        num_pairs: chunks of either of two streams that take turns.
        threads: CPU threads; torch's choice where it is left out.
    """

    out: Path = Path("outputs/bench.json")
    model_path: str = "tiny"
    prompt: str = Field("a red circle bouncing on a blue sky", min_length=1)
    seed: int = Field(0, ge=0)
    num_pairs: int = Field(100, ge=1)
    threads: int | None = Field(None, ge=1)


def prepare(arguments: BenchArguments) -> LoadedModel:
    """The model, loaded, once the report is known to have a place and torch has its threads."""
    import torch

    from longtake.stream.bundle import load_model

    check_writable(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return load_model(arguments.model_path)


def write(report: Mapping[str, Any], out: Path) -> None:
    """The report as JSON."""
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def print_bars(bars: Sequence[Mapping[str, Any]], out: Path, form: str = ".4g") -> None:
    """One line for each bar, and where the report is; `form` of measured numbers."""
    width = max(len(bar["what"]) for bar in bars)
    for bar in bars:
        measured = "-" if bar["measured"] is None else format(bar["measured"], form)
        verdict = "met" if bar["met"] else "NOT met"
        print(f"  {bar['what']:<{width}} {measured:>10} {bar['required']:>10}  {verdict}")
    print(f"report: {out}")

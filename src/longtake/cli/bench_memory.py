"""``longtake bench memory``: what a learned memory costs."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from longtake.cli.evaluation import check_writable, tell
from longtake.config import Config


class Arguments(Config):
    """Compare a model with its memory and without, at the same window: FLOPs counted, time measured by turns.

    A model without memory is timed with an untrained one. Also counted: settings at Wan2.1-1.3B's size, the
    paper's among them. Close other programs first.

    Attributes:
        out: file for the report, as JSON.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        prompt: of the streams.
        seed: of their noise.
        num_pairs: chunks with and without the memory that take turns.
        threads: CPU threads; torch's choice where it is left out.
    """

    out: Path = Path("outputs/bench-memory.json")
    model_path: str = "tiny"
    prompt: str = Field("a red circle bouncing on a blue sky", min_length=1)
    seed: int = Field(0, ge=0)
    num_pairs: int = Field(100, ge=1)
    threads: int | None = Field(None, ge=1)


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    import torch

    from longtake.bench.memory import MemoryBenchConfig, run_memory_bench
    from longtake.stream.bundle import load_model

    check_writable(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model_path)
    config = MemoryBenchConfig(prompt=arguments.prompt, seed=arguments.seed, num_pairs=arguments.num_pairs)
    report = run_memory_bench(config, model.pipeline, str(model.path), tell)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("counted at Wan2.1-1.3B's size, over a chunk without memory:")
    for name, row in report["counted"]["wan_1_3b"].items():
        print(
            f"  {name:<28} {row['tokens']:>5} tokens  {row['share']:>7.2%}  "
            f"(keys {row['keys']:.2%}, read {row['read']:.2%}, update {row['update']:.2%})"
        )
    kind = "its own memory" if report["model"]["trained_memory"] else "an untrained memory"
    print(f"{arguments.model_path} with {kind}: counted {report['counted']['model']['share']:.2%}")
    for name, times in report["time"].items():
        quartiles = times["ratio_within_pairs"]["quartiles"]
        print(
            f"  time of {name}: {times['ratio_of_medians'] - 1:+.2%} "
            f"(within pairs {quartiles[0] - 1:+.2%} to {quartiles[1] - 1:+.2%})"
        )
    for bar in report["bars"]:
        print(
            f"  {bar['what']:<56} {bar['measured']:>8.2%} {bar['required']:>8}  "
            f"{'met' if bar['met'] else 'NOT met'}"
        )
    print(f"report: {arguments.out}")
    return 0

"""``longtake bench memory``: what a learned memory costs."""

from __future__ import annotations

from pathlib import Path

from longtake.cli.benchmark import BenchArguments, prepare, print_bars, write
from longtake.cli.evaluation import tell


class Arguments(BenchArguments):
    """Compare a model with its memory and without, at the same window: FLOPs counted, time measured by turns.

    A model without memory is timed with an untrained one. Also counted: settings at Wan2.1-1.3B's size, the
    paper's among them. Close other programs first.
    """

    out: Path = Path("outputs/bench-memory.json")


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    from longtake.bench.memory import MemoryBenchConfig, run_memory_bench

    model = prepare(arguments)
    config = MemoryBenchConfig(prompt=arguments.prompt, seed=arguments.seed, num_pairs=arguments.num_pairs)
    report = run_memory_bench(config, model.pipeline, str(model.path), tell)
    write(report, arguments.out)
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
    print_bars(report["bars"], arguments.out, ".2%")
    return 0

"""``longtake bench cpu``: speed and memory of a model on this machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from longtake.cli.benchmark import BenchArguments, prepare, print_bars, write
from longtake.cli.evaluation import config_of, tell


class Arguments(BenchArguments):
    """Measure speed and memory of a model on this machine's CPU, from text to encoded file.

    The far stream has the seed, the fresh one the next. The report tells the rate, whether the far chunk of a
    long video costs what an early one does, whether memory grows, and how long the first frame takes, each
    against what is required. Close other programs first.

    Attributes:
        far_chunk: the chunk that is compared with one whose window has just filled.
        num_starts: launches of the command, for the time to the first frame.
    """

    out: Path = Path("outputs/bench-cpu.json")
    far_chunk: int = Field(2000, ge=1)
    num_starts: int = Field(3, ge=1)


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    from longtake.bench.cpu import CpuBenchConfig, run_cpu_bench

    model = prepare(arguments)
    config = config_of(CpuBenchConfig, arguments)
    report = run_cpu_bench(config, model.pipeline, str(model.path), arguments.threads, tell)
    write(report, arguments.out)
    long_run, start = report["long_run"], report["start"]
    size = f"{model.pipeline.config.width}x{model.pipeline.config.height}"
    print(
        f"{report['environment']['cpu']}, {report['environment']['torch_threads']} threads, {size}: "
        f"{long_run['frames_per_second']:.1f} FPS from text to file, "
        f"chunk p50 {long_run['chunk_seconds_p50']:.4f} s, p95 {long_run['chunk_seconds_p95']:.4f} s, "
        f"encoding {long_run['encode_and_write_share']:.1%}; "
        f"first frame after {start['time_to_first_frame_seconds']['median']:.2f} s, "
        f"of which the import of torch {start['import_seconds']['median']:.2f} s"
    )
    print_bars(report["bars"], arguments.out)
    return 0

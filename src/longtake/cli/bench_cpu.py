"""``longtake bench cpu``: speed and memory of a model on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from longtake.cli.evaluation import check_writable, config_of, tell
from longtake.config import Config


class Arguments(Config):
    """Measure speed and memory of a model on this machine's CPU, from text to encoded file.

    The report tells the rate, whether the far chunk of a long video costs what an early one does, whether
    memory grows, and how long the first frame takes, each against what is required. Close other programs
    first.

    Attributes:
        out: file for the report, as JSON.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        prompt: of every stream.
        seed: of the far stream; the fresh one has the next.
        far_chunk: the chunk that is compared with one whose window has just filled.
        num_pairs: chunks of either stream in that comparison, which take turns.
        num_starts: launches of the command, for the time to the first frame.
        threads: CPU threads; torch's choice where it is left out.
    """

    out: Path = Path("outputs/bench-cpu.json")
    model_path: str = "tiny"
    prompt: str = Field("a red circle bouncing on a blue sky", min_length=1)
    seed: int = Field(0, ge=0)
    far_chunk: int = Field(2000, ge=1)
    num_pairs: int = Field(100, ge=1)
    num_starts: int = Field(3, ge=1)
    threads: int | None = Field(None, ge=1)


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    import torch

    from longtake.bench.cpu import CpuBenchConfig, run_cpu_bench
    from longtake.stream.bundle import load_model

    check_writable(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model_path)
    config = config_of(CpuBenchConfig, arguments)
    report = run_cpu_bench(config, model.pipeline, str(model.path), arguments.threads, tell)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
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
    for bar in report["bars"]:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.4g}"
        print(
            f"  {bar['what']:<66} {measured:>10} {bar['required']:>10}  {'met' if bar['met'] else 'NOT met'}"
        )
    print(f"report: {arguments.out}")
    return 0

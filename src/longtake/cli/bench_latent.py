"""``longtake bench latent``: what latent attention saves and costs."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from longtake.cli.evaluation import check_writable, tell
from longtake.config import Config


class Arguments(Config):
    """Compare latent attention with dense: bytes and FLOPs counted at Wan2.1-1.3B's size, bytes measured on
    real allocations, time measured on a model's streams by turns.

    A dense model is timed beside itself with untrained latent attention, and the other way round: time does
    not depend on weights. Close other programs first.

    Attributes:
        out: file for the report, as JSON.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        prompt: of the streams.
        seed: of their noise.
        num_pairs: dense and latent chunks that take turns.
        threads: CPU threads; torch's choice where it is left out.
    """

    out: Path = Path("outputs/bench-latent.json")
    model_path: str = "tiny"
    prompt: str = Field("a red circle bouncing on a blue sky", min_length=1)
    seed: int = Field(0, ge=0)
    num_pairs: int = Field(100, ge=1)
    threads: int | None = Field(None, ge=1)


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    import torch

    from longtake.bench.latent import LatentBenchConfig, run_latent_bench
    from longtake.stream.bundle import load_model

    check_writable(arguments.out)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model_path)
    config = LatentBenchConfig(prompt=arguments.prompt, seed=arguments.seed, num_pairs=arguments.num_pairs)
    report = run_latent_bench(config, model.pipeline, str(model.path), tell)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("counted at Wan2.1-1.3B's size, 480x832, a chunk of 3 frames in four steps:")
    print("  window   PFLOP: dense expand absorbed   GB of cache: dense latent int4   streams in 80 GB")
    for row in report["wan_1_3b"]:
        flops, cache, streams = row["flops"], row["cache_bytes"], row["streams_without_decoder_state"]
        print(
            f"  {row['window_frames']:>6}   {flops['dense'] / 1e15:>12.3f} {flops['expand'] / 1e15:>6.3f} "
            f"{flops['absorbed'] / 1e15:>8.3f}   {cache['dense'] / 1e9:>18.3f} {cache['latent'] / 1e9:>6.3f} "
            f"{cache['latent, int4'] / 1e9:>4.3f}   {streams['dense']} / {streams['latent']} by cache alone, "
            f"{row['streams']['dense']} / {row['streams']['latent']} with the decoder's state"
        )
    times = report["time"]
    quartiles = times["ratio_within_pairs"]["quartiles"]
    print(
        f"time of latents, {arguments.model_path}: {times['ratio_of_medians']:.3f} of dense "
        f"(within pairs {quartiles[0]:.3f} to {quartiles[1]:.3f})"
    )
    for bar in report["bars"]:
        print(
            f"  {bar['what']:<48} {bar['measured']:>9.3f} {bar['required']:>8}  "
            f"{'met' if bar['met'] else 'NOT met'}"
        )
    print(f"report: {arguments.out}")
    return 0

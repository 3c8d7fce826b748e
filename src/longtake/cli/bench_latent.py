"""``longtake bench latent``: what latent attention saves and costs."""

from __future__ import annotations

from pathlib import Path

from longtake.cli.benchmark import BenchArguments, prepare, print_bars, write
from longtake.cli.evaluation import tell


class Arguments(BenchArguments):
    """Compare latent attention with dense: bytes and FLOPs counted at Wan2.1-1.3B's size, bytes measured on
    real allocations, time measured on a model's streams by turns.

    A dense model is timed beside itself with untrained latent attention, and the other way round: time does
    not depend on weights. Close other programs first.
    """

    out: Path = Path("outputs/bench-latent.json")


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code, 0 whether or not the bars are met."""
    from longtake.bench.latent import LatentBenchConfig, run_latent_bench

    model = prepare(arguments)
    config = LatentBenchConfig(prompt=arguments.prompt, seed=arguments.seed, num_pairs=arguments.num_pairs)
    report = run_latent_bench(config, model.pipeline, str(model.path), tell)
    write(report, arguments.out)
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
    for name, row in report["memory"].items():
        measured = row.get("time")
        time = ""
        if measured is not None:
            time = f"; time here, of a single frame: {measured['ratio_of_medians'] - 1:+.1%} over none"
        print(
            f"  a memory of three frames read as {name}: {row['share']:.1%} more FLOPs at a window of 12, "
            f"{row['segment_bytes'] / 1e6:.1f} MB{time}"
        )
    times = report["time"]
    quartiles = times["ratio_within_pairs"]["quartiles"]
    print(
        f"time of latents, {arguments.model_path}: {times['ratio_of_medians']:.3f} of dense "
        f"(within pairs {quartiles[0]:.3f} to {quartiles[1]:.3f})"
    )
    print_bars(report["bars"], arguments.out, ".3f")
    return 0

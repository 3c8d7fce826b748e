"""``longtake bench wan``: time and memory of a chunk at Wan2.1-1.3B's size on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.benchmark import write
from longtake.cli.evaluation import check_writable, tell
from longtake.config import Config


class Arguments(Config):
    """Measure a chunk at Wan2.1-1.3B's size, 480x832, with untrained weights: dense and latent attention by
    window, and what a memory adds.

    Takes a minute or two on a GPU with 24 GB or more, and hours on a CPU. Close other programs first.

    Attributes:
        out: file for the report, as JSON.
        device: where to measure.
        windows: latent frames, current chunk included.
        memories: settings of a memory by name, as `longtake bench memory` counts them; all where left out.
        num_chunks: of which the median counts.
    """

    out: Path = Path("outputs/bench-wan.json")
    device: Literal["cuda", "cpu"] = "cuda"
    windows: tuple[int, ...] = (7, 12, 21, 63)
    memories: tuple[str, ...] | None = None
    num_chunks: int = Field(3, ge=1)


def run(arguments: Arguments) -> int:
    """Measure; returns the exit code.

    Raises:
        ConfigError: there is no such device here, or no such memory.
    """
    import torch

    from longtake.bench.wan import WanBenchConfig, run_wan_bench
    from longtake.errors import ConfigError

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch sees no such device here", "use --device cpu")
    config = WanBenchConfig(windows=arguments.windows, num_chunks=arguments.num_chunks)
    if arguments.memories is not None:
        config = config.replace(memories=arguments.memories)
    check_writable(arguments.out)
    report = run_wan_bench(
        config, torch.device(arguments.device), tell, save=lambda report: write(report, arguments.out)
    )
    print(f"a chunk of 3 frames in four steps, {report['device']}:")
    print("                                    seconds   cache   peak beside weights")
    for row in report["cases"]:
        if row["seconds"] is None:
            print(f"  {row['case']:<34} does not fit")
            continue
        peak = row["peak_bytes_beside_weights"]
        shown = "" if peak is None else f"{peak / 1e9:12.2f} GB"
        print(f"  {row['case']:<34} {row['seconds']:6.3f}  {row['cache_bytes'] / 1e9:5.2f} GB {shown}")
    print(f"report: {arguments.out}")
    return 0

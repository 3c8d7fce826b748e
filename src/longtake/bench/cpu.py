"""The CPU benchmark: is the video made faster than it plays, at constant cost, in constant memory?

Four measurements of one model, each a part of the report:

- start: the command itself, in processes of its own, from launch to the first frame in the file;
- long run: one stream from text to encoded file, to a far chunk: rate, chunk times, resident memory;
- constant cost: a stream whose window has just filled and the far one take turns, so that both see the same
machine; - allocations: how often the memory allocator is asked in one chunk of each of the two.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any, Final

from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from longtake.bench.meter import DurationHistogram, resident_bytes
from longtake.bench.turns import Tell, TurnsConfig, bar, full_window_chunk, head, measure_pairs, spread
from longtake.errors import ConfigError, UsageError
from longtake.io.video import VideoConfig, open_video
from longtake.stream.pipeline import Pipeline
from longtake.stream.session import Stream

MIN_REAL_TIME_FACTOR: Final = 3.0
MAX_COST_RATIO: Final = 1.02
MAX_GROWTH_BYTES: Final = 1_000_000
MAX_START_SECONDS: Final = 2.0

RESIDENT_CHUNKS: Final = 100
"""Resident memory is read after this many chunks at either end of the long run, and medians are compared: the
C library hands freed memory back now and then, which moves single readings by some megabytes up and down."""


class CpuBenchConfig(TurnsConfig):
    """What to measure. The far stream has `seed`, the fresh one the next.

    Attributes:
        far_chunk: index of the chunk that is compared with one whose window has just filled.
        num_starts: launches of the command.
    """

    far_chunk: int = Field(2000, ge=1)
    num_starts: int = Field(3, ge=1)


def run_cpu_bench(
    config: CpuBenchConfig, pipeline: Pipeline, model: str, threads: int | None, tell: Tell
) -> dict[str, Any]:
    """All measurements, as a report ready for JSON.

    Args:
        config: what to measure.
        pipeline: the model, loaded.
        model: what ``--model-path`` takes to load it in the processes that are launched.
        threads: CPU threads of these processes; None leaves it to torch. This one has them set already.
        tell: given a line about what is measured next.

    Raises:
        ConfigError: a window without limit, or a far chunk before the window is full.
    """
    full = full_window_chunk(pipeline)
    if config.far_chunk <= full:
        raise ConfigError(f"far_chunk={config.far_chunk}: the window is full at {full}", "choose a later one")
    tell(f"start: {config.num_starts} launches")
    start = measure_start(config, model, threads)
    tell(f"long run: {config.far_chunk} chunks")
    far, long_run = measure_long_run(config, pipeline, full, tell)
    tell(f"constant cost: {config.num_pairs} pairs of chunks {full} and {config.far_chunk} onwards")
    near = Stream(pipeline, config.prompt, config.seed + 1)
    for _ in range(full):
        next(near)
    cost = measure_pairs(near, far, config.num_pairs)
    tell("allocations: one chunk of each")
    counts = {"just_full": count_allocations(near), "far": count_allocations(far)}
    report = {
        **head(config, pipeline, model, stream=pipeline.config.model_dump(mode="json")),
        "start": start,
        "long_run": long_run,
        "constant_cost": {"just_full_chunk": full, "far_chunk": config.far_chunk, **cost},
        "allocations": {**counts, "equal": counts["just_full"] == counts["far"]},
    }
    return {**report, "bars": bars(report)}


def measure_start(config: CpuBenchConfig, model: str, threads: int | None) -> dict[str, Any]:
    """Seconds from the launch of ``longtake generate`` to its first frame in the file, and of what they
    consist.

    Raises:
        UsageError: the command failed; with its own line.
    """
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        metrics = Path(directory) / "metrics.json"
        command = [
            sys.executable,
            "-m",
            "longtake",
            "generate",
            "--prompt",
            config.prompt,
            "--model-path",
            model,
        ]
        command += ["--num-frames", "9", "--output-path", f"{directory}/out.mp4", "--metrics", str(metrics)]
        command += [] if threads is None else ["--threads", str(threads)]
        for _ in range(config.num_starts):
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                raise UsageError(f"the command failed: {result.stderr.strip()}", "run it by itself")
            runs.append(json.loads(metrics.read_text(encoding="utf-8")))
    names = (
        "time_to_first_frame_seconds",
        "import_seconds",
        "first_frame_beyond_import_seconds",
        "load_seconds",
        "first_chunk_seconds",
    )
    return {name: spread([run[name] for run in runs]) for name in names}


def measure_long_run(
    config: CpuBenchConfig, pipeline: Pipeline, full: int, tell: Tell
) -> tuple[Stream, dict[str, Any]]:
    """Stream to the far chunk, from text to encoded file. Returns the stream, which is there, and the
    figures."""
    stream = Stream(pipeline, config.prompt, config.seed)
    chunk_seconds, write_seconds = DurationHistogram(), DurationHistogram()
    early: list[int] = []
    late: deque[int] = deque(maxlen=RESIDENT_CHUNKS)
    tenth = max(1, config.far_chunk // 10)
    num_frames = 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "out.mp4"
        writer = open_video(path, VideoConfig(fps=pipeline.config.fps))
        with writer:
            began = before = time.perf_counter()
            for index in range(config.far_chunk):
                frames = next(stream).frames
                assert frames is not None, "the stream was asked to decode"
                made = time.perf_counter()
                writer.write(frames)
                now = time.perf_counter()
                if index < full:
                    began = now
                else:
                    num_frames += len(frames)
                    chunk_seconds.add(now - before)
                    write_seconds.add(now - made)
                found = resident_bytes()
                # The first full chunk still allocates what later ones reuse.
                if found is not None and index > full:
                    if len(early) < RESIDENT_CHUNKS:
                        early.append(found)
                    late.append(found)
                if index % tenth == 0:
                    tell(f"  chunk {index}")
                before = time.perf_counter()
            elapsed = before - began
            file_bytes = path.stat().st_size
    rate = num_frames / elapsed
    growth = statistics.median(late) - statistics.median(early) if early else None
    return stream, {
        "chunks": chunk_seconds.count,
        "frames_per_second": rate,
        "real_time_factor": rate / pipeline.config.fps,
        "chunk_seconds_p50": chunk_seconds.quantile(0.5),
        "chunk_seconds_p95": chunk_seconds.quantile(0.95),
        "encode_and_write_share": write_seconds.total_seconds / chunk_seconds.total_seconds,
        "cache_bytes": stream.cache_bytes,
        "resident_bytes_early": spread(early) if early else None,
        "resident_bytes_late": spread(late) if late else None,
        "resident_growth_bytes": growth,
        "file_bytes": file_bytes,
    }


def count_allocations(stream: Stream) -> dict[str, int]:
    """Requests to the tensor allocator and their bytes during the stream's next chunk."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        next(stream)
    # The raw events: profiler.events() folds those inside an operator into that operator.
    assert profiler.profiler is not None
    raw = profiler.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in raw if event.name() == "[memory]" and event.nbytes() > 0]
    return {"count": len(sizes), "bytes": sum(sizes)}


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is required, what was measured, and whether it suffices."""
    long_run, allocations = report["long_run"], report["allocations"]
    return [
        bar(
            "real-time factor, text to encoded file",
            long_run["real_time_factor"],
            MIN_REAL_TIME_FACTOR,
            at_least=True,
        ),
        bar(
            "far chunk's time / just full one's", report["constant_cost"]["ratio_of_medians"], MAX_COST_RATIO
        ),
        bar(
            "far chunk's allocations - just full one's",
            allocations["far"]["count"] - allocations["just_full"]["count"],
            0,
        ),
        bar("growth of resident memory, bytes", long_run["resident_growth_bytes"], MAX_GROWTH_BYTES),
        bar(
            "seconds to the first frame in the file beyond the import of torch",
            report["start"]["first_frame_beyond_import_seconds"]["median"],
            MAX_START_SECONDS,
        ),
    ]

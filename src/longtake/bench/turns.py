"""What the benchmarks of a model share: streams that take turns, the head of a report, bars.

Two streams are compared chunk by chunk in one run, so that both see the same machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

from pydantic import Field

from longtake.bench.meter import environment
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.stream.pipeline import Pipeline
from longtake.stream.session import Stream

Tell = Callable[[str], None]
"""Given a line about what is measured next."""


class TurnsConfig(Config):
    """Streams that take turns.

    Attributes:
        prompt: of the streams. ``seed``: of their noise.
        num_pairs: chunks of either stream.
    """

    prompt: str = Field("a red circle bouncing on a blue sky", min_length=1)
    seed: int = Field(0, ge=0)
    num_pairs: int = Field(100, ge=1)


def full_window_chunk(pipeline: Pipeline) -> int:
    """Index of the first chunk that sees a full window.

    Raises:
        ConfigError: the window has no limit.
    """
    history = pipeline.config.history
    if history.window_frames is None:
        raise ConfigError(
            "the model's window has no limit, so its cost grows", "choose a model with a window"
        )
    return math.ceil(history.window_frames / history.chunk_frames) - 1


def measure_alternatives(
    config: TurnsConfig,
    plain: Pipeline,
    other: Pipeline,
    names: tuple[str, str],
    *,
    decode: bool = False,
) -> dict[str, Any]:
    """`measure_pairs` of one stream of each pipeline, from where both see a full window.

    Raises:
        ConfigError: a window without limit.
    """
    first, second = (
        Stream(pipeline, config.prompt, config.seed, decode=decode) for pipeline in (plain, other)
    )
    for stream in (first, second):
        for _ in range(full_window_chunk(other) + 2):
            next(stream)
    return measure_pairs(first, second, config.num_pairs, names)


def measure_pairs(
    near: Stream, far: Stream, num_pairs: int, names: tuple[str, str] = ("just_full", "far")
) -> dict[str, Any]:
    """Chunk times of two streams that take turns, and how the second compares with the first.

    The order changes with every pair, so that neither always finds the other's data in the processor's
    caches.
    """
    first, second = names
    seconds: dict[str, list[float]] = {first: [], second: []}
    for pair in range(num_pairs):
        turns = [(first, near), (second, far)]
        for name, stream in reversed(turns) if pair % 2 else turns:
            began = time.perf_counter()
            next(stream)
            seconds[name].append(time.perf_counter() - began)
    return {
        f"{first}_seconds": spread(seconds[first]),
        f"{second}_seconds": spread(seconds[second]),
        "ratio_of_medians": statistics.median(seconds[second]) / statistics.median(seconds[first]),
        "ratio_within_pairs": spread([b / a for a, b in zip(seconds[first], seconds[second], strict=True)]),
    }


def spread(values: Collection[float]) -> dict[str, Any]:
    """Median, quartiles, extremes and number of values."""
    low, _, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (min(values),) * 3
    )
    return {
        "median": statistics.median(values),
        "quartiles": [low, high],
        "range": [min(values), max(values)],
        "num": len(values),
    }


def head(config: Config, pipeline: Pipeline, model: str, **about: object) -> dict[str, Any]:
    """How a report begins: settings, machine, and the model with what else is said of it."""
    return {
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "model": {"path": model, "weights_sha256": pipeline.digest, **about},
    }


def bar(what: str, measured: float | None, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    """What is required, what was measured, and whether it suffices; what could not be measured does not."""
    met = measured is not None and (measured >= limit if at_least else measured <= limit)
    return {
        "what": what,
        "required": f"{'>=' if at_least else '<='} {limit:g}",
        "measured": measured,
        "met": met,
    }

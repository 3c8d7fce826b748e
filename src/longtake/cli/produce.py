"""The loop of ``longtake generate``: chunks from a stream into a video, with progress and orderly
interruption."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Final, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from longtake.bench.meter import GenerationMeter
from longtake.io.video import Frames, FrameWriter

_LOG_EVERY_SECONDS: Final = 30.0  # where standard error is no terminal


class FrameSource(Protocol):
    """What the loop asks of a stream."""

    @property
    def cache_bytes(self) -> int:
        """Bytes of everything that the stream keeps between chunks."""

    def next_frames(self) -> Frames:
        """The next chunk's frames, uint8 [t, h, w, 3]."""

    def set_prompt(self, text: str) -> None:
        """Change the prompt from the next chunk on."""


@dataclass(frozen=True)
class Plan:
    """What to make.

    Attributes:
        num_frames: length of the video; None never ends.
        switches: (frame, prompt) in ascending order: the first chunk that begins at or after the frame has
            the prompt.
        fps: playback rate, frames per second.
    """

    num_frames: int | None
    switches: tuple[tuple[int, str], ...]
    fps: float


class StopRequest:
    """Becomes set by SIGINT or SIGTERM, so that the chunk in progress is finished first; a second one
    interrupts it.

    Attributes:
        signal_number: the signal that came first, or None.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals over for the duration of the block; only the main thread may."""
        watched = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._received) for number in watched}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number


def produce(
    source: FrameSource,
    writer: FrameWriter,
    plan: Plan,
    meter: GenerationMeter,
    stop: StopRequest,
    progress: Callable[[GenerationMeter, int], None],
) -> bool:
    """Write chunks until the plan is fulfilled, the output's reader goes away, or ``stop`` is set.

    Args:
        source: makes the frames.
        writer: takes them.
        plan: length, switches, rate.
        meter: told of every chunk that is safe in the output.
        stop: looked at before each chunk.
        progress: told the meter and the cache's bytes after each chunk.

    Returns:
        Whether the plan was fulfilled.

    Raises:
        VideoError: the output refused frames; those before them are safe.
    """
    pending = list(plan.switches)
    while plan.num_frames is None or meter.num_frames < plan.num_frames:
        if stop.signal_number is not None:
            return False
        while pending and pending[0][0] <= meter.num_frames:
            source.set_prompt(pending.pop(0)[1])
        frames = source.next_frames()
        if plan.num_frames is not None:
            frames = frames[: plan.num_frames - meter.num_frames]
        if not writer.write(frames):
            return False
        meter.wrote(len(frames))
        progress(meter, source.cache_bytes)
    return True


class _Figures(ProgressColumn):
    """Rate, real-time factor and cache size, as the last chunk left them."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["figures"]))


def _figures(meter: GenerationMeter, cache_bytes: int) -> str:
    rate, factor = meter.frames_per_second, meter.real_time_factor
    speed = "" if rate is None or factor is None else f"{rate:.1f} FPS  {factor:.2f}x real time  "
    return f"{speed}cache {cache_bytes / 1e6:.1f} MB"


@contextmanager
def progress_display(plan: Plan, label: str) -> Iterator[Callable[[GenerationMeter, int], None]]:
    """Shows progress on standard error: a live line on a terminal, a plain one now and then elsewhere.

    Args:
        plan: for the whole length; an endless video shows no end.
        label: stands before the line.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _PlainLog(plan, label)
        return
    columns = [TextColumn("{task.description}"), TextColumn("{task.fields[made]}")]
    ending = (
        [BarColumn(bar_width=24), TimeRemainingColumn(compact=True)] if plan.num_frames is not None else []
    )
    with Progress(*columns, *ending, _Figures(), console=console, transient=True) as display:
        task = display.add_task(label, total=plan.num_frames, made="0.0 s", figures="")

        def show(meter: GenerationMeter, cache_bytes: int) -> None:
            display.update(
                task,
                completed=meter.num_frames,
                made=f"{meter.num_frames / plan.fps:.1f} s",
                figures=_figures(meter, cache_bytes),
            )

        yield show


class _PlainLog:
    """A line every half minute, for logs."""

    def __init__(self, plan: Plan, label: str) -> None:
        self._plan = plan
        self._label = label
        self._next = time.monotonic() + _LOG_EVERY_SECONDS

    def __call__(self, meter: GenerationMeter, cache_bytes: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next += _LOG_EVERY_SECONDS
        whole, rate = self._plan.num_frames, meter.frames_per_second
        made = f"{meter.num_frames / self._plan.fps:.1f} s"
        left = "" if whole is None or not rate else f"  ETA {(whole - meter.num_frames) / rate:.0f} s"
        print(f"{self._label}  {made}{left}  {_figures(meter, cache_bytes)}", file=sys.stderr, flush=True)

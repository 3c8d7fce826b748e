"""Clocks and meters of a running generation, in constant memory however long it runs."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any, Final

_SHORTEST_SECONDS: Final = 1e-6
_LONGEST_SECONDS: Final = 1e4
_BIN_RATIO: Final = 1.01


class DurationHistogram:
    """Durations counted in bins one percent wide: quantiles to one percent, in constant memory."""

    def __init__(self) -> None:
        self._counts = [0] * (math.ceil(math.log(_LONGEST_SECONDS / _SHORTEST_SECONDS, _BIN_RATIO)) + 1)
        self.count = 0
        self.total_seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration; what is shorter or longer than the bins goes into the outermost."""
        clamped = min(max(seconds, _SHORTEST_SECONDS), _LONGEST_SECONDS)
        self._counts[int(math.log(clamped / _SHORTEST_SECONDS, _BIN_RATIO))] += 1
        self.count += 1
        self.total_seconds += seconds

    def quantile(self, share: float) -> float | None:
        """The duration in seconds that this share (0 to 1) does not exceed; None for no durations."""
        if not self.count:
            return None
        wanted = max(1, math.ceil(share * self.count))
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return float(_SHORTEST_SECONDS * _BIN_RATIO ** (index + 0.5))
        raise AssertionError("the bins hold fewer durations than were counted")


class GenerationMeter:
    """Times of one generation, from the command's start to its last frame.

    Call ``imported`` when torch is there, ``loaded`` when the model is, and ``wrote`` after each chunk's
    frames are in the file.

    Args:
        fps: playback rate of the video, frames per second.
        started: ``time.perf_counter()`` at the command's start.
    """

    def __init__(self, fps: float, started: float) -> None:
        self._fps = fps
        self._started = started
        self._imported: float | None = None
        self._loaded: float | None = None
        self._first: float | None = None
        self._first_frames = 0
        self._last = started
        self.chunk_seconds = DurationHistogram()
        self.num_frames = 0

    def imported(self, moment: float | None = None) -> None:
        """torch has been imported, now or at a moment before."""
        self._imported = self._last = time.perf_counter() if moment is None else moment

    def loaded(self) -> None:
        """The model has been loaded and the stream made."""
        self._loaded = self._last = time.perf_counter()

    def wrote(self, num_frames: int) -> None:
        """Another chunk's frames are in the file."""
        now = time.perf_counter()
        if self._first is None:
            self._first, self._first_frames = now, num_frames
        else:
            self.chunk_seconds.add(now - self._last)
        self._last = now
        self.num_frames += num_frames

    @property
    def frames_per_second(self) -> float | None:
        """Frames in the file per second of wall time once the first chunk is done; None before it."""
        if self._first is None or self._last == self._first:
            return None
        return (self.num_frames - self._first_frames) / (self._last - self._first)

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of video made per second of wall time; above 1 it plays while it is made."""
        rate = self.frames_per_second
        return None if rate is None else rate / self._fps

    def summary(self) -> dict[str, Any]:
        """Everything measured, ready for JSON; null where the run ended too early to measure."""

        def since(start: float | None, stop: float | None) -> float | None:
            return None if start is None or stop is None else stop - start

        return {
            "num_frames": self.num_frames,
            "video_seconds": self.num_frames / self._fps,
            "wall_seconds": self._last - self._started,
            "frames_per_second": self.frames_per_second,
            "real_time_factor": self.real_time_factor,
            "time_to_first_frame_seconds": since(self._started, self._first),
            "import_seconds": since(self._started, self._imported),
            "load_seconds": since(self._imported, self._loaded),
            "first_chunk_seconds": since(self._loaded, self._first),
            "first_frame_beyond_import_seconds": since(self._imported, self._first),
            "chunk_seconds_p50": self.chunk_seconds.quantile(0.5),
            "chunk_seconds_p95": self.chunk_seconds.quantile(0.95),
            "chunks_after_the_first": self.chunk_seconds.count,
        }


def process_started() -> float:
    """When this process began, on ``time.perf_counter``'s scale, to 10 ms; now where the system has no
    /proc."""
    now = time.perf_counter()
    try:
        # The 22nd field, counted in clock ticks since boot; the second is a name in brackets, which may hold
        # spaces.
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return now
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return now - max(0.0, age)


def resident_bytes() -> int | None:
    """Physical memory of this process, in bytes; None where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def environment() -> dict[str, Any]:
    """What a figure depends on: hardware, versions, threads and the source's commit."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cpus_available": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "load_average_1min": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that this package runs from, marked if changed; None if installed."""
    here = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None

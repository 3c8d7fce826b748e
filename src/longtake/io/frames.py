"""What every video writer shares: its settings, its contract, and how the operating system's refusals are
told.

Legend: t frames, h height, w width, 3 = red, green, blue.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from longtake.config import Config
from longtake.errors import VideoError

Frames = npt.NDArray[np.uint8]

_REMEDIES: Final = {
    errno.ENOSPC: "free some space or give another --output-path",
    errno.EDQUOT: "free some space or give another --output-path",
    errno.EFBIG: "write segments (--segment-seconds) or give another --output-path",
    errno.ENOENT: "create the directory or give another --output-path",
    errno.EISDIR: "give the path of a file, or of a directory ending in '/' for PNG frames",
}


class VideoConfig(Config):
    """How frames become a file.

    Attributes:
        fps: frames per second of the video.
        crf: H.264's constant rate factor, 0 (lossless) to 51 (worst); 18 is visually lossless.
        codec: name of an FFmpeg video encoder that the MP4 container takes.
        preset: the encoder's own trade of speed against size.
        pixel_format: ``yuv420p`` plays everywhere and needs even sizes: an odd size gets its last row or
            column repeated once. ``yuv444p`` keeps odd sizes and full colour resolution; many browsers
            refuse it.
        keyframe_seconds: the longest distance between two frames that a player can seek to.
        segment_seconds: start a new file with a fresh encoder at the first chunk boundary at or after this
            length; None writes one file.
        gif_max_frames: a GIF is a format for short clips; longer ones are refused.
    """

    fps: float = Field(default=16.0, ge=0.1, le=1000)
    crf: int = Field(default=18, ge=0, le=51)
    codec: str = "libx264"
    preset: str = "veryfast"
    pixel_format: Literal["yuv420p", "yuv444p"] = "yuv420p"
    keyframe_seconds: float = Field(default=2.0, gt=0)
    segment_seconds: float | None = Field(default=None, gt=0)
    gif_max_frames: int = Field(default=600, gt=0)

    @property
    def rate(self) -> Fraction:
        """Frames per second as the exact fraction that time stamps need."""
        return Fraction(self.fps).limit_denominator(1001)


class FrameWriter(ABC):
    """Takes frames as they come and has them safe when ``write`` returns.

    A writer never holds more than the frames it was handed. After ``write`` returns, these frames survive the
    death of the process; a failed ``write`` raises ``VideoError`` and leaves what was written before
    playable. Use it as a context manager: ``close`` may be called any number of times.

    Attributes:
        num_frames: frames that are safe.
    """

    num_frames: int = 0

    @abstractmethod
    def write(self, frames_thw3: Frames) -> bool:
        """Append frames, uint8 [t, h, w, 3].

        Returns:
            True while the output takes more; False once a pipe's reader has gone, which is no error.

        Raises:
            VideoError: the frames are not of the one size and type, or the output refused them.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the output."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_frames(frames_thw3: Frames, size_hw: tuple[int, int] | None) -> tuple[int, int]:
    """The frames' (height, width), after checking that they are uint8 [t, h, w, 3] of ``size_hw``.

    Raises:
        VideoError: they are not.
    """
    if frames_thw3.dtype != np.uint8 or frames_thw3.ndim != 4 or frames_thw3.shape[3] != 3:
        raise VideoError(
            f"frames are {frames_thw3.dtype} of shape {list(frames_thw3.shape)}",
            "a video takes uint8 [t, h, w, 3]",
        )
    height, width = frames_thw3.shape[1:3]
    if height == 0 or width == 0:
        raise VideoError(f"frames of {width}x{height} pixels have no picture", "give a positive size")
    if size_hw is not None and (height, width) != size_hw:
        raise VideoError(
            f"frames of {width}x{height} do not fit a video of {size_hw[1]}x{size_hw[0]}",
            "one file has one size: open another for the new one",
        )
    return height, width


def io_error(path: str | Path, error: OSError, num_frames: int, config: VideoConfig) -> VideoError:
    """The refusal of the operating system in one line: which file, why, and what of it is safe."""
    reason = os.strerror(error.errno) if error.errno is not None else str(error)
    kept = ""
    if num_frames:
        kept = f"; {num_frames} frames ({num_frames / config.fps:.1f} s) were written and play"
    return VideoError(
        f"cannot write {str(path)!r}: {reason}{kept}",
        _REMEDIES.get(error.errno or 0, "give another --output-path"),
    )


class AppendFile:
    """A file that grows by whole records: after a failed append it ends where the last good one ended.

    Raises:
        OSError: from the constructor and ``append``, as the operating system says it.
    """

    def __init__(self, path: str | Path) -> None:
        self._fd: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._size = 0

    def append(self, record: bytes | bytearray | memoryview) -> None:
        """Write the whole record through to the operating system, or nothing of it."""
        assert self._fd is not None, "append after close"
        try:
            write_all(self._fd, record)
        except BaseException:
            # A torn record at the end would still play, but the file would promise bytes that it lacks.
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.ftruncate(self._fd, self._size)
            raise
        self._size += len(record)

    def close(self) -> None:
        """Close the file; safe to repeat."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """``os.write`` until everything is written: a signal or a nearly full disk may cut one call short."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]

"""Video in and out: ``open_video`` writes frames as they come, ``read_video`` gives them back one by one.

==============================  ============================================================================
``--output-path``               what is written
==============================  ============================================================================
``clip.mp4``, ``.m4v``, ``.mov``  H.264 in fragmented MP4: playable while it grows, and after a crash
``frames/``                     a directory of ``000000.png``, ``000001.png``, ...
``frames/shot-%04d.png``        numbered PNG files in an existing directory
``clip.gif``                    an animated GIF, for short clips
``-``                           raw rgb24 pixels on standard output
==============================  ============================================================================

Legend: t frames, h height, w width, 3 = red, green, blue.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

import av
import numpy as np
from av.container import InputContainer

from longtake.errors import VideoError, nearest
from longtake.io.frames import Frames, FrameWriter, VideoConfig, io_error
from longtake.io.images import GifWriter, PngWriter, RawWriter, check_gif_length
from longtake.io.mp4 import Mp4Writer, SegmentedMp4Writer, check_encoder

__all__ = [
    "FrameWriter",
    "Frames",
    "VideoConfig",
    "VideoInfo",
    "check_output",
    "open_video",
    "probe_video",
    "read_video",
]

STDOUT: Final = "-"
_SUFFIXES: Final = (".mp4", ".m4v", ".mov", ".gif", ".png")

Kind = Literal["mp4", "gif", "png", "raw"]


def _kind(path: str) -> Kind:
    """Which writer a path asks for."""
    if path == STDOUT:
        return "raw"
    if not path:
        raise VideoError("--output-path is empty", "give a file such as out.mp4")
    suffix = Path(path).suffix.lower()
    if path.endswith(os.sep) or (Path(path).is_dir() and suffix not in _SUFFIXES):
        return "png"
    if suffix == ".png":
        if "%" not in Path(path).name:
            raise VideoError(
                f"{path!r} names one picture, and a video has many",
                f"give a pattern such as {Path(path).stem}-%06d.png, or a directory ending in '/'",
            )
        return "png"
    if suffix == ".gif":
        return "gif"
    if suffix in (".mp4", ".m4v", ".mov"):
        return "mp4"
    raise VideoError(
        f"unknown kind of video {suffix or path!r} in --output-path {path!r}",
        f"{nearest(suffix, _SUFFIXES)}; also a directory ending in '/' (PNG files) or '-' (raw pipe)",
    )


def check_output(path: str, config: VideoConfig, num_frames: int | None) -> None:
    """Find out, before any slow work, whether ``open_video`` will work. Leaves no trace and overwrites
    nothing.

    Args:
        path: as in ``open_video``.
        config: as in ``open_video``.
        num_frames: how many frames are to come; None for an endless video.

    Raises:
        VideoError: the path's kind is unknown, it cannot be written, a GIF would be too long, or there is no
            such encoder.
    """
    kind = _kind(path)
    if config.segment_seconds is not None and kind != "mp4":
        raise VideoError(
            f"{path!r} cannot be cut into segments", "use an .mp4 or leave out --segment-seconds"
        )
    if kind == "gif":
        check_gif_length(num_frames, config)
    if kind == "mp4":
        check_encoder(config)
    if kind == "raw":
        return
    target = Path(path)
    try:
        if kind == "png" and "%" not in target.name:
            existed = target.is_dir()
            PngWriter(target, config)
            if not existed:
                target.rmdir()
            return
        if not target.parent.is_dir():
            raise FileNotFoundError(2, "no such directory", str(target.parent))
        if kind == "png":
            PngWriter(target, config)
            return
        existed = target.exists()
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        if not existed:
            target.unlink()
    except OSError as error:
        raise io_error(path, error, 0, config) from error


def open_video(path: str | Path, config: VideoConfig) -> FrameWriter:
    """A writer of the kind that the path asks for; an existing file is overwritten.

    Args:
        path: see the table above.
        config: rate, quality, codec, segments.

    Raises:
        VideoError: the path's kind is unknown or it cannot be written.
    """
    kind = _kind(str(path))
    match kind:
        case "raw":
            return RawWriter(config)
        case "png":
            return PngWriter(Path(path), config)
        case "gif":
            return GifWriter(Path(path), config)
        case "mp4":
            if config.segment_seconds is not None:
                return SegmentedMp4Writer(Path(path), config)
            return Mp4Writer(Path(path), config)


@dataclass(frozen=True)
class VideoInfo:
    """What a file's head says of it. ``height`` and ``width`` in pixels, ``fps`` in frames per second."""

    height: int
    width: int
    fps: float
    codec: str


@contextmanager
def _opened(path: str | Path) -> Iterator[InputContainer]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{str(path)!r} holds no video stream", "give a video file")
            yield container
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"cannot read {str(path)!r} as video: {error}", "give a video file that plays"
        ) from error


def probe_video(path: str | Path) -> VideoInfo:
    """Size, rate and codec of a file, without decoding it.

    Raises:
        VideoError: it is no readable video.
    """
    with _opened(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        if rate is None:
            raise VideoError(f"{str(path)!r} has no frame rate", "give a video with at least two frames")
        return VideoInfo(stream.height, stream.width, float(rate), stream.codec_context.name)


def read_video(path: str | Path) -> Iterator[Frames]:
    """The frames of a file one by one, uint8 [h, w, 3], holding one at a time.

    A file that was cut off in the middle of a frame gives the frames before it.

    Raises:
        VideoError: it is no readable video.
    """
    with _opened(path) as container:
        torn: av.InvalidDataError | None = None
        for packet in container.demux(video=0):
            if torn is not None and packet.size:
                raise torn  # damage in the middle is no cut
            try:
                frames = packet.decode()
            except av.InvalidDataError as error:
                torn = error
                continue
            for frame in frames:
                frame_hw3 = frame.to_ndarray(format="rgb24")
                assert frame_hw3.dtype == np.uint8, "rgb24 has 8 bits"
                yield cast(Frames, frame_hw3)

"""Outputs that are not MP4: numbered PNG files, a GIF, raw pixels down a pipe."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Final

import av
import numpy as np
from av.container import OutputContainer
from av.filter import Graph
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from longtake.errors import VideoError
from longtake.io.frames import AppendFile, Frames, FrameWriter, VideoConfig, check_frames, io_error, write_all

_PATTERN: Final = re.compile(r"%0?\d*d")


class PngWriter(FrameWriter):
    """One PNG file a frame, lossless. A file appears under its name only when it is complete.

    Args:
        path: a directory, which gets ``000000.png``, ``000001.png`` and so on, or a pattern of names in an
            existing directory, such as ``frames/shot-%04d.png``.
        config: only quoted in messages: PNG files carry no frame rate.

    Raises:
        VideoError: the directory cannot be created or written.
    """

    def __init__(self, path: Path, config: VideoConfig) -> None:
        self._config = config
        self._size_hw: tuple[int, int] | None = None
        if _PATTERN.search(path.name):
            self._directory, self._pattern = path.parent, path.name
        else:
            self._directory, self._pattern = path, "%06d.png"
            try:
                path.mkdir(exist_ok=True)
            except OSError as error:
                raise io_error(path, error, 0, config) from error
        if not self._directory.is_dir() or not os.access(self._directory, os.W_OK | os.X_OK):
            raise VideoError(
                f"cannot write PNG files into {str(self._directory)!r}",
                "give a directory that exists and is writable",
            )

    def write(self, frames_thw3: Frames) -> bool:
        """Write one file a frame, uint8 [t, h, w, 3]; see ``FrameWriter.write``."""
        self._size_hw = check_frames(frames_thw3, self._size_hw)
        for frame_hw3 in frames_thw3:
            target = self._directory / (self._pattern % self.num_frames)
            partial = target.with_name(f".{target.name}.part")
            try:
                partial.write_bytes(encode_png(frame_hw3))
                partial.replace(target)
            except OSError as error:
                partial.unlink(missing_ok=True)
                raise io_error(target, error, self.num_frames, self._config) from error
            self.num_frames += 1
        return True

    def close(self) -> None:
        """Nothing to finish: every file is complete."""


def encode_png(frame_hw3: Frames) -> bytes:
    """One frame, uint8 [h, w, 3], as the bytes of a PNG file."""
    context = av.CodecContext.create("png", "w")
    assert isinstance(context, VideoCodecContext), "PNG is a video codec"
    context.height, context.width = frame_hw3.shape[:2]
    context.pix_fmt = "rgb24"
    context.thread_count = 1
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_hw3), format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


def sheet_picture(clips_bthw3: Frames, columns: int = 10, gap: int = 2) -> Frames:
    """A contact sheet: one row per clip, frames of it evenly spread in time from left to right.

    Args:
        clips_bthw3: uint8.
        columns: frames per row; of shorter clips every frame is shown.
        gap: white pixels between frames.

    Returns:
        uint8 [rows, columns, 3], the picture.
    """
    num_frames = clips_bthw3.shape[1]
    times = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int)
    spaced = np.pad(clips_bthw3[:, times], [(0, 0), (0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
    picture: Frames = np.concatenate([np.concatenate(list(row), axis=1) for row in spaced])
    return picture


class GifWriter(FrameWriter):
    """An animated GIF, each frame with a palette of its own (256 colours), for clips of
    ``config.gif_max_frames``.

    GIF counts time in hundredths of a second, so that frame lengths are rounded (6 or 7 for 16 frames per
    second).

    Raises:
        VideoError: the file cannot be created.
    """

    def __init__(self, path: Path, config: VideoConfig) -> None:
        self._path = path
        self._config = config
        self._size_hw: tuple[int, int] | None = None
        self._graph: Graph | None = None
        self._stream: VideoStream | None = None
        self._container: OutputContainer | None = None
        self._muxed = io.BytesIO()
        self._pending = 0  # frames that are muxed, but not yet in the file
        try:
            self._file = AppendFile(path)
        except OSError as error:
            raise io_error(path, error, 0, config) from error

    def _start(self, size_hw: tuple[int, int]) -> tuple[OutputContainer, VideoStream, Graph]:
        height, width = size_hw
        # The muxer never seeks back, so what it wrote can be taken away after each packet.
        options = {"loop": "0", "flush_packets": "1"}
        container = av.open(self._muxed, "w", format="gif", options=options)
        stream: VideoStream = container.add_stream("gif", rate=self._config.rate)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = 1 / self._config.rate
        graph = Graph()
        rgb24 = av.VideoFormat("rgb24")
        source = graph.add_buffer(width=width, height=height, format=rgb24, time_base=1 / self._config.rate)
        split = graph.add("split")
        palette = graph.add("palettegen", "stats_mode=single")
        paint = graph.add("paletteuse", "new=1:dither=none")
        sink = graph.add("buffersink")
        source.link_to(split)
        split.link_to(palette, 0, 0)
        split.link_to(paint, 1, 0)
        palette.link_to(paint, 0, 1)
        paint.link_to(sink)
        graph.configure()
        return container, stream, graph

    def write(self, frames_thw3: Frames) -> bool:
        """Append frames, uint8 [t, h, w, 3]; see ``FrameWriter.write``.

        Raises:
            VideoError: also where the clip would be longer than ``config.gif_max_frames``.
        """
        self._size_hw = check_frames(frames_thw3, self._size_hw)
        check_gif_length(self.num_frames + len(frames_thw3), self._config)
        if self._container is None or self._stream is None or self._graph is None:
            self._container, self._stream, self._graph = self._start(self._size_hw)
        for frame_hw3 in frames_thw3:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_hw3), format="rgb24")
            frame.pts = self.num_frames + self._pending
            frame.time_base = 1 / self._config.rate
            self._graph.push(frame)
            painted = self._graph.pull()
            assert isinstance(painted, av.VideoFrame), "the palette filters pass pictures"
            self._container.mux(self._stream.encode(painted))
            self._pending += 1
        self._flush()
        return True

    def _flush(self) -> None:
        try:
            self._file.append(self._muxed.getvalue())
        except OSError as error:
            if self._container is not None:
                self._container.close()
                self._container = None  # what it wrote since is lost: nothing may follow the gap
            raise io_error(self._path, error, self.num_frames, self._config) from error
        self._muxed.seek(0)
        self._muxed.truncate()
        self.num_frames, self._pending = self.num_frames + self._pending, 0

    def close(self) -> None:
        """Write the end of the file."""
        container, self._container = self._container, None
        try:
            if container is not None and self._stream is not None:
                container.mux(self._stream.encode(None))
                container.close()
                self._flush()
        finally:
            self._file.close()


def check_gif_length(num_frames: int | None, config: VideoConfig) -> None:
    """Refuse a GIF of more than ``config.gif_max_frames`` frames; None means an endless one.

    Raises:
        VideoError: too long.
    """
    if num_frames is None or num_frames > config.gif_max_frames:
        asked = "endless length" if num_frames is None else f"{num_frames} frames"
        raise VideoError(
            f"a GIF of {asked} is too long: its limit is {config.gif_max_frames} frames "
            f"({config.gif_max_frames / config.fps:g} s)",
            "write an .mp4",
        )


class RawWriter(FrameWriter):
    """Raw rgb24 pixels down a file descriptor, by default standard output.

    The stream has no header: a reader must be told size and rate, for instance
    ``ffplay -f rawvideo -pixel_format rgb24 -video_size 64x64 -framerate 16 -``. A reader that hangs up ends
    the video; it is no error.
    """

    def __init__(self, config: VideoConfig, fd: int = 1) -> None:
        self._config = config
        self._fd = fd
        self._size_hw: tuple[int, int] | None = None

    def write(self, frames_thw3: Frames) -> bool:
        """Append frames, uint8 [t, h, w, 3]; see ``FrameWriter.write``."""
        self._size_hw = check_frames(frames_thw3, self._size_hw)
        try:
            write_all(self._fd, np.ascontiguousarray(frames_thw3).tobytes())
        except BrokenPipeError:
            return False
        except OSError as error:
            raise io_error("-", error, self.num_frames, self._config) from error
        self.num_frames += len(frames_thw3)
        return True

    def close(self) -> None:
        """Nothing to finish; the descriptor stays open, its owner closes it."""

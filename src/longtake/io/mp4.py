"""H.264 in fragmented MP4, one fragment per ``write``, so that a killed process loses no frame it had
written.

The file is ``ftyp moov (moof mdat)*`` (ISO/IEC 14496-12, section 8.8). A muxer that runs along with the
video would keep the last frame back until it knows the next one's time, and an index that grows with the
video; so one PyAV muxer writes the head, and each ``write`` muxes its packets on their own, in memory, of
which only ``moof`` and ``mdat`` are kept, with their place in the whole filled in.

The bytes depend on the frames, their division into writes and the settings alone: one thread, no B-frames, no
lookahead.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Final

import av
import numpy as np
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from longtake.errors import VideoError
from longtake.io.frames import AppendFile, Frames, FrameWriter, VideoConfig, check_frames, io_error

_MUXER: Final = {"movflags": "empty_moov+default_base_moof+frag_custom+skip_trailer", "use_editlist": "0"}
_SMALL_HW: Final = (64, 64)  # every encoder takes it
_HEADER: Final = 8  # bytes of a box before its content: size and type


def _boxes(data: bytes | bytearray, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of each box between two offsets."""
    while start < end:
        (size,) = struct.unpack_from(">I", data, start)
        assert size >= _HEADER, "the muxer wrote a box without a 32-bit size"
        yield bytes(data[start + 4 : start + 8]), start, start + size
        start += size


def _child(data: bytes | bytearray, parent: tuple[int, int], kind: bytes) -> tuple[int, int]:
    """The first box of this type inside a parent, as (begin, end)."""
    for found, begin, end in _boxes(data, parent[0] + _HEADER, parent[1]):
        if found == kind:
            return begin, end
    raise AssertionError(f"the muxer wrote no {kind!r} box")


class _Encoder:
    """An encoder and the head of the file that its packets belong to."""

    def __init__(self, size_hw: tuple[int, int], config: VideoConfig) -> None:
        self._config = config
        even = 2 if config.pixel_format == "yuv420p" else 1
        self._pad_hw = (-size_hw[0] % even, -size_hw[1] % even)
        sink = io.BytesIO()
        self._container: OutputContainer = av.open(sink, "w", format="mp4", options=self._muxer_options())
        try:
            if av.Codec(config.codec, "w").type != "video":
                raise ValueError("it encodes no pictures")
            stream = self._container.add_stream(config.codec, rate=config.rate)
            assert isinstance(stream, VideoStream), "a video codec makes a video stream"
            self._stream = stream
            self._stream.height = size_hw[0] + self._pad_hw[0]
            self._stream.width = size_hw[1] + self._pad_hw[1]
            self._stream.pix_fmt = config.pixel_format
            context = self._stream.codec_context
            context.time_base = 1 / config.rate
            context.thread_count = 1
            context.gop_size = max(1, round(config.keyframe_seconds * config.fps))
            context.max_b_frames = 0
            context.options = {"preset": config.preset, "crf": str(config.crf)}
            if config.codec in ("libx264", "libx264rgb"):
                context.options |= {"tune": "zerolatency"}  # no lookahead: a frame in is a packet out
            self._container.start_encoding()
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(
                f"no video encoder codec={config.codec!r} with preset={config.preset!r} and "
                f"pixel_format={config.pixel_format!r} for MP4 ({error})",
                "use codec='libx264', preset='veryfast'",
            ) from error
        self.head = sink.getvalue()
        self._num_in = 0

    def _muxer_options(self) -> dict[str, str]:
        # A frame must be a whole number of ticks: fps of 30000/1001 needs 30000 ticks a second, 1001 a frame.
        return _MUXER | {
            "video_track_timescale": str(self._config.rate.numerator * _ticks_factor(self._config.rate))
        }

    @property
    def ticks_per_frame(self) -> int:
        """Length of a frame in the track's time scale."""
        return self._config.rate.denominator * _ticks_factor(self._config.rate)

    def encode(self, frames_thw3: Frames) -> list[Packet[VideoStream]]:
        """The packets of these frames: as many as frames, unless the encoder looks ahead."""
        if any(self._pad_hw):
            frames_thw3 = np.pad(
                frames_thw3, [(0, 0), (0, self._pad_hw[0]), (0, self._pad_hw[1]), (0, 0)], "edge"
            )
        packets: list[Packet[VideoStream]] = []
        for frame_hw3 in frames_thw3:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_hw3), format="rgb24")
            frame.pts = self._num_in
            frame.time_base = 1 / self._config.rate
            self._num_in += 1
            packets += self._stream.codec_context.encode(frame)
        return packets

    def drain(self) -> list[Packet[VideoStream]]:
        """The packets that the encoder still holds."""
        return self._stream.codec_context.encode(None)

    def fragment(self, packets: list[Packet[VideoStream]], sequence: int, first_frame: int) -> bytearray:
        """One ``moof`` + ``mdat`` holding the packets, to stand at ``first_frame`` of the video."""
        sink = io.BytesIO()
        with av.open(sink, "w", format="mp4", options=self._muxer_options()) as container:
            stream = container.add_stream_from_template(self._stream)
            for packet in packets:
                packet.duration = 1  # in the encoder's time base: one frame
                packet.stream = stream
                container.mux_one(packet)
        muxed = sink.getvalue()
        record = bytearray()
        for kind, begin, end in _boxes(muxed, 0, len(muxed)):
            if kind in (b"moof", b"mdat"):
                record += muxed[begin:end]
        moof = _child(record, (-_HEADER, len(record)), b"moof")
        traf = _child(record, moof, b"traf")
        tfdt, _ = _child(record, traf, b"tfdt")
        assert record[tfdt + _HEADER] == 1, "the muxer wrote a 32-bit decode time"
        struct.pack_into(">I", record, _child(record, moof, b"mfhd")[0] + _HEADER + 4, sequence)
        struct.pack_into(">Q", record, tfdt + _HEADER + 4, first_frame * self.ticks_per_frame)
        return record

    def close(self) -> None:
        """Free the encoder."""
        self._container.close()


def check_encoder(config: VideoConfig) -> None:
    """Find out whether the encoder exists and takes the settings.

    Raises:
        VideoError: it does not.
    """
    _Encoder(_SMALL_HW, config).close()


def _ticks_factor(rate: Fraction) -> int:
    """Multiplies the time scale to about 10 000 ticks a second or more, as players expect it."""
    return max(1, -(-10_000 // rate.numerator))


class Mp4Writer(FrameWriter):
    """One MP4 file; each ``write`` adds one fragment and hands it to the operating system before it returns.

    Raises:
        VideoError: the file cannot be created, or (on the first ``write``) the encoder does not exist.
    """

    def __init__(self, path: Path, config: VideoConfig) -> None:
        self._path = path
        self._config = config
        self._encoder: _Encoder | None = None
        self._size_hw: tuple[int, int] | None = None
        self._sequence = 0
        try:
            self._file = AppendFile(path)
        except OSError as error:
            raise io_error(path, error, 0, config) from error

    def write(self, frames_thw3: Frames) -> bool:
        """Append frames, uint8 [t, h, w, 3], as one fragment; see ``FrameWriter.write``."""
        self._size_hw = check_frames(frames_thw3, self._size_hw)
        head = b""
        if self._encoder is None:
            self._encoder = _Encoder(self._size_hw, self._config)
            head = self._encoder.head
        self._append(self._encoder, self._encoder.encode(frames_thw3), head)
        return True

    def _append(self, encoder: _Encoder, packets: list[Packet[VideoStream]], head: bytes = b"") -> None:
        if not packets and not head:
            return
        record = bytearray(head)
        if packets:
            self._sequence += 1
            record += encoder.fragment(packets, self._sequence, self.num_frames)
        try:
            self._file.append(record)
        except OSError as error:
            raise io_error(self._path, error, self.num_frames, self._config) from error
        self.num_frames += len(packets)

    def close(self) -> None:
        """Write what the encoder holds back (nothing, for the default encoder) and close the file."""
        encoder, self._encoder = self._encoder, None
        try:
            if encoder is not None:
                self._append(encoder, encoder.drain())
        finally:
            if encoder is not None:
                encoder.close()
            self._file.close()


class SegmentedMp4Writer(FrameWriter):
    """Numbered MP4 files, each with an encoder of its own, so that each depends on its own frames alone.

    ``clip.mp4`` becomes ``clip-00000.mp4``, ``clip-00001.mp4`` and so on. A segment ends with the first
    ``write`` that brings it to ``config.segment_seconds`` or beyond.
    """

    def __init__(self, path: Path, config: VideoConfig) -> None:
        assert config.segment_seconds is not None, "a segmented writer needs segment_seconds"
        self._path = path
        self._config = config
        self._frames_per_segment = config.segment_seconds * config.fps
        self._num_segments = 0
        self._segment: Mp4Writer | None = self._open()

    def _open(self) -> Mp4Writer:
        path = self._path.with_name(f"{self._path.stem}-{self._num_segments:05d}{self._path.suffix}")
        self._num_segments += 1
        return Mp4Writer(path, self._config)

    def write(self, frames_thw3: Frames) -> bool:
        """Append frames, uint8 [t, h, w, 3]; see ``FrameWriter.write``."""
        if self._segment is None:
            self._segment = self._open()
        before = self._segment.num_frames
        self._segment.write(frames_thw3)
        self.num_frames += self._segment.num_frames - before
        if self._segment.num_frames >= self._frames_per_segment:
            self._close_segment()
        return True

    def _close_segment(self) -> None:
        segment, self._segment = self._segment, None
        if segment is not None:
            before = segment.num_frames
            segment.close()
            self.num_frames += segment.num_frames - before

    def close(self) -> None:
        """Finish the segment in progress."""
        self._close_segment()

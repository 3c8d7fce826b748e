"""Video writing and reading: order, exactness, determinism, crashes, full disks, and the words of
refusals."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from longtake.errors import ConfigError, VideoError
from longtake.io.frames import AppendFile, Frames
from longtake.io.video import VideoConfig, check_output, open_video, probe_video, read_video


def moving_square(num_frames: int, height: int = 48, width: int = 64, start: int = 0) -> Frames:
    """A bright square on a dark ground that moves a pixel a frame, so that each frame tells its number."""
    frames = np.full((num_frames, height, width, 3), 30, np.uint8)
    for index in range(num_frames):
        left = (start + index) % (width - 12)
        frames[index, 10:22, left : left + 12] = (200, 40, 40)
    return frames


def psnr(a: Frames, b: Frames) -> float:
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255.0**2 / error))


def write(path: Path | str, frames: Frames, config: VideoConfig, chunk: int = 12) -> None:
    with open_video(path, config) as writer:
        for begin in range(0, len(frames), chunk):
            assert writer.write(frames[begin : begin + chunk])
        assert writer.num_frames == len(frames)


def test_mp4_gives_back_every_frame_in_order_with_exact_times(tmp_path: Path) -> None:
    frames = moving_square(40)
    path = tmp_path / "clip.mp4"
    write(path, frames, VideoConfig(fps=12.5))
    back = list(read_video(path))
    assert len(back) == 40
    for index in range(40):
        assert psnr(back[index], frames[index]) > 32
        # The neighbouring frame must fit worse: order and identity, not likeness.
        assert psnr(back[index], frames[index]) > psnr(back[index], frames[index - 1]) + 3
    info = probe_video(path)
    assert (info.height, info.width, info.fps, info.codec) == (48, 64, 12.5, "h264")
    with av.open(str(path)) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == [index / 12.5 for index in range(40)]


@pytest.mark.parametrize("fps", [1.0, 15.0, 16.0, 29.97, 60.0, 120.0])
def test_any_rate_keeps_exact_frame_times(tmp_path: Path, fps: float) -> None:
    path = tmp_path / "clip.mp4"
    write(path, moving_square(7), VideoConfig(fps=fps), chunk=3)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.pts * stream.time_base for frame in container.decode(video=0) if frame.pts is not None]
    assert times == [index / VideoConfig(fps=fps).rate for index in range(7)]


def test_same_frames_give_the_same_bytes_and_no_b_frames(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)
    for name in ("a", "b"):
        write(tmp_path / f"{name}.mp4", frames, VideoConfig())
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        assert all(packet.pts == packet.dts for packet in packets)
        assert all(frame.pict_type != PictureType.B for packet in packets for frame in packet.decode())


def test_colours_survive_encoding(tmp_path: Path) -> None:
    colours = np.array(
        [[230, 40, 40], [240, 220, 60], [40, 180, 70], [40, 200, 220], [50, 70, 220]], np.uint8
    )
    frames = np.repeat(colours[:, None, None, :], 32, axis=1).repeat(32, axis=2)
    write(tmp_path / "clip.mp4", frames, VideoConfig(), chunk=1)
    for original, back in zip(frames, read_video(tmp_path / "clip.mp4"), strict=True):
        assert np.abs(original.astype(int) - back.astype(int)).max() <= 6


def test_quality_option_trades_size_for_error(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    for crf in (10, 40):
        write(tmp_path / f"{crf}.mp4", frames, VideoConfig(crf=crf))
    assert (tmp_path / "10.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_every_written_frame_is_in_the_file_before_close(tmp_path: Path, chunk: int) -> None:
    frames = moving_square(25)
    path = tmp_path / "clip.mp4"
    writer = open_video(path, VideoConfig())
    for begin in range(0, 25, chunk):
        writer.write(frames[begin : begin + chunk])
        assert len(list(read_video(path))) == min(begin + chunk, 25) == writer.num_frames
    writer.close()
    writer.close()


def test_a_killed_process_loses_no_committed_frame(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    code = f"""
import sys, numpy as np
from longtake.io.video import VideoConfig, open_video
writer = open_video({str(path)!r}, VideoConfig())
rng = np.random.default_rng(0)
while True:
    writer.write(rng.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8))
    print(writer.num_frames, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    committed = 0
    while committed < 96:
        committed = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    committed = max([committed, *(int(line) for line in process.stdout.read().split("\n")[:-1])])
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    frames = list(read_video(path))
    assert len(frames) >= committed
    rng = np.random.default_rng(0)
    expected = np.concatenate(
        [rng.integers(0, 256, (12, 48, 64, 3), dtype=np.uint8) for _ in range(committed // 12)]
    )
    assert min(psnr(a, b) for a, b in zip(expected, frames[:committed], strict=True)) > 11


def test_a_file_cut_anywhere_plays_up_to_the_last_whole_fragment(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    sizes = []
    with open_video(path, VideoConfig()) as writer:
        for start in range(0, 36, 12):
            writer.write(moving_square(12, start=start))
            sizes.append(path.stat().st_size)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in [sizes[1], sizes[1] + 1, sizes[1] + 7, sizes[1] + 60, *rng.integers(sizes[0], sizes[2], 12)]:
        (tmp_path / "cut.mp4").write_bytes(data[:cut])
        whole = 12 * sum(size <= cut for size in sizes)
        assert whole <= len(list(read_video(tmp_path / "cut.mp4"))) <= whole + 12


def test_odd_sizes_are_padded_or_kept(tmp_path: Path) -> None:
    frames = moving_square(5, height=33, width=47)
    write(tmp_path / "even.mp4", frames, VideoConfig())
    back = list(read_video(tmp_path / "even.mp4"))
    assert back[0].shape == (34, 48, 3)
    assert psnr(back[3][:33, :47], frames[3]) > 30
    write(tmp_path / "odd.mp4", frames, VideoConfig(pixel_format="yuv444p"))
    assert next(read_video(tmp_path / "odd.mp4")).shape == (33, 47, 3)


def test_segments_start_anew_and_depend_on_their_own_frames_alone(tmp_path: Path) -> None:
    config = VideoConfig(segment_seconds=1.0, fps=16)
    frames = moving_square(60)
    write(tmp_path / "clip.mp4", frames, config)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["clip-00000.mp4", "clip-00001.mp4", "clip-00002.mp4"]
    # 12 + 12 frames is the first chunk boundary at or after 16.
    assert [len(list(read_video(tmp_path / name))) for name in names] == [24, 24, 12]
    write(tmp_path / "alone.mp4", frames[24:48], VideoConfig(fps=16))
    assert (tmp_path / "alone.mp4").read_bytes() == (tmp_path / "clip-00001.mp4").read_bytes()


def test_an_encoder_that_looks_ahead_loses_nothing_at_close(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with open_video(path, VideoConfig(codec="mpeg4")) as writer:
        for _ in range(2):
            writer.write(moving_square(6))
    assert writer.num_frames == len(list(read_video(path))) == 12


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    frames = moving_square(12, 16, 16)
    with open_video(tmp_path / "clip.mp4", VideoConfig()) as writer:
        for _ in range(200):
            writer.write(frames)
        before = resident()
        for _ in range(1000):
            writer.write(frames)
        assert resident() - before < 1_000_000


def test_png_directory_and_pattern_are_lossless(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 31, 17, 3), dtype=np.uint8)
    write(f"{tmp_path}/frames/", frames, VideoConfig(), chunk=2)
    (tmp_path / "named").mkdir()
    write(tmp_path / "named" / "shot-%03d.png", frames, VideoConfig(), chunk=2)
    for directory, names in (("frames", "%06d.png"), ("named", "shot-%03d.png")):
        assert len(os.listdir(tmp_path / directory)) == 5
        for index in range(5):
            assert np.array_equal(next(read_video(tmp_path / directory / (names % index))), frames[index])


def test_gif_plays_and_long_ones_are_refused(tmp_path: Path) -> None:
    frames = moving_square(20)
    path = tmp_path / "clip.gif"
    write(path, frames, VideoConfig(), chunk=6)
    back = list(read_video(path))
    assert len(back) == 20
    assert psnr(back[7], frames[7]) > 40
    config = VideoConfig(gif_max_frames=16)
    with pytest.raises(VideoError, match=r"GIF of endless length is too long"):
        check_output(str(path), config, None)
    with pytest.raises(VideoError, match=r"17 frames.*limit is 16 frames \(1 s\).*\.mp4"):
        check_output(str(path), config, 17)
    with open_video(path, config) as writer:
        writer.write(frames[:12])
        with pytest.raises(VideoError, match="limit is 16 frames"):
            writer.write(frames[12:])
    assert len(list(read_video(path))) == 12


@contextmanager
def stdout_as(fd: int) -> Iterator[None]:
    saved = os.dup(1)
    os.dup2(fd, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def test_raw_pipe_carries_the_pixels_and_ends_cleanly_when_its_reader_goes() -> None:
    frames = moving_square(3, 8, 16)
    reader, sender = os.pipe()
    with stdout_as(sender), open_video("-", VideoConfig()) as writer:
        assert writer.write(frames)
        assert os.read(reader, 10_000) == frames.tobytes()
        os.close(reader)
        assert not writer.write(frames)
        assert writer.num_frames == 3
    os.close(sender)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_one_clear_line_and_the_file_still_plays(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    with open_video(path, VideoConfig()) as writer, file_size_limit(200_000):
        with pytest.raises(
            VideoError, match=r"File too large; \d+ frames \(.* s\) were written and play"
        ) as info:
            for _ in range(100):
                writer.write(noise)
    assert "\n" not in str(info.value)
    assert writer.num_frames >= 12
    assert len(list(read_video(path))) == writer.num_frames


@pytest.mark.parametrize("name", ["full.mp4", "full.gif"])
def test_no_space_left_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/full")
    writer = open_video(tmp_path / name, VideoConfig())
    with pytest.raises(VideoError, match=r"No space left on device.*free some space"):
        for _ in range(100):
            writer.write(moving_square(12))
        writer.close()
    writer.close()


def test_no_space_for_png_files_leaves_no_torn_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    frames = np.concatenate([np.zeros_like(noise), noise])  # noise does not compress: its files are larger
    with open_video(f"{tmp_path}/frames/", VideoConfig()) as writer, file_size_limit(2_000):
        with pytest.raises(VideoError, match="File too large; 2 frames"):
            writer.write(frames)
    assert sorted(os.listdir(tmp_path / "frames")) == ["000000.png", "000001.png"]


def test_a_failed_append_leaves_whole_records_only(tmp_path: Path) -> None:
    file = AppendFile(tmp_path / "records")
    file.append(b"a" * 1000)
    with file_size_limit(1500), pytest.raises(OSError, match="File too large") as info:
        file.append(b"b" * 1000)
    assert info.value.errno == errno.EFBIG
    file.close()
    assert (tmp_path / "records").read_bytes() == b"a" * 1000


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("{tmp}/missing/clip.mp4", r"No such file or directory.*create the directory"),
        ("{tmp}/missing/%d.png", r"give a directory that exists|create the directory"),
        ("{tmp}/clip.mp5", r"unknown kind of video '\.mp5'.*did you mean '\.mp4'"),
        ("{tmp}/clip", r"unknown kind of video"),
        ("{tmp}/clip.png", r"clip-%06d\.png"),
        ("{tmp}/file/", r"File exists|Not a directory"),
        ("{tmp}/file/clip.mp4", r"No such file|Not a directory"),
        ("/proc/clip.mp4", r"cannot write '/proc/clip.mp4'"),
        ("", r"empty"),
    ],
)
def test_unwritable_paths_are_refused_before_and_at_opening(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "file").write_text("")
    target = path.format(tmp=tmp_path)
    with pytest.raises(VideoError, match=words):
        check_output(target, VideoConfig(), 10)
    with pytest.raises(VideoError, match=words):
        open_video(target, VideoConfig())


def test_a_directory_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(VideoError, match="Is a directory"):
        check_output(str(tmp_path / "clip.mp4"), VideoConfig(), 10)


def test_checking_an_output_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "old.mp4").write_bytes(b"precious")
    for name in ("old.mp4", "new.mp4", "new.gif", "frames/", "%d.png", "-"):
        check_output(name if name == "-" else f"{tmp_path}/{name}", VideoConfig(), 10)
    assert os.listdir(tmp_path) == ["old.mp4"]
    assert (tmp_path / "old.mp4").read_bytes() == b"precious"


def test_wrong_frames_are_refused_with_their_shape(tmp_path: Path) -> None:
    with open_video(tmp_path / "clip.mp4", VideoConfig()) as writer:
        writer.write(moving_square(2))
        with pytest.raises(VideoError, match=r"64x50 do not fit a video of 64x48"):
            writer.write(moving_square(2, height=50))
        with pytest.raises(VideoError, match="float32"):
            writer.write(moving_square(2).astype(np.float32))  # type: ignore[arg-type]
        with pytest.raises(VideoError, match="no picture"):
            open_video(tmp_path / "other.mp4", VideoConfig()).write(np.zeros((1, 0, 8, 3), np.uint8))
    assert len(list(read_video(tmp_path / "clip.mp4"))) == 2


@pytest.mark.parametrize(
    "config", [VideoConfig(codec="libx265000"), VideoConfig(preset="fastish"), VideoConfig(codec="aac")]
)
def test_unknown_encoders_are_named(tmp_path: Path, config: VideoConfig) -> None:
    with open_video(tmp_path / "clip.mp4", config) as writer:
        with pytest.raises(VideoError, match=r"codec='.*' with preset='.*'.*use codec='libx264'"):
            writer.write(moving_square(2))


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"fps": 0}, {"crf": 60}, {"segment_seconds": -1}, {"quality": 3}):
        with pytest.raises(ConfigError):
            VideoConfig(**wrong)  # type: ignore[arg-type]


def test_segments_are_for_mp4_only(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="segment"):
        check_output(f"{tmp_path}/clip.gif", VideoConfig(segment_seconds=2.0), 10)


def test_reading_what_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.mp4").write_bytes(b"not a video" * 10)
    with pytest.raises(VideoError, match="noise.mp4"):
        next(read_video(tmp_path / "noise.mp4"))
    with pytest.raises(VideoError, match="absent.mp4"):
        probe_video(tmp_path / "absent.mp4")

"""The loop between a stream and a file, with a stream of known frames: lengths, switches, interruption,
failures."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from longtake.bench.meter import GenerationMeter
from longtake.cli.produce import Plan, StopRequest, produce, progress_display
from longtake.errors import VideoError
from longtake.io.video import Frames, FrameWriter, VideoConfig, open_video, read_video


class Counting:
    """A source whose first chunk has 9 frames and the others 12; each frame's brightness tells its number."""

    def __init__(self) -> None:
        self.made = 0
        self.prompts: list[tuple[int, str]] = []
        self.cache_bytes = 4096

    def next_frames(self) -> Frames:
        count = 12 if self.made else 9
        numbers = np.arange(self.made, self.made + count)
        self.made += count
        return np.broadcast_to((numbers * 2 % 256).astype(np.uint8)[:, None, None, None], (count, 16, 16, 3))

    def set_prompt(self, text: str) -> None:
        self.prompts.append((self.made, text))


def run(source: Counting, writer: FrameWriter, plan: Plan, stop: StopRequest | None = None) -> bool:
    meter = GenerationMeter(plan.fps, time.perf_counter())
    meter.imported()
    meter.loaded()
    shown: list[tuple[int, int]] = []
    done = produce(
        source, writer, plan, meter, stop or StopRequest(), lambda m, b: shown.append((m.num_frames, b))
    )
    assert meter.num_frames == writer.num_frames
    assert not shown or shown[-1] == (writer.num_frames, 4096)
    return done


@pytest.mark.parametrize("num_frames", [1, 9, 10, 21, 50])
def test_exactly_the_frames_asked_for_are_written(tmp_path: Path, num_frames: int) -> None:
    source = Counting()
    with open_video(tmp_path / "out.mp4", VideoConfig(crf=1)) as writer:
        assert run(source, writer, Plan(num_frames, (), 16))
    brightness = [int(np.median(frame)) for frame in read_video(tmp_path / "out.mp4")]
    assert brightness == pytest.approx([2 * i for i in range(num_frames)], abs=2)
    assert source.made - num_frames < 12  # no chunk is made in vain


def test_a_prompt_takes_over_at_the_first_chunk_that_begins_at_or_after_its_frame(tmp_path: Path) -> None:
    source = Counting()
    plan = Plan(60, ((0, "a"), (9, "b"), (10, "c"), (45, "d"), (1000, "e")), 16)
    with open_video(tmp_path / "out.mp4", VideoConfig()) as writer:
        run(source, writer, plan)
    assert source.prompts == [(0, "a"), (9, "b"), (21, "c"), (45, "d")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_endless_video_after_the_chunk_in_progress(tmp_path: Path, number: int) -> None:
    class Signalled(Counting):
        def next_frames(self) -> Frames:
            if self.made == 33:
                os.kill(os.getpid(), number)
            return super().next_frames()

    stop = StopRequest()
    before = signal.getsignal(number)
    with open_video(tmp_path / "out.mp4", VideoConfig()) as writer, stop.listening():
        assert not run(Signalled(), writer, Plan(None, (), 16), stop)
    assert stop.signal_number == number
    assert len(list(read_video(tmp_path / "out.mp4"))) == 45
    assert signal.getsignal(number) is before


def test_a_second_signal_interrupts_at_once_and_the_file_plays(tmp_path: Path) -> None:
    class Stuck(Counting):
        def next_frames(self) -> Frames:
            if self.made == 21:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            return super().next_frames()

    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        with open_video(tmp_path / "out.mp4", VideoConfig()) as writer, stop.listening():
            run(Stuck(), writer, Plan(None, (), 16), stop)
    assert len(list(read_video(tmp_path / "out.mp4"))) == 21


def test_a_reader_that_hangs_up_ends_the_video() -> None:
    class OneChunk(FrameWriter):
        def write(self, frames_thw3: Frames) -> bool:
            if self.num_frames:
                return False
            self.num_frames += len(frames_thw3)
            return True

        def close(self) -> None:
            pass

    assert not run(Counting(), OneChunk(), Plan(None, (), 16))


def test_a_failing_output_passes_its_error_on(tmp_path: Path) -> None:
    (tmp_path / "full.mp4").symlink_to("/dev/full")
    with open_video(tmp_path / "full.mp4", VideoConfig()) as writer:
        with pytest.raises(VideoError, match="No space left"):
            produce(
                Counting(),
                writer,
                Plan(None, (), 16),
                GenerationMeter(16, time.perf_counter()),
                StopRequest(),
                lambda meter, cache_bytes: None,
            )


@pytest.mark.parametrize("num_frames", [50, None])
@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_length_rate_and_cache(
    num_frames: int | None,
    terminal: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("longtake.cli.produce._LOG_EVERY_SECONDS", 0.0)
    meter = GenerationMeter(16, time.perf_counter())
    with progress_display(Plan(num_frames, (), 16), "out.mp4") as show:
        for count in (9, 12, 12):
            meter.wrote(count)
            show(meter, 1_500_000)
            time.sleep(0.01)
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("out.mp4", "2.1 s", "FPS", "x real time", "cache 1.5 MB"):
        assert words in err

"""``longtake generate`` with a small random model: what it writes, what it says, and how each failure
ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longtake.cli import main
from longtake.io.video import read_video
from model_file import SIZE, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "random.safetensors")


def generate(model: Path, *argv: str, prompt: str = "a red circle") -> int:
    return main(["generate", "--model-path", str(model), "--prompt", prompt, *argv])


def refused(capsys: pytest.CaptureFixture[str], model: Path, *argv: str, prompt: str = "a red circle") -> str:
    """Run what must fail; returns its one line."""
    assert generate(model, *argv, prompt=prompt) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("longtake: error: ")
    return err


def test_a_prompt_becomes_a_playable_file_and_metrics_that_add_up(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, metrics = tmp_path / "out.mp4", tmp_path / "metrics.json"
    assert generate(model, "--seconds", "4", "--output-path", str(video), "--metrics", str(metrics)) == 0
    frames = list(read_video(video))
    assert len(frames) == 64
    assert frames[0].shape == (SIZE, SIZE, 3)
    told = json.loads(metrics.read_text())
    assert told["num_frames"] == 64
    assert told["outcome"] == "complete"
    parts = told["import_seconds"] + told["load_seconds"] + told["first_chunk_seconds"]
    assert parts == pytest.approx(told["time_to_first_frame_seconds"])
    assert told["frames_per_second"] > 0
    assert told["real_time_factor"] == pytest.approx(told["frames_per_second"] / 16)
    assert 0 < told["chunk_seconds_p50"] <= told["chunk_seconds_p95"]
    assert told["chunks_after_the_first"] == 5
    assert told["cache_bytes"] > 0
    assert told["resident_bytes"] > told["cache_bytes"]
    assert told["arguments"]["prompt"] == "a red circle"
    assert len(told["weights_sha256"]) == 64
    err = capsys.readouterr().err
    assert "4.0 s of video" in err
    assert "x real time" in err
    assert "cache" in err


def test_the_seed_decides_and_nothing_else(model: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        generate(model, "--num-frames", "30", "--seed", seed, "--output-path", str(tmp_path / f"{name}.mp4"))
    first = (tmp_path / "a.mp4").read_bytes()
    assert first == (tmp_path / "b.mp4").read_bytes()
    assert first != (tmp_path / "c.mp4").read_bytes()


def test_a_prompt_switch_changes_only_what_comes_after(model: Path, tmp_path: Path) -> None:
    argv = ["--num-frames", "57", "--output-path"]
    generate(model, *argv, f"{tmp_path}/plain/")
    generate(model, *argv, f"{tmp_path}/switched/", "--prompt-at", "1.2", "a blue square")

    def frames(name: str) -> list[bytes]:
        return [next(read_video(tmp_path / name / f"{i:06d}.png")).tobytes() for i in range(57)]

    plain, switched = frames("plain"), frames("switched")
    # 1.2 s is frame 19.2; chunks begin at 0, 9, 21, 33, 45.
    assert plain[:21] == switched[:21]
    assert all(a != b for a, b in zip(plain[21:], switched[21:], strict=True))


@pytest.mark.parametrize(
    "argv",
    [
        ("--num-inference-steps", "3"),
        ("--guidance-scale", "3"),
        ("--guidance-scale", "3", "--negative-prompt", "blue square"),
        ("--height", "40", "--width", "48"),
        ("--fps", "8"),
        ("--crf", "35"),
    ],
)
def test_every_setting_has_an_effect(model: Path, tmp_path: Path, argv: tuple[str, ...]) -> None:
    common = ("--num-frames", "24", "--output-path")
    generate(model, *common, str(tmp_path / "plain.mp4"))
    assert generate(model, *common, str(tmp_path / "changed.mp4"), *argv) == 0
    assert (tmp_path / "plain.mp4").read_bytes() != (tmp_path / "changed.mp4").read_bytes()
    assert len(list(read_video(tmp_path / "changed.mp4"))) == 24
    if "--height" in argv:
        assert next(read_video(tmp_path / "changed.mp4")).shape == (40, 48, 3)


def test_a_model_that_keeps_everything_generates_too(tmp_path: Path) -> None:
    history = {"window_frames": None, "sink_frames": 0, "chunk_frames": 3}
    model = write_model(tmp_path / "model.safetensors", history=history)
    assert generate(model, "--num-frames", "50", "--output-path", str(tmp_path / "out.mp4")) == 0
    assert len(list(read_video(tmp_path / "out.mp4"))) == 50


def test_segments(model: Path, tmp_path: Path) -> None:
    argv = ("--seconds", "3", "--segment-seconds", "1", "--output-path", str(tmp_path / "out.mp4"))
    assert generate(model, *argv) == 0
    lengths = [len(list(read_video(path))) for path in sorted(tmp_path.glob("out-*.mp4"))]
    assert lengths == [21, 24, 3]


def test_unknown_words_are_named_in_a_warning(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("--num-frames", "9", "--output-path", str(tmp_path / "out.mp4"), "--prompt-at", "0.1", "a wug")
    assert generate(model, *argv, prompt="a purple circle on Mars") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert "'purple', 'mars'" in warnings[0]
    assert "'circle'" not in warnings[0]
    assert "'wug'" in warnings[1]


def test_wrong_prompts_lengths_and_sizes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = ("--output-path", str(tmp_path / "out.mp4"))
    assert "prompt '  ' is empty" in refused(capsys, model, *to, prompt="  ")
    assert "prompt '' is empty" in refused(capsys, model, *to, "--prompt-at", "3", "")
    assert "no such second" in refused(capsys, model, *to, "--prompt-at", "-3", "a circle")
    assert "known words" in refused(capsys, model, *to, prompt="a red circle on a red circle on a red circle")
    assert "exclude each other" in refused(capsys, model, *to, "--seconds", "3", "--infinite")
    assert "multiples of 8" in refused(capsys, model, *to, "--height", "33")
    assert "does nothing without guidance" in refused(capsys, model, *to, "--negative-prompt", "blue")
    assert "--crf=60 is refused" in refused(capsys, model, *to, "--crf", "60")
    assert "codec='x265000'" in refused(capsys, model, *to, "--codec", "x265000")
    assert "'--promt'; did you mean '--prompt'" in refused(capsys, model, *to, "--promt", "x")
    assert list(tmp_path.iterdir()) == []


def test_wrong_outputs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing" / "out.mp4")
    assert "No such file or directory" in refused(capsys, model, "--output-path", missing)
    assert "unknown kind of video '.mp5'" in refused(capsys, model, "--output-path", f"{tmp_path}/a.mp5")
    assert "GIF" in refused(capsys, model, "--output-path", f"{tmp_path}/a.gif", "--infinite")
    metrics = ("--output-path", f"{tmp_path}/a.mp4", "--metrics", f"{tmp_path}/no/metrics.json")
    assert "--metrics" in refused(capsys, model, *metrics)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_path_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from longtake.cli import main; "
        f"code = main(['generate', '--prompt', 'x', '--output-path', {str(tmp_path / 'no' / 'out.mp4')!r}]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr


def test_wrong_models(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = ("--output-path", str(tmp_path / "out.mp4"))
    assert "unknown model 'tinny'" in refused(capsys, Path("tinny"), *to)
    assert "absent.safetensors" in refused(capsys, tmp_path / "absent.safetensors", *to)

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(model.read_bytes()[:-1000])
    assert "cut.safetensors" in refused(capsys, cut, *to)

    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(np.random.default_rng(0).bytes(5000))
    assert "noise.safetensors" in refused(capsys, noise, *to)

    with safe_open(model, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(model)
    name = next(name for name in tensors if name.startswith("dit."))

    def changed(label: str, weights: dict[str, object]) -> Path:
        save_file(weights, tmp_path / f"{label}.safetensors", metadata)
        return tmp_path / f"{label}.safetensors"

    without = changed("missing", {key: value for key, value in tensors.items() if key != name})
    assert name in refused(capsys, without, *to)
    renamed = changed("renamed", {f"{key}x" if key == name else key: value for key, value in tensors.items()})
    line = refused(capsys, renamed, *to)
    assert "missing" in line
    assert "unexpected" in line
    broken = changed("broken", {**tensors, name: tensors[name] * float("nan")})
    assert name in refused(capsys, broken, *to)
    assert not (tmp_path / "out.mp4").exists()


def test_a_full_disk_leaves_what_was_written(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video, metrics = tmp_path / "out.mp4", tmp_path / "metrics.json"
    code = (
        "import resource, sys; from longtake.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
        f"sys.exit(main(['generate', '--prompt', 'a red circle', '--model-path', {str(model)!r}, "
        f"'--infinite', '--output-path', {str(video)!r}, '--metrics', {str(metrics)!r}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "File too large" in result.stderr
    assert "were written and play" in result.stderr
    told = json.loads(metrics.read_text())
    assert told["outcome"] == "failed"
    assert len(list(read_video(video))) == told["num_frames"] > 0


@contextmanager
def started(model: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process of its own, which does not outlive the block."""
    command = [sys.executable, "-m", "longtake", "generate", "--model-path", str(model)]
    with subprocess.Popen(
        [*command, "--prompt", "a red circle", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(path: Path, num_bytes: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < num_bytes:
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("argv", "number", "code"),
    [
        (("--infinite",), signal.SIGINT, 0),
        (("--seconds", "86400"), signal.SIGINT, 130),
        (("--infinite",), signal.SIGTERM, 143),
    ],
)
def test_an_interrupted_video_plays(
    model: Path, tmp_path: Path, argv: tuple[str, ...], number: int, code: int
) -> None:
    video, metrics = tmp_path / "out.mp4", tmp_path / "metrics.json"
    with started(model, *argv, "--output-path", str(video), "--metrics", str(metrics)) as process:
        wait_for(video, 10_000)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert b"Traceback" not in err
    assert b"(interrupted)" in err
    told = json.loads(metrics.read_text())
    assert told["outcome"] == "interrupted"
    assert len(list(read_video(video))) == told["num_frames"] > 9


def test_a_killed_video_plays(model: Path, tmp_path: Path) -> None:
    with started(model, "--infinite", "--output-path", str(tmp_path / "out.mp4")) as process:
        wait_for(tmp_path / "out.mp4", 10_000)
        process.kill()
        process.communicate()
    assert len(list(read_video(tmp_path / "out.mp4"))) > 9


def test_a_raw_pipe_carries_frames_alone_and_may_be_closed(model: Path) -> None:
    with started(model, "--infinite", "--output-path", "-") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        size = SIZE * SIZE * 3
        first = process.stdout.read(21 * size)
        assert len(first) == 21 * size
        assert len(set(first)) > 10
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0, err
    assert b"Traceback" not in err
    assert b"(reader closed)" in err


def test_a_finished_file_replaces_an_old_one(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(os.urandom(100_000))
    assert generate(model, "--num-frames", "9", "--output-path", str(tmp_path / "out.mp4")) == 0
    assert len(list(read_video(tmp_path / "out.mp4"))) == 9

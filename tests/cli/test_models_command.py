"""``longtake models``: what it says of model files, good and bad."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from longtake.cli import main
from model_file import SIZE, write_model


def test_a_model_file_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "model.safetensors")
    assert main(["models", str(path), "--format", "json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["path"] == str(path)]
    assert row["name"] == "random"
    assert row["level"] == 1
    assert (row["width"], row["height"], row["fps"], row["steps"]) == (SIZE, SIZE, 16.0, 2)
    assert row["num_bytes"] == path.stat().st_size
    assert row["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()

    assert main(["models", str(path)]) == 0
    table = capsys.readouterr().out
    for words in ("random", f"{SIZE}x{SIZE} at 16 fps", row["sha256"][:12]):
        assert words in table


def test_shipped_models_are_found_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "small.safetensors")
    monkeypatch.setattr("longtake.stream.bundle.shipped_models", lambda: {"small": path})
    assert main(["models"]) == 0
    assert "random" in capsys.readouterr().out
    video = tmp_path / "out.mp4"
    argv = ["generate", "--prompt", "a circle", "--num-frames", "9", "--output-path", str(video)]
    assert main([*argv, "--model-path", "small"]) == 0
    assert video.stat().st_size > 0
    capsys.readouterr()
    assert main([*argv, "--model-path", "smal"]) == 2
    assert "unknown model 'smal'; did you mean 'small'?" in capsys.readouterr().err

    monkeypatch.setattr("longtake.stream.bundle.shipped_models", dict)
    assert main(["models"]) == 0
    assert "no models come with this package" in capsys.readouterr().out


def test_what_is_no_model_is_told_and_the_rest_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_model(tmp_path / "model.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    absent = tmp_path / "absent.safetensors"
    assert main(["models", str(tmp_path / "noise.safetensors"), str(absent), str(path)]) == 2
    out, err = capsys.readouterr()
    assert "random" in out
    assert err.count("\n") == 2
    assert "noise.safetensors" in err
    assert "absent.safetensors" in err

"""``longtake verify``: what it prints and how it exits, on a recording that holds, one that does not, and no
recording."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longtake.cli import main

RECORDING = Path(__file__).parents[1] / "data" / "causal_window.safetensors"


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """The recording with one output off by more than the tolerance."""
    with safe_open(RECORDING, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(RECORDING)
    tensors["latents"].view(-1)[7] += 1e-3
    save_file(tensors, tmp_path / "spoilt.safetensors", metadata)
    return tmp_path / "spoilt.safetensors"


def test_a_recording_that_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(RECORDING)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "max abs error" in out
    assert "FAILED" not in out
    assert out.splitlines()[-1] == "all within 0.0001"


def test_one_that_does_not_and_one_that_cannot_be_read(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(RECORDING), str(spoilt)]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    failed = [line for line in out.splitlines() if "FAILED" in line]
    assert failed
    assert all("latents" in line for line in failed)
    assert out.splitlines()[-1] == "NOT all within 0.0001"

    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(RECORDING.read_bytes()[:1000])
    assert main(["verify", str(damaged), str(tmp_path / "absent.safetensors"), str(RECORDING)]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 2
    assert "damaged.safetensors" in err
    assert "absent.safetensors" in err
    assert str(RECORDING) in out  # the readable one is still verified


def test_a_wider_tolerance(spoilt: Path) -> None:
    assert main(["verify", "--tolerance", "0.01", str(spoilt)]) == 0

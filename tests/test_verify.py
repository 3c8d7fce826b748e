"""Golden recordings replay within 1e-4, and a recording that cannot pass does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from longtake.errors import CheckpointError, LongtakeError
from longtake.history.positions import Absolute, Relative
from longtake.io.checkpoints import read_safetensors
from longtake.verify import Recording, verify_file

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    "name", ["wan_bidirectional", "causal_window", "causal_sink", "causal_relative", "memory"]
)
def test_golden_recordings_replay(name: str) -> None:
    report = verify_file(DATA / f"{name}.safetensors")
    assert report.passed
    assert report.parts
    assert max(report.parts.values()) < 2e-5


def altered(tmp_path: Path, name: str, metadata: dict[str, str | None], **tensors: torch.Tensor) -> Path:
    recorded, values = read_safetensors(DATA / f"{name}.safetensors")
    path = tmp_path / "altered.safetensors"
    kept = {key: value for key, value in {**values, **metadata}.items() if value is not None}
    save_file({**recorded, **tensors}, path, kept)
    return path


def test_a_wrong_setting_fails(tmp_path: Path) -> None:
    report = verify_file(altered(tmp_path, "causal_sink", {"sink_frames": "2"}))
    assert not report.passed
    assert report.parts["flows (in place)"] > 1e-3


def test_not_a_number_fails(tmp_path: Path) -> None:
    flow = Recording(DATA / "wan_bidirectional.safetensors").tensor("flow") * float("nan")
    assert not verify_file(altered(tmp_path, "wan_bidirectional", {}, flow=flow)).passed


@pytest.mark.parametrize("window", ["-1", "0", "None", "inf", None])
def test_unlimited_windows_are_read(tmp_path: Path, window: str | None) -> None:
    path = altered(tmp_path, "causal_window", {"window_frames": window})
    assert Recording(path).history().window_frames is None
    if window not in ("-1", None):
        return
    report = verify_file(path)
    assert not report.passed, "the recording was made with a window"
    assert report.parts["flows (in place)"] == pytest.approx(report.parts["flows (functional)"], abs=1e-5)


@pytest.mark.parametrize(
    ("wording", "relative"),
    [
        ("Relative ids", True),
        ("window-relative, keys un-rotated", True),
        ("absolute frame ids", False),
        (None, False),
    ],
)
def test_positions_are_read_from_their_wording(tmp_path: Path, wording: str | None, relative: bool) -> None:
    config = Recording(altered(tmp_path, "causal_relative", {"rope": wording})).history()
    assert config.positions == (Relative(f_max=11) if relative else Absolute())


def test_what_the_noise_says_need_not_be_said(tmp_path: Path) -> None:
    path = altered(tmp_path, "causal_relative", {"chunks": None, "kind": None, "context_timestep": None})
    assert verify_file(path).passed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "recall"}, "kind 'recall' are not supported"),
        ({"kind": "memory"}, "holds no memory encoder"),
        ({"dim": None}, "no metadata 'dim'"),
        ({"dim": "wide"}, "dim='wide' is no number"),
        ({"patch_size": "2,2"}, "patch_size='2,2' has no three sizes"),
        ({"sink_frames": "1.5"}, r"sink_frames=1\.5 is no whole number"),
        ({"chunks": "9"}, "21 frames of noise are not 9 chunks of 3"),
        ({"chunks": None, "frames_per_chunk": "7"}, r"renoise has the shape \(7, 3, .* need \(3, 3, 1, 7,"),
        ({"num_layers": "2"}, r"unexpected: blocks\.2"),
        ({"window_frames": "2"}, "window_frames=2 does not hold"),
    ],
)
def test_bad_recordings_are_user_errors(
    tmp_path: Path, metadata: dict[str, str | None], message: str
) -> None:
    with pytest.raises(LongtakeError, match=message):
        verify_file(altered(tmp_path, "causal_sink", metadata))


def test_unreadable_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not safetensors at all")
    for path in (broken, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=path.name):
            verify_file(path)

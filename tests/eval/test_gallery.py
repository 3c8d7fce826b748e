"""The gallery: files, verdicts, failures marked, the same again for the same sources, small."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from faulty_sources import FaultySource
from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.gallery import GalleryConfig, _write_videos, faults, write_gallery
from longtake.eval.source import TruthSource
from longtake.io.video import read_video
from longtake.world import render, sample_scene

CONFIG = GalleryConfig(clips=2, worst=1, pool=3, batch=2)


def write(fault: str, out: Path) -> dict[str, bytes]:
    total = write_gallery(CONFIG, FaultySource(fault), TruthSource, out, "longtake eval gallery")
    files = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    assert total == sum(map(len, files.values()))
    return files


def picture(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24").astype(int)


def has_red_letters(sheet_hwc: np.ndarray) -> bool:
    """Label rows are 16 pixels high, above all frames."""
    top = sheet_hwc[:64].reshape(-1, 3)
    return bool(((top[:, 0] > 240) & (top[:, 1] < 20) & (top[:, 2] < 20)).any())


def test_failures_are_shown_and_marked(tmp_path: Path) -> None:
    (tmp_path / "level-1-999.mp4").write_bytes(b"of an earlier gallery")
    files = write("wrong colour", tmp_path)
    clips = [name for name in files if name.endswith(".mp4")]
    assert 2 <= len(clips) <= 3
    assert set(files) == {*clips, "README.md", "level-1.png", "level-1-worst.png"}
    page = files["README.md"].decode()
    assert "0 of 3 clips of 5 s are right" in page
    assert page.count("WRONG: colour 0.00") == 3
    assert page.count("| right |") == 3  # the real clips
    assert all(f"]({name})" in page for name in clips)
    assert has_red_letters(picture(tmp_path / "level-1-worst.png"))
    frame = next(read_video(tmp_path / clips[0]))
    assert frame.shape == (64, 128, 3)
    assert write("wrong colour", tmp_path / "again") == {
        name: data for name, data in files.items() if name != "level-1-999.mp4"
    }


def test_right_clips_have_no_section_of_failures(tmp_path: Path) -> None:
    files = write("none", tmp_path)
    page = files["README.md"].decode()
    assert "3 of 3 clips" in page
    assert "WRONG" not in page
    assert "level-1-worst.png" not in files
    assert sum(name.endswith(".mp4") for name in files) == 2
    assert not has_red_letters(picture(tmp_path / "level-1.png"))


def test_what_does_not_apply_is_no_fault() -> None:
    scores = {"binding": 0.95, "background": 1.0, "switch": None, "shown": 0.5, "return_present": None}
    assert faults({**scores, "return_colour": 0.25}, 3) == ["shown 0.50", "return colour 0.25"]


def test_a_gallery_keeps_to_its_size(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    videos = {"level-1-001.mp4": noise}
    fine = _write_videos(videos, tmp_path, 1_000_000)
    assert _write_videos(videos, tmp_path, fine - 1) < fine
    with pytest.raises(EvalError, match="use fewer --clips"):
        _write_videos({"level-1-001.mp4": render(sample_scene(0), 0, 9)}, tmp_path, 100)


def test_impossible_galleries_are_refused() -> None:
    with pytest.raises(ConfigError, match="use pool >= 10"):
        GalleryConfig(pool=9)
    with pytest.raises(ConfigError, match="use some of 1, 2, 3"):
        GalleryConfig(levels=(1, 4))

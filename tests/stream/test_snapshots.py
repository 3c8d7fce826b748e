"""Snapshots of streams: what goes on from one is what would have followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.errors import SnapshotError
from longtake.io.checkpoints import read_safetensors, write_safetensors
from longtake.stream.bundle import load_model
from longtake.stream.session import Stream
from longtake.stream.snapshot import FORMAT
from model_file import write_model
from tiny_parts import STREAM_SETTINGS, assert_same, small_pipeline


@settings(max_examples=12, deadline=None)
@given(
    changes=st.sampled_from(STREAM_SETTINGS),
    before=st.integers(0, 6),
    switch=st.sampled_from([None, "keep", "reencode", "drop"]),
    pending=st.booleans(),
)
def test_resume_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any], before: int, switch: Any, pending: bool
) -> None:
    pipeline = small_pipeline(**changes)
    path = tmp_path_factory.mktemp("snapshot") / "stream.safetensors"
    stream = Stream(pipeline, "a red ball", 11)
    for index in range(before):
        if switch is not None and index == 2:
            stream.set_prompt("green square", sink=switch)
        next(stream)
    if pending:
        stream.set_prompt("yellow", sink="reencode")
    stream.snapshot(path)
    branch = stream.branch()
    expected = [next(stream) for _ in range(4)]
    resumed = Stream.restore(path, small_pipeline(**changes))
    resumed.engine.history.check_integrity()
    for chunk in expected:
        assert_same(next(resumed), chunk)
        assert_same(next(branch), chunk)


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_resume_of_the_real_networks_is_bit_identical(tmp_path: Path, guidance: float | None) -> None:
    """The small autoencoder runs channels-last, which a file does not keep."""
    model = str(write_model(tmp_path / "model.safetensors", guidance=guidance))
    stream = Stream(load_model(model).pipeline, "a red circle", 5)
    for _ in range(3):
        next(stream)
    path = str(tmp_path / "stream.longtake")
    stream.snapshot(path)
    resumed = Stream.restore(path, load_model(model).pipeline)
    for chunk in [next(stream) for _ in range(2)]:
        assert_same(next(resumed), chunk)


def test_snapshots_refuse_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    stream = Stream(small_pipeline(), "a red ball")
    next(stream)
    stream.snapshot(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["stream.safetensors"], "nothing partial is left"
    with pytest.raises(SnapshotError, match="made with weights"):
        Stream.restore(path, small_pipeline(seed=1))
    with pytest.raises(SnapshotError, match=r"config\.history\.sink_frames was 2, is 1"):
        Stream.restore(path, small_pipeline(sink_frames=1))
    with pytest.raises(SnapshotError, match=r"config\.guidance was null, is 3\.0"):
        Stream.restore(path, small_pipeline(guidance=3.0))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnapshotError, match="damaged"):
        Stream.restore(damaged, small_pipeline())
    plain = tmp_path / "plain.safetensors"
    write_safetensors(plain, {"x": torch.zeros(1)}, {})
    with pytest.raises(SnapshotError, match="no snapshot"):
        Stream.restore(plain, small_pipeline())
    with pytest.raises(SnapshotError, match="absent"):
        stream.snapshot(tmp_path / "absent" / "stream.safetensors")
    tensors, metadata = read_safetensors(path)
    write_safetensors(
        plain,
        tensors,
        {name: text.replace(f'"format": {FORMAT}', '"format": 9') for name, text in metadata.items()},
    )
    with pytest.raises(SnapshotError, match="format 9"):
        Stream.restore(plain, small_pipeline())


def test_another_thread_count_is_told(tmp_path: Path) -> None:
    path = tmp_path / "stream.safetensors"
    Stream(small_pipeline(), "a red ball").snapshot(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.warns(UserWarning, match="not bit for bit"):
            Stream.restore(path, small_pipeline())
    finally:
        torch.set_num_threads(threads)

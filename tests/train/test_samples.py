"""What a stage shows of its model: pictures where they are expected, and those that serving would make."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from longtake.io.images import sheet_picture
from longtake.models.tiny_vae import TinyVAE
from longtake.stream import Pipeline, Stream
from longtake.train.loop import run
from longtake.train.samples import SampleRollouts
from longtake.train.vae import VAETask
from toy_training import CAPTIONS, VAE, networks, recipe


def read_png(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


def test_a_sheet_has_a_row_per_clip_and_time_from_left_to_right() -> None:
    clips = np.zeros((2, 5, 4, 6, 3), np.uint8)
    clips[:] = (10 * np.arange(5)[None, :] + 100 * np.arange(2)[:, None])[:, :, None, None, None]
    picture = sheet_picture(clips, columns=3, gap=1)
    assert picture.shape == (2 * 5, 3 * 7, 3)
    assert picture[0, [0, 7, 14], 0].tolist() == [0, 20, 40]
    assert picture[5, [0, 7, 14], 0].tolist() == [100, 120, 140]
    assert picture[4, 0, 0] == picture[0, 6, 0] == 255
    assert sheet_picture(clips, columns=9).shape[1] == 5 * 8


def test_rollouts_are_the_streams_of_a_server() -> None:
    torch.manual_seed(0)
    vae, module = TinyVAE(VAE).eval(), networks()
    stream = recipe().stream
    frames = SampleRollouts(vae, stream, CAPTIONS, num_chunks=3)(module.dit, module.text)
    assert frames.dtype == torch.uint8
    assert frames.shape == (3, 1 + 5 * VAE.temporal_stride, 16, 16, 3)
    served = Stream(Pipeline(module.dit, vae, module.text, stream), CAPTIONS[1], seed=1)
    expected = np.concatenate([next(served).frames for _ in range(3)])
    difference = np.abs(expected.astype(int) - frames[1].numpy().astype(int))
    assert difference.max() <= 1  # a batch rounds differently


def test_a_stage_keeps_its_samples_beside_its_log(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    task = VAETask(TinyVAE(VAE), recipe().vae)
    run(task, task.config.loop, tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-000002.png",
        "step-000003.png",
    ]
    shown = task.samples()
    assert shown.shape == (8, task.num_frames, 16, 16, 3)
    assert (read_png(tmp_path / "samples" / "step-000003.png") == sheet_picture(shown.numpy())).all()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [2, 3]

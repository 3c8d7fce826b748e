"""Sources with known faults, made from real clips."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from longtake.eval.source import TruthSource
from longtake.world import render, render_masks, scene_for_prompt

Frames = NDArray[np.uint8]


class FaultySource(TruthSource):
    """Real clips with one fault, applied to whole videos and then cut into the same chunks."""

    name = "model"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.generated = 0

    @property
    def about(self) -> dict[str, str]:
        return {**super().about, "fault": self.fault}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        self.generated += len(prompts)
        videos = np.stack(
            [self._spoil(text, seed, num_frames) for text, seed in zip(prompts, seeds, strict=True)]
        )
        start, stop = 0, self.first_chunk_frames
        while start < num_frames:
            yield videos[:, start:stop]
            start, stop = stop, stop + self.chunk_frames

    def _spoil(self, text: str, seed: int, num_frames: int) -> Frames:
        if self.fault == "one place":
            seed = 0
        scene = scene_for_prompt(text, seed)
        video = render(scene, 0, num_frames)
        rng = np.random.default_rng(seed)
        time = np.arange(num_frames)
        if self.fault == "wrong colour":
            purple = np.array((145, 35, 185), np.uint8)
            video = np.where(render_masks(scene, 0, num_frames)[:, 0, :, :, None] > 0.3, purple, video)
        elif self.fault == "no object":
            video = np.repeat(video.max(axis=2, keepdims=True), 64, axis=2)
            video[:] = video[:1]
        elif self.fault == "two objects":
            video[:, 1:15, 1:15] = video[:, -15:-1, -15:-1] = (20, 195, 60)
        elif self.fault == "frozen":
            video[:] = video[:1]
        elif self.fault == "drifting colours":
            shift = np.array((-30, 15, 25)) * (time / num_frames)[:, None]
            video = np.clip(video + shift[:, None, None], 0, 255)
        elif self.fault == "jerky":
            jumps = np.maximum(0, time + rng.integers(-12, 13, num_frames))
            video = np.concatenate([render(scene, t, t + 1) for t in jumps.tolist()])
        elif self.fault == "flickering":
            video = video + (time % 2 * 8)[:, None, None, None]
        elif self.fault == "seams":
            chunk = (time >= 9) * (1 + (time - 9) // 12)
            video = video + (chunk % 2 * 6)[:, None, None, None]
        elif self.fault == "blobs":
            video = _out_of_focus(video)
        return np.clip(video, 0, 255).astype(np.uint8)


def _out_of_focus(video_thwc: Frames, sigma: float = 4.0) -> NDArray[np.float64]:
    """Blurred until shapes are gone, by the transform of a Gaussian."""
    frequency = np.fft.fftfreq(video_thwc.shape[1])
    gain = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    spectrum = np.fft.fft2(video_thwc, axes=(1, 2)) * (gain[:, None] * gain)[..., None]
    return np.fft.ifft2(spectrum, axes=(1, 2)).real

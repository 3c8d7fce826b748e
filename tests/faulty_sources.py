"""Sources with known faults, made from real clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from longtake.eval.script import Script, scene_for_script
from longtake.eval.source import TruthSource
from longtake.world import Scene, render, render_masks
from longtake.world.vocabulary import COLOURS

Frames = NDArray[np.uint8]


class FaultySource(TruthSource):
    """Real clips with one fault, applied to whole videos and then cut into the same chunks."""

    name = "model"

    def __init__(self, fault: str, level: int = 1) -> None:
        super().__init__(level)
        self.fault = fault
        self.generated = 0

    @property
    def about(self) -> dict[str, str]:
        return {**super().about, "fault": self.fault}

    def generate(self, scripts: Sequence[Script], seeds: Sequence[int], num_frames: int) -> Iterator[Frames]:
        self.generated += len(scripts)
        videos = np.stack(
            [self._spoil(script, seed, num_frames) for script, seed in zip(scripts, seeds, strict=True)]
        )
        start, stop = 0, self.chunking.first_frames
        while start < num_frames:
            yield videos[:, start:stop]
            start, stop = stop, stop + self.chunking.frames

    def _spoil(self, script: Script, seed: int, num_frames: int) -> Frames:
        if self.fault == "one place":
            seed = 0
        if self.fault == "ignored switch":
            script = Script(script.prompts[:1])
        if self.fault == "late switch":  # by a chunk and a half: half a chunk of it is judged
            script = Script(tuple((start + 18 if start else 0, text) for start, text in script.prompts))
        scene = scene_for_script(script, seed, self.level)
        if self.fault == "no object":
            empty = [dataclasses.replace(segment, objects=()) for segment in scene.segments]
            scene = dataclasses.replace(scene, segments=tuple(empty))
        if self.fault == "swapped colours":
            scene = _swapped(scene)
        if self.fault in ("returns recoloured", "does not return"):
            return _without_memory(scene, num_frames, recolour=self.fault == "returns recoloured")
        video = render(scene, 0, num_frames)
        rng = np.random.default_rng(seed)
        time = np.arange(num_frames)
        if self.fault == "wrong colour":
            purple = np.array((145, 35, 185), np.uint8)
            video = np.where(render_masks(scene, 0, num_frames)[:, 0, :, :, None] > 0.3, purple, video)
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


def _swapped(scene: Scene) -> Scene:
    """Each object in the colour of the next one: all asked colours and shapes are there, wrongly bound."""
    segments = []
    for segment in scene.segments:
        colours = [item.colour for item in segment.objects]
        objects = [
            dataclasses.replace(item, colour=colour)
            for item, colour in zip(segment.objects, colours[1:] + colours[:1], strict=True)
        ]
        segments.append(dataclasses.replace(segment, objects=tuple(objects)))
    return dataclasses.replace(scene, segments=tuple(segments))


def _without_memory(scene: Scene, num_frames: int, recolour: bool) -> Frames:
    """A panning clip whose objects are forgotten once they have left: no return, or one in another colour."""
    (segment,) = scene.segments
    truth = scene.truth(0, num_frames)
    seen_tn = truth.visible > 0
    left_n = []
    for n in range(len(segment.objects)):
        x_t = truth.center_xy[:, n, 0]
        out_t = ~seen_tn[:, n] & ((x_t < 0) | (x_t > 1)) & (np.cumsum(seen_tn[:, n]) > 0)
        left_n.append(np.flatnonzero(out_t[1:] & ~out_t[:-1]) + 1)
    free = [colour for colour in COLOURS if colour not in {item.colour for item in segment.objects}]
    parts = []
    moments = {0, num_frames, *(int(frame) for left in left_n for frame in left)}
    for start, stop in pairwise(sorted(moments)):
        times_n = [int((left <= start).sum()) for left in left_n]
        objects = [
            dataclasses.replace(item, colour=free[times % len(free)]) if times else item
            for item, times in zip(segment.objects, times_n, strict=True)
            if recolour or not times
        ]
        changed = dataclasses.replace(segment, objects=tuple(objects))
        parts.append(render(dataclasses.replace(scene, segments=(changed,)), start, stop))
    return np.concatenate(parts)


def _out_of_focus(video_thwc: Frames, sigma: float = 4.0) -> NDArray[np.float64]:
    """Blurred until shapes are gone, by the transform of a Gaussian."""
    frequency = np.fft.fftfreq(video_thwc.shape[1])
    gain = np.exp(-2 * (np.pi * sigma * frequency) ** 2)
    spectrum = np.fft.fft2(video_thwc, axes=(1, 2)) * (gain[:, None] * gain)[..., None]
    return np.fft.ifft2(spectrum, axes=(1, 2)).real

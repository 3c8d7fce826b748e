"""Measures a batch of streams as their chunks come: detections on sampled frames, differences on all.

What is kept grows by a few numbers per sample; no frame is kept longer than the next one needs it.

Legend: b streams, s samples, t frames, k object slots, h rows, w columns, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from longtake.world.detect import Detections, detect
from longtake.world.motion import Float64

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """One stream's measurements.

    Attributes:
        frames: Frame numbers of the samples, [S].
        detections: Of the sampled frames.
        change: Mean absolute difference (0..255) of every frame from the one before, [T - 1].
        flicker: Mean absolute second difference (0..255) of every three frames in a row, [T - 2].
        boundaries: Indices into `change` of the steps that cross a chunk boundary.
    """

    frames: NDArray[np.int64]
    detections: Detections
    change: Float64
    flicker: Float64
    boundaries: NDArray[np.int64]


class Meter:
    """Takes chunks of B streams and gives each stream's measurements.

    Args:
        num_frames: Frames to measure; what comes after is ignored.
        sample_every: Every n-th frame goes to the detectors.
    """

    def __init__(self, num_frames: int, sample_every: int) -> None:
        self._num_frames = num_frames
        self._sample_every = sample_every
        self._seen = 0
        self._tail_bthwc: NDArray[np.int16] | None = None
        self._detections: list[Detections] = []
        self._samples: list[int] = []
        self._change: list[Float64] = []
        self._flicker: list[Float64] = []
        self._boundaries: list[int] = []
        self._num_streams = 0

    @property
    def done(self) -> bool:
        """Whether all frames have come."""
        return self._seen >= self._num_frames

    def feed(self, chunk_bthwc: Frames) -> None:
        """Measures the next chunk, uint8 [B, T, H, W, 3]."""
        chunk_bthwc = chunk_bthwc[:, : self._num_frames - self._seen]
        self._num_streams, num_new = chunk_bthwc.shape[:2]
        if not num_new:
            return
        self._measure_changes(chunk_bthwc.astype(np.int16))
        picked = [t for t in range(num_new) if (self._seen + t) % self._sample_every == 0]
        if picked:
            sampled_bshwc = chunk_bthwc[:, picked]
            found = detect(sampled_bshwc.reshape(-1, *sampled_bshwc.shape[2:]))
            shape = (self._num_streams, len(picked))
            self._detections.append(_reshape(found, shape))
            self._samples += [self._seen + t for t in picked]
        self._seen += num_new

    def _measure_changes(self, chunk_bthwc: NDArray[np.int16]) -> None:
        if self._tail_bthwc is not None:
            # Step i leads from frame i to frame i + 1; this one crosses into the chunk.
            self._boundaries.append(self._seen - 1)
            chunk_bthwc = np.concatenate([self._tail_bthwc, chunk_bthwc], axis=1)
        step_bthwc = np.diff(chunk_bthwc, axis=1)
        # The tail's own steps were measured with the chunk before.
        known = 0 if self._tail_bthwc is None else self._tail_bthwc.shape[1] - 1
        self._change.append(np.abs(step_bthwc[:, known:]).mean(axis=(2, 3, 4)))
        self._flicker.append(np.abs(np.diff(step_bthwc, axis=1)).mean(axis=(2, 3, 4)))
        self._tail_bthwc = chunk_bthwc[:, -2:]

    def results(self) -> list[Measured]:
        """The measurements of each stream."""
        assert self.done, f"{self._seen} of {self._num_frames} frames came"
        merged = {
            item.name: np.concatenate([getattr(part, item.name) for part in self._detections], axis=1)
            for item in fields(Detections)
        }
        change_bt = np.concatenate(self._change, axis=1)
        flicker_bt = np.concatenate(self._flicker, axis=1)
        return [
            Measured(
                frames=np.array(self._samples),
                detections=Detections(**{name: values[stream] for name, values in merged.items()}),
                change=change_bt[stream],
                flicker=flicker_bt[stream],
                boundaries=np.array(self._boundaries, np.int64),
            )
            for stream in range(self._num_streams)
        ]


def pick(found: Detections, rows: NDArray[np.bool_]) -> Detections:
    """The detections of those samples for which `rows`, [S], is true."""
    return Detections(**{item.name: getattr(found, item.name)[rows] for item in fields(Detections)})


def _reshape(found: Detections, lead: tuple[int, int]) -> Detections:
    """Detections with their first axis split in two."""
    parts = {item.name: getattr(found, item.name) for item in fields(Detections)}
    return Detections(**{name: values.reshape(*lead, *values.shape[1:]) for name, values in parts.items()})

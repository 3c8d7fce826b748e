"""Contact sheets: frames of clips side by side in one picture, for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longtake.eval.errors import EvalError
from longtake.io.images import encode_png
from longtake.io.plot import pyplot

Frames = NDArray[np.uint8]


def contact_sheet(
    clips: Sequence[Frames],
    path: Path,
    columns: int = 10,
    labels: Sequence[str] | None = None,
    scale: int = 2,
    gap: int = 2,
    marked: Sequence[bool] | None = None,
    levels: int = 256,
) -> None:
    """Writes a PNG with one row per clip, `columns` frames of it evenly spread in time.

    Args:
        clips: uint8 [T, H, W, 3] each, of one size.
        path: The file to write.
        columns: Frames per row; a shorter clip repeats frames.
        labels: Text above each row, one or more lines; needs matplotlib (the `eval` extra) for its letters.
        scale: Every pixel becomes a square of this many.
        gap: White pixels between frames.
        marked: Rows whose label is red.
        levels: Values that each channel is rounded to: 64 halve the file of a model's frames.

    Raises:
        EvalError: No clips, or clips of different sizes.
    """
    sizes = {clip.shape[1:] for clip in clips}
    if len(sizes) != 1:
        raise EvalError(f"clips of sizes {sorted(sizes)} make no sheet", "give clips of one size")
    rows = []
    step = 256 // levels
    for number, clip_thwc in enumerate(clips):
        times = np.linspace(0, len(clip_thwc) - 1, columns).round().astype(int)
        frames = (clip_thwc[times] // step * step + step // 2).repeat(scale, axis=1).repeat(scale, axis=2)
        padded = np.pad(frames, [(0, 0), (0, gap), (0, gap), (0, 0)], constant_values=255)
        row = np.concatenate(list(padded), axis=1)
        if labels is not None:
            colour = "red" if marked is not None and marked[number] else "black"
            row = np.concatenate([_text(labels[number], row.shape[1], colour), row])
        rows.append(row)
    path.write_bytes(encode_png(np.concatenate(rows)))


class SheetKeeper:
    """Keeps a few frames of the first streams of a batch as chunks pass, for a contact sheet.

    Args:
        num_frames: Length of the videos.
        columns: Frames kept of each.
        rows: Streams kept.
    """

    def __init__(self, num_frames: int, columns: int = 12, rows: int = 12) -> None:
        self._times = sorted(set(np.linspace(0, num_frames - 1, columns).round().astype(int).tolist()))
        self._rows = rows
        self._seen = 0
        self._kept_bhwc: list[Frames] = []

    def feed(self, chunk_bthwc: Frames) -> None:
        """Looks at the next chunk, uint8 [B, T, H, W, 3]."""
        num_new = chunk_bthwc.shape[1]
        wanted = [time - self._seen for time in self._times if self._seen <= time < self._seen + num_new]
        self._kept_bhwc += [chunk_bthwc[: self._rows, time].copy() for time in wanted]
        self._seen += num_new

    def write(self, path: Path, labels: Sequence[str]) -> None:
        """Writes the sheet, one row per stream."""
        clips = np.stack(self._kept_bhwc, axis=1)
        contact_sheet(list(clips), path, columns=clips.shape[1], labels=labels[: len(clips)])


def _text(text: str, width: int, colour: str) -> Frames:
    """Lines of text as a picture of the given width, uint8 [16 a line, W, 3]."""
    height, dpi = 16 * len(text.splitlines()), 100
    figure = pyplot().figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    for number, line in enumerate(text.splitlines(), start=1):
        figure.text(2 / width, 1 - (16 * number - 4) / height, line, fontsize=8, color=colour)
    figure.canvas.draw()
    picture: Frames = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
    pyplot().close(figure)
    return picture[:height, :width]

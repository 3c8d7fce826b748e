"""Fresh clips that ask for recall, and which of their chunks there is something to learn from.

What was shown leaves the view for longer than the window and comes back unnamed (`world.recall`). While the
camera rests elsewhere a memory is to last and to keep silent: most of those chunks are only committed. What
is to come back must be shown as asked first, so the switch to it is learned from as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np

from longtake.history.base import HistoryConfig
from longtake.train.excerpts import Excerpt, LatentCacheConfig, chunk_at, chunk_start
from longtake.train.latents import ClipEncoder, Clips, DrawnT
from longtake.train.rendering import ClipRenderer, Rendered
from longtake.world.recall import (
    RecallScene,
    glide_frames,
    longest_recall_frames,
    recall_scene,
    recall_targets,
)

_NUM_SEEDS = 1 << 30
_NUM_SHOWING = 2  # chunks after the switch to what is to come back


@dataclass(frozen=True)
class RecallBatch(Generic[DrawnT]):
    """Clips of one length that do the same at the same time.

    Attributes:
        clips: of recall scenes.
        learned: of every chunk whether it is learned from or only committed.
        shown_frame: last latent frame of the view that is to come back.
        unseen: of every chunk whether that view has left the window before it and not come back.
        back_chunk: the first chunk in which the camera comes back.
    """

    clips: DrawnT
    learned: tuple[bool, ...]
    shown_frame: int
    unseen: tuple[bool, ...]
    back_chunk: int

    def encoded(self, encoder: ClipEncoder) -> RecallBatch[Clips]:
        """The same with clips as latents."""
        return RecallBatch(
            encoder.encode(self.clips), self.learned, self.shown_frame, self.unseen, self.back_chunk
        )


@dataclass(frozen=True)
class RecallSource:
    """Recall scenes of the training split, other ones in every step.

    Args:
        renderer: of the clips.
        config: their size, split and chunks; its number of frames does not matter.
        history: of the model, whose window absences are counted in.
        absence: shortest and longest absence in windows (sink and chunk included); drawn once for a batch,
            evenly in its logarithm, and never shorter than the camera's way.
        num_away: chunks that are learned from while the camera rests elsewhere, or as many as there are:
            what is remembered is not to be seen there.
        learned_share: of the other chunks that there is something to learn from, drawn for every batch.
    """

    renderer: ClipRenderer
    config: LatentCacheConfig
    history: HistoryConfig
    absence: tuple[float, float]
    num_away: int = 0
    learned_share: float = 1.0

    def draw(self, rng: np.random.Generator, count: int) -> RecallBatch[Rendered]:
        """Scenes that follow from the generator's state alone, as long as the longest of them."""
        low, high = (math.log(value) for value in self.absence)
        assert self.history.window_frames is not None, "absences are counted in windows"
        window = self.history.window_frames * self.renderer.stride
        frames = round(math.exp(low + (high - low) * float(rng.random())) * window)
        aspect = self.config.width / self.config.height
        frames = max(frames, glide_frames(aspect))
        seeds = self.config.first_seed + rng.integers(_NUM_SEEDS, size=count)
        targets = recall_targets(count, int(rng.integers(_NUM_SEEDS)), self.config.split)

        def scenes_from(earliest_back: int) -> list[RecallScene]:
            return [
                recall_scene(
                    int(seed), target, frames, self._boundary, self.config.split, aspect, earliest_back
                )
                for seed, target in zip(seeds, targets, strict=True)
            ]

        # All go back at the same time, so that they are learned from in the same chunks.
        scenes = scenes_from(max(made.back_from for made in scenes_from(0)))
        num_chunks = self._chunk_at(scenes[0].num_frames)
        config = self.config.replace(num_latent_frames=num_chunks * self.config.chunk_frames)
        excerpts = [
            Excerpt(
                made.scene,
                0,
                tuple(
                    (self._chunk_at(start) * config.chunk_frames, text) for start, text in made.scene.captions
                ),
                True,
            )
            for made in scenes
        ]
        shown, away, back = (
            self._chunk_at(start)
            for start in (scenes[0].shown_from, scenes[0].away_from, scenes[0].back_from)
        )
        leaving = _leaving_chunks(self.config.chunk_frames * self.renderer.stride, aspect)
        chunks = range(num_chunks)
        silent = range(away + leaving, back)
        moving = [*range(shown, shown + _NUM_SHOWING), *range(away, away + leaving), *range(back, num_chunks)]
        learned = set(_some(rng, moving, math.ceil(self.learned_share * len(moving))))
        learned |= set(_some(rng, silent, self.num_away))
        local, shown_frame = self.history.local_frames or 0, away * config.chunk_frames - 1
        return RecallBatch(
            self.renderer.render(excerpts, config),
            learned=tuple(chunk in learned for chunk in chunks),
            shown_frame=shown_frame,
            unseen=tuple(
                away + leaving <= chunk <= back and shown_frame < chunk * config.chunk_frames - local
                for chunk in chunks
            ),
            back_chunk=back,
        )

    def _boundary(self, frame: int) -> int:
        """First pixel frame of the first chunk that begins at or after a frame."""
        return chunk_start(self._chunk_at(frame), self.config.chunk_frames, self.renderer.stride)

    def _chunk_at(self, frame: int) -> int:
        return chunk_at(frame, self.config.chunk_frames, self.renderer.stride)


def _some(rng: np.random.Generator, chunks: Sequence[int], count: int) -> Sequence[int]:
    """As many of these, at random; all where there are no more."""
    return chunks if count >= len(chunks) else rng.choice(chunks, count, replace=False).tolist()


def longest_chunks(
    absence_frames: int,
    chunk_pixel_frames: int,
    aspect: float,
    num_away: int = 0,
    learned_share: float = 1.0,
) -> tuple[int, int]:
    """Upper ends of a batch's chunks, and of those that are learned from (for plans).

    Args:
        absence_frames: the longest absence, in pixel frames.
        chunk_pixel_frames: pixel frames of a chunk.
        aspect: width of the view over its height.
        num_away, learned_share: see `RecallSource`.
    """
    whole, back = longest_recall_frames(absence_frames, chunk_pixel_frames, aspect)
    chunks = -(-whole // chunk_pixel_frames)
    leaving = _leaving_chunks(chunk_pixel_frames, aspect)
    moving = _NUM_SHOWING + leaving + -(-back // chunk_pixel_frames)
    return chunks, min(chunks, math.ceil(learned_share * moving) + num_away)


def _leaving_chunks(chunk_pixel_frames: int, aspect: float) -> int:
    """Chunks from the one in which the camera leaves to the one in which it comes to rest."""
    return -(-glide_frames(aspect) // chunk_pixel_frames)

"""What every step of the DiT's teacher forcing walks through, drawn by worker processes ahead of the training
where asked for.

A step's clips follow from the seed and the draw's number alone, so that a run goes on after it was stopped as
it would have without, whoever renders them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.latents import ClipEncoder, Clips, ClipSource, DrawnT
from longtake.train.long_clips import LongBatch, LongSource
from longtake.train.recall import RecallBatch, RecallSource
from longtake.train.rendering import Rendered

_STEPS_AHEAD = 2
"""Of every worker: how many steps' pictures wait in memory."""


@dataclass(frozen=True)
class StepClips(Generic[DrawnT]):
    """What one step walks through.

    Attributes:
        noise_seed: of all else that is random in the step.
        walks: clips, and how many of their chunks are walked.
        long: clips of several windows, or None.
        recall: clips that ask for recall, or None.
    """

    noise_seed: int
    walks: tuple[tuple[DrawnT, int], ...]
    long: LongBatch[DrawnT] | None = None
    recall: RecallBatch[DrawnT] | None = None

    def encoded(self, encoder: ClipEncoder) -> StepClips[Clips]:
        """The same with clips as latents."""
        return StepClips(
            self.noise_seed,
            tuple((encoder.encode(clips), num_chunks) for clips, num_chunks in self.walks),
            None if self.long is None else self.long.encoded(encoder),
            None if self.recall is None else self.recall.encoded(encoder),
        )


@dataclass(frozen=True)
class StepSources(Dataset[StepClips[Clips | Rendered]]):
    """Where a stage's steps take their clips from; item i is what draw i walks through.

    Args:
        config: the stage.
        first_clips: source of clips of which only the first chunk is trained; None where the stage has none.
        clips: source of whole clips; None likewise.
        recall: source of clips that ask for recall; None likewise.
        long_clips: source of clips of several windows; None likewise.
    """

    config: DiTTrainingConfig
    first_clips: ClipSource[Clips | Rendered] | None = None
    clips: ClipSource[Clips | Rendered] | None = None
    recall: RecallSource | None = None
    long_clips: LongSource | None = None

    def __getitem__(self, draw: int) -> StepClips[Clips | Rendered]:
        config = self.config
        rng = np.random.default_rng((config.loop.seed, draw))
        noise_seed = int(rng.integers(1 << 40))
        walks = tuple(config.draw(rng, self.first_clips, self.clips))
        long = None if self.long_clips is None else self.long_clips.draw(rng, config.num_long_clips)
        recall = None if self.recall is None else self.recall.draw(rng, config.num_recall_clips)
        return StepClips(noise_seed, walks, long, recall)  # type: ignore[arg-type]  # batches are immutable


class Steps:
    """The encoded clips of every draw.

    Args:
        sources: where clips come from.
        encoder: of rendered ones; None where all are latents.
        num_workers: processes that draw ahead; 0 draws when a step asks.
    """

    def __init__(
        self, sources: StepSources, encoder: ClipEncoder | None = None, num_workers: int = 0
    ) -> None:
        self.sources = sources
        self.encoder = ClipEncoder(None) if encoder is None else encoder
        self._num_workers = num_workers
        self._ahead: Iterator[StepClips[Clips | Rendered]] | None = None
        self._next = 0

    def __call__(self, draw: int) -> StepClips[Clips]:
        """What a draw walks through; workers are ready for the one after the last that was asked for."""
        return self._drawn(draw).encoded(self.encoder)

    def close(self) -> None:
        """End the workers; a later draw starts others."""
        self._ahead = None

    def _drawn(self, draw: int) -> StepClips[Clips | Rendered]:
        num_draws = self.sources.config.num_draws
        if self._num_workers == 0 or draw >= num_draws:
            return self.sources[draw]
        if self._ahead is None or draw != self._next:
            self._ahead = iter(
                DataLoader(
                    self.sources,
                    batch_size=None,
                    sampler=range(draw, num_draws),
                    num_workers=self._num_workers,
                    prefetch_factor=_STEPS_AHEAD,
                    generator=torch.Generator(),  # which else would be the global one, that runs keep
                )
            )
        self._next = draw + 1
        drawn = next(self._ahead)
        if self._next == num_draws:
            self.close()
        return drawn

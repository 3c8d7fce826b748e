"""Fresh clips that go on for several windows: what a memory of long ago must not spoil.

A camera that keeps panning, prompts that change a part of a scene, and prompts that leave it for another one.
A few chunks are learned from, all of them after frames have left the window; the others are only committed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Generic

import numpy as np

from longtake.history.base import HistoryConfig
from longtake.train.excerpts import Excerpt, LatentCacheConfig, chunk_at, chunk_start
from longtake.train.latents import ClipEncoder, Clips, DrawnT
from longtake.train.rendering import ClipRenderer, Rendered
from longtake.world import Scene, sample_scene

_NUM_SEEDS = 1 << 30
_LEVEL = 3  # whose scenes pan or have prompt switches
_OTHER_LEVELS = (1, 2)


@dataclass(frozen=True)
class LongBatch(Generic[DrawnT]):
    """Clips of one length.

    Attributes:
        clips: they pan, or their prompts switch.
        learned: of every chunk whether it is learned from or only committed.
        returns: of every clip, of every chunk whether a panning camera brings something back in it.
    """

    clips: DrawnT
    learned: tuple[bool, ...]
    returns: tuple[tuple[bool, ...], ...]

    def encoded(self, encoder: ClipEncoder) -> LongBatch[Clips]:
        """The same with clips as latents."""
        return LongBatch(encoder.encode(self.clips), self.learned, self.returns)


@dataclass(frozen=True)
class LongSource:
    """Long clips of the training split, other ones in every step; half of them pan.

    Args:
        renderer: of the clips.
        config: their size, split and chunks; its number of frames and its levels do not matter.
        num_chunks: the most that a clip has; it ends with the last one that is learned from.
        num_learned: chunks that are learned from, one of every so many equal parts of those that may be.
        first_learned: the first chunk that may be: from which on something has left the window.
        num_returns: of the chunks that are learned from so many are, as far as there are any, ones in which a
            panning camera brings something back.
        away_frames: pixel frames; what was out of view for longer counts as brought back.
    """

    renderer: ClipRenderer
    config: LatentCacheConfig
    num_chunks: int
    num_learned: int
    first_learned: int
    num_returns: int = 0
    away_frames: int = 0

    def draw(self, rng: np.random.Generator, count: int) -> LongBatch[Rendered]:
        """Clips that follow from the generator's state alone."""
        excerpts = [
            self._excerpt(
                self.config.first_seed + int(rng.integers(_NUM_SEEDS)),
                self.num_chunks * self.config.chunk_frames,
                pans=bool(rng.integers(2)),
                leaves=bool(rng.integers(2)),
            )
            for _ in range(count)
        ]
        returning = [self._returning(item.scene) for item in excerpts]
        chosen = self._chosen(rng, set().union(*returning))
        learned = tuple(chunk in chosen for chunk in range(max(chosen) + 1))
        config = self.config.replace(num_latent_frames=len(learned) * self.config.chunk_frames)
        excerpts = [
            dataclasses.replace(
                item,
                prompts=tuple(prompt for prompt in item.prompts if prompt[0] < config.num_latent_frames),
            )
            for item in excerpts
        ]
        returns = tuple(tuple(chunk in of_clip for chunk in range(len(learned))) for of_clip in returning)
        return LongBatch(self.renderer.render(excerpts, config), learned, returns)

    def _chosen(self, rng: np.random.Generator, returning: set[int]) -> set[int]:
        """The chunks that are learned from."""
        some = rng.permutation(sorted(returning))[: min(self.num_returns, self.num_learned)]
        chosen = {int(chunk) for chunk in some}
        late = [chunk for chunk in range(self.first_learned, self.num_chunks) if chunk not in chosen]
        others = min(self.num_learned - len(chosen), len(late))
        return chosen | {int(rng.choice(part)) for part in np.array_split(late, others or 1)[:others]}

    def _returning(self, scene: Scene) -> set[int]:
        """Late chunks in which something comes into view again that was out of it for long."""
        stride, chunk_frames = self.renderer.stride, self.config.chunk_frames
        if not any(segment.camera.panning for segment in scene.segments):
            return set()
        truth = scene.truth(0, chunk_start(self.num_chunks, chunk_frames, stride))
        found = set()
        for in_view in (truth.present & (truth.visible > 0)).T:
            frames = np.flatnonzero(in_view)
            back = frames[1:][np.diff(frames) > self.away_frames]
            found |= {chunk_at(int(frame) + 1, chunk_frames, stride) - 1 for frame in back}
        return {chunk for chunk in found if chunk >= self.first_learned}

    def _excerpt(self, seed: int, num_frames: int, *, pans: bool, leaves: bool) -> Excerpt:
        """The beginning of a scene, its prompts coming into force where chunks begin.

        Args:
            seed: of the scene; the first one from it on that is of the kind asked for.
            num_frames: latent frames of the clip.
            pans: its camera pans; otherwise its prompt switches.
            leaves: every switch is to a scene that has nothing to do with the one before.
        """
        aspect = self.config.width / self.config.height
        while True:
            scene = sample_scene(seed, _LEVEL, self.config.split, aspect)
            if (len(scene.segments) == 1) == pans:
                break
            seed += 1
        stride = self.renderer.stride
        prompts, segments = [], []
        for index, segment in enumerate(scene.segments):
            chunk = chunk_at(segment.start, self.config.chunk_frames, stride)
            latent = chunk * self.config.chunk_frames
            if latent >= num_frames:
                break
            if leaves and not pans:
                level = _OTHER_LEVELS[(seed + index) % len(_OTHER_LEVELS)]
                (segment,) = sample_scene(seed + index, level, self.config.split, aspect).segments
            start = chunk_start(chunk, self.config.chunk_frames, stride)
            segments.append(dataclasses.replace(segment, start=start))
            prompts.append((latent, segment.caption))
        whole = Scene(seed=seed, level=_LEVEL, aspect=scene.aspect, segments=tuple(segments))
        return Excerpt(whole, 0, tuple(prompts), True)


def first_late_chunk(history: HistoryConfig) -> int:
    """The first chunk before which frames have left the window; 0 where none ever does."""
    return 0 if history.window_frames is None else history.window_frames // history.chunk_frames

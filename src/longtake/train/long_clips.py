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
from longtake.world.motion import Camera, Paused

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
        resumes: likewise, whether a camera that has stood still goes on in it.
    """

    clips: DrawnT
    learned: tuple[bool, ...]
    returns: tuple[tuple[bool, ...], ...]
    resumes: tuple[tuple[bool, ...], ...]

    def encoded(self, encoder: ClipEncoder) -> LongBatch[Clips]:
        """The same with clips as latents."""
        return LongBatch(encoder.encode(self.clips), self.learned, self.returns, self.resumes)


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
        away_frames: pixel frames that the window holds; what was out of view for longer counts as brought
            back, and a camera that stood still for longer leaves nothing in it that moves with the view.
        pauses: share of panning cameras that stand still for one to three times as long, at a random time,
            and go on where a chunk begins; that chunk and the next are learned from.
        whole: clips are rendered to their end; else their first chunk alone, where a network makes the rest.
    """

    renderer: ClipRenderer
    config: LatentCacheConfig
    num_chunks: int
    num_learned: int
    first_learned: int
    num_returns: int = 0
    away_frames: int = 0
    pauses: float = 0.0
    whole: bool = True

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
        resuming: list[set[int]] = [set() for _ in excerpts]
        for row, item in enumerate(excerpts):
            if self.pauses > 0 and _pans(item.scene) and rng.random() < self.pauses:
                excerpts[row], chunk = self._paused(rng, item)
                resuming[row] = {chunk, min(chunk + 1, self.num_chunks - 1)}
        returning = [self._returning(item.scene) for item in excerpts]
        chosen = self._chosen(rng, set().union(*resuming), set().union(*returning))
        learned = tuple(chunk in chosen for chunk in range(max(chosen) + 1))
        chunk_frames = self.config.chunk_frames
        num_frames = len(learned) * chunk_frames
        config = self.config.replace(num_latent_frames=num_frames if self.whole else chunk_frames)
        excerpts = [
            dataclasses.replace(
                item,
                prompts=tuple(prompt for prompt in item.prompts if prompt[0] < num_frames),
            )
            for item in excerpts
        ]
        returns, resumes = (
            tuple(tuple(chunk in of_clip for chunk in range(len(learned))) for of_clip in chunks)
            for chunks in (returning, resuming)
        )
        return LongBatch(self.renderer.render(excerpts, config), learned, returns, resumes)

    def _paused(self, rng: np.random.Generator, item: Excerpt) -> tuple[Excerpt, int]:
        """A panning clip whose camera stands still on its way, and the chunk in which it goes on."""
        (segment,) = item.scene.segments
        assert isinstance(segment.camera, Camera), "no scene is sampled with another"
        chunk = int(rng.integers(self.first_learned, self.num_chunks))
        end = chunk_start(chunk, self.config.chunk_frames, self.renderer.stride)
        begin = max(0, end - round(self.away_frames * rng.uniform(1, 3)))
        segment = dataclasses.replace(segment, camera=Paused(segment.camera, begin, end - begin))
        return dataclasses.replace(item, scene=dataclasses.replace(item.scene, segments=(segment,))), chunk

    def _chosen(self, rng: np.random.Generator, resuming: set[int], returning: set[int]) -> set[int]:
        """The chunks that are learned from."""
        chosen = {int(chunk) for chunk in rng.permutation(sorted(resuming))[: self.num_learned]}
        if self.num_returns > 0:
            some = rng.permutation(sorted(returning - chosen))
            chosen |= {int(chunk) for chunk in some[: min(self.num_returns, self.num_learned - len(chosen))]}
        late = [chunk for chunk in range(self.first_learned, self.num_chunks) if chunk not in chosen]
        others = min(self.num_learned - len(chosen), len(late))
        return chosen | {int(rng.choice(part)) for part in np.array_split(late, others or 1)[:others]}

    def _returning(self, scene: Scene) -> set[int]:
        """Late chunks in which something comes into view again that was out of it for long."""
        stride, chunk_frames = self.renderer.stride, self.config.chunk_frames
        if not _pans(scene):
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


def _pans(scene: Scene) -> bool:
    return any(segment.camera.panning for segment in scene.segments)


def first_late_chunk(history: HistoryConfig) -> int:
    """The first chunk before which frames have left the window; 0 where none ever does."""
    return 0 if history.window_frames is None else history.window_frames // history.chunk_frames

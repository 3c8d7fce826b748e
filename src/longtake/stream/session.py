"""One endless video as an iterator of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from longtake.stream import snapshot
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline
from longtake.stream.state import Chunk, PromptSwitch, StreamState


class Stream(Iterator[Chunk]):
    """One stream in an engine of its own; never ends.

    Args:
        pipeline: the model.
        prompt: what the video shows.
        seed: the same seed, prompt, model, machine and thread count give the same video.
        decode: make frames; False yields latents only.
        max_frames: latent frames the stream may have; needed for an unlimited window only.

    Raises:
        PromptError: a prompt the text encoder refuses.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompt: str,
        seed: int = 0,
        *,
        decode: bool = True,
        max_frames: int | None = None,
    ) -> None:
        engine = Engine(pipeline, max_frames=max_frames)
        self._begin(engine, engine.open(prompt, seed), decode)

    def _begin(self, engine: Engine, state: StreamState, decode: bool) -> None:
        self.engine = engine
        self.state = state
        self.decode = decode

    def __next__(self) -> Chunk:
        return self.engine.advance([self.state], decode=self.decode)[0]

    def set_prompt(
        self,
        text: str,
        *,
        sink: Literal["keep", "reencode", "drop"] = "keep",
        memory: Literal["keep", "rebuild", "reset"] | None = None,
        window: Literal["reencode", "keep"] = "reencode",
    ) -> int:
        """Change the prompt from the next chunk on; see :class:`~longtake.stream.state.PromptSwitch`.

        A `memory` of None is what the model does by default (`StreamConfig.memory_at_switch`).

        Returns:
            The index of the chunk it takes effect in.

        Raises:
            PromptError: a prompt the text encoder refuses; the one in force stays.
        """
        memory = memory or self.engine.pipeline.config.memory_at_switch
        return self.engine.set_prompt(
            self.state, PromptSwitch(text=text, sink=sink, memory=memory, window=window)
        )

    @property
    def cache_bytes(self) -> int:
        """Bytes of what the stream keeps of its video between chunks; constant once it has begun. What its
        prompt becomes for cross-attention is not in it.
        """
        return self.engine.num_bytes

    def snapshot(self, path: str | Path) -> None:
        """Write everything the stream consists of, whole or not at all.

        Raises:
            SnapshotError: the file cannot be written.
        """
        snapshot.save(self.engine, self.state, Path(path))

    @classmethod
    def restore(cls, path: str | Path, pipeline: Pipeline, *, decode: bool = True) -> Stream:
        """Go on from a snapshot, bit-identically on the same machine and thread count.

        Raises:
            SnapshotError: a damaged file, or one of other weights or settings, naming the difference.
        """
        engine, state = snapshot.load(Path(path), pipeline)
        stream = cls.__new__(cls)
        stream._begin(engine, state, decode)
        return stream

    def branch(self) -> Stream:
        """A second stream that goes on from here on its own."""
        engine = Engine(self.engine.pipeline, max_frames=self.engine.history.max_frames)
        state = snapshot.unpack(engine, *snapshot.pack(self.engine, self.state))
        stream = type(self).__new__(type(self))
        stream._begin(engine, state, self.decode)
        return stream

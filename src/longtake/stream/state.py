"""Everything one stream consists of between two chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longtake.config import Config
from longtake.models.dit import TextContext

Frames = NDArray[np.uint8]


class PromptSwitch(Config):
    """A new prompt and what becomes of the past (defaults as LongLive and Echo-Infinity do it).

    Args:
        text: the prompt from the next chunk on.
        sink: "keep" leaves the sink's entries as they are, "reencode" computes them again under the new
            prompt, "drop" forgets them: the frames that leave the window next, which "reencode" of the window
            has computed again under the new prompt, become the sink.
        memory: of policies that have one: "keep", "reset" to its start, or "rebuild" from the window.
        window: "reencode" computes the local frames' entries again under the new prompt, "keep" leaves them.
    """

    text: str
    sink: Literal["keep", "reencode", "drop"] = "keep"
    memory: Literal["keep", "rebuild", "reset"] = "rebuild"
    window: Literal["reencode", "keep"] = "reencode"


@dataclass
class StreamState:
    """One stream. Owned by the engine that opened it; its tensors in the engine's buffers are found by
    ``slot``.

    Args:
        seed: the noise of every chunk follows from it.
        prompt: in force. ``text``: the same as the DiT reads it.
        slot: its place in the engine. ``negative_slot``: of guidance's negative branch, where there is
            guidance.
        vae_state: decoder state, batch 1.
        chunk: index of the next chunk. ``num_frames``: pixel frames decoded so far.
        decoded_frames: latent frames that the decoder has seen.
        pending: a prompt switch that the next chunk begins with. ``pending_text``: its prompt as the DiT
            reads it.
    """

    seed: int
    prompt: str
    text: TextContext
    slot: int
    negative_slot: int | None
    vae_state: dict[str, Tensor]
    chunk: int = 0
    num_frames: int = 0
    decoded_frames: int = 0
    pending: PromptSwitch | None = None
    pending_text: TextContext | None = None
    closed: bool = False

    @property
    def slots(self) -> list[int]:
        """Its places in the history: its own, then the negative branch's where there is guidance."""
        return [self.slot] if self.negative_slot is None else [self.slot, self.negative_slot]


@dataclass(frozen=True)
class Chunk:
    """What one step of a stream made.

    Args:
        index: of the chunk in its stream.
        prompt: it was generated under.
        first_frame: index in the video of its first pixel frame.
        latents: clean, ``[f, c, h, w]``, on the engine's device.
        frames: uint8 ``[t, height, width, 3]``, or None where decoding was not asked for.
    """

    index: int
    prompt: str
    first_frame: int
    latents: Tensor
    frames: Frames | None

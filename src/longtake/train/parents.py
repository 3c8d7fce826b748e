"""A frozen parent whose predictions are learned, and its way through the clips.

Legend: b clips, r = copies * b rows, f latent frames, c channels, h/w latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextEncoder
from longtake.stream.bundle import load_networks, resolve_model
from longtake.stream.state import PromptSwitch
from longtake.train.networks import TextToLatents
from longtake.train.recipe import Recipe
from longtake.train.walk import Walk


@dataclass(frozen=True)
class Parent:
    """Who teaches, and over what past: its own window, memory and positions, whatever the learner's are.

    Attributes:
        networks: never changed.
        history: its chunks are the learner's.
    """

    networks: TextToLatents
    history: HistoryConfig


def load_parent(recipe: Recipe, same_memory: bool = False) -> Parent:
    """The dense model that is learned from, with a memory or without unless it must have the same. Raises
    ConfigError where it is of other sizes or chunks.
    """
    assert recipe.parent is not None, "checked before"
    card, found = load_networks(resolve_model(recipe.parent))
    given, wanted = card.dit, recipe.dit_model.dense()
    if not same_memory:
        given, wanted = (model.replace(memory=None) for model in (given, wanted))
    if given != wanted or card.text != recipe.text_model:
        raise ConfigError(
            f"parent={recipe.parent!r} is of other sizes than the recipe's networks",
            "give the dense model that was converted, or that has learned no memory yet",
        )
    history, own = card.stream.history, recipe.stream.history
    if history.chunk_frames != own.chunk_frames:
        raise ConfigError(
            f"parent={recipe.parent!r} has chunks of {history.chunk_frames} frames, the recipe of "
            f"{own.chunk_frames}",
            f"set stream.history.chunk_frames={history.chunk_frames}, or give another parent",
        )
    text, dit = found["text"], found["dit"]
    assert isinstance(text, TinyTextEncoder)
    assert isinstance(dit, DiT)
    return Parent(TextToLatents(text, dit).requires_grad_(False), history)


def without_memory(networks: TextToLatents, history: HistoryConfig) -> Parent:
    """Networks that teach what they know already, their memory left off."""
    if isinstance(history.policy, EvolvingConfig):
        history = history.replace(policy=history.policy.replace(mode="off"))
    return Parent(networks.requires_grad_(False), history)


class ParentsWalk:
    """The parent's way through the same clips, over a history of its own.

    Args:
        parent: who walks.
        captions: one per clip.
        num_clips: b.
        height: of the latents.
        width: of the latents.
    """

    def __init__(self, parent: Parent, captions: list[str], num_clips: int, height: int, width: int) -> None:
        self._networks = parent.networks
        with torch.no_grad():
            text = self._networks.encode(captions)
        self._walk = Walk(self._networks.dit, parent.history, text, num_clips, height, width)

    @torch.no_grad()
    def predict(self, noisy_rfchw: Tensor, sigma_r: Tensor, context_bfchw: Tensor | None) -> Tensor:
        """See `Walk.predict`, and `Walk.advance` where there is a context."""
        if context_bfchw is None:
            return self._walk.predict(noisy_rfchw, sigma_r)
        return self._walk.advance(noisy_rfchw, sigma_r, context_bfchw)

    @torch.no_grad()
    def commit(self, context_bfchw: Tensor) -> None:
        """See `Walk.commit`."""
        self._walk.commit(context_bfchw)

    @torch.no_grad()
    def switch(self, captions: list[str], switch: PromptSwitch, rows: Sequence[int]) -> None:
        """See `Walk.switch`."""
        self._walk.switch(self._networks.encode(captions), switch, rows)

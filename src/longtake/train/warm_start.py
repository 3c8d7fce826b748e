"""Weights of a smaller or older model as the start of a larger one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F

from longtake.io.checkpoints import load_into

_ADDED = ("decoder.middle_mix.", "decoder.fine_mix.", "decoder.last_mix.", "frame_embedding.", "memory.")
"""Layers that add to what goes past them, or to what is read, and may start as they are."""
_LONGER = ("position",)
"""One row per place; further rows start as they are."""
_RESIZED = ("spatial_embedding.weight",)
"""A picture of places, resized with the resolution."""


def warm_start(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a module that may have grown: longer prompts, another token grid, finer time mixing,
    a memory.

    Args:
        module: the small VAE, text encoder or DiT.
        weights: a state dict of the same network in its former size.
        source: where they come from, for messages.

    Raises:
        CheckpointError: a difference that is no growth of these kinds.
    """
    adapted = dict(weights)
    for name, own in module.state_dict().items():
        given = weights.get(name)
        if given is None:
            if name.startswith(_ADDED):
                adapted[name] = own
        elif given.shape == own.shape:
            continue
        elif name in _LONGER and given.shape[1:] == own.shape[1:] and len(given) < len(own):
            adapted[name] = own.clone()
            adapted[name][: len(given)] = given
        elif name in _RESIZED and given.shape[0] == own.shape[0]:
            grid = own.shape[1:]
            adapted[name] = F.interpolate(given[None], size=grid, mode="bilinear", align_corners=False)[0]
    load_into(module, adapted, source)

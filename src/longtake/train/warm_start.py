"""Weights of a smaller or older model as the start of a larger one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.io.checkpoints import load_into

_MEMORY = "memory."
_ADDED = (
    "decoder.middle_mix.",
    "decoder.fine_mix.",
    "decoder.last_mix.",
    "decoder.carry.",
    "decoder.details.",
    "frame_embedding.",
    _MEMORY,
)
"""Layers that add to what goes past them, or to what is read, and may start as they are."""
_LONGER = ("position",)
"""One row per place; further rows start as they are."""
_RESIZED = ("spatial_embedding.weight",)
"""A picture of places, resized with the resolution."""


def warm_start(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a module that may have grown: longer prompts, another token grid, finer time mixing,
    carried pixels, details, a memory, more blocks, cross-attention in more of them. A memory that it has no
    place for is left behind, as policies need it that are to be compared with one.

    Blocks are spread evenly over the larger number. A new one, or a new cross-attention, is a copy of the
    last before it that adds nothing yet: its output projections are zero, so a deeper network starts as
    what the shallower one was.

    Args:
        module: the small VAE, text encoder or DiT.
        weights: a state dict of the same network in its former size.
        source: where they come from, for messages.

    Raises:
        CheckpointError: a difference that is no growth of these kinds.
    """
    expected = module.state_dict()
    if not any(name.startswith(_MEMORY) for name in expected):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(_MEMORY)}
    weights = _deepened(module, weights)
    adapted = dict(weights)
    for name, own in expected.items():
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


def of_readers(
    weights: Mapping[str, Tensor], given: Sequence[int], wanted: Sequence[int]
) -> Mapping[str, Tensor]:
    """A DiT's weights, with those of its memory's readings that fewer layers keep.

    Args:
        weights: of a DiT whose memory has a reading for each layer that reads it, or any other.
        given: these layers.
        wanted: those that go on reading; layers that never did leave the weights as they are.
    """
    if not wanted or len(wanted) == len(given) or not set(wanted) <= set(given):
        return weights
    places = [list(given).index(layer) for layer in wanted]
    return {
        name: torch.cat([tensor.chunk(len(given))[place] for place in places])
        if name.startswith(_READINGS)
        else tensor
        for name, tensor in weights.items()
    }


_READINGS = ("memory.to_k.", "memory.to_v.", "memory.to_c.", "memory.to_k_rope.")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_OUTPUTS = ("self_attn.o.", "cross_attn.o.", "ffn.2.")
_CROSS_ATTENTION = ("norm3.", "cross_attn.")


def _deepened(module: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights as those of a network with the module's blocks."""
    own = _blocks(module.state_dict())
    old = _blocks(weights)
    if not old or len(own) < len(old):
        return weights
    places = _spread(len(old), len(own))
    adapted = {name: tensor for name, tensor in weights.items() if _BLOCK.match(name) is None}
    last: dict[str, Tensor] = {}
    for index, parts in sorted(own.items()):
        given = old[places.index(index)] if index in places else {}
        for part in parts:
            if part in given:
                last[part] = given[part]
            elif part not in last or (given and not part.startswith(_CROSS_ATTENTION)):
                continue  # left to be reported as missing
            adds_nothing = part not in given and part.startswith(_OUTPUTS)
            adapted[f"blocks.{index}.{part}"] = torch.zeros_like(last[part]) if adds_nothing else last[part]
        for part in sorted(given.keys() - parts.keys()):
            adapted[f"blocks.{index}.{part}"] = given[part]  # too much, to be reported
    return adapted


def _blocks(weights: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The weights of each block."""
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        match = _BLOCK.match(name)
        if match is not None:
            blocks.setdefault(int(match[1]), {})[match[2]] = tensor
    return blocks


def _spread(count: int, places: int) -> list[int]:
    """Where so many blocks go among more places: the first stays first, the last is last."""
    return [round(index * (places - 1) / max(1, count - 1)) for index in range(count)]

"""Weights of a smaller or older model as the start of a larger one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import PolicyConfig
from longtake.io.checkpoints import load_into
from longtake.models.dit_config import DiTConfig
from longtake.models.memory import MemoryEncoderConfig

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


@dataclass(frozen=True)
class MemoryUse:
    """What a memory's weights are for.

    Args:
        config: of its encoder.
        num_layers: of the DiT. ``readers``: of these those that read it, in ascending order; empty where none
            is known.
    """

    config: MemoryEncoderConfig
    num_layers: int
    readers: tuple[int, ...] = ()

    @classmethod
    def of(cls, dit: DiTConfig, policy: PolicyConfig) -> MemoryUse | None:
        """Of a network's memory, None where it has none; a policy that is none of memories reads nothing."""
        if dit.memory is None:
            return None
        if not isinstance(policy, EvolvingConfig):
            return cls(dit.memory, dit.num_layers)
        named = policy.read_layers
        return cls(dit.memory, dit.num_layers, tuple(range(dit.num_layers)) if named == "all" else named)


def resized_memory(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor], old: MemoryUse, new: MemoryUse
) -> Mapping[str, Tensor]:
    """A DiT's weights with its memory as another one's that has other readers, or more frames or layers of
    its encoder.

    Readings of layers that go on reading, and the first frames' initial state, stay as they are; a reading
    that all layers shared becomes that of each. Further ones start as `own` has them, and further layers of
    the encoder as layers that add nothing. Layers of a deeper DiT are found where `warm_start` puts them.

    Args:
        weights: of the former DiT. ``own``: of the new one, as it was made.
        old, new: the former and the new memory.

    Raises:
        ConfigError: a memory of another grid, or of fewer frames.
    """
    before, after = old.config, new.config
    if (before.rows, before.columns) != (after.rows, after.columns) or before.num_frames > after.num_frames:
        sizes = [f"{size.num_frames} frames of {size.rows} x {size.columns}" for size in (before, after)]
        raise ConfigError(
            f"a memory of {sizes[0]} tokens does not become one of {sizes[1]}",
            "give memory.rows and memory.columns as they were, and as many num_frames or more",
        )
    adapted = dict(weights)
    kept = _kept_readings(old, new)
    if kept is not None:
        for name in weights.keys() & own.keys():
            if name.startswith(_READINGS):
                there = own[name].device
                given = weights[name].to(there).chunk(before.num_readings)
                fresh = own[name].chunk(after.num_readings)
                chosen = (tensor if i is None else given[i] for i, tensor in zip(kept, fresh, strict=True))
                adapted[name] = torch.cat(list(chosen))
    if after.num_frames > before.num_frames:
        first = weights[_INITIAL].to(own[_INITIAL].device)
        adapted[_INITIAL] = torch.cat([first, own[_INITIAL][:, first.shape[1] :]], dim=1)
    for layer in range(before.num_layers, after.num_layers):
        prefix = f"{_MEMORY}layers.{layer}."
        for name, tensor in own.items():
            if name.startswith(prefix):
                adds = name.removeprefix(prefix).startswith(("o.", "ffn.2."))
                adapted[name] = torch.zeros_like(tensor) if adds else tensor
    return adapted


def _kept_readings(old: MemoryUse, new: MemoryUse) -> list[int | None] | None:
    """Of every new reading which of the old it is, None for one that starts anew; None where all readings
    stay as they are, or nothing is known of them.
    """
    before, after = old.config.num_readings, new.config.num_readings
    if after == 1 and before == 1:
        return None
    if before == 1 and len(old.readers) != 1:
        return [0] * after
    if before != len(old.readers) or after != len(new.readers):
        return None
    moved = _spread(old.num_layers, new.num_layers) if new.num_layers > old.num_layers else None
    places = [layer if moved is None else moved[layer] for layer in old.readers]
    return [places.index(layer) if layer in places else None for layer in new.readers]


_INITIAL = f"{_MEMORY}query_init"
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

"""Rollouts of a small DiT with a learned memory, in both storages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.cache.dense import dense_layout
from longtake.diffusion.sampler import context_pass
from longtake.history.base import HistoryConfig, HistoryView
from longtake.history.evolving import EvolvingConfig, EvolvingPolicy
from longtake.history.policy import Policy, Surroundings
from longtake.history.positions import Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.models.dit import DiT, TextContext
from longtake.models.memory import MemoryEncoder, MemoryEncoderConfig
from tiny_parts import GRID

GRID_OF_MEMORY = (2, (0.0, 1.0), (0.0, 1.0, 2.0))
CONFIG = HistoryConfig(window_frames=5, sink_frames=1, chunk_frames=2, positions=Relative(f_max=6))
CHUNKS = 6


def encoder(seed: int = 1) -> MemoryEncoder:
    torch.manual_seed(seed)
    made = MemoryEncoder(MemoryEncoderConfig(width=24, num_heads=2, num_frames=2, rows=2, columns=3))
    torch.nn.init.normal_(made.query_init, std=0.5)
    return made


def policy(
    mode: Literal["update", "prior", "off"] = "update",
    network: MemoryEncoder | None = None,
    **changes: object,
) -> EvolvingPolicy:
    config = EvolvingConfig(mode=mode).replace(**changes)
    surroundings = Surroundings(dense_layout(2, 2, 12), GRID, network or encoder())
    return EvolvingPolicy(surroundings, GRID_OF_MEMORY, config)


def text_of(dit: DiT) -> TextContext:
    return dit.encode_text(torch.linspace(-1, 1, 32).reshape(1, 4, 8).expand(2, -1, -1))


def rollout(dit: DiT, view: Callable[[], HistoryView], commit: Callable[[Entries], object]) -> list[Tensor]:
    """Flows of a few chunks at one noise level, each committed as it came."""
    flows = []
    text = text_of(dit)
    generator = torch.Generator().manual_seed(3)
    for _ in range(CHUNKS):
        x = torch.randn(2, 2, 3, *GRID, generator=generator)
        seen = view()
        flow, _ = dit(x, x.new_full((2, 2), 600.0), text, seen)
        commit(context_pass(dit, text, seen, x - flow))
        flows.append(flow)
    return flows


def in_place(dit: DiT, used: Policy | None) -> list[Tensor]:
    history = SlotHistory(CONFIG, dit.cache_spec(), GRID, 2, policy=used)
    slots = [history.join(), history.join()]
    size = history.num_bytes
    with torch.no_grad():
        flows = rollout(dit, lambda: history.view(slots), lambda entries: history.commit(entries, slots))
    assert history.num_bytes == size
    return flows


def functional(dit: DiT, used: Policy | None) -> list[Tensor]:
    kept = PureHistory(CONFIG, dit.cache_spec(), GRID, **({} if used is None else {"policy": used}))

    def commit(entries: Entries) -> None:
        nonlocal kept
        kept = kept.commit(entries)

    return rollout(dit, lambda: kept.view(), commit)

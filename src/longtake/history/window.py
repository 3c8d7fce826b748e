"""The plainest policy: frames that leave the window are gone; the sink stays because it never leaves."""

from __future__ import annotations

from typing import Literal

import torch

from longtake.cache.base import Entries
from longtake.history.policy import Evicted, MemoryGrid, Policy, PolicyConfig, PolicyState, Surroundings


class WindowConfig(PolicyConfig):
    """No settings."""

    kind: Literal["window"] = "window"

    def make(self, surroundings: Surroundings) -> WindowPolicy:
        """Always."""
        return WindowPolicy()


class WindowPolicy(Policy):
    """Sliding window: evicted frames are dropped."""

    @property
    def memory_grid(self) -> MemoryGrid | None:
        """Keeps nothing."""
        return None

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        """No state."""
        return {}

    def readable(self, num_evicted: int) -> bool:
        """Never: there is nothing to read."""
        return False

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        """Drop."""
        return state

    def read(self, state: PolicyState) -> Entries:
        """Nothing: no layers, no tokens."""
        return Entries(())

"""After warm-up a step allocates what the step before did, and keeps nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longtake.history.compression import AverageConfig, Band, PooledConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.retention import KeyFramesConfig, MostAttendedConfig
from longtake.stream.engine import Engine
from tiny_parts import small_pipeline


class Allocations(TorchDispatchMode):
    """Counts tensors that operators return in memory of their own, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.count += 1
                self.bytes += tensor.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": Relative(f_max=6)},
        {"guidance": 2.0},
        {"sink_frames": 3, "window_frames": 6},
        {"policy": EvolvingConfig(), "positions": Relative(f_max=8)},
        {"policy": EvolvingConfig(timing="second_pass"), "positions": Relative(f_max=8)},
        {"policy": KeyFramesConfig(num_frames=2)},
        {"policy": MostAttendedConfig(num_frames=2)},
        {"policy": AverageConfig()},
        {"policy": PooledConfig(bands=(Band(num_entries=1), Band(num_entries=1, num_frames=2)), num_ids=2)},
    ],
)
def test_steps_allocate_alike_and_buffers_stay(changes: dict[str, Any]) -> None:
    engine = Engine(small_pipeline(**changes), num_streams=2)
    states = [engine.open("one", 1), engine.open("two", 2)]

    def pointers() -> list[int]:
        named = [*engine.history._named_tensors().values(), engine.latents]
        return [tensor.data_ptr() for tensor in named]

    before, size = pointers(), None
    counts = []
    for chunk in range(40):
        with Allocations() as allocations:
            engine.advance(states)
        if chunk >= 6:
            counts.append((allocations.count, allocations.bytes))
        if chunk == 6:
            size = engine.num_bytes
    assert len(set(counts)) == 1
    assert counts[0][0] > 0
    assert engine.num_bytes == size
    assert pointers() == before


def test_memory_does_not_grow_with_the_video() -> None:
    """Tensors alive after chunk 10 and after chunk 60 are equally many and equally big."""
    import gc

    engine = Engine(small_pipeline())
    state = engine.open("one")

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor]
        return len(tensors), sum(tensor.nbytes for tensor in tensors)

    levels = []
    for chunk in range(61):
        engine.advance([state])
        if chunk in (10, 35, 60):
            levels.append(alive())
    assert levels[0] == levels[1] == levels[2]


def test_no_tensor_is_read_back_in_a_step() -> None:
    """A read-back (``item``, a tensor as a condition) would be a device sync on an accelerator."""
    pipeline = small_pipeline()
    engine = Engine(pipeline)
    state = engine.open("one")

    class NoReads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read back"
            return func(*args, **(kwargs or {}))

    with NoReads():
        for _ in range(6):
            engine.advance([state], decode=False)
        with pytest.raises(AssertionError, match="read back"):
            torch.ones(1).item()

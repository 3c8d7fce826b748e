"""The file of a small model: what is stored comes back, to the precision it is stored in."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longtake.errors import CheckpointError
from longtake.io.checkpoints import read_safetensors, write_safetensors
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.bundle import _packed, _unpacked, load_networks, save_model
from model_file import DIT, write_model

CONVOLUTION = "vae.encoder.fine.0.conv1.weight"
MATRIX = "dit.blocks.0.ffn.0.weight"
MEMORY = MemoryEncoderConfig(width=24, num_heads=2, num_frames=1, rows=2, columns=2)


def test_encoder_blocks_and_memory_take_a_byte_a_weight_and_everything_else_two(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", dit=DIT.replace(memory=MEMORY))
    stored, _ = read_safetensors(path)
    assert any(name.startswith("dit.memory.") for name in stored)
    for name, tensor in stored.items():
        whole = name.startswith("vae.encoder.") and tensor.dim() == 4
        whole |= name.startswith(("dit.blocks.", "dit.memory.")) and tensor.dim() == 2
        assert tensor.dtype == (torch.int8 if whole else torch.half), name
    card, networks = load_networks(path)
    again = tmp_path / "again.safetensors"
    save_model(again, card, dict(networks.items()))
    for name, tensor in load_networks(again)[1].state_dict().items():
        assert torch.equal(tensor, networks.state_dict()[name]), name  # stored twice is stored once


@given(
    st.integers(0, 1 << 30),
    st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 300.0]),
    st.sampled_from([(CONVOLUTION, (5, 3, 3, 3)), (MATRIX, (5, 27))]),
)
def test_a_weight_is_off_by_half_a_step_at_most(
    seed: int, size: float, kind: tuple[str, tuple[int, ...]]
) -> None:
    name, shape = kind
    weight = size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    stored = _packed(name, weight)
    back = _unpacked(stored)
    assert set(back) == {name}
    step = stored[name + ".scale"].float().view(-1, *(1,) * (len(shape) - 1))
    assert bool((step > 0).all())
    assert bool(((back[name] - weight).abs() <= 0.5001 * step).all())
    assert bool((step.flatten() <= weight.abs().flatten(1).amax(1) / 127 * 1.002 + 1.3e-7).all())
    again = _packed(name, back[name])
    if not bool((step >= 2.0**-14).all()):
        return  # scales that half precision holds with few bits may move
    assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


def test_a_lost_or_wrong_scale_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors")
    stored, metadata = read_safetensors(path)
    for name in (CONVOLUTION, MATRIX):
        for scale in (None, torch.ones(3).half()):
            broken = {key: tensor for key, tensor in stored.items() if key != name + ".scale"}
            if scale is not None:
                broken[name + ".scale"] = scale
            write_safetensors(path, broken, metadata)
            with pytest.raises(CheckpointError, match=re.escape(name)):
                load_networks(path)

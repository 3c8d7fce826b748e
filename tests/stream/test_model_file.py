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
from longtake.stream.bundle import _packed, _unpacked, build, load_networks, read_card, save_model
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


def derived(folder: Path, base: str = "small") -> tuple[Path, torch.nn.ModuleDict]:
    """A model of which one level of the decoder alone is its own, in a folder with its base."""
    card, networks = load_networks(write_model(folder / "small.safetensors"))
    card = card.replace(name="larger", vae=card.vae.replace(detail_width=8))
    larger = build(card)
    larger.load_state_dict(networks.state_dict(), strict=False)
    path = folder / "larger.safetensors"
    save_model(path, card, dict(larger.items()), base)
    return path, larger


def test_a_model_holds_only_what_its_base_does_not(tmp_path: Path) -> None:
    path, larger = derived(tmp_path)
    own, _ = read_safetensors(path)
    assert own
    assert all(name.startswith("vae.decoder.details.") for name in own)
    card, back = load_networks(path)
    assert card.base is not None
    assert card.base.name == "small"
    expected = load_networks(tmp_path / "small.safetensors")[1].state_dict() | {
        name: tensor.half().float() for name, tensor in larger.state_dict().items() if ".details." in name
    }
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in expected.items())
    whole = tmp_path / "whole.safetensors"
    save_model(whole, card, dict(back.items()))  # without a base it stands alone
    assert read_card(whole).base is None
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in load_networks(whole)[1].state_dict().items())


def test_a_tensor_that_only_its_scale_or_only_its_steps_tell_from_the_base_is_kept(tmp_path: Path) -> None:
    path, _ = derived(tmp_path)
    card, networks = load_networks(path)
    with torch.no_grad():
        networks.get_parameter(MATRIX).mul_(2)
        networks.get_parameter("dit.blocks.1.ffn.0.weight")[:, 0] = 0
    save_model(path, card, dict(networks.items()), "small")
    back = load_networks(path)[1].state_dict()
    for name in (MATRIX, "dit.blocks.1.ffn.0.weight"):
        torch.testing.assert_close(back[name], networks.state_dict()[name], atol=1e-3, rtol=1e-2)


def test_a_base_that_is_missing_changed_or_no_whole_model_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipped").mkdir()
    path, _ = derived(tmp_path)
    card, networks = load_networks(path)
    with pytest.raises(CheckpointError, match="larger.safetensors rests on another model itself"):
        save_model(tmp_path / "third.safetensors", card, dict(networks.items()), "larger")
    with pytest.raises(CheckpointError, match="no model 'smal' to rest on"):
        save_model(tmp_path / "third.safetensors", card, dict(networks.items()), "smal")
    shipped = write_model(tmp_path / "shipped" / "small.safetensors")
    write_model(tmp_path / "small.safetensors", seed=1)
    monkeypatch.setattr("longtake.stream.bundle.shipped_models", lambda: {"small": shipped})
    load_networks(path)  # the version that fits, wherever it is
    monkeypatch.setattr("longtake.stream.bundle.shipped_models", dict)
    with pytest.raises(CheckpointError, match="another version of the model 'small'.*export the model again"):
        load_networks(path)
    (tmp_path / "small.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rests on the model 'small'.*put small.safetensors beside it"):
        load_networks(path)

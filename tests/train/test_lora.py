"""Low-rank updates: who learns, that nothing changes before the first step, and that they merge."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from longtake.diffusion.flow import Schedule
from longtake.errors import ConfigError
from longtake.models.latent_config import LatentConfig
from longtake.train.dmd import DMDTask
from longtake.train.dmd_config import DMDConfig
from longtake.train.loop import STOPPED_EARLY, run
from longtake.train.lora import LoRAConfig, LowRankLinear, add_lora, merge_lora
from longtake.train.networks import TextToLatents
from toy_training import CAPTIONS, DIT, MEMORY, REMEMBERING, loop, networks

LORA = LoRAConfig(rank=4, scale=0.5)
SCHEDULE = Schedule(steps=(1000, 500), shift=1.0)


def task(module: TextToLatents) -> DMDTask:
    config = DMDConfig(
        loop=loop(4), num_clips=2, num_chunks=2, max_lead_chunks=3, critic_updates=1, lora=LORA
    )
    teacher = copy.deepcopy(module)
    shape = (4, 4, 4)
    torch.manual_seed(1)  # as `train` does
    return DMDTask(module, teacher, REMEMBERING, SCHEDULE, config, CAPTIONS, CAPTIONS[:2], shape)


def test_a_layer_is_the_frozen_one_and_a_low_rank_update() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 5)
    layer = LowRankLinear(linear, LORA)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), linear(x))
    with torch.no_grad():
        layer.lora_up.normal_()
    by_hand = linear(x) + 0.5 * (x @ layer.lora_down.T) @ layer.lora_up.T
    torch.testing.assert_close(layer(x), by_hand)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_down", "lora_up"]
    merged = layer.merged()
    assert type(merged) is nn.Linear
    torch.testing.assert_close(merged(x), by_hand)


def test_blocks_get_updates_a_memory_learns_whole_and_all_else_is_frozen() -> None:
    made = networks(DIT.replace(memory=MEMORY))
    names = set(made.state_dict())
    add_lora(made, LORA)
    learning = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert learning == {
        name
        for name, _ in made.named_parameters()
        if name.startswith("dit.memory.") or name.endswith(("lora_down", "lora_up"))
    }
    layers = [name for name, module in made.named_modules() if isinstance(module, LowRankLinear)]
    assert len(layers) == sum(isinstance(module, nn.Linear) for module in made.dit.blocks.modules())
    assert all(name.startswith("dit.blocks.") for name in layers)
    merge_lora(made)
    assert set(made.state_dict()) == names
    assert all(parameter.requires_grad for parameter in made.parameters())


def test_what_latent_attention_multiplies_itself_stays_as_it_is() -> None:
    made = networks(DIT.replace(latent=LatentConfig(kv_rank=12, nope_dim=6, rope_bands=(1, 1, 1))))
    add_lora(made, LORA)
    updated = {name.rpartition(".")[2] for name, m in made.named_modules() if isinstance(m, LowRankLinear)}
    assert updated >= {"q_nope", "q_rope", "kv_down", "k_rope", "o"}
    assert not updated & {"k_up", "v_up"}


def test_networks_without_updates_stay_as_they_are() -> None:
    made = networks().requires_grad_(False)
    merge_lora(made)
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_a_stage_moves_blocks_and_memory_alone_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    start = networks(DIT.replace(memory=MEMORY))
    results = []
    for name, stops in (("one", (None,)), ("two", (0.0, None))):
        for seconds in stops:
            matched = task(copy.deepcopy(start))
            settings = matched.config
            figures = run(matched, settings.loop, tmp_path / name, seconds, settings)
            assert (STOPPED_EARLY in figures) == (seconds == 0.0)
        merge_lora(matched.module)
        results.append(matched.module.state_dict())
    one, two = results
    before = start.state_dict()
    assert set(one) == set(before)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
        moves = name.startswith("dit.memory.") or (
            name.startswith("dit.blocks.") and name.endswith("weight") and tensor.dim() == 2
        )
        assert torch.equal(tensor, before[name]) == (not moves), name


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lora\.rank=24 is no less than the DiT's width of 24"):
        add_lora(networks(), LoRAConfig(rank=24))

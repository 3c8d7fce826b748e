"""Layers count as the flow suffers from their losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longtake.convert.files import generation_of
from longtake.convert.layer_weights import LayerWeights
from longtake.convert.network import Plan
from longtake.convert.settings import ConvertConfig
from longtake.convert.shared_keys import weighed
from longtake.errors import ConfigError
from longtake.models.layers import Block
from longtake.stream.bundle import load_model
from model_file import write_model
from tiny_parts import small_dit


def test_a_layer_that_says_nothing_weighs_next_to_nothing(tmp_path: Path) -> None:
    pipeline = load_model(str(write_model(tmp_path / "dense.safetensors"))).pipeline
    dit = pipeline.dit
    silent = dit.blocks[1]
    assert isinstance(silent, Block)
    with torch.no_grad():
        silent.self_attn.o.weight.zero_()
        silent.self_attn.o.bias.zero_()
    config = ConvertConfig(kv_rank=4, num_tokens=300, num_chunks=2)
    plan = Plan(dit.config, config.latent(dit.config), config.method)
    generation = generation_of(pipeline, ["a red circle", "a blue star"])
    told: list[str] = []
    weights = generation.weighing(generation.samples(config), config, told.append).layers(plan)
    assert weights.weights[0] > 0
    assert weights.weights[1] == pytest.approx(0.01 * weights.weights[0])
    assert len(told) == dit.config.num_layers
    assert weights.predicted(weights.losses) == weights.error


def test_predictions_are_to_first_order() -> None:
    weights = LayerWeights(error=0.1, gains=((0.8,), (1.0,)), losses=(0.2, 0.0), weights=(0.5, 2.0))
    assert weights.predicted((0.4, 0.1)) == pytest.approx(0.1 + 0.5 * 0.2 + 2.0 * 0.1)
    assert weights.predicted((0.0, 0.0)) == pytest.approx(0.0)


def test_what_sharing_keys_costs_is_measured_and_the_rest_stays(tmp_path: Path) -> None:
    """One key for each of two heads costs less than one for both."""
    pipeline = load_model(str(write_model(tmp_path / "dense.safetensors"))).pipeline
    dense, config = pipeline.dit.config, ConvertConfig(kv_rank=4, num_tokens=300, num_chunks=2)
    one, two = (Plan(dense, config.replace(rope_keys=keys).latent(dense), config.method) for keys in (1, 2))
    generation = generation_of(pipeline, ["a red circle", "a blue star"])
    weighing = generation.weighing(generation.samples(config), config, lambda _: None)
    weights = weighing.layers(one)
    again = weighing.with_keys(weights, two)
    assert again == replace(weights, error=again.error)
    assert again.error < weights.error
    assert weighing.with_keys(again, one) == weights


class FakeWeighing:
    """The flow's error by the number of shared keys, told and not measured."""

    def __init__(self, *errors: float) -> None:
        self.errors = errors

    def layers(self, plan: Plan) -> LayerWeights:
        half = 0.5**0.25
        gains = tuple((1 - half) * half**rank for rank in range(24))
        return self.with_keys(LayerWeights(0.0, (gains, gains), (0.0, 0.0), (0.5, 0.5)), plan)

    def with_keys(self, weights: LayerWeights, plan: Plan) -> LayerWeights:
        return replace(weights, error=self.errors[plan.latent.rope_dim // 6 - 1])


@pytest.mark.parametrize(("errors", "chosen"), [((0.5, 0.1), 12), ((0.2, 0.19), 6), ((0.1, 0.5), 6)])
def test_keys_are_chosen_against_the_ranks_that_they_leave(errors: tuple[float, ...], chosen: int) -> None:
    """Two heads, three bands: a second key of each takes six numbers from a latent that needs them."""
    dense = small_dit().config
    config = ConvertConfig(budget_bytes=2 * 2 * (10 + 6), rope_keys="auto")
    told: list[str] = []
    plan, weights = weighed(config, dense, FakeWeighing(*errors), told.append)  # type: ignore[arg-type]
    assert plan.latent.rope_dim == chosen
    assert weights.error == errors[chosen // 6 - 1]
    assert len(told) == 2


def test_a_budget_without_room_for_more_keys_takes_those_that_fit() -> None:
    dense = small_dit().config
    config = ConvertConfig(budget_bytes=2 * 2 * (2 + 6), rope_keys="auto")
    plan, _ = weighed(config, dense, FakeWeighing(0.5, 0.1), lambda _: None)  # type: ignore[arg-type]
    assert plan.latent.rope_dim == 6
    with pytest.raises(ConfigError, match="budget_bytes=20 holds no rank"):
        weighed(config.replace(budget_bytes=20), dense, FakeWeighing(0.5), lambda _: None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='rope_keys="auto" is chosen for a budget'):
        ConvertConfig(rope_keys="auto")
    with pytest.raises(ConfigError, match='rope_keys="auto" is chosen for a budget'):
        ConvertConfig(rope_keys="auto", budget_bytes=100, one_rank=True)

"""Layers count as the flow suffers from their losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longtake.convert.files import generation_of
from longtake.convert.layer_weights import LayerWeights
from longtake.convert.network import Plan
from longtake.convert.settings import ConvertConfig
from longtake.models.layers import Block
from longtake.stream.bundle import load_model
from model_file import write_model


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
    weights = generation.weights(plan, generation.samples(config), config, told.append)
    assert weights.weights[0] > 0
    assert weights.weights[1] == pytest.approx(0.01 * weights.weights[0])
    assert len(told) == dit.config.num_layers
    assert weights.predicted(weights.losses) == weights.error


def test_predictions_are_to_first_order() -> None:
    weights = LayerWeights(error=0.1, gains=((0.8,), (1.0,)), losses=(0.2, 0.0), weights=(0.5, 2.0))
    assert weights.predicted((0.4, 0.1)) == pytest.approx(0.1 + 0.5 * 0.2 + 2.0 * 0.1)
    assert weights.predicted((0.0, 0.0)) == pytest.approx(0.0)

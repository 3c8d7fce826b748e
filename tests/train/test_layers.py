"""Layer-wise distillation: latent layers come to answer as the dense ones, and only they learn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from counting import some_clips
from longtake.convert.files import convert_bundle
from longtake.convert.settings import ConvertConfig
from longtake.errors import ConfigError
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit import DiT
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import load_model, save_model
from longtake.train.layers import LayersConfig, LayersTask
from longtake.train.loop import run
from longtake.train.run import train
from longtake.train.start import _conversion, start_of
from toy_training import CAPTIONS, DIT, HISTORY, TEXT, VAE, loop, networks, recipe

LATENT = LatentConfig(kv_rank=12, query_rank=None, nope_dim=6, rope_bands=(1, 1, 1))
CONFIG = LayersConfig(
    loop=loop(40).replace(ema_decay=0.5, evaluate_every_steps=40),
    num_clips=2,
    num_chunks=3,
    num_copies=2,
    muon_learning_rate=2e-2,
    adamw_learning_rate=1e-2,
)


def task(memory: bool = False, config: LayersConfig = CONFIG) -> LayersTask:
    history, dit = HISTORY, DIT
    if memory:
        sizes = MemoryEncoderConfig(width=24, num_heads=2, num_frames=1, rows=2, columns=2, num_layers=1)
        dit = DIT.replace(memory=sizes)
        history = HISTORY.replace(policy=EvolvingConfig(), positions=Relative(f_max=6))
    module, parent = networks(dit.replace(latent=LATENT)), networks(dit).requires_grad_(False)
    some = some_clips()
    return LayersTask(module, parent, history, config, None, some, some)


@pytest.mark.parametrize("memory", [False, True])
def test_answers_come_closer_and_nothing_else_moves(tmp_path: Path, memory: bool) -> None:
    made = task(memory)
    others = {
        name: tensor.clone() for name, tensor in made._dit.named_parameters() if ".self_attn." not in name
    }
    before = made.evaluate()
    after = run(made, CONFIG.loop, tmp_path)
    assert after["error"] < 0.6 * before["error"]
    assert all(torch.equal(made._dit.get_parameter(name), tensor) for name, tensor in others.items())
    assert not made._parent.dit.blocks[0].self_attn._forward_hooks


def test_a_dense_layer_in_both_places_answers_alike() -> None:
    """What is compared is attention over the same past, so that nothing is left where layers are equal."""
    made = task()
    made._dit = made._parent.dit
    errors = made.evaluate()
    assert errors["error"] == pytest.approx(0, abs=1e-9)


def test_gradients_flow_through_the_layers_own_past() -> None:
    made = task(config=CONFIG.replace(num_chunks=2))
    loss, figures = made.loss(0, 0.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert set(figures) == {"layer_0", "layer_1"}
    assert all(parameter.grad is not None for parameter in made.module.parameters())


def test_a_dense_start_is_converted_once(tmp_path: Path) -> None:
    dense, out = recipe(), tmp_path / "mended"
    train(dense, tmp_path / "dense", stages=("vae", "latents", "first", "export"))
    parent = tmp_path / "dense" / "toy.safetensors"
    mended = dense.replace(
        name="mended",
        parent=str(parent),
        warm_start=str(parent),
        dit_model=dense.dit_model.replace(latent=LATENT),
        layers=LayersConfig(loop=loop(1), num_clips=2, num_chunks=2),
    )
    told: list[str] = []
    torch.manual_seed(5)
    start_of(mended, tmp_path / "alone", told.append)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    start_of(mended, tmp_path / "alone", told.append)  # which finds it made
    assert torch.equal(torch.rand(1), drawn)
    train(mended, out, stages=("latents", "layers"), tell=told.append)
    assert told[-1] == "conversion: layer 2 of 2"
    [converted] = out.glob("converted-*.safetensors")
    assert load_model(str(converted)).card.dit.latent == LATENT
    told.clear()
    train(mended, out, stages=("layers", "export"), tell=told.append)
    assert not told
    train(mended.replace(seed=1), out, stages=("latents",), tell=told.append)
    assert len(list(out.glob("converted-*.safetensors"))) == 2


def test_a_model_is_converted_mended_and_exported(tmp_path: Path) -> None:
    dense = recipe()
    train(dense, tmp_path / "dense", stages=("vae", "latents", "first", "export"))
    parent = tmp_path / "dense" / "toy.safetensors"
    converted = tmp_path / "latent.safetensors"
    config = ConvertConfig(kv_rank=12, num_tokens=300)
    report = convert_bundle(parent, converted, config, list(CAPTIONS), lambda line: None)
    latent = LatentConfig(kv_rank=12, query_rank=None, nope_dim=6, rope_bands=(1, 1, 1))
    assert report.latent_numbers == 2 * (12 + 6)
    mended = dense.replace(
        name="mended",
        parent=str(parent),
        warm_start=str(converted),
        dit_model=dense.dit_model.replace(latent=latent),
        layers=LayersConfig(loop=loop(4), num_clips=2, num_chunks=2),
        windows=dense.windows.replace(learns_from="parent"),
    )
    stages = ("latents", "layers", "windows", "export")
    train(mended, tmp_path / "mended", stages=stages)
    card = load_model(str(tmp_path / "mended" / "mended.safetensors")).card
    assert card.dit.latent == latent
    assert str(tmp_path) not in card.recipe  # where files lay is nobody's business
    assert '"warm_start":"latent.safetensors"' in card.recipe
    with pytest.raises(ConfigError, match="is of other sizes"):
        train(mended.replace(parent=str(converted)), tmp_path / "other", stages=("latents", "layers"))
    with pytest.raises(ConfigError, match="parent=None"):
        train(mended.replace(parent=None), tmp_path / "none", stages=("layers",))


@pytest.mark.parametrize(
    "latent",
    [
        LATENT,
        LATENT.replace(rope_bands=((0, 0), (0, 0), (1, 1)), heads_mix="keys", path="kept"),
        LATENT.replace(rope_bands=((0, 0), (0, 0), (1, 1)), storage="int4", key_storage="fp8", debias=True),
        LATENT.replace(query_rank=5, kv_rank=(7, 12), storage="fp8"),
    ],
)
def test_a_start_is_converted_to_what_the_recipe_asks_for(latent: LatentConfig) -> None:
    assert _conversion(latent, 3).latent(DIT) == latent


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads_mix": "keys"}, 'heads_mix="queries"'),
        ({"kv_rank": (12, 11)}, r"kv_rank=\[12, 12\]"),
        ({"rope_bands": ((1,), 1, 1)}, r"rope_bands=\[\[0\], \[0\], \[0\]\]"),
    ],
)
def test_latents_that_mean_something_else_are_no_start(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    """Though most of these have the same sizes."""
    made = recipe().replace(
        dit_model=DIT.replace(latent=LATENT), warm_start=str(tmp_path / "made.safetensors")
    )
    torch.manual_seed(0)
    parts = {"vae": TinyVAE(VAE), "text": TinyTextEncoder(TEXT), "dit": DiT(made.dit_model)}
    save_model(tmp_path / "made.safetensors", made.card, parts)
    assert start_of(made, tmp_path, print) is not None
    other = made.replace(dit_model=DIT.replace(latent=LATENT.replace(**changes)))
    with pytest.raises(ConfigError, match=named):
        start_of(other, tmp_path, print)

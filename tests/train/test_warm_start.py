"""Weights of a model's former size in its present one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from longtake.errors import CheckpointError, ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.models.dit import DiT
from longtake.models.tiny_text import TinyTextEncoder
from longtake.models.tiny_vae import TinyVAE
from longtake.stream.bundle import load_networks, save_model
from longtake.train.recipe import Recipe
from longtake.train.run import _Networks
from longtake.train.walk import Walk
from longtake.train.warm_start import MemoryUse, resized_memory, warm_start
from toy_training import DIT, MEMORY, REMEMBERING, TEXT, VAE, recipe


@torch.no_grad()
def test_a_longer_prompt_leaves_shorter_ones_as_they_were() -> None:
    old, new = TinyTextEncoder(TEXT), TinyTextEncoder(TEXT.replace(max_words=TEXT.max_words + 9))
    warm_start(new, old.state_dict(), "old")
    prompts = ["a red circle bouncing on grey", "a blue star"]
    (before, mask), (after, longer) = old.encode(prompts), new.encode(prompts)
    assert torch.equal(longer[:, : mask.shape[1]], mask)
    torch.testing.assert_close(after[:, : mask.shape[1]], before)
    assert not longer[:, mask.shape[1] :].any()


@torch.no_grad()
def test_a_finer_grid_sees_the_same_places() -> None:
    old = DiT(DIT.replace(spatial_embedding=(2, 2)))
    torch.nn.init.normal_(old.spatial_embedding.weight)
    new = DiT(DIT.replace(spatial_embedding=(4, 4)))
    warm_start(new, old.state_dict(), "old")
    grown, small = new.spatial_embedding.weight, old.spatial_embedding.weight
    assert torch.equal(grown[:, ::3, ::3], small)  # corners stay corners
    torch.testing.assert_close(grown.mean(dim=(1, 2)), small.mean(dim=(1, 2)))


@torch.no_grad()
def test_finer_mixes_begin_small_and_the_rest_is_loaded() -> None:
    torch.manual_seed(0)
    old, new = TinyVAE(VAE).eval(), TinyVAE(VAE.replace(fine_mixes=True)).eval()
    warm_start(new, old.state_dict(), "old")
    latents = torch.randn(1, 3, 4, 2, 2)
    before, _ = old.decode_chunk(latents, old.init_decode_state(1, 16, 16))
    after, _ = new.decode_chunk(latents, new.init_decode_state(1, 16, 16))
    assert (after - before).abs().max() < 0.3 * before.abs().max()
    assert torch.equal(after[:, 0], before[:, 0])  # nothing is before the first frame


@torch.no_grad()
def test_carried_pixels_leave_a_first_picture_as_it_was() -> None:
    old = TinyVAE(VAE.replace(fine_mixes=True)).eval()
    new = TinyVAE(VAE.replace(fine_mixes=True, carries_pixels=True)).eval()
    warm_start(new, old.state_dict(), "old")
    latents = torch.randn(1, 3, 4, 2, 2)
    before, _ = old.decode_chunk(latents, old.init_decode_state(1, 16, 16))
    after, _ = new.decode_chunk(latents, new.init_decode_state(1, 16, 16))
    assert torch.equal(after[:, 0], before[:, 0])


@torch.no_grad()
def test_details_are_added_to_a_decoder_that_stays_as_it_was() -> None:
    old, new = TinyVAE(VAE).eval(), TinyVAE(VAE.replace(detail_width=8)).eval()
    warm_start(new, old.state_dict(), "old")
    latents = torch.randn(1, 3, 4, 2, 2)
    before, _ = old.decode_chunk(latents, old.init_decode_state(1, 16, 16))
    after, _ = new.decode_chunk(latents, new.init_decode_state(1, 32, 32))
    halved = torch.nn.functional.avg_pool2d(after.flatten(0, 1).movedim(-1, 1), 2)
    enlarged = torch.nn.functional.interpolate(
        before.flatten(0, 1).movedim(-1, 1), scale_factor=2, mode="bilinear"
    )
    torch.testing.assert_close(halved, torch.nn.functional.avg_pool2d(enlarged, 2))


def test_a_deeper_network_starts_as_the_shallower_one_and_learns_everywhere() -> None:
    old = DiT(DIT.replace(num_layers=3, cross_attention_layers=(0, 2)))
    for parameter in old.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    new = DiT(DIT.replace(num_layers=5, cross_attention_layers=(0, 1, 2, 4)))
    warm_start(new, old.state_dict(), "old")
    history = HistoryConfig(window_frames=6, sink_frames=2, chunk_frames=2, positions=Relative(f_max=5))
    prompts = torch.randn(2, DIT.text_length, DIT.text_width)
    walks = [Walk(dit, history, dit.encode_text(prompts), 2, 4, 4) for dit in (old, new)]
    for _ in range(4):
        clean, sigma = torch.randn(2, 2, DIT.in_channels, 4, 4), torch.tensor([0.3, 0.9])
        before, after = (walk.advance(clean, sigma, clean) for walk in walks)
        torch.testing.assert_close(after, before)
    after.square().mean().backward()
    outputs = [p for name, p in new.named_parameters() if name.startswith("blocks.") and ".o.weight" in name]
    assert len(outputs) == 9
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in outputs)


def test_other_differences_are_refused() -> None:
    with pytest.raises(CheckpointError, match="wrong shape: position"):
        warm_start(TinyTextEncoder(TEXT), TinyTextEncoder(TEXT.replace(max_words=99)).state_dict(), "old")
    with pytest.raises(CheckpointError, match="old does not fit.*unexpected: blocks"):
        warm_start(DiT(DIT), DiT(DIT.replace(num_layers=3)).state_dict(), "old")
    with pytest.raises(CheckpointError, match="old does not fit.*unexpected: blocks.1.cross_attn"):
        warm_start(DiT(DIT), DiT(DIT.replace(cross_attention_layers="all")).state_dict(), "old")
    with pytest.raises(CheckpointError, match="old does not fit.*missing: blocks.0.norm3"):
        warm_start(DiT(DIT), DiT(DIT.replace(cross_attention_layers=(1,))).state_dict(), "old")


@torch.no_grad()
def test_fewer_layers_go_on_reading_a_memory_as_they_did(tmp_path: Path) -> None:
    """Each layer that goes on has the reading that it had."""
    torch.manual_seed(0)
    made = recipe()

    def read_by(*layers: int) -> Recipe:
        history = REMEMBERING.replace(policy=EvolvingConfig(read_layers=layers))
        memory = MEMORY.replace(num_readings=len(layers))
        return made.replace(dit_model=DIT.replace(memory=memory), stream=made.stream.replace(history=history))

    both, path = read_by(0, 1), tmp_path / "both.safetensors"
    networks = {"vae": TinyVAE(VAE), "text": TinyTextEncoder(TEXT), "dit": DiT(both.dit_model)}
    save_model(path, both.card, networks)
    before = load_networks(path)[1]["dit"]
    assert isinstance(before, DiT)
    assert before.memory is not None
    state = torch.randn(1, 1, 24)
    readings = before.memory.read(state)
    for layers in ((0, 1), (1,), (0,)):
        started = _Networks(read_by(*layers).replace(warm_start=str(path)), tmp_path / "run")
        assert started.remembers
        after = started.text_to_latents.dit.memory
        assert after is not None
        for layer, reading in zip(layers, after.read(state), strict=True):
            for name, tensor in reading.items():
                torch.testing.assert_close(tensor, readings[layer][name])
    one = tmp_path / "one.safetensors"
    first = _Networks(read_by(1).replace(warm_start=str(path)), tmp_path / "run")
    save_model(one, read_by(1).card, {**networks, "dit": first.text_to_latents.dit})
    more = _Networks(both.replace(warm_start=str(one)), tmp_path / "run").text_to_latents.dit.memory
    assert more is not None
    fresh, kept = more.read(state)
    for name, tensor in kept.items():
        torch.testing.assert_close(tensor, readings[1][name])
        assert not torch.allclose(fresh[name], readings[0][name])


@torch.no_grad()
def test_a_memory_of_more_frames_and_layers_begins_as_the_one_that_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = recipe()

    def with_memory(**changes: Any) -> Recipe:
        history = REMEMBERING.replace(policy=EvolvingConfig(), positions=Relative(f_max=9))
        memory = MEMORY.replace(**changes)
        return made.replace(dit_model=DIT.replace(memory=memory), stream=made.stream.replace(history=history))

    small, path = with_memory(), tmp_path / "small.safetensors"
    networks = {"vae": TinyVAE(VAE), "text": TinyTextEncoder(TEXT), "dit": DiT(small.dit_model)}
    save_model(path, small.card, networks)
    before = load_networks(path)[1]["dit"]
    large = with_memory(num_frames=3, num_layers=MEMORY.num_layers + 1).replace(warm_start=str(path))
    after = _Networks(large, tmp_path / "run").text_to_latents.dit
    assert isinstance(before, DiT)
    assert before.memory is not None
    assert after.memory is not None
    tokens = MEMORY.num_tokens
    old, new = before.memory.initial(2), after.memory.initial(2)
    assert new.shape[1] == 3 * tokens // MEMORY.num_frames
    torch.testing.assert_close(new[:, :tokens], old)
    heads = (DIT.num_heads, DIT.width // DIT.num_heads)
    keys, values = torch.randn(2, 2, 5, *heads)
    torch.testing.assert_close(after.memory(new, keys, values)[:, :tokens], before.memory(old, keys, values))


@torch.no_grad()
def test_a_network_without_a_memory_leaves_it_behind() -> None:
    torch.manual_seed(0)
    old, new = DiT(DIT.replace(memory=MEMORY)), DiT(DIT)
    warm_start(new, old.state_dict(), "old")
    given = old.state_dict()
    assert all(torch.equal(tensor, given[name]) for name, tensor in new.state_dict().items())


def readings(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers).repeat_interleave(2)[:, None].expand(-1, 3).clone()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ((2, (0, 1)), (2, (1,)), [2.0]),
        ((2, (0, 1)), (2, (0, 1)), [1.0, 2.0]),
        ((2, (1,)), (2, (0, 1)), [-1.0, 1.0]),
        ((2, (1,)), (4, (3,)), [1.0]),  # the same block, which stands elsewhere now
        ((2, (0, 1)), (4, (0, 1, 2, 3)), [1.0, -2.0, -3.0, 2.0]),
        ((2, ()), (2, (0, 1)), [1.0, 1.0]),  # shared before
    ],
)
def test_readings_go_where_their_layers_are(old: Any, new: Any, expected: list[float]) -> None:
    """Those that are made anew have negative numbers."""
    (old_layers, old_readers), (new_layers, new_readers) = old, new
    num = max(1, len(old_readers))
    uses = [
        MemoryUse(MEMORY.replace(num_readings=max(1, len(readers))), layers, readers)
        for layers, readers in ((old_layers, old_readers), (new_layers, new_readers))
    ]
    weights = {"memory.to_k.weight": readings(*range(1, num + 1)), "head.bias": torch.zeros(2)}
    own = {"memory.to_k.weight": readings(*range(-1, -len(new_readers) - 1, -1))}
    made = resized_memory(weights, own, *uses)
    assert torch.equal(made["memory.to_k.weight"], readings(*expected))
    assert made["head.bias"] is weights["head.bias"]
    there = {name: tensor.to("meta") for name, tensor in own.items()}
    assert resized_memory(weights, there, *uses)["memory.to_k.weight"].shape == readings(*expected).shape


def test_one_reading_that_another_layer_reads_stays() -> None:
    """It was shared, or its layer has changed; either way it is better than nothing."""
    weights = {"memory.to_k.weight": readings(5)}
    uses = [MemoryUse(MEMORY, 2, (layer,)) for layer in (0, 1)]
    made = resized_memory(weights, {"memory.to_k.weight": readings(-1)}, *uses)
    assert torch.equal(made["memory.to_k.weight"], readings(5))


def test_a_memory_on_another_grid_is_refused() -> None:
    old, other = (MemoryUse(MEMORY.replace(num_frames=2 // rows, rows=rows), 2) for rows in (1, 2))
    with pytest.raises(
        ConfigError, match="2 frames of 1 x 1 tokens does not become one of 1 frames of 2 x 1"
    ):
        resized_memory({}, {}, old, other)

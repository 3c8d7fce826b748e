"""Names there and back, wrappers, refusals, and equality with diffusers' model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longtake.errors import CheckpointError
from longtake.history.base import full_view
from longtake.io.checkpoints import (
    load_into,
    read_safetensors,
    read_told_weights,
    read_weights,
    weights_digest,
    write_safetensors,
)
from longtake.io.names import TABLES, Format, from_own, to_own, unwrap
from longtake.models.memory import MemoryEncoderConfig
from tiny_parts import GRID, small_dit


@pytest.mark.parametrize("fmt", ["own", "wan", "diffusers"])
def test_names_round_trip(fmt: Format) -> None:
    state = small_dit(num_layers=12).state_dict()
    foreign = from_own(state, fmt)
    assert len(foreign) == len(state)
    back = to_own(foreign)
    assert list(back) == list(state)
    assert all(back[name] is state[name] for name in state)
    ours, theirs = zip(*TABLES[fmt], strict=True)
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)


def test_options_have_no_foreign_names() -> None:
    memory = MemoryEncoderConfig(width=24, num_heads=2, rows=1, columns=1, normalize_keys=True)
    state = small_dit(pooled_text=True, spatial_embedding=(2, 2), memory=memory).state_dict()
    assert list(to_own(from_own(state, "own"))) == list(state)
    for fmt in ("wan", "diffusers"):
        with pytest.raises(CheckpointError, match=r"no name for pooled_text\.weight"):
            from_own(state, fmt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"generator": state},
        lambda state: {"generator_ema": state, "generator": {}, "critic": {}, "step": 3},
        lambda state: {
            "generator_ema": {f"model._fsdp_wrapped_module.{name}": t for name, t in state.items()}
        },
        lambda state: {"model": {f"model.{name}": t for name, t in state.items()}},
        lambda state: {f"model.{name}": t for name, t in from_own(state, "diffusers").items()},
        lambda state: {f"_fsdp_wrapped_module.{name}": t for name, t in state.items()},
        lambda state: {f"model.diffusion_model.{name}": t for name, t in state.items()},
        lambda state: (
            {f"generator.model.{name}": t for name, t in state.items()} | {"critic.x": torch.zeros(1)}
        ),
    ],
)
def test_wrappers_are_taken_off(tmp_path: Path, wrap: Any) -> None:
    state = small_dit().state_dict()
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(state), path)
    read = read_weights(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_pickles_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"generator": print}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt: it is damaged, or holds objects that could"):
        read_weights(path)


def split(state: dict[str, torch.Tensor], folder: Path, index: bool = True) -> None:
    """Writes weights as two files, as the hub has them."""
    folder.mkdir(parents=True)
    places = {}
    for part, names in enumerate((list(state)[::2], list(state)[1::2])):
        file = f"model-{part}.safetensors"
        save_file({name: state[name] for name in names}, folder / file, {"part": str(part), "format": "pt"})
        places |= dict.fromkeys(names, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("where", ["", "transformer"])
@pytest.mark.parametrize("index", [True, False])
def test_split_models_are_read_whole(tmp_path: Path, where: str, index: bool) -> None:
    state = from_own(small_dit().state_dict(), "diffusers")
    folder = tmp_path / "model" / where
    split(state, folder, index)
    if index:  # which alone says what belongs to the model
        save_file({"other": torch.zeros(1)}, folder / "other.safetensors")
    weights, metadata = read_told_weights(tmp_path / "model")
    assert weights_digest(weights) == weights_digest(small_dit().state_dict())
    assert metadata == {"part": "1", "format": "pt"}
    if index:
        named = read_weights(folder / "model.safetensors.index.json")
        assert weights_digest(named) == weights_digest(weights)


def test_what_is_no_model_in_files_is_told(tmp_path: Path) -> None:
    state = small_dit().state_dict()
    split(state, tmp_path / "doubled", index=False)
    save_file({"head.head.bias": state["head.head.bias"]}, tmp_path / "doubled" / "old.safetensors")
    split(state, tmp_path / "incomplete")
    (tmp_path / "incomplete" / "model-1.safetensors").unlink()
    split(state, tmp_path / "several")
    (tmp_path / "several" / "ema.safetensors.index.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "a.safetensors.index.json").write_text("[]")
    for name, words in (
        ("doubled", "more than one file holds 'head.head.bias'"),
        ("incomplete", "lacks model-1.safetensors, 1 of 2 files of model.safetensors.index.json"),
        ("several", "holds 2 models: ema.safetensors.index.json, model"),
        ("empty", "holds no .safetensors file"),
        ("index", "cannot read index"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_weights(tmp_path / name)


def test_bad_files_are_told(tmp_path: Path) -> None:
    state = small_dit().state_dict()
    good = tmp_path / "good.safetensors"
    write_safetensors(good, state, {"a": "b"})
    assert weights_digest(read_weights(good)) == weights_digest(state)
    assert read_safetensors(good)[1] == {"a": "b"}
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-10])
    unknown = tmp_path / "unknown.safetensors"
    save_file({"layer.weight": torch.zeros(2)}, unknown)
    lora = tmp_path / "lora.safetensors"
    save_file({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(2)}, lora)
    other = tmp_path / "other.bin"
    other.write_bytes(b"")
    for path, message in (
        (cut, "cannot read"),
        (tmp_path / "absent.safetensors", "cannot read"),
        (unknown, "no known DiT weights: 'layer.weight'"),
        (lora, "LoRA"),
        (other, "unknown suffix"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_weights(path)
    with pytest.raises(CheckpointError, match="'step' is a int"):
        unwrap({"step": 3})
    with pytest.raises(CheckpointError, match="'0' is a dict"):
        unwrap({0: {"exp_avg": torch.zeros(1)}})  # type: ignore[dict-item]  # an optimiser's
    with pytest.raises(CheckpointError, match="cannot write"):
        write_safetensors(tmp_path / "absent" / "x.safetensors", state, {})


def test_misfits_are_named() -> None:
    dit = small_dit()
    state = dict(dit.state_dict())
    state["blocks.7.norm3.weight"] = state.pop("blocks.1.norm3.weight")
    state["head.head.bias"] = torch.zeros(5)
    with pytest.raises(CheckpointError) as caught:
        load_into(dit, state, "x.pt")
    for part in (
        "x.pt",
        "missing: blocks.1.norm3.weight",
        "unexpected: blocks.7",
        "head.head.bias (5,) instead of (3,)",
    ):
        assert part in str(caught.value)


def test_the_digest_sees_every_change() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    digests = {
        weights_digest(state),
        weights_digest({**state, "a": torch.zeros(3, 2)}),
        weights_digest({**state, "a": torch.zeros(2, 3, dtype=torch.float16)}),
        weights_digest({**state, "b": torch.ones(1) + 1e-6}),
        weights_digest({"a": state["a"], "c": state["b"]}),
    }
    assert len(digests) == 5
    assert weights_digest(state) == weights_digest(dict(reversed(state.items())))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 1, 1)])
def test_equals_diffusers(patch: tuple[int, int, int]) -> None:
    """Needs the ``wan`` extra, which the test environment installs."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(2)
    theirs = WanTransformer3DModel(
        patch_size=patch,
        num_attention_heads=2,
        attention_head_dim=14,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=20,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = small_dit(
        width=28, ffn_width=20, num_layers=3, num_heads=2, in_channels=4, out_channels=4, patch_size=patch
    )  # fmt: skip
    load_into(ours, to_own(theirs.state_dict()))
    height, width = GRID[0] * patch[1], GRID[1] * patch[2]
    x, context = torch.randn(2, 6, 4, height, width), torch.randn(2, 6, 8)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), torch.tensor([731.0, 20.0]), context, return_dict=False)[0]
        view = full_view(ours.cache_spec(), range(6 // patch[0]), GRID)
        times = torch.tensor([731.0, 20.0])[:, None].expand(2, 6)
        flow, _ = ours(x, times, ours.encode_text(context), view)
    torch.testing.assert_close(flow, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    back = from_own(ours.state_dict(), "diffusers")
    assert {name: t.shape for name, t in back.items()} == {
        name: t.shape for name, t in theirs.state_dict().items()
    }

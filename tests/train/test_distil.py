"""The 1.3B recipe: its settings, prompts embedded once, and a real step at reduced depth and resolution."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longtake.cli import main
from longtake.convert.bare import BareWeights
from longtake.errors import ConfigError, PromptError, TrainingError
from longtake.io.checkpoints import read_weights, write_safetensors
from longtake.io.names import from_own
from longtake.models.dit import DiT
from longtake.models.memory import MemoryEncoderConfig
from longtake.recipes.wan import WAN_NEGATIVE_PROMPT, wan_1_3b_dmd, wan_1_3b_echo_long
from longtake.train.distil import distil
from longtake.train.distil_recipe import UNTRAINED, DistillationRecipe
from longtake.train.loop import STOPPED_EARLY
from longtake.train.lora import LoRAConfig
from longtake.train.optim import AdamWConfig
from longtake.train.plan import Machine
from longtake.train.prompts import EmbeddedPrompts, embed_prompts, read_prompts, write_embeddings

PROMPTS = ["a cat on a roof", "rain over a harbour", "a train in the snow"]


def small(folder: Path, **changes: object) -> DistillationRecipe:
    """Two layers of a quarter of the width, 32x48 pixels; everything that steers the training is the
    recipe's own.
    """
    made = wan_1_3b_dmd()
    model = made.dit_model.replace(num_layers=2, width=384, num_heads=3, ffn_width=2240)
    loop = made.dmd.loop.replace(accumulation_steps=2)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:2]) + "\n\n" + PROMPTS[0])
    (folder / "held-out.txt").write_text(PROMPTS[2])
    return made.replace(
        dit_model=model,
        teacher_model=model,
        stream=made.stream.replace(height=32, width=48),
        dmd=made.dmd.replace(loop=loop, num_chunks=3),
        device="cpu",
        prompts=str(folder / "prompts.txt"),
        held_out_prompts=str(folder / "held-out.txt"),
        generator=UNTRAINED,
        critic=UNTRAINED,
        teacher=UNTRAINED,
    ).replace(**changes)


def embedded(folder: Path) -> None:
    """What stage prompts leaves, of random numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    every = [WAN_NEGATIVE_PROMPT, *PROMPTS]
    rows = [torch.randn(4 + i, 4096, generator=generator) for i in range(len(every))]
    write_embeddings(folder / "prompts-00000.safetensors", every, rows, "somewhere")


def test_the_recipe_has_the_published_settings() -> None:
    made = wan_1_3b_dmd()
    dmd, loop = made.dmd, made.dmd.loop
    assert sum(p.numel() for p in _on_meta(made).parameters()) == 1_418_996_800
    assert made.latent_shape == (16, 60, 104)
    assert dmd.num_chunks * made.stream.history.chunk_frames == 21
    assert dmd.num_clips * loop.accumulation_steps == 64
    assert (dmd.generator_optimizer, dmd.critic_optimizer) == tuple(
        AdamWConfig(learning_rate=rate, betas=(0.0, 0.999), weight_decay=0.01) for rate in (2e-6, 4e-7)
    )
    assert (loop.gradient_clip, loop.ema_decay, loop.ema_from_step) == (10.0, 0.99, 200)
    assert (dmd.critic_updates, dmd.score_shift, dmd.min_score_sigma, dmd.max_score_sigma) == (
        5,
        5.0,
        0.02,
        0.98,
    )
    assert dmd.negative_prompt.startswith("色调艳丽")
    assert DistillationRecipe.loads(made.dumps()) == made


def _on_meta(made: DistillationRecipe) -> DiT:
    with torch.device("meta"):
        return DiT(made.dit_model)


def random_weights(folder: Path, made: DistillationRecipe) -> dict[str, str]:
    """Files of three networks, in official names, whose heads predict something: initial ones are zero."""
    paths = {}
    for seed, name in enumerate(("generator", "critic", "teacher")):
        torch.manual_seed(seed)
        dit = DiT(made.dit_model)
        torch.nn.init.normal_(dit.head.head.weight, std=0.05)
        paths[name] = str(folder / f"{name}.safetensors")
        write_safetensors(Path(paths[name]), from_own(dit.state_dict(), "wan"), {})
    return paths


def test_one_real_step_at_reduced_depth_and_resolution(tmp_path: Path) -> None:
    one_layer = wan_1_3b_dmd().dit_model.replace(num_layers=1)  # 72 M parameters: in all 2 GB
    made = small(tmp_path, dit_model=one_layer, teacher_model=one_layer)
    made = made.replace(**random_weights(tmp_path, made))
    embedded(tmp_path / "out" / "prompts")
    figures = distil(made, tmp_path / "out", ["dmd"], stop_after_seconds=0.0)
    assert figures[STOPPED_EARLY] == 1
    state = torch.load(tmp_path / "out" / "dmd" / "checkpoint.pt")
    for name, rate in (("generator", 2e-6), ("critic", 4e-7)):
        before = read_weights(Path(getattr(made, name)))
        after = {key.removeprefix("dit."): tensor for key, tensor in state["modules"][name].items()}
        moves = {key: (after[key] - tensor).abs().max().item() for key, tensor in before.items()}
        assert [key for key, move in moves.items() if move == 0] == []
        # With a first beta of 0 every weight's first update is the rate, with the sign of its gradient.
        assert 0.9 * rate < max(moves.values()) < 1.2 * rate
        (group,) = state["optimizers"][name]["param_groups"]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (rate, (0.0, 0.999), 0.01)
    for key, tensor in state["average"].items():
        assert torch.equal(tensor, state["modules"]["generator"][key])  # averaging begins at step 200
    first = json.loads((tmp_path / "out" / "dmd" / "log.jsonl").read_text().splitlines()[0])
    for key in ("generator_loss", "generator_norm", "critic_loss", "critic_norm"):
        assert 0 < first[key] < 1e4


def test_the_long_recipe_takes_published_pieces_with_a_memory(tmp_path: Path) -> None:
    """Its generator comes without a memory here, which then starts untrained and learns whole; blocks learn
    low-rank updates, and an ordinary network is exported.
    """
    published = wan_1_3b_echo_long()
    long = published.dmd
    frames = published.stream.history.chunk_frames
    assert (long.num_chunks * frames, (long.num_chunks - long.overlap_chunks) * frames) == (21, 18)
    assert (long.max_lead_chunks + long.num_chunks) * frames == 240
    assert published.dit_model.memory is not None
    assert published.dit_model.memory.num_tokens == 4680
    made = small(tmp_path)
    weights = random_weights(tmp_path, made)
    memory = MemoryEncoderConfig(width=384, num_heads=3, num_frames=3, rows=2, columns=3)
    loop = long.loop.replace(num_steps=1, accumulation_steps=1, evaluate_every_steps=9)
    settings = long.replace(loop=loop, num_chunks=2, max_lead_chunks=4, lora=LoRAConfig(rank=8))
    made = made.replace(
        dit_model=made.dit_model.replace(memory=memory),
        stream=published.stream.replace(height=32, width=48),
        dmd=settings,
        **weights,
    )
    embedded(tmp_path / "out" / "prompts")
    distil(made, tmp_path / "out", ["dmd", "export"])
    told = BareWeights.read(tmp_path / "out" / "wan-1.3b-dmd.safetensors")
    assert (told.config, told.stream) == (made.dit_model, made.stream)
    exported = told.state
    started = read_weights(Path(weights["generator"]))
    assert set(exported) == set(DiT(made.dit_model).state_dict())
    assert set(started) == {name for name in exported if not name.startswith("memory.")}
    state = torch.load(tmp_path / "out" / "dmd" / "checkpoint.pt")
    assert not any("memory" in name for name in state["modules"]["critic"])
    assert {group["base_lr"] for group in state["optimizers"]["generator"]["param_groups"]} == {1e-5, 5e-5}
    learned = {name for name in state["average"] if not name.startswith("dit.memory.")}
    assert learned
    assert all(name.endswith(("lora_down", "lora_up")) for name in learned)


def test_what_is_trained_is_exported_under_wans_names(tmp_path: Path) -> None:
    made = small(tmp_path)
    with pytest.raises(TrainingError, match="run stage dmd first"):
        distil(made, tmp_path, ["export"])
    dit = DiT(made.dit_model)
    (tmp_path / "dmd").mkdir()
    write_safetensors(tmp_path / "dmd" / "weights.safetensors", dit.state_dict(), {})
    assert distil(made, tmp_path, ["export"])["bytes"] > 0
    exported = read_weights(tmp_path / "wan-1.3b-dmd.safetensors")
    torch.testing.assert_close(
        exported["blocks.1.ffn.2.weight"].float(),
        dit.state_dict()["blocks.1.ffn.2.weight"],
        atol=0,
        rtol=0.01,
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generator": "nowhere.pt"}, r"generator='nowhere.pt' is neither .*--set generator=PATH"),
        ({"prompts": "nowhere.txt"}, r"cannot read prompts 'nowhere.txt'"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    embedded(tmp_path / "prompts")
    with pytest.raises(TrainingError, match=words):
        distil(small(tmp_path, **changes), tmp_path, ["dmd"])


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made, plenty = small(tmp_path), Machine("cpu", 10**15)
    with pytest.raises(ConfigError, match=r"stream is 40x48, no multiple of 16x16.*use for instance 32x48"):
        made.replace(stream=made.stream.replace(height=40)).check(["dmd"], plenty)
    with pytest.raises(ConfigError, match=r"dit_model.text_width=4096, but teacher_model has 128"):
        made.replace(teacher_model=made.teacher_model.replace(text_width=128)).check(["dmd"], plenty)


def test_the_dry_run_fits_80_gb_and_not_24(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "wan-1.3b-dmd", "--dry-run", "--memory-gb", "80"]) == 0
    assert "1.42 B trained" in capsys.readouterr().out
    assert main(["train", "wan-1.3b-dmd", "--dry-run", "--memory-gb", "24"]) == 2
    assert "shard over 3 such devices" in capsys.readouterr().err


def test_prompts_are_embedded_once_and_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def load(name: str, text_length: int, device: str) -> Callable[[list[str]], list[torch.Tensor]]:
        def embed(texts: list[str]) -> list[torch.Tensor]:
            calls.append(texts)
            return [torch.full((len(text.split()), 6), float(len(text))) for text in texts]

        return embed

    monkeypatch.setattr("longtake.train.prompts._load_encoder", load)
    monkeypatch.setattr("longtake.train.prompts._PROMPTS_PER_SHARD", 2)
    embed_prompts(PROMPTS, "encoder", tmp_path, 16)
    assert calls == [PROMPTS[:2], PROMPTS[2:]]
    (tmp_path / "prompts-00001.safetensors").unlink()
    embed_prompts(PROMPTS, "encoder", tmp_path, 16)
    assert calls[2:] == [PROMPTS[2:]]
    text = EmbeddedPrompts.load(tmp_path, 6)
    embeddings, mask = text.encode([PROMPTS[2], PROMPTS[1]])
    assert embeddings.shape == (2, 5, 6)
    assert mask.sum(1).tolist() == [5, 4]
    assert embeddings[1, :, 0].tolist() == [19.0, 19.0, 19.0, 19.0, 0.0]
    assert list(text.parameters()) == []
    with pytest.raises(PromptError, match="'a dog' is not among the 3 prompts"):
        text.encode(["a dog"])
    with pytest.raises(TrainingError, match="other prompts"):
        embed_prompts(PROMPTS[::-1], "encoder", tmp_path, 16)
    with pytest.raises(TrainingError, match="in 6 numbers a token, the DiT reads 4096"):
        EmbeddedPrompts.load(tmp_path, 4096)
    with pytest.raises(TrainingError, match="run stage prompts first"):
        EmbeddedPrompts.load(tmp_path / "nowhere", 6)


def test_files_of_prompts_hold_one_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \none\n")
    assert read_prompts(path) == ["one", "two"]
    path.write_text("\n")
    with pytest.raises(TrainingError, match="holds no prompts"):
        read_prompts(path)


def test_prompts_through_a_real_text_encoder(tmp_path: Path) -> None:
    """A small umT5 in the layout of Wan's repository; embeddings end where the prompt does."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = dict.fromkeys(["<pad>", "</s>", "<unk>", *" ".join(PROMPTS).split()])
    vocabulary = {word: i for i, word in enumerate(words)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=len(vocabulary), d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2
    )
    transformers.UMT5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    embed_prompts(PROMPTS, str(tmp_path), tmp_path / "cache", 12)
    embeddings, mask = EmbeddedPrompts.load(tmp_path / "cache", 16).encode([PROMPTS[0], PROMPTS[1]])
    assert mask.sum(1).tolist() == [5, 4]
    assert embeddings[0].abs().sum() > 0
    assert not torch.equal(embeddings[0, :4], embeddings[1, :4])
    with pytest.raises(
        TrainingError, match=r"cannot load the text encoder '/nowhere'.*local folder with 'tokenizer'"
    ):
        embed_prompts(["more"], "/nowhere", tmp_path / "other", 12)

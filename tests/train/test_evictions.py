"""A memory that learns from what a frozen network evicts: what is kept, what is asked, and the stage."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from counting import measured
from longtake.cache.base import Entries
from longtake.errors import ConfigError, TrainingError
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import Evicted, PolicyState
from longtake.history.positions import Relative
from longtake.models.latent_config import LatentConfig
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.bundle import load_model
from longtake.train import evictions as stage
from longtake.train.dit_config import DiTTrainingConfig
from longtake.train.evictions import Evictions, EvictionsConfig, EvictionsTask, evictions_of
from longtake.train.excerpts import LatentCacheConfig, prompts_in_force
from longtake.train.latents import Clips
from longtake.train.networks import TextToLatents
from longtake.train.plan import Machine
from longtake.train.recall import RecallBatch, RecallSource
from longtake.train.recipe import Recipe
from longtake.train.run import train
from longtake.train.walk import Walk
from toy_training import DIT, HISTORY, clip_encoder, loop, networks, recipe, renderer

PLENTY = Machine("cpu", 10**15)
MEMORY = MemoryEncoderConfig(
    width=24, num_heads=2, rows=2, columns=2, num_frames=2, num_layers=1, attends="cell", num_readings=2
)
POLICY = EvolvingConfig(source_layer=0)
REMEMBERS = HISTORY.replace(policy=POLICY, positions=Relative(f_max=6))
SIZE = 32  # 2 x 2 tokens


@lru_cache
def batch(count: int = 2) -> RecallBatch[Clips]:
    config = LatentCacheConfig(chunk_frames=2, height=SIZE, width=SIZE)
    source = RecallSource(renderer(guided=True), config, REMEMBERS, (2.0, 3.0))
    return source.draw(np.random.default_rng(0), count).encoded(clip_encoder())


def module(**memory: object) -> TextToLatents:
    return networks(DIT.replace(memory=MEMORY.replace(**memory))).requires_grad_(False)


def test_no_two_batches_are_drawn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out ones neither: targets of recall scenes follow from the draw, not from the scenes' seeds."""
    drawn: list[list[int]] = []

    class Drawing(RecallSource):
        def draw(self, rng: np.random.Generator, count: int) -> RecallBatch[Clips]:  # type: ignore[override]
            drawn.append(rng.integers(1 << 30, size=4).tolist())
            return batch()

    made, source = module(), Drawing(renderer(guided=True), LatentCacheConfig(), REMEMBERS, (2.0, 3.0))
    kept = evictions_of(made, REMEMBERS, batch())
    monkeypatch.setattr(stage, "evictions_of", lambda *_: kept)
    sources = {"train": (source, 2), "held-out": (source, 2)}
    config = EvictionsConfig(loop=loop(2), num_clips=2)

    def build(identity: str) -> None:
        stage.build_evictions(
            made, REMEMBERS, clip_encoder(), sources, config, tmp_path, {"weights": identity}
        )

    build("some")
    assert len({tuple(numbers) for numbers in drawn}) == 4
    build("some")
    assert len(drawn) == 4
    with pytest.raises(TrainingError, match="another network or other clips"):
        build("others")


@torch.no_grad()
def test_what_is_kept_is_what_a_walk_under_the_plain_window_evicts(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = module(), batch()
    kept = evictions_of(made, REMEMBERS, asked)
    seen: list[Evicted] = []
    absorb = stage._Recorder.absorb

    def noted(self: stage._Recorder, state: PolicyState, evicted: Evicted) -> PolicyState:
        seen.append(evicted)
        return absorb(self, state, evicted)

    monkeypatch.setattr(stage._Recorder, "absorb", noted)
    assert torch.equal(evictions_of(made, REMEMBERS, asked).keys, kept.keys)
    assert kept.sizes == (4, *(8 for _ in seen[1:]))  # the sink has taken one frame of a chunk
    for keys, values, evicted in zip(
        kept.keys.split(kept.sizes, 1), kept.values.split(kept.sizes, 1), seen, strict=True
    ):
        source = evicted.entries.layers[POLICY.source_layer]
        assert torch.equal(keys, source["k"].half())
        assert torch.equal(values, source["v"].half())
    # The view's two frames, in every layer; memory frame by memory frame.
    for place, frame in enumerate((asked.shown_frame - 1, asked.shown_frame)):
        [home] = [item for item in seen if frame in item.frames[0]]
        at = home.frames[0].index(frame)
        for layer, parts in enumerate(home.entries.layers):
            own, theirs = slice(4 * place, 4 * place + 4), slice(4 * at, 4 * at + 4)
            assert torch.equal(kept.shown_keys[layer][:, own], parts["k"][:, theirs].half())
            assert torch.equal(kept.shown_values[layer][:, own], parts["v"][:, theirs].half())
    # It is asked where the view is out of sight, after all that was evicted until then.
    first = asked.unseen.index(True)
    # All commits but the first one evict.
    assert kept.reads == tuple(range(first - 1, first - 1 + sum(asked.unseen)))
    # The walk is that of the plain window.
    plain = HISTORY.replace(positions=REMEMBERS.positions)
    latents, captions = asked.clips.latents_bfchw.float(), prompts_in_force(asked.clips.prompts, 0)
    walk = Walk(made.dit, plain, made.encode(captions), 2, 4, 4)
    entries: list[Entries] = []
    made.dit.register_forward_hook(lambda _, __, out: entries.append(out[1]))
    for chunk in range(3):
        walk.commit(latents[:, 2 * chunk : 2 * chunk + 2])
    torch.testing.assert_close(
        seen[0].entries.layers[1]["v"], entries[0].layers[1]["v"][:, 4:], check_stride=False
    )


@pytest.mark.parametrize("lower", [False, True])
def test_a_file_keeps_a_batch(tmp_path: Path, lower: bool) -> None:
    """Also of a walk in bf16, which stages make where a processor is faster in it."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=lower):
        kept = evictions_of(module(), REMEMBERS, batch())
    assert kept.keys.dtype == kept.shown_values.dtype == torch.half
    kept.save(tmp_path / "one.safetensors")
    again = Evictions.load(tmp_path / "one.safetensors")
    assert again.reads == kept.reads
    for name in ("keys", "values", "shown_keys", "shown_values", "guide"):
        assert torch.equal(getattr(again, name), getattr(kept, name))


@pytest.mark.parametrize("readings", [1, 2])
def test_the_memory_comes_to_answer_and_nothing_else_moves(tmp_path: Path, readings: int) -> None:
    made = module(num_readings=readings)
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    with torch.no_grad():
        for path in paths:
            evictions_of(made, REMEMBERS, batch()).save(path)
    shown = Evictions.load(paths[0]).shown_keys
    assert len(shown) == readings
    others = {name: t.clone() for name, t in made.named_parameters() if "dit.memory" not in name}
    config = EvictionsConfig(muon_learning_rate=1e-2, adamw_learning_rate=1e-2)
    task = EvictionsTask(made.dit, (2, 2), config, paths[:1], paths[1:])
    before = task.evaluate()
    for step in range(40):
        loss, figures = task.loss(step, 0.0)
        assert set(figures) == {"keys", "values", "guide"}
        loss.backward()  # type: ignore[no-untyped-call]
        task.optimizer.step()
        task.optimizer.zero_grad()
    after = task.evaluate()
    assert set(after) == {"keys", "values", "guide", "keys_last", "values_last", "guide_last"}
    for name, value in after.items():
        assert value < 0.7 * before[name], name
    assert all(torch.equal(made.get_parameter(name), tensor) for name, tensor in others.items())


def test_a_perfect_memory_has_no_error(tmp_path: Path) -> None:
    """Readings are compared frame by frame and layer by layer with the view."""
    made = module()
    path = tmp_path / "one.safetensors"
    with torch.no_grad():
        evictions_of(made, REMEMBERS, batch()).save(path)
    kept = Evictions.load(path)
    task = EvictionsTask(made.dit, (2, 2), EvictionsConfig(), [path], [path])
    task._memory.read = lambda state: [  # type: ignore[method-assign]
        {"k": keys.float(), "v": values.float()}
        for keys, values in zip(kept.shown_keys, kept.shown_values, strict=True)
    ]
    errors = task.evaluate()
    assert errors["keys"] == errors["values"] == 0
    assert errors["guide"] > 0


def remembering(**changes: object) -> Recipe:
    made = recipe()
    size = {"height": SIZE, "width": SIZE}
    caches = {name: getattr(made, name).replace(**size) for name in ("first_latents", "latents", "held_out")}
    settings = {"loop": loop(4), "num_clips": 2, "num_batches": 2, "num_held_out_batches": 1, **changes}
    return made.replace(
        stages=("vae", "latents", "first", "evictions", "memory", "export"),
        dit_model=DIT.replace(memory=MEMORY),
        stream=made.stream.replace(history=REMEMBERS, **size),
        evictions=EvictionsConfig(absence=(2.5, 3.0), **settings),  # type: ignore[arg-type]
        memory=DiTTrainingConfig(
            loop=loop(1),
            num_clips=0,
            num_recall_clips=1,
            num_copies=1,
            recall_absence=(2.5, 2.5),
            fresh_clips=True,
            num_chunks=2,
        ),
        **caches,
    )


def test_the_stage_goes_on_where_it_was_stopped_and_leaves_a_memory(tmp_path: Path) -> None:
    made = remembering()
    before = ("vae", "latents", "first")
    train(made, tmp_path / "one", stages=before)
    train(made, tmp_path / "one", stages=("evictions",))
    train(made, tmp_path / "two", stages=before)
    train(made, tmp_path / "two", stages=("evictions",), stop_after_seconds=0)
    assert not (tmp_path / "two" / "evictions" / "weights.safetensors").exists()
    train(made, tmp_path / "two", stages=("evictions",))
    one, two = (tmp_path / run / "evictions" / "weights.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert len(list((tmp_path / "one" / "evicted").glob("*.safetensors"))) == 3
    train(made, tmp_path / "one", stages=("evictions", "memory", "export"))  # what is done is not done again
    assert load_model(str(tmp_path / "one" / "toy.safetensors")).card.dit.memory == MEMORY
    with pytest.raises(TrainingError, match="another network or other clips"):
        train(remembering(num_clips=3), tmp_path / "one", stages=("evictions",))


def test_stages_before_the_memorys_own_walk_without_it() -> None:
    def mode(made: Recipe, stage: str) -> str:
        policy = made.history_of(stage).policy
        assert isinstance(policy, EvolvingConfig)
        return policy.mode

    made = remembering()
    assert [mode(made, stage) for stage in ("first", "windows", "evictions", "memory", "dmd")] == [
        "off",
        "off",
        "update",
        "update",
        "update",
    ]
    assert mode(made.replace(stages=("windows", "export")), "windows") == "update"
    assert recipe().history_of("windows") == recipe().stream.history


def test_what_a_step_takes_is_counted(tmp_path: Path) -> None:
    made = remembering()
    plan = made.plan("evictions", PLENTY)
    assert plan is not None
    networks_made = module()
    path = tmp_path / "one.safetensors"
    with torch.no_grad():
        evictions_of(networks_made, REMEMBERS, batch()).save(path)
    task = EvictionsTask(networks_made.dit, (2, 2), made.evictions, [path], [path])
    flops, _ = measured(task.learners[""], [task.module], 0, False)
    assert flops < sum(plan.flops.values()) < 2.5 * flops  # counted for the longest absence
    trained = {network.name: network.num_trained for network in plan.networks}
    memory = networks_made.dit.memory
    assert memory is not None
    assert trained["dit"] == sum(parameter.numel() for parameter in memory.parameters())
    assert trained["text"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda: remembering().replace(dit_model=DIT.replace(memory=MEMORY.replace(rows=1))),
            "2 x 1 x 2 tokens",
        ),
        (
            lambda: remembering().replace(
                dit_model=DIT.replace(
                    memory=MEMORY, latent=LatentConfig(kv_rank=12, nope_dim=6, rope_bands=(1, 1, 1))
                )
            ),
            "per-head keys and values",
        ),
        (
            lambda: remembering().replace(
                stream=remembering().stream.replace(
                    history=REMEMBERS.replace(policy=EvolvingConfig(mode="prior"))
                )
            ),
            "stage evictions teaches a policy that learns",
        ),
        (lambda: EvictionsConfig(absence=(0.5, 2.0)), "no range of absences"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        change().check(("evictions",), PLENTY)  # type: ignore[operator]

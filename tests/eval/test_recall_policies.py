"""Policies to compare a memory with, by name: their settings, budgets and positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.policies import apart, short_name, with_policy
from longtake.eval.recall_records import RecallConfig
from longtake.eval.recall_videos import ModelVideos
from longtake.history.compression import AverageConfig, PooledConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.retention import KeyFramesConfig, MostAttendedConfig
from longtake.history.window import WindowConfig
from longtake.stream.state import PromptSwitch
from longtake.world import Scene
from longtake.world.recall import RecallScene
from tiny_parts import small_pipeline

CONFIG = RecallConfig(scenes=4, absence=(1.0,))
WINDOW = 48
Change = Callable[[RecallScene], Scene]


def test_policies_between_commas() -> None:
    """Settings and what stands in brackets have commas of their own."""
    bands = '[{"num_entries": 2, "pool": [1, 3]}, {"num_entries": 1, "num_frames": 4, "pool": [2, 3]}]'
    texts = [
        "own",
        "key_frames:stride=4,num_frames=2",
        "average:decays=[0.9,0.5]",
        f"pooled:num_ids=1,bands={bands}",
    ]
    assert apart(",".join(texts)) == texts
    assert apart("own,") == ["own"]
    assert [short_name(text) for text in texts[:3]] == [
        "own",
        "key_frames-stride-28a695",
        "average-decays-0.9-0.5",
    ]
    assert len({short_name(f"{texts[-1]}{number}") for number in range(9)}) == 9
    pooled = with_policy(small_pipeline(policy=EvolvingConfig()), texts[-1]).config.history.policy
    assert isinstance(pooled, PooledConfig)
    assert [band.pool for band in pooled.bands] == [(1, 3), (2, 3)]


def test_policies_by_name() -> None:
    torch.manual_seed(0)
    pipeline = small_pipeline(policy=EvolvingConfig())
    assert with_policy(pipeline, "own") is pipeline

    def policy(text: str) -> object:
        return with_policy(pipeline, text).config.history.policy

    assert policy("prior") == EvolvingConfig(mode="prior")
    assert policy("off") == EvolvingConfig(mode="off")
    late = small_pipeline(policy=EvolvingConfig(source_layer=0, read_layers=(1,)))
    changed = with_policy(late, "evolving:read_initially=false").config.history.policy
    assert changed == EvolvingConfig(source_layer=0, read_layers=(1,), read_initially=False)
    assert policy("key_frames:stride=4,num_frames=2") == KeyFramesConfig(stride=4, num_frames=2)
    assert policy("average:decays=[0.9, 0.5]") == AverageConfig(decays=(0.9, 0.5))
    full = with_policy(pipeline, "full").config.history
    assert full.window_frames is None
    assert full.policy.kind == "window"
    with pytest.raises(ConfigError, match="stripe"):
        policy("key_frames:stripe=4")
    with pytest.raises(ConfigError, match="kind"):
        policy("hoarding")
    with pytest.raises(EvalError, match="has no value"):
        policy("key_frames:stride")
    with pytest.raises(EvalError, match="has not"):
        with_policy(small_pipeline(), "prior")
    for text in ("own:mode=off", "off:read_layers=[0]", "full:nonsense=3", "swapped:x"):
        with pytest.raises(EvalError, match="has no settings"):
            policy(text)


def test_rivals_keep_as_many_frames_and_get_no_ids_that_the_model_never_saw() -> None:
    pipeline = small_pipeline(policy=EvolvingConfig(), positions=Relative(f_max=8))  # window 7, two of memory
    assert with_policy(pipeline, "key_frames").config.history.policy == KeyFramesConfig(num_frames=2)
    assert with_policy(pipeline, "most_attended").config.history.policy == MostAttendedConfig(num_frames=2)
    wider = with_policy(pipeline, "window:window_frames=9").config.history
    assert (wider.window_frames, wider.policy, wider.positions) == (9, WindowConfig(), Relative(f_max=8))
    for text, needed, refusal in (
        ("window:window_frames=10", 9, ConfigError),
        ("key_frames:num_frames=3", 9, EvalError),
    ):
        with pytest.raises(refusal, match="f_max=8|ids up to 9, and the model has them up to 8"):
            with_policy(pipeline, text)
        unseen = with_policy(pipeline, f"{text},f_max={needed}").config.history
        assert unseen.positions == Relative(f_max=needed)
    told = ModelVideos(with_policy(pipeline, "key_frames"), "tiny", "key_frames", PromptSwitch(text="")).about
    assert told["memory"] == "12 tokens, read by 2 of 2 layers"
    assert told["window"] == "7 latent frames, 2 of them a sink, ids 0..8"

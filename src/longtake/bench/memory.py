"""What a learned memory costs over the same window without one: FLOPs counted from shapes, and time measured
by turns.

Counted is a chunk of a stream whose window is full: its denoising passes, its context pass, and what the
memory adds to both (more keys in the layers that read it, its projection to keys and values, its update).
Autoencoder and text are the same with and without, and left out. Elementwise work counts nothing.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import torch
from pydantic import Field, model_validator

from longtake.bench.turns import Tell, TurnsConfig, bar, full_window_chunk, head, measure_alternatives
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.history.window import WindowConfig
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig, wan_dit
from longtake.models.memory import MemoryEncoderConfig
from longtake.stream.pipeline import Pipeline
from longtake.train.dit_costs import DiTCosts

MAX_COUNTED_SHARE: Final = 0.03
MAX_TIME_SHARE: Final = 0.08

WAN_1_3B: Final = wan_dit()
WAN_LATENT: Final = (60, 104)
"""480x832 pixels."""


class MemorySetting(Config):
    """Sizes and readers of a memory, as shares of the network that it is for.

    Attributes:
        num_frames: frame-equivalents.
        token_share: of a frame's rows, and of its columns, that each of them has.
        num_layers: of its encoder. ``ffn_ratio``: of its feed-forward.
        num_readers: how many of the network's layers read it, evenly spread with the last among them; "all".
        attends: see `MemoryEncoderConfig`. ``own_readings``: each reader has keys and values of its own.
    """

    num_frames: int = Field(3, ge=1)
    token_share: float = Field(1.0, gt=0, le=1)
    num_layers: int = Field(2, ge=1)
    ffn_ratio: int = Field(4, ge=1)
    num_readers: int | Literal["all"] = "all"
    attends: Literal["all", "cell"] = "all"
    own_readings: bool = False

    @classmethod
    def like(cls, dit: DiTConfig, policy: EvolvingConfig, grid: tuple[int, int]) -> MemorySetting:
        """A network's own memory, in shares of that network, with which it can be scaled to another: its
        tokens, layers and readers, beside dense attention and read as keys.

        Args:
            dit: the network, with its memory.
            policy: how the memory is used.
            grid: rows and columns of a frame's tokens.
        """
        memory, readers = dit.memory, policy.read_layers
        assert memory is not None, "a policy that reads a memory"
        share = math.sqrt(memory.rows * memory.columns / (grid[0] * grid[1]))
        num_readers: int | Literal["all"] = "all"
        if readers != "all":
            num_readers = max(1, round(len(readers) / dit.num_layers * WAN_1_3B.num_layers))
        return cls(
            num_frames=memory.num_frames,
            token_share=min(1.0, share),
            num_layers=memory.num_layers,
            ffn_ratio=memory.ffn_ratio,
            num_readers=num_readers,
            attends=memory.attends,
            own_readings=memory.num_readings > 1,
        )

    def encoder(self, dit: DiTConfig, grid: tuple[int, int]) -> MemoryEncoderConfig:
        """The encoder for a network and its token grid."""
        rows, columns = (max(1, round(self.token_share * size)) for size in grid)
        return MemoryEncoderConfig(
            width=dit.width,
            num_heads=dit.num_heads,
            num_frames=self.num_frames,
            rows=rows,
            columns=columns,
            num_layers=self.num_layers,
            ffn_ratio=self.ffn_ratio,
            attends=self.attends,
            num_readings=self._num_readers(dit) if self.own_readings else 1,
        )

    def policy(self, dit: DiTConfig) -> EvolvingConfig:
        """How the network uses it.

        Raises:
            ConfigError: more readers than layers.
        """
        if self.num_readers == "all":
            return EvolvingConfig()
        if not 1 <= self.num_readers <= dit.num_layers:
            raise ConfigError(
                f"num_readers={self.num_readers} of a DiT with {dit.num_layers} layers", "use fewer"
            )
        last = dit.num_layers - 1
        return EvolvingConfig(
            read_layers=tuple(
                sorted(last - i * dit.num_layers // self.num_readers for i in range(self.num_readers))
            )
        )

    def _num_readers(self, dit: DiTConfig) -> int:
        readers = self.policy(dit).read_layers
        return dit.num_layers if readers == "all" else len(readers)


PAPER: Final = MemorySetting()
SETTINGS: Final[dict[str, MemorySetting]] = {
    "paper": PAPER,
    "one frame": MemorySetting(num_frames=1),
    "six readers": MemorySetting(num_readers=6),
    "one frame, six readers": MemorySetting(num_frames=1, num_readers=6),
    "half a grid, all readers": MemorySetting(num_frames=1, token_share=0.5),
    "half a grid, six readers": MemorySetting(num_frames=1, token_share=0.5, num_readers=6),
}


THIS_MODELS: Final = "this model's, scaled"


class MemoryBenchConfig(TurnsConfig):
    """What to measure.

    Attributes:
        memory: setting to time on a model that has no memory, with untrained weights: time does not depend
            on them.
        window_frames, sink_frames, chunk_frames: of the counted history at Wan2.1-1.3B's size.
    """

    memory: MemorySetting = MemorySetting(num_frames=1, num_layers=1, ffn_ratio=2, num_readers=2)
    window_frames: int = Field(12, ge=1)
    sink_frames: int = Field(3, ge=0)
    chunk_frames: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _has_window(self) -> MemoryBenchConfig:
        if self.window_frames < self.sink_frames + self.chunk_frames:
            raise ConfigError(
                f"window_frames={self.window_frames} does not hold sink {self.sink_frames} + chunk "
                f"{self.chunk_frames}",
                "use a longer window",
            )
        return self


@dataclass(frozen=True)
class Counted:
    """FLOPs of a chunk in the steady state.

    Args:
        plain: without memory.
        keys: what layers that read it add for its keys.
        read: its projection to keys and values. ``update``: of its state.
    """

    plain: float
    keys: float
    read: float
    update: float

    @property
    def share(self) -> float:
        """Of the memory, over the chunk without one."""
        return (self.keys + self.read + self.update) / self.plain


def count(
    dit: DiTConfig, history: HistoryConfig, policy: EvolvingConfig, latent: tuple[int, int], num_passes: int
) -> Counted:
    """Counts a chunk of a full window.

    Args:
        dit: the network, with its memory.
        history: window, sink and chunk; its own policy does not matter.
        policy: how the memory is used.
        latent: height and width of the latents.
        num_passes: denoising passes of a chunk and its context pass.
    """
    assert history.window_frames is not None
    chunk = 2 * history.window_frames  # far behind the first eviction
    bare = DiTCosts(dit, history.replace(policy=WindowConfig()), *latent)
    full = replace(bare, history=history.replace(policy=policy, positions=_room(history, dit)))
    plain = num_passes * bare.forward(1, chunk).flops
    keys = num_passes * full.forward(1, chunk).flops - plain
    read, update = full.memory_flops(1, chunk)
    return Counted(plain, keys, read, update)


def _room(history: HistoryConfig, dit: DiTConfig) -> Relative:
    """Ids for window and memory."""
    assert history.window_frames is not None
    num_memory = 0 if dit.memory is None else dit.memory.num_frames
    return Relative(f_max=history.window_frames + num_memory - 1)


def with_memory(
    pipeline: Pipeline, setting: MemorySetting, read_as_latent: tuple[int, int] | None = None
) -> Pipeline:
    """The model with an untrained memory, read as per-head keys or (see `MemoryEncoderConfig`) as latents."""
    shape = pipeline.latent_shape
    grid = pipeline.dit.token_grid(shape[2], shape[3])
    memory = setting.encoder(pipeline.dit.config, grid).replace(read_as_latent=read_as_latent)
    config = pipeline.dit.config.replace(memory=memory)
    torch.manual_seed(0)
    dit = DiT(config)
    own = {name: t for name, t in pipeline.dit.state_dict().items() if not name.startswith("memory.")}
    dit.load_state_dict(copy.deepcopy(own), strict=False)
    dit.to(pipeline.device).eval().requires_grad_(False)
    history = pipeline.config.history
    return Pipeline(
        dit,
        pipeline.vae,
        pipeline.text_encoder,
        pipeline.config.replace(
            history=history.replace(policy=setting.policy(config), positions=_room(history, config))
        ),
    )


def run_memory_bench(config: MemoryBenchConfig, pipeline: Pipeline, model: str, tell: Tell) -> dict[str, Any]:
    """All figures, as a report ready for JSON.

    Args:
        config: what to measure.
        pipeline: the model, with a memory or without.
        model: its name.
        tell: given a line about what is measured next.

    Raises:
        ConfigError: a window without limit.
    """
    full_window_chunk(pipeline)
    own = isinstance(pipeline.config.history.policy, EvolvingConfig)
    timed = pipeline if own else with_memory(pipeline, config.memory)
    history, policy = timed.config.history, timed.config.history.policy
    assert isinstance(policy, EvolvingConfig)
    passes = len(timed.config.schedule.resolve().timesteps) + 1
    counted = count(timed.dit.config, history, policy, timed.latent_shape[2:], passes)
    # Both with the same positions, so that nothing but the memory differs.
    plain = timed.with_history(history.replace(policy=policy.replace(mode="off")))
    times = {}
    for name, decode in (("chunk", True), ("latents", False)):
        tell(f"time: {config.num_pairs} pairs, {'frames' if decode else 'latents alone'}")
        times[name] = measure_alternatives(config, plain, timed, ("off", "memory"), decode=decode)
    settings = dict(SETTINGS)
    if own:
        grid = timed.dit.token_grid(*timed.latent_shape[2:])
        settings[THIS_MODELS] = MemorySetting.like(timed.dit.config, policy, grid)
    rows = {name: _at_wan_size(config, setting) for name, setting in settings.items()}
    report = {
        **head(config, pipeline, model, trained_memory=own),
        "counted": {"model": _figures(counted), "wan_1_3b": rows},
        "time": times,
    }
    return {**report, "bars": bars(report)}


def _at_wan_size(config: MemoryBenchConfig, setting: MemorySetting) -> dict[str, Any]:
    grid = (WAN_LATENT[0] // 2, WAN_LATENT[1] // 2)
    dit = WAN_1_3B.replace(memory=setting.encoder(WAN_1_3B, grid))
    history = HistoryConfig(
        window_frames=config.window_frames,
        sink_frames=config.sink_frames,
        chunk_frames=config.chunk_frames,
    )
    counted = count(dit, history, setting.policy(dit), WAN_LATENT, 5)
    assert dit.memory is not None
    return {"tokens": dit.memory.num_tokens, **_figures(counted)}


def _figures(counted: Counted) -> dict[str, float]:
    return {
        "share": counted.share,
        "keys": counted.keys / counted.plain,
        "read": counted.read / counted.plain,
        "update": counted.update / counted.plain,
        "flops_without": counted.plain,
    }


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is required, what was measured, and whether it suffices. At Wan's size that is of the memory that
    the model has, whose recall can be tested; of a model without one, of the cheapest setting.
    """
    rows = report["counted"]["wan_1_3b"]
    name = THIS_MODELS if THIS_MODELS in rows else min(rows, key=lambda name: rows[name]["share"])
    time = report["time"]["chunk"]["ratio_of_medians"] - 1
    return [
        bar(f"{name} at Wan2.1-1.3B's size, counted FLOPs", rows[name]["share"], MAX_COUNTED_SHARE),
        bar("this model's time, text to frames", time, MAX_TIME_SHARE),
    ]

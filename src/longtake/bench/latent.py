"""What latent attention saves and costs beside dense: bytes and FLOPs counted at Wan2.1-1.3B's size, bytes
measured on real allocations, time measured on a model's streams by turns.

Counted is a chunk of a stream whose window is full: four denoising passes and the context pass.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from typing import Any, Final

import torch
from pydantic import Field

from longtake.bench.memory import PAPER, WAN_1_3B, WAN_LATENT, MemorySetting, count, with_memory
from longtake.bench.meter import resident_bytes
from longtake.bench.turns import Tell, TurnsConfig, bar, head, measure_alternatives
from longtake.cache.base import Buffers
from longtake.cache.latent import latent_layout
from longtake.cache.quantized import KeyStorage, Storage
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.models.dit import DiT
from longtake.models.latent_config import LatentConfig
from longtake.stream.pipeline import Pipeline
from longtake.train.dit_costs import DiTCosts

WINDOWS: Final = (7, 12, 21, 63)
"""Latent frames, current chunk included."""
STORAGES: Final[dict[str, tuple[Storage, KeyStorage]]] = {
    "full": ("full", "full"),
    "fp8": ("fp8", "full"),
    "int4": ("int4", "full"),
    "fp8, keys fp8": ("fp8", "fp8"),
    "int4, keys fp8": ("int4", "fp8"),
}
"""Of latents, and of the shared key."""
MAX_BYTES: Final = 166
MAX_TIME_RATIO: Final = 1.05
MAX_OFF: Final = 0.01
NUM_PASSES: Final = 5
MEMORY_WINDOW: Final = 12
WAN_DECODER_STATE_BYTES: Final = 1.9e9
"""Of Wan's streaming autoencoder at 480x832 in bf16: 0.94 G numbers, kept for every stream."""
_NUM_WEIGHTS: Final = 1.42e9 + 0.13e9  # DiT and autoencoder; the text encoder need not stay


class LatentBenchConfig(TurnsConfig):
    """What to measure.

    Attributes:
        measured_bytes: at least so much is allocated to compare with what is counted.
        device_bytes: memory in which streams of 21 frames are counted.
    """

    measured_bytes: int = Field(256 << 20, ge=1)
    device_bytes: float = Field(80e9, gt=0)


def counted_window(window_frames: int, device_bytes: float) -> dict[str, Any]:
    """Bytes and FLOPs of a chunk at Wan2.1-1.3B's size."""
    history = HistoryConfig(window_frames=window_frames, sink_frames=1, chunk_frames=3)
    chunk, latent = 2 * window_frames, LatentConfig()
    flops: dict[str, float] = {}
    networks = {"dense": WAN_1_3B} | {
        path: WAN_1_3B.replace(latent=latent.replace(path=path)) for path in ("expand", "absorbed", "auto")
    }
    for name, config in networks.items():
        flops[name] = NUM_PASSES * DiTCosts(config, history, *WAN_LATENT).forward(1, chunk).flops
    _, rows, columns = WAN_1_3B.patch_size
    frame_tokens = WAN_LATENT[0] // rows * (WAN_LATENT[1] // columns)
    tokens = window_frames * frame_tokens
    with torch.device("meta"):
        per_token = {"dense": DiT(WAN_1_3B).cache_spec().bytes_per_token(torch.bfloat16)}
    ranks, rope = latent.ranks(WAN_1_3B.num_layers), latent.rope(WAN_1_3B.head_dim)
    for name, storages in STORAGES.items():
        spec = latent_layout(ranks, rope, *storages)
        per_token["latent" if name == "full" else f"latent, {name}"] = spec.bytes_per_token(torch.bfloat16)
    cache = {name: tokens * size for name, size in per_token.items()}
    room = device_bytes - 2 * _NUM_WEIGHTS
    width = WAN_1_3B.width
    return {
        "window_frames": window_frames,
        "flops": flops,
        "cache_bytes": cache,
        "one_layer_expanded_bytes": tokens * 2 * width * 2,
        "streams": {name: int(room // (size + WAN_DECODER_STATE_BYTES)) for name, size in cache.items()},
        "streams_without_decoder_state": {name: int(room // size) for name, size in cache.items()},
    }


def measured_allocation(num_bytes: int) -> list[dict[str, Any]]:
    """Resident memory that buffers at Wan2.1-1.3B's size really take, beside what their layout counts. Each
    in a process of its own: one that has freed memory takes that first, and grows by less than it uses.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        return list(pool.map(_allocation, STORAGES, repeat(num_bytes)))


def _allocation(name: str, num_bytes: int) -> dict[str, Any]:
    latent = LatentConfig()
    ranks, rope = latent.ranks(WAN_1_3B.num_layers), latent.rope(WAN_1_3B.head_dim)
    spec = latent_layout(ranks, rope, *STORAGES[name])
    per_token = spec.bytes_per_token(torch.bfloat16)
    tokens = -(-num_bytes // per_token)
    before = resident_bytes()
    buffers = Buffers(spec, 1, tokens, torch.device("cpu"), torch.bfloat16)
    for tensor in buffers.named_tensors().values():
        tensor.fill_(1)  # zeros that nobody has written take no memory
    after = resident_bytes()
    return {
        "storage": name,
        "bytes_per_token_and_layer": per_token / WAN_1_3B.num_layers,
        "counted_bytes": tokens * per_token,
        "allocated_bytes": buffers.num_bytes,
        "resident_bytes": None if before is None or after is None else after - before,
    }


def counted_memory(read_as_latent: tuple[int, int] | None) -> dict[str, Any]:
    """What the published memory costs beside latent attention at Wan2.1-1.3B's size, by how it is read.

    Args:
        read_as_latent: sizes of the latent and of the rotary key; None for per-head keys and values.
    """
    _, rows, columns = WAN_1_3B.patch_size
    memory = PAPER.encoder(WAN_1_3B, (WAN_LATENT[0] // rows, WAN_LATENT[1] // columns))
    dit = WAN_1_3B.replace(latent=LatentConfig(), memory=memory.replace(read_as_latent=read_as_latent))
    history = HistoryConfig(window_frames=MEMORY_WINDOW, sink_frames=3, chunk_frames=3)
    counted = count(dit, history, PAPER.policy(dit), WAN_LATENT, NUM_PASSES)
    numbers = 2 * WAN_1_3B.width if read_as_latent is None else sum(read_as_latent)
    return {"share": counted.share, "segment_bytes": 2.0 * memory.num_tokens * memory.num_readings * numbers}


def timed_memory(config: TurnsConfig, latent: Pipeline, read_as_latent: tuple[int, int] | None) -> Any:
    """Time of a chunk's latents with an untrained memory, over the same model that reads none."""
    timed = with_memory(latent, MemorySetting(num_frames=1, num_layers=1, ffn_ratio=2), read_as_latent)
    history, policy = timed.config.history, timed.config.history.policy
    assert isinstance(policy, EvolvingConfig)
    plain = timed.with_history(history.replace(policy=policy.replace(mode="off")))
    return measure_alternatives(config, plain, timed, ("off", "memory"))


def as_latent(pipeline: Pipeline) -> Pipeline:
    """The model with untrained latent attention, for measuring time, which does not depend on weights."""
    dense = pipeline.dit.config
    config = dense.replace(latent=LatentConfig.proportional(dense.width, dense.head_dim))
    torch.manual_seed(0)
    dit = DiT(config).to(pipeline.device).eval().requires_grad_(False)
    return replace(pipeline, dit=dit)


def run_latent_bench(config: LatentBenchConfig, pipeline: Pipeline, model: str, tell: Tell) -> dict[str, Any]:
    """All figures, as a report ready for JSON.

    Args:
        config: what to measure.
        pipeline: the model, with dense attention or latent.
        model: its name.
        tell: given a line about what is measured next.
    """
    tell("allocations")
    allocated = measured_allocation(config.measured_bytes)
    tell(f"time: {config.num_pairs} pairs")
    own = pipeline.dit.config.latent
    latent = pipeline if own is not None else as_latent(pipeline)
    plain = pipeline.dit.config.dense()
    dense = pipeline
    if own is not None:
        torch.manual_seed(0)
        dense = replace(pipeline, dit=DiT(plain).to(pipeline.device).eval().requires_grad_(False))
    times = measure_alternatives(config, dense, latent, ("dense", "latent"))
    tell(f"time with a memory: {config.num_pairs} pairs, read as keys and as latents")
    sizes = latent.dit.config.latent
    assert sizes is not None
    ranks = set(sizes.ranks(latent.dit.config.num_layers))
    memories: dict[str, Any] = {"keys": {**counted_memory(None), "time": timed_memory(config, latent, None)}}
    memories["latents"] = counted_memory((LatentConfig().ranks(1)[0], LatentConfig().rope_dim))
    if len(ranks) == 1:  # all layers read the same latents
        memories["latents"]["time"] = timed_memory(config, latent, (ranks.pop(), sizes.rope_dim))
    specs = {"dense": dense.dit.cache_spec(), "latent": latent.dit.cache_spec()}
    report = {
        **head(
            config,
            pipeline,
            model,
            latent=latent.dit.config.latent.model_dump(mode="json") if latent.dit.config.latent else None,
            bytes_per_token={name: spec.bytes_per_token(torch.float32) for name, spec in specs.items()},
        ),
        "wan_1_3b": [counted_window(window, config.device_bytes) for window in WINDOWS],
        "allocated": allocated,
        "time": times,
        "memory": memories,
    }
    return {**report, "bars": bars(report)}


def bars(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is required, what was measured, and whether it suffices."""
    by_storage = {row["storage"]: row for row in report["allocated"]}
    found = [row["resident_bytes"] or row["allocated_bytes"] for row in report["allocated"]]
    off = max(
        abs(size / row["counted_bytes"] - 1) for size, row in zip(found, report["allocated"], strict=True)
    )
    ratio = report["time"]["ratio_of_medians"]
    packed = by_storage["int4"]["bytes_per_token_and_layer"]
    plain = by_storage["full"]["bytes_per_token_and_layer"]
    exact = {"required": "= 448", "met": plain == 448}
    return [
        {**bar("bytes a token and layer, bf16", plain, 448), **exact},
        bar("bytes a token and layer, int4", packed, MAX_BYTES),
        bar("resident memory over counted bytes, off by", off, MAX_OFF),
        bar("latent over dense, time of a chunk's latents", ratio, MAX_TIME_RATIO),
    ]

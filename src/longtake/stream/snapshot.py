"""Streams to files and back: one safetensors file whose metadata holds the host side as JSON.

Tensors are copied into freshly allocated buffers, so a resumed stream does what the first one would have
done, bit for bit, on the same machine and thread count.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from longtake.config import Config
from longtake.errors import CheckpointError, ConfigError, SnapshotError
from longtake.history.records import SlotRecord
from longtake.io.checkpoints import read_safetensors, write_safetensors
from longtake.stream.engine import Engine
from longtake.stream.pipeline import Pipeline, StreamConfig
from longtake.stream.state import PromptSwitch, StreamState

FORMAT = 2
_KEY = "longtake_stream"


class Record(Config):
    """A history slot's host side, see :class:`~longtake.history.records.SlotRecord`."""

    ring: tuple[int, ...]
    sink: tuple[int, ...]
    sink_ids: tuple[int, ...]
    memory_ids: tuple[int, ...]
    memory_pending: bool
    num_absorbed: int
    next_frame: int
    ring_writes: int
    num_evicted: int


class Manifest(Config):
    """The host side of a stream.

    Args:
        format: of this file.
        weights: digest of the pipeline's weights. ``config``, ``dit``: what they were run with.
        num_threads: CPU threads, which decide the last bits.
    """

    format: int = FORMAT
    weights: str
    config: StreamConfig
    dit: dict[str, Any]
    max_frames: int | None
    num_threads: int
    seed: int
    prompt: str
    chunk: int = Field(ge=0)
    num_frames: int = Field(ge=0)
    decoded_frames: int = Field(ge=0)
    pending: PromptSwitch | None
    history: tuple[Record, ...]


def pack(engine: Engine, state: StreamState) -> tuple[Manifest, dict[str, Tensor]]:
    """Everything a stream consists of, copied."""
    records: list[Record] = []
    tensors: dict[str, Tensor] = {}
    for branch, slot in enumerate(state.slots):
        record, parts = engine.history.export_slot(slot)
        host = asdict(record)
        del host["version"]  # counts changes within one engine
        host |= {"ring": tuple(record.ring), "sink": tuple(record.sink)}
        records.append(Record(**host))
        tensors |= {f"history.{branch}.{name}": tensor for name, tensor in parts.items()}
    tensors["latents"] = engine.latents[state.slot].clone()
    tensors |= {f"vae.{name}": tensor.clone() for name, tensor in state.vae_state.items()}
    pipeline = engine.pipeline
    manifest = Manifest(
        weights=pipeline.digest,
        config=pipeline.config,
        dit=pipeline.dit.config.model_dump(mode="json"),
        max_frames=engine.history.max_frames,
        num_threads=torch.get_num_threads(),
        seed=state.seed,
        prompt=state.prompt,
        chunk=state.chunk,
        num_frames=state.num_frames,
        decoded_frames=state.decoded_frames,
        pending=state.pending,
        history=tuple(records),
    )
    return manifest, tensors


def unpack(engine: Engine, manifest: Manifest, tensors: dict[str, Tensor]) -> StreamState:
    """Open a packed stream in an engine with room; the manifest must be of its pipeline.

    Raises:
        HistoryError: no room. PromptError: a prompt the text encoder refuses.
    """
    state = engine.open(manifest.prompt, manifest.seed)
    for branch, (slot, record) in enumerate(zip(state.slots, manifest.history, strict=True)):
        prefix = f"history.{branch}."
        parts = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        host = record.model_dump()
        host |= {"ring": list(record.ring), "sink": list(record.sink)}
        engine.history.import_slot(slot, SlotRecord(**host), parts)
    engine.latents[state.slot].copy_(tensors["latents"])
    for name, tensor in state.vae_state.items():
        state.vae_state[name] = tensors[f"vae.{name}"].to(tensor.device, copy=True)
    state.chunk, state.num_frames = manifest.chunk, manifest.num_frames
    state.decoded_frames = manifest.decoded_frames
    if manifest.pending is not None:
        engine.set_prompt(state, manifest.pending)
    return state


def save(engine: Engine, state: StreamState, path: Path) -> None:
    """Write a stream, whole or not at all. Raises SnapshotError where that fails."""
    manifest, tensors = pack(engine, state)
    try:
        write_safetensors(path, tensors, {_KEY: manifest.dumps()})
    except CheckpointError as error:
        raise SnapshotError(error.problem, error.remedy) from error


def load(path: Path, pipeline: Pipeline) -> tuple[Engine, StreamState]:
    """Read a stream into an engine of its own.

    Raises:
        SnapshotError: damaged, or of other weights or settings, naming the first difference.
    """
    try:
        tensors, metadata = read_safetensors(path)
        manifest = Manifest.loads(metadata[_KEY], str(path))
    except CheckpointError as error:
        raise SnapshotError(error.problem, error.remedy) from error
    except KeyError as error:
        raise SnapshotError(
            f"{path} is no snapshot of a stream", "give a file that snapshot wrote"
        ) from error
    except ConfigError as error:
        raise SnapshotError(f"{error.problem}", "the snapshot is damaged or of another version") from error
    _check_fits(path, manifest, pipeline)
    if manifest.num_threads != torch.get_num_threads():
        warnings.warn(
            f"{path} was made with {manifest.num_threads} threads, this run has {torch.get_num_threads()}: "
            "frames agree, but not bit for bit",
            stacklevel=2,
        )
    engine = Engine(pipeline, max_frames=manifest.max_frames)
    return engine, unpack(engine, manifest, tensors)


def _check_fits(path: Path, manifest: Manifest, pipeline: Pipeline) -> None:
    if manifest.format != FORMAT:
        raise SnapshotError(
            f"{path} has format {manifest.format}, this version reads {FORMAT}", "update longtake"
        )
    saved = {"config": json.loads(manifest.config.dumps()), "dit": manifest.dit}
    own = {"config": json.loads(pipeline.config.dumps()), "dit": pipeline.dit.config.model_dump(mode="json")}
    difference = _first_difference(saved, own)
    if difference:
        raise SnapshotError(
            f"{path} was made with other settings: {difference}", "use the settings it was made with"
        )
    if manifest.weights != pipeline.digest:
        raise SnapshotError(
            f"{path} was made with weights {manifest.weights[:12]}, these are {pipeline.digest[:12]}",
            "load the weights it was made with",
        )


def _first_difference(saved: Any, own: Any, name: str = "") -> str:
    """Where two JSON values differ first, as text; empty where they are equal."""
    if isinstance(saved, dict) and isinstance(own, dict):
        for key in sorted(saved.keys() | own.keys()):
            found = _first_difference(saved.get(key), own.get(key), f"{name}.{key}".removeprefix("."))
            if found:
                return found
        return ""
    normal_saved, normal_own = json.dumps(saved), json.dumps(own)
    return "" if normal_saved == normal_own else f"{name} was {normal_saved}, is {normal_own}"

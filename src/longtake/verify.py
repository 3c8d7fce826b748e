"""Run golden recordings through the engine and say how far it is from them.

A recording is a safetensors file of random weights, inputs and outputs of a public reference
implementation, with the configuration in its metadata (all values are strings). See tests/data/README.md
for the format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longtake.diffusion.flow import Steps, steps_at
from longtake.diffusion.sampler import context_pass, sample_chunk
from longtake.errors import CheckpointError, nearest
from longtake.history.base import HistoryConfig, full_view
from longtake.history.positions import Absolute, Relative
from longtake.history.pure import PureHistory
from longtake.history.slots import SlotHistory
from longtake.io.checkpoints import load_into, read_safetensors
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.memory import MemoryEncoder, MemoryEncoderConfig

STATE = "state."
UNLIMITED = ("", "none", "unlimited", "inf")
"""Words for a window without limit, beside 0 and negative numbers."""


@dataclass(frozen=True)
class VerifyReport:
    """How a recording compares.

    Args:
        parts: per recorded output the largest absolute error, NaN counting as infinite.
        tolerance: what is allowed.
    """

    path: Path
    kind: str
    parts: Mapping[str, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Every part is within the tolerance."""
        return all(error <= self.tolerance for error in self.parts.values())


class Recording:
    """A recording's tensors and typed access to its metadata."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = read_safetensors(path)

    @property
    def kind(self) -> str:
        """``rollout``, ``single`` or ``memory``; told by the tensors where the metadata does not say."""
        return self.metadata.get("kind", "rollout" if "noise" in self.tensors else "single")

    def tensor(self, name: str) -> Tensor:
        """A recorded tensor. Raises CheckpointError where there is none of that name."""
        if name not in self.tensors:
            others = [other for other in self.tensors if not other.startswith(STATE)]
            raise CheckpointError(f"{self.path} holds no tensor {name!r}", nearest(name, others))
        return self.tensors[name]

    def text(self, name: str) -> str:
        """A metadata value. Raises CheckpointError where there is none of that name."""
        if name not in self.metadata:
            raise CheckpointError(f"{self.path} has no metadata {name!r}", nearest(name, self.metadata))
        return self.metadata[name]

    def number(self, name: str) -> float:
        """A metadata value as a number. Raises CheckpointError where it is none."""
        text = self.text(name)
        try:
            return float(text)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {name}={text!r} is no number", "record it again") from error

    def integer(self, name: str) -> int:
        """A metadata value as an integer. Raises CheckpointError where it is none."""
        number = self.number(name)
        if not number.is_integer():
            raise CheckpointError(f"{self.path}: {name}={number} is no whole number", "record it again")
        return int(number)

    def weights(self) -> dict[str, Tensor]:
        """The recorded weights by their own names."""
        return {name.removeprefix(STATE): t for name, t in self.tensors.items() if name.startswith(STATE)}

    def memory(self) -> MemoryEncoder:
        """The recorded memory encoder."""
        state = self.weights()
        if "query_init" not in state or "layers.0.ffn.0.weight" not in state:
            raise CheckpointError(f"{self.path} holds no memory encoder", "record it again")
        _, num_tokens, width = state["query_init"].shape
        num_frames = self.integer("memory_frames")
        if num_tokens % num_frames:
            raise CheckpointError(
                f"{self.path}: {num_tokens} memory tokens are not memory_frames={num_frames} frames",
                "record it again",
            )
        # A recording does not say how a frame's tokens stand in rows and columns, and nothing here asks.
        config = MemoryEncoderConfig(
            width=width,
            num_heads=self.integer("num_heads"),
            num_frames=num_frames,
            rows=1,
            columns=num_tokens // num_frames,
            num_layers=self.integer("num_encoder_layers"),
            ffn_ratio=state["layers.0.ffn.0.weight"].shape[0] // width,
            normalize_keys="norm_k_out.weight" in state,
            eps=self.number("eps"),
        )
        encoder = MemoryEncoder(config)
        load_into(encoder, state, str(self.path))
        return encoder.eval()

    def dit(self) -> DiT:
        """The recorded network."""
        patch = [int(size) for size in re.findall(r"\d+", self.text("patch_size"))]
        if len(patch) != 3:
            raise CheckpointError(
                f"{self.path}: patch_size={self.text('patch_size')!r} has no three sizes", "record it again"
            )
        state = self.weights()
        config = DiTConfig(
            width=self.integer("dim"),
            ffn_width=self.integer("ffn_dim"),
            num_layers=self.integer("num_layers"),
            num_heads=self.integer("num_heads"),
            in_channels=self.integer("in_dim"),
            out_channels=self.integer("out_dim"),
            patch_size=(patch[0], patch[1], patch[2]),
            text_width=self.integer("text_dim"),
            text_length=self.integer("text_len"),
            frequency_width=self.integer("freq_dim"),
            eps=self.number("eps"),
            qk_norm="blocks.0.self_attn.norm_q.weight" in state,
        )
        dit = DiT(config)
        load_into(dit, state, str(self.path))
        return dit.eval()

    def history(self) -> HistoryConfig:
        """The recorded window.

        No window, 0, -1 or a word for it mean unlimited, where relative ids are plain frame indices.
        """
        stated = self.metadata.get("window_frames", "none").strip().lower()
        window = 0 if stated in UNLIMITED else self.integer("window_frames")
        sink = max(0, self.integer("sink_frames")) if "sink_frames" in self.metadata else 0
        chunk = self.integer("frames_per_chunk")
        if window > 0:
            # A cache too short for its sink and a chunk: the reference's chunk overwrites the sink's end.
            sink = max(0, min(sink, window - chunk))
        rope = self.metadata.get("rope", "absolute").lower()
        relative = "relative" in rope and not rope.startswith("absolute")
        return HistoryConfig(
            window_frames=window if window > 0 else None,
            sink_frames=sink,
            chunk_frames=chunk,
            positions=Relative(f_max=window - 1) if relative and window > 0 else Absolute(),
        )

    def steps(self) -> Steps:
        """The recorded timesteps, already warped."""
        timesteps = [float(timestep) for timestep in self.tensor("timesteps").flatten()]
        return steps_at(timesteps, self.number("timestep_shift"))

    def noise(self, num_frames: int, num_steps: int) -> list[list[Tensor]]:
        """For each chunk the noise of every step: what it starts from, then what is mixed in again.

        Args:
            num_frames: of a chunk. ``num_steps``: of the sampler.

        Raises:
            CheckpointError: less noise than the chunks need.
        """
        start = self.tensor("noise")
        num_chunks = self.integer("chunks") if "chunks" in self.metadata else start.shape[1] // num_frames
        if not 0 < num_chunks * num_frames <= start.shape[1]:
            raise CheckpointError(
                f"{self.path}: {start.shape[1]} frames of noise are not {num_chunks} chunks of {num_frames}",
                "record it again",
            )
        starts = torch.split(start[:, : num_chunks * num_frames], num_frames, dim=1)
        if num_steps == 1:
            return [[first] for first in starts]
        again = self.tensor("renoise")
        held, expected = again.shape, (num_chunks, num_steps - 1, *starts[0].shape)
        if held[0] < expected[0] or held[1] < expected[1] or held[-4:] != expected[-4:]:
            raise CheckpointError(
                f"{self.path}: renoise has the shape {tuple(held)}, {num_chunks} chunks of "
                f"{num_steps} steps need {expected}",
                "record it again",
            )
        return [[first, *again[chunk, : num_steps - 1]] for chunk, first in enumerate(starts)]


@torch.no_grad()
def verify_file(path: Path, tolerance: float = 1e-4) -> VerifyReport:
    """Run one recording through the engine.

    Raises:
        CheckpointError: unreadable, incomplete, or of a kind that is not supported.
        ConfigError: a configuration the engine refuses.
    """
    recording = Recording(path)
    match recording.kind:
        case "single":
            parts = _verify_single(recording)
        case "rollout":
            parts = _verify_rollout(recording)
        case "memory":
            parts = _verify_memory(recording)
        case kind:
            remedy = "verify recordings of kind 'rollout', 'single' or 'memory'"
            raise CheckpointError(f"{path}: recordings of kind {kind!r} are not supported yet", remedy)
    return VerifyReport(path, recording.kind, parts, tolerance)


def _verify_single(recording: Recording) -> dict[str, float]:
    dit, x = recording.dit(), recording.tensor("x")
    frames = x.shape[1] // dit.config.patch_size[0]
    view = full_view(dit.cache_spec(), range(frames), dit.token_grid(x.shape[-2], x.shape[-1]))
    timesteps = recording.tensor("timestep").reshape(x.shape[0], -1).expand(x.shape[:2])
    flow, _ = dit(x, timesteps, dit.encode_text(recording.tensor("context")), view)
    return {"flow": max_error(flow, recording.tensor("flow"))}


def _verify_memory(recording: Recording) -> dict[str, float]:
    encoder, num_updates = recording.memory(), recording.integer("updates")
    states: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    state = encoder.initial(recording.tensor("evicted_k").shape[1])
    for update in range(num_updates):
        state = encoder(state, recording.tensor("evicted_k")[update], recording.tensor("evicted_v")[update])
        states.append(state)
        [read] = encoder.read(state)
        keys.append(read["k"])
        values.append(read["v"])
    return {
        name: max_error(torch.stack(ours), recording.tensor(name))
        for name, ours in (("memory", states), ("read_k", keys), ("read_v", values))
    }


def _verify_rollout(recording: Recording) -> dict[str, float]:
    flows, latents = rollout(recording, functional=False)
    functional_flows, functional_latents = rollout(recording, functional=True)
    recorded_flows, recorded_latents = recording.tensor("flows"), recording.tensor("latents")
    return {
        "flows (in place)": max_error(torch.stack(flows), recorded_flows),
        "latents (in place)": max_error(latents, recorded_latents),
        "flows (functional)": max_error(torch.stack(functional_flows), recorded_flows),
        "latents (functional)": max_error(functional_latents, recorded_latents),
    }


@torch.no_grad()
def rollout(recording: Recording, functional: bool) -> tuple[list[Tensor], Tensor]:
    """Play a recorded rollout: every flow in order, and the latents ``[b, f, c, h, w]``."""
    dit, config, steps = recording.dit(), recording.history(), recording.steps()
    if dit.config.patch_size[0] != 1:
        raise CheckpointError(
            f"{recording.path}: patch_size={dit.config.patch_size} joins frames",
            "a history needs 1 frame a patch",
        )
    noise = recording.noise(config.chunk_frames, len(steps.timesteps))
    batch, _, _, height, width = noise[0][0].shape
    grid = dit.token_grid(height, width)
    text = dit.encode_text(recording.tensor("context").expand(batch, -1, -1))
    context_timestep = (
        recording.number("context_timestep") if "context_timestep" in recording.metadata else 0.0
    )
    pure = PureHistory(config, dit.cache_spec(), grid)
    max_frames = len(noise) * config.chunk_frames
    fixed = SlotHistory(config, dit.cache_spec(), grid, batch, max_frames=max_frames)
    slots = [fixed.join() for _ in range(batch)]
    flows: list[Tensor] = []
    latents: list[Tensor] = []
    for of_chunk in noise:
        view = pure.view() if functional else fixed.view(slots)
        clean = sample_chunk(dit, text, view, of_chunk, steps, on_flow=flows.append)
        entries = context_pass(dit, text, view, clean, timestep=context_timestep)
        if functional:
            pure = pure.commit(entries)
        else:
            fixed.commit(entries, slots)
        latents.append(clean)
    return flows, torch.cat(latents, dim=1)


def max_error(ours: Tensor, recorded: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ or either is not a number."""
    if ours.shape != recorded.shape:
        return float("inf")
    error = float((ours - recorded).abs().max())
    return error if error == error else float("inf")

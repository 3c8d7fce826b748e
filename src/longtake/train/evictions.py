"""What a frozen network's window lets go, and a memory that learns from it alone to stand for a past frame.

Through the loss of what returns, a memory learns late: its gradient is one part in many and passes through
layers that do not read it yet. Here it is told directly. Clips that ask for recall (`train.recall`) are
walked once, and their evicted keys and values kept on disk. The memory takes these in, one update after
another, and is asked, while the view that is to come back is away, for the keys and values that this view's
frames had in every layer that reads; a probe asks it for the view's objects besides. An update costs
milliseconds, and a memory that answers is what layers know how to read when the whole network goes on
learning (stage `memory`).

Legend: b clips, k evicted tokens, l readings, m memory tokens, h heads, d head dim, g guide channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor, nn

from longtake.cache.base import Entries
from longtake.config import Config
from longtake.errors import ConfigError, TrainingError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.policy import Evicted, MemoryGrid, Policy, PolicyState
from longtake.io.checkpoints import write_safetensors
from longtake.models.dit import DiT
from longtake.stream.state import PromptSwitch
from longtake.train.excerpts import changed, prompts_in_force
from longtake.train.guide import guide_tokens
from longtake.train.latents import ClipEncoder, Clips
from longtake.train.loop import Learner, LoopConfig, autocast_dtype, build_optimizer
from longtake.train.networks import TextToLatents
from longtake.train.optim import MuonAdamW
from longtake.train.probes import guide_probe, token_guide_error
from longtake.train.recall import RecallBatch, RecallSource
from longtake.train.walk import Walk

_SWITCH = PromptSwitch(text="", memory="keep")
_VERSION = 2  # of how batches are drawn


class EvictionsConfig(Config):
    """Stage `evictions`."""

    loop: LoopConfig = LoopConfig(num_steps=700, decay_from=0.2, ema_decay=0.98)
    num_clips: int = Field(8, ge=1, description="clips per step, which look away and back at the same time")
    num_batches: int = Field(80, ge=1, description="of so many clips each, walked once and gone over again")
    num_held_out_batches: int = Field(4, ge=1)
    absence: tuple[float, float] = Field(
        (1.0, 4.0), description="shortest and longest absence in the clips, in windows"
    )
    guide_weight: float = Field(
        5.0, ge=0, description="of the error of reading objects off the memory, against that of its readings"
    )
    object_weight: float = Field(
        5.0, ge=1, description="of readings of tokens that objects touch, against 1 for all others"
    )
    muon_learning_rate: float = Field(1.5e-3, gt=0)
    adamw_learning_rate: float = Field(7e-4, gt=0)

    @model_validator(mode="after")
    def _can_recall(self) -> EvictionsConfig:
        low, high = self.absence
        if not 1 <= low <= high:
            raise ConfigError(
                f"absence={self.absence} is no range of absences", "use for instance [1.0, 4.0]"
            )
        return self


@dataclass(frozen=True)
class Evictions:
    """What left the window of a batch of clips, and the view that is to come back.

    Attributes:
        keys, values: of the source layer, all updates' one after another `[b, k, h, d]`, half precision.
        sizes: tokens of each update.
        reads: how many updates come before each moment at which the memory is asked, ascending.
        shown_keys, shown_values: of the view's last frames in every layer that is read, `[l, b, m, h, d]`.
        guide: of its last frame, `[b, g, rows, columns]`.
    """

    keys: Tensor
    values: Tensor
    sizes: tuple[int, ...]
    reads: tuple[int, ...]
    shown_keys: Tensor
    shown_values: Tensor
    guide: Tensor

    def save(self, path: Path) -> None:
        """Write a file whole or not at all."""
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        about = {"sizes": json.dumps(self.sizes), "reads": json.dumps(self.reads)}
        write_safetensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path) -> Evictions:
        """Read such a file."""
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            about = file.metadata() or {}
        sizes, reads = (tuple(json.loads(about[name])) for name in ("sizes", "reads"))
        return cls(**tensors, sizes=sizes, reads=reads)


_TENSORS = ("keys", "values", "shown_keys", "shown_values", "guide")


@dataclass
class _Recorder(Policy):
    """Keeps what is evicted and gives nothing to read: the network walks as with the plain window.

    Args:
        grid: of the memory that is to learn; only that there is one matters.
        source: layer that the memory will take in.
        read_layers: layers whose entries it is to stand for, of the frames ``wanted``.
    """

    grid: MemoryGrid
    source: int
    read_layers: tuple[int, ...]
    wanted: tuple[int, ...]
    evicted: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shown: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def memory_grid(self) -> MemoryGrid:
        return self.grid

    def start(self, batch: int, device: torch.device, dtype: torch.dtype) -> PolicyState:
        return {"nothing": torch.zeros(batch, 0, device=device, dtype=dtype)}

    def readable(self, num_evicted: int) -> bool:
        return False

    def absorb(self, state: PolicyState, evicted: Evicted) -> PolicyState:
        frames, layers = evicted.frames[0], evicted.entries.layers
        num_tokens = evicted.entries.num_tokens // len(frames)
        self.evicted.append((layers[self.source]["k"], layers[self.source]["v"]))
        for place, frame in enumerate(frames):
            if frame not in self.wanted:
                continue
            tokens = slice(place * num_tokens, (place + 1) * num_tokens)
            of_layers = [layers[layer] for layer in self.read_layers]
            keys = torch.stack([parts["k"][:, tokens] for parts in of_layers])
            values = torch.stack([parts["v"][:, tokens] for parts in of_layers])
            self.shown[frame] = (keys, values)
        return state

    def read(self, state: PolicyState) -> Entries:
        raise AssertionError("nobody reads it")


def evictions_of(module: TextToLatents, history: HistoryConfig, batch: RecallBatch[Clips]) -> Evictions:
    """Walk a batch through real context under the plain window, and keep what leaves it.

    Args:
        module: the networks; the DiT has a memory, which is not used.
        history: with the policy under which it will learn.
        batch: clips with their guide.
    """
    dit, clips = module.dit, batch.clips
    assert isinstance(history.policy, EvolvingConfig), "checked before"
    assert dit.memory is not None, "checked before"
    latents = clips.latents_bfchw.float()
    grid = dit.token_grid(*latents.shape[-2:])
    memory = dit.policy(history.policy, grid).memory_grid
    assert memory is not None, "checked before"
    wanted = range(batch.shown_frame + 1 - memory.num_frames, batch.shown_frame + 1)
    recorder = _Recorder(memory, *layers_of(dit, history.policy), tuple(wanted))
    captions = prompts_in_force(clips.prompts, 0)
    walk = Walk(dit, history, module.encode(captions), len(clips), *latents.shape[-2:], policy=recorder)
    reads = []
    frames = history.chunk_frames
    for chunk in range(max(c for c, unseen in enumerate(batch.unseen) if unseen) + 1):
        before, captions = captions, prompts_in_force(clips.prompts, chunk * frames)
        switched = changed(before, captions)
        if switched:
            walk.switch(module.encode(captions), _SWITCH, switched)
        if batch.unseen[chunk]:
            reads.append(len(recorder.evicted))
        walk.commit(latents[:, chunk * frames : (chunk + 1) * frames])
    # Halved last: autocast on a CPU does not join half precision.
    keys, values = (torch.cat(part, dim=1).half() for part in zip(*recorder.evicted, strict=True))
    sizes = tuple(taken.shape[1] for taken, _ in recorder.evicted)
    shown = zip(*(recorder.shown[frame] for frame in wanted), strict=True)
    shown_keys, shown_values = (torch.cat(part, dim=2).half() for part in shown)
    assert clips.guide_bfkhw is not None, "asked for with their guide"
    guide = clips.guide_bfkhw[:, batch.shown_frame].half()
    return Evictions(keys, values, sizes, tuple(reads), shown_keys, shown_values, guide)


def layers_of(dit: DiT, policy: EvolvingConfig) -> tuple[int, tuple[int, ...]]:
    """The layer that a memory takes in, and those whose keys and values its readings are to be: the layers
    that read, where each has a reading of its own, or else the one that it takes in.
    """
    num_layers = dit.config.num_layers
    source = policy.source_layer % num_layers
    assert dit.memory is not None
    if dit.memory.num_readings == 1:
        return source, (source,)
    return source, tuple(range(num_layers)) if policy.read_layers == "all" else policy.read_layers


def build_evictions(
    module: TextToLatents,
    history: HistoryConfig,
    encoder: ClipEncoder,
    sources: Mapping[str, tuple[RecallSource, int]],
    config: EvictionsConfig,
    folder: Path,
    identity: Mapping[str, object],
) -> None:
    """Write every batch that is missing.

    Args:
        module: the networks, frozen.
        history: see `evictions_of`.
        encoder: of their clips.
        sources: by name where batches come from, and how many.
        config: the stage.
        folder: `NAME-0000.safetensors` and so on go there.
        identity: what the batches follow from.

    Raises:
        TrainingError: the folder holds batches of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about, text = folder / "evictions.json", json.dumps({"version": _VERSION, **identity}, sort_keys=True)
    if about.exists() and about.read_text() != text:
        raise TrainingError(
            f"{folder} keeps what another network or other clips evicted", "use another folder or remove it"
        )
    about.write_text(text)
    dtype = autocast_dtype(config.loop.precision, next(module.parameters()).device)
    for number, (name, (source, count)) in enumerate(sources.items()):
        for index, path in enumerate(batch_paths(folder, name, count)):
            if path.exists():
                continue
            rng = np.random.default_rng((config.loop.seed, number, index))  # no two batches alike
            batch = source.draw(rng, config.num_clips).encoded(encoder)
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                evictions_of(module, history, batch).save(path)


def batch_paths(folder: Path, name: str, count: int) -> list[Path]:
    """Files of the batches of a source."""
    return [folder / f"{name}-{index:04d}.safetensors" for index in range(count)]


class EvictionsTask:
    """The stage's module, optimiser, loss and evaluation (see `train.loop.Task`).

    Args:
        dit: whose memory learns, and alone is left requiring gradients.
        grid: tokens of a frame, rows and columns.
        config: the stage.
        batches: files to learn from.
        held_out: files for evaluation.
        fresh: the memory has learned nothing yet, so that its readings may begin anywhere.
    """

    def __init__(
        self,
        dit: DiT,
        grid: tuple[int, int],
        config: EvictionsConfig,
        batches: Sequence[Path],
        held_out: Sequence[Path],
        *,
        fresh: bool = True,
    ) -> None:
        assert dit.memory is not None, "checked before"
        self._grid, self._patch = grid, dit.config.patch_size[-1]
        self.config = config
        self._batches, self._held_out = list(batches), list(held_out)
        dit.requires_grad_(False)
        self._memory = dit.memory.requires_grad_(True)
        self._probe = guide_probe(dit.config)
        if fresh:
            self._center_readings()
        self.module: nn.Module = nn.ModuleDict({"memory": self._memory, "probe": self._probe})
        self.optimizer = evictions_optimizer(self.module, config)
        self.learners = {"": Learner(self.module, self.optimizer, self.loss)}

    def loss(self, step: int, progress: float) -> tuple[Tensor, dict[str, float]]:
        """Mean error of the readings, as a share of what they are to be varies, and of the probe."""
        rng = np.random.default_rng((self.config.loop.seed, step))
        batch = Evictions.load(self._batches[int(rng.integers(len(self._batches)))])
        errors = torch.stack(self._errors(batch)).mean(0)
        figures = dict(zip(("keys", "values", "guide"), errors.tolist(), strict=True))
        return 0.5 * (errors[0] + errors[1]) + self.config.guide_weight * errors[2], figures

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The same on held-out clips, on the whole and when the view has been away for longest."""
        found = [torch.stack(self._errors(Evictions.load(path))) for path in self._held_out]
        whole, last = (torch.stack([pick(errors) for errors in found]).mean(0) for pick in (_mean, _last))
        names = ("keys", "values", "guide")
        return dict(zip(names, whole.tolist(), strict=True)) | {
            f"{name}_last": value for name, value in zip(names, last.tolist(), strict=True)
        }

    def samples(self) -> Tensor | None:
        """None, see `train.loop.Task`."""
        return None

    def _errors(self, batch: Evictions) -> list[Tensor]:
        """Of keys, values and guide, `[3]` for each moment at which the memory is asked."""
        wanted = [part.float() for part in (batch.shown_keys, batch.shown_values)]
        guide_bugw = batch.guide[:, None].float()
        target = guide_tokens(guide_bugw, self._patch)
        touched_bm = (target.abs().sum(-1) > 0).float().repeat(1, self._memory.config.num_frames)
        weight_bm = 1 + (self.config.object_weight - 1) * touched_bm
        weight_1bm11 = (weight_bm / weight_bm.mean())[None, :, :, None, None]
        parts = (torch.split(part, list(batch.sizes), 1) for part in (batch.keys, batch.values))
        updates = list(zip(*parts, strict=True))
        state, done, errors = self._memory.initial(len(batch.keys)), 0, []
        for reads in batch.reads:
            for keys, values in updates[done:reads]:
                state = self._memory(state, keys.float(), values.float(), self._grid).float()
            done = reads
            readings = self._memory.read(state)
            answers = [torch.stack([reading[name] for reading in readings]).float() for name in ("k", "v")]
            of_parts = [
                ((answer - want).square() * weight_1bm11).mean() / want.var().clamp_min(1e-6)
                for answer, want in zip(answers, wanted, strict=True)
            ]
            frames_bnuw = state.unflatten(1, (self._memory.config.num_frames, -1))  # type: ignore[no-untyped-call]
            guide = token_guide_error(self._probe, frames_bnuw.mean(1), guide_bugw, self._patch)
            errors.append(torch.stack([*of_parts, guide]))
        return errors

    @torch.no_grad()
    def _center_readings(self) -> None:
        """Readings begin near the mean of what they are to be, so that no step is spent on finding it."""
        batch = Evictions.load(self._batches[0])
        for linear, part in ((self._memory.to_k, batch.shown_keys), (self._memory.to_v, batch.shown_values)):
            linear.bias.copy_(part.float().mean((1, 2)).flatten())
            linear.weight.mul_(0.3)


def evictions_optimizer(module: nn.Module, config: EvictionsConfig) -> MuonAdamW:
    """Muon on the matrices, AdamW on the rest."""
    return build_optimizer(
        module,
        config.muon_learning_rate,
        config.adamw_learning_rate,
        config.loop.precision,
        ("query_init", "probe"),
    )


def _mean(errors: Tensor) -> Tensor:
    return errors.mean(0)


def _last(errors: Tensor) -> Tensor:
    return errors[-1]

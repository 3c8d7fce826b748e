"""Time and memory of a chunk at Wan2.1-1.3B's size, measured on a device with untrained weights: dense and
latent attention by window, and what a memory adds.

Time does not depend on weights. A chunk is four denoising passes and the context pass over a full window;
autoencoder and text encoder are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from pydantic import Field, model_validator

from longtake.bench.latent import WINDOWS
from longtake.bench.memory import SETTINGS, WAN_1_3B, WAN_LATENT
from longtake.bench.meter import environment
from longtake.bench.turns import Tell
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.history.base import HistoryConfig
from longtake.history.positions import Relative
from longtake.history.slots import SlotHistory
from longtake.history.window import WindowConfig
from longtake.models.dit import DiT
from longtake.models.dit_config import DiTConfig
from longtake.models.latent_config import LatentConfig
from longtake.ops.latent import LatentPath

_SINK_FRAMES, _CHUNK_FRAMES = 1, 3
_PATHS: Final[tuple[LatentPath, ...]] = ("expand", "absorbed")
_TIMESTEPS: Final = (1000.0, 750.0, 500.0, 250.0)


class WanBenchConfig(Config):
    """What to measure.

    Attributes:
        windows: latent frames, current chunk included, at which dense and latent attention are compared.
        memories: names of `bench.memory.SETTINGS`, measured beside the same window without a memory.
        num_chunks: of which the median counts.
    """

    windows: tuple[int, ...] = WINDOWS
    memories: tuple[str, ...] = tuple(SETTINGS)
    num_chunks: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _exists(self) -> WanBenchConfig:
        for window in self.windows:
            if window < _SINK_FRAMES + _CHUNK_FRAMES:
                raise ConfigError(
                    f"a window of {window} frames does not hold sink {_SINK_FRAMES} + chunk {_CHUNK_FRAMES}",
                    f"use {_SINK_FRAMES + _CHUNK_FRAMES} at least",
                )
        for name in self.memories:
            if name not in SETTINGS:
                raise ConfigError(f"no memory is called {name!r}", f"use some of {', '.join(SETTINGS)}")
        return self


class Case(NamedTuple):
    """A network and its history, by name."""

    name: str
    dit: DiTConfig
    history: HistoryConfig


def cases(
    config: WanBenchConfig,
    dit: DiTConfig = WAN_1_3B,
    latent: LatentConfig | None = None,
    size: tuple[int, int] = WAN_LATENT,
) -> list[Case]:
    """Dense and latent attention at every window, and memories at 12 frames with a sink of three; what takes
    long comes last.

    Args:
        config: which.
        dit: the dense network.
        latent: sizes of latent attention in it; VideoMLA's where None.
        size: height and width of the latents.
    """
    latent = LatentConfig() if latent is None else latent
    grid = (size[0] // dit.patch_size[1], size[1] // dit.patch_size[2])
    made: list[Case] = []
    slow: list[Case] = []
    for window in config.windows:
        history = HistoryConfig(
            window_frames=window,
            sink_frames=_SINK_FRAMES,
            chunk_frames=_CHUNK_FRAMES,
            positions=Relative(f_max=window - 1),
        )
        made.append(Case(f"dense, window {window}", dit, history))
        expands, absorbs = (dit.replace(latent=latent.replace(path=path)) for path in _PATHS)
        made.append(Case(f"latent expand, window {window}", expands, history))
        slow.append(Case(f"latent absorbed, window {window}", absorbs, history))
    for name in config.memories:
        encoder = SETTINGS[name].encoder(dit, grid)
        remembering = dit.replace(memory=encoder)
        history = HistoryConfig(
            window_frames=12,
            sink_frames=3,
            chunk_frames=_CHUNK_FRAMES,
            positions=Relative(f_max=11 + encoder.num_frames),
            policy=SETTINGS[name].policy(remembering),
        )
        if name == config.memories[0]:
            made.append(Case("no memory", dit, history.replace(policy=WindowConfig())))
        made.append(Case(f"memory, {name}", remembering, history))
    return made + slow


def measure(
    case: Case,
    device: torch.device,
    num_chunks: int,
    size: tuple[int, int] = WAN_LATENT,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Seconds of a chunk once the window is full (median of several), bytes of the cache and, on a CUDA
    device, the most memory that a chunk takes beside the weights.
    """
    on_cuda = device.type == "cuda"
    torch.manual_seed(0)
    with torch.device(device):
        dit = DiT(case.dit).to(dtype).eval().requires_grad_(False)
        text = dit.encode_text(torch.randn(1, case.dit.text_length, case.dit.text_width, dtype=dtype))
    grid = dit.token_grid(*size)
    policy = dit.policy(case.history.policy, grid)
    history = SlotHistory(case.history, dit.cache_spec(), grid, 1, policy=policy, device=device, dtype=dtype)
    slot = history.join()
    shape = (1, _CHUNK_FRAMES, case.dit.in_channels, *size)

    @torch.no_grad()
    def chunk(timesteps: Sequence[float]) -> None:
        noisy = torch.randn(shape, device=device, dtype=dtype)
        for step in (*timesteps, 0.0):
            view = history.view([slot])
            times = torch.full((1, _CHUNK_FRAMES), step, device=device)
            flow, entries = dit(noisy, times, text, view)
            noisy = noisy - 0.1 * flow
        history.commit(entries, [slot])

    assert case.history.window_frames is not None
    for _ in range(case.history.window_frames // _CHUNK_FRAMES + 3):
        chunk(())  # what fills the window needs no denoising
    chunk(_TIMESTEPS)
    weights = sum(tensor.nbytes for tensor in (*dit.parameters(), *dit.buffers()))
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = [_seconds(lambda: chunk(_TIMESTEPS), device) for _ in range(num_chunks)]
    return {
        "case": case.name,
        "seconds": statistics.median(seconds),
        "range": [min(seconds), max(seconds)],
        "cache_bytes": history.num_bytes,
        "weight_bytes": weights,
        "peak_bytes_beside_weights": torch.cuda.max_memory_allocated(device) - weights if on_cuda else None,
    }


def run_wan_bench(
    config: WanBenchConfig,
    device: torch.device,
    tell: Tell,
    to_measure: Sequence[Case] | None = None,
    save: Callable[[dict[str, Any]], None] | None = None,
    **how: Any,
) -> dict[str, Any]:
    """All figures, as a report ready for JSON; a case that does not fit into the device's memory says so.

    Args:
        config: what to measure.
        device: where.
        tell: given a line about what is measured next.
        to_measure: other cases than the configuration's.
        save: given the report after every case, so that a run that is cut off has measured something.
        how: of `measure`, where it is not Wan's size.
    """
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows: list[dict[str, Any]] = []
    report = {
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "device": about,
        "cases": rows,
    }
    for case in cases(config) if to_measure is None else to_measure:
        tell(case.name)
        try:
            rows.append(measure(case, device, config.num_chunks, **how))
        except torch.cuda.OutOfMemoryError:
            rows.append({"case": case.name, "seconds": None})
        if save is not None:
            save(report)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began

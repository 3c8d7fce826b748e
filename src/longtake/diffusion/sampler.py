"""The few-step sampler of a chunk, its noise, and the context pass that turns a clean chunk into entries.

Legend: b streams, r rows of the network (b, or 2b under guidance: all positive rows, then all negative), f
frames.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from longtake.cache.base import Entries
from longtake.diffusion.flow import Steps, add_noise, along_path, to_clean
from longtake.history.base import HistoryView
from longtake.models.dit import DiT, TextContext


def chunk_noise(
    seeds: Sequence[int], chunks: Sequence[int], num_steps: int, shape: tuple[int, int, int, int]
) -> list[Tensor]:
    """Noise of every step of a chunk, on the CPU, from (stream seed, chunk, step) alone.

    So neither batch composition nor device nor a resume changes it. Step 0 starts the chunk, the others
    renoise.

    Args:
        seeds: per stream any integer. ``chunks``: per stream the index of the chunk.
        num_steps: steps of the sampler.
        shape: of one stream's chunk, frames, channels, height, width.

    Returns:
        Per step float32 ``[b, f, c, h, w]``.
    """

    def one(seed: int, chunk: int, step: int) -> Tensor:
        digest = hashlib.sha256(f"longtake noise {seed} {chunk} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randn(shape, generator=generator)

    pairs = list(zip(seeds, chunks, strict=True))
    return [torch.stack([one(seed, chunk, step) for seed, chunk in pairs]) for step in range(num_steps)]


def few_steps(
    predict: Callable[[int, Tensor], Tensor],
    noise: Callable[[int], Tensor],
    steps: Steps,
    num_steps: int | None = None,
) -> Tensor:
    """The few-step sampler, whatever predicts: serving and the rollouts of training go through it alike.

    Args:
        predict: of a step's index and its noisy latents the clean ones.
        noise: of a step's index, asked in order and only where a step draws any.
        steps: noise levels, and where noise is kept from step to step.
        num_steps: how many of them are gone; None for all.

    Returns:
        What the last step that was gone predicts.
    """
    sigmas = steps.sigmas[:num_steps]
    assert sigmas, "at least one step"
    x = noise(0)
    clean = predict(0, x)
    for step, (before, sigma) in enumerate(pairwise(sigmas), start=1):
        if steps.keeps_noise(step):
            x = along_path(x, clean, before, sigma)
        else:
            x = add_noise(clean, noise(step), sigma)
        clean = predict(step, x)
    return clean


def sample_chunk(
    dit: DiT,
    text: TextContext,
    view: HistoryView,
    noise: Sequence[Tensor],
    steps: Steps,
    *,
    guidance: float | None = None,
    on_flow: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Denoise one chunk of every stream.

    Args:
        dit: the network.
        text, view: of the rows; under guidance of the positive rows and then the negative ones, which have
            histories of their own.
        noise: per step ``[b, f, c, h, w]``, on the network's device.
        steps: timesteps and noise levels, and where noise is kept from step to step.
        guidance: scale of classifier-free guidance, ``negative + scale * (positive - negative)``; None for
            none.
        on_flow: called with each step's (guided) flow.

    Returns:
        The clean chunk ``[b, f, c, h, w]``.
    """
    assert len(noise) == len(steps.timesteps), "one noise per step"
    dtype = dit.patch_embedding.weight.dtype

    def predict(step: int, x: Tensor) -> Tensor:
        nonlocal view
        if step > 0:
            view = view.after_first_pass()  # not before: where it shows another memory, it replaces the first
        rows = x if guidance is None else torch.cat([x, x])
        times = rows.new_full(rows.shape[:2], steps.timesteps[step])
        flow, _ = dit(rows.to(dtype), times, text, view)
        if guidance is not None:
            positive, negative = flow.chunk(2)
            flow = negative + guidance * (positive - negative)
        if on_flow is not None:
            on_flow(flow)
        return to_clean(x, flow, steps.sigmas[step])

    return few_steps(predict, noise.__getitem__, steps)


def context_pass(
    dit: DiT,
    text: TextContext,
    view: HistoryView,
    clean: Tensor,
    *,
    guided: bool = False,
    timestep: float = 0.0,
) -> Entries:
    """The entries a finished chunk leaves: one forward pass on the clean latents at timestep 0.

    Args:
        dit, text, view: as the sampler used them.
        clean: ``[b, f, c, h, w]``. ``guided``: rows are doubled, as in :func:`sample_chunk`.
        timestep: what the network is told; a few checkpoints were trained with a small one.
    """
    rows = torch.cat([clean, clean]) if guided else clean
    dtype = dit.patch_embedding.weight.dtype
    entries: Entries
    _, entries = dit(rows.to(dtype), rows.new_full(rows.shape[:2], timestep), text, view.after_first_pass())
    return entries

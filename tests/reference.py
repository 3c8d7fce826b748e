"""A brute-force Wan2.1 with a history, written from the definitions and sharing no code with the package.

Every past frame's keys (un-rotated) and values are kept in a list for ever; each chunk picks what it may
see by frame number, rotates everything with complex numbers and attends by explicit softmax. Differentiable.

Legend: b batch, f frames, n tokens of a frame, h heads, d head dim, w width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    dim: int
    num_heads: int
    num_layers: int
    freq_dim: int
    text_len: int
    patch: tuple[int, int, int]
    out_dim: int
    eps: float = 1e-6


@dataclass
class Past:
    """Per layer, per frame ever committed: (keys, values) ``[b, n, h, d]``."""

    layers: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def rms(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weights[name + ".weight"]


def norm(x: Tensor, eps: float) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def turn(x: Tensor, time: float, rows: int, columns: int) -> Tensor:
    """Rotate one frame's tokens ``[b, n, h, d]`` by complex multiplication in double precision."""
    pairs = x.shape[-1] // 2
    split = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    out = []
    for row in range(rows):
        for column in range(columns):
            angles = []
            for position, count in zip((time, row, column), split, strict=True):
                angles += [position * 10000 ** (-(2 * i) / (2 * count)) for i in range(count)]
            angle = torch.tensor(angles, dtype=torch.float64)
            out.append(torch.polar(torch.ones_like(angle), angle))
    spin = torch.stack(out)[None, :, None]
    turned = torch.view_as_complex(x.double().reshape(*x.shape[:-1], pairs, 2)) * spin
    return torch.view_as_real(turned).flatten(-2).float()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def visible(
    past: int, chunk: int, window: int | None, sink: int, relative_f_max: int | None
) -> tuple[list[int], list[float], list[float]]:
    """Past frames that a chunk sees, their ids, and the chunk's own ids, from the words of the definition."""
    frames = list(range(past))
    if window is not None:
        room = window - sink - chunk
        others = [frame for frame in frames if frame >= sink]
        frames = [frame for frame in frames if frame < sink] + (others[-room:] if room > 0 else [])
    own = [float(past + i) for i in range(chunk)]
    if relative_f_max is None:
        return frames, [float(frame) for frame in frames], own
    newest = min(past + chunk - 1, relative_f_max)
    own = [float(newest - chunk + 1 + i) for i in range(chunk)]
    num_sink = len([frame for frame in frames if frame < sink])
    num_local = len(frames) - num_sink
    return (
        frames,
        [float(i) for i in range(num_sink)] + [own[0] - num_local + i for i in range(num_local)],
        own,
    )


def forward(
    weights: Weights,
    shape: Shape,
    x: Tensor,
    timesteps_bf: Tensor,
    context: Tensor,
    past: Past,
    seen: Sequence[int],
    seen_ids: Sequence[float],
    own_ids: Sequence[float],
) -> tuple[Tensor, list[list[tuple[Tensor, Tensor]]]]:
    """Flow of a chunk ``[b, f, c, h, w]``, and per layer and frame what it would leave."""
    batch, frames, _, height, width = x.shape
    _, ph, pw = shape.patch
    rows, columns = height // ph, width // pw
    heads, n = shape.num_heads, rows * columns
    kernel = weights["patch_embedding.weight"]
    tokens = torch.nn.functional.conv3d(
        x.transpose(1, 2), kernel, weights["patch_embedding.bias"], stride=shape.patch
    )
    h = tokens.flatten(3).permute(0, 2, 3, 1)  # b f n w
    text = torch.zeros(batch, shape.text_len, context.shape[-1])
    text[:, : context.shape[1]] = context
    text = linear(weights, "text_embedding.2", gelu(linear(weights, "text_embedding.0", text)))
    half = shape.freq_dim // 2
    angle = timesteps_bf.double()[..., None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    wave = torch.cat([angle.cos(), angle.sin()], -1).float()
    time = linear(
        weights, "time_embedding.2", torch.nn.functional.silu(linear(weights, "time_embedding.0", wave))
    )
    six = linear(weights, "time_projection.1", torch.nn.functional.silu(time)).reshape(batch, frames, 6, -1)
    left = []
    for i in range(shape.num_layers):
        block = f"blocks.{i}."
        mod = (weights[block + "modulation"] + six)[:, :, :, None]  # b f 6 1 w
        y = norm(h, shape.eps) * (1 + mod[:, :, 1]) + mod[:, :, 0]

        def project(name: str, y: Tensor, block: str = block) -> Tensor:
            return linear(weights, block + name, y)

        q = rms(weights, block + "self_attn.norm_q", project("self_attn.q", y), shape.eps)
        k = rms(weights, block + "self_attn.norm_k", project("self_attn.k", y), shape.eps)
        v = project("self_attn.v", y)
        q, k, v = (z.reshape(batch, frames, n, heads, -1) for z in (q, k, v))
        left.append([(k[:, f], v[:, f]) for f in range(frames)])
        keys = [turn(past.layers[i][f][0], t, rows, columns) for f, t in zip(seen, seen_ids, strict=True)]
        keys += [turn(k[:, f], own_ids[f], rows, columns) for f in range(frames)]
        values = [past.layers[i][f][1] for f in seen] + [v[:, f] for f in range(frames)]
        queries = torch.cat([turn(q[:, f], own_ids[f], rows, columns) for f in range(frames)], 1)
        out = attend(queries, torch.cat(keys, 1), torch.cat(values, 1)).reshape(h.shape)
        h = h + project("self_attn.o", out) * mod[:, :, 2]
        y = norm(h, shape.eps) * weights[block + "norm3.weight"] + weights[block + "norm3.bias"]
        q = rms(weights, block + "cross_attn.norm_q", project("cross_attn.q", y), shape.eps)
        k = rms(weights, block + "cross_attn.norm_k", project("cross_attn.k", text), shape.eps)
        q = q.reshape(batch, frames * n, heads, -1)
        k, v = (z.reshape(batch, shape.text_len, heads, -1) for z in (k, project("cross_attn.v", text)))
        h = h + project("cross_attn.o", attend(q, k, v)).reshape(h.shape)
        y = norm(h, shape.eps) * (1 + mod[:, :, 4]) + mod[:, :, 3]
        h = h + project("ffn.2", gelu(project("ffn.0", y))) * mod[:, :, 5]
    mod = (weights["head.modulation"] + time[:, :, None])[:, :, :, None]
    patches = linear(weights, "head.head", norm(h, shape.eps) * (1 + mod[:, :, 1]) + mod[:, :, 0])
    grid = patches.reshape(batch, frames, rows, columns, ph, pw, shape.out_dim)
    return grid.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, shape.out_dim, height, width), left


def roll(
    weights: Weights,
    shape: Shape,
    context: Tensor,
    noise: Tensor,
    renoise: Tensor,
    timesteps: Sequence[float],
    sigma_of: Callable[[float], float],
    chunk: int,
    window: int | None,
    sink: int,
    relative_f_max: int | None,
) -> tuple[Tensor, Tensor]:
    """A whole few-step rollout: all flows in order, and the latents."""
    past = Past([[] for _ in range(shape.num_layers)])
    flows, latents = [], []
    for c in range(noise.shape[1] // chunk):
        see = visible(c * chunk, chunk, window, sink, relative_f_max)
        x = noise[:, c * chunk : (c + 1) * chunk]
        for i, t in enumerate(timesteps):
            flow, _ = forward(weights, shape, x, torch.full(x.shape[:2], t), context, past, *see)
            flows.append(flow)
            clean = x - sigma_of(t) * flow
            if i + 1 < len(timesteps):
                level = sigma_of(timesteps[i + 1])
                x = (1 - level) * clean + level * renoise[c, i]
        _, left = forward(weights, shape, clean, torch.zeros(x.shape[:2]), context, past, *see)
        for layer, frames in zip(past.layers, left, strict=True):
            layer += frames
        latents.append(clean)
    return torch.stack(flows), torch.cat(latents, 1)

"""Random configurations, recorded by the brute-force reference in the golden format, replay in the engine."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longtake.history.base import HistoryConfig
from longtake.history.positions import Absolute, Relative
from longtake.history.pure import PureHistory
from longtake.verify import verify_file
from reference import Past, Shape, forward, roll, visible
from tiny_parts import small_dit


def nearest_sigma(t: float, shift: float) -> float:
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in ((1000 - i) / 1000 for i in range(1000))]
    return min(sigmas, key=lambda sigma: abs(1000 * sigma - t))


def record(path: Path, seed: int) -> dict[str, Any]:
    """Draw a configuration, roll it out by brute force, and write it as a recording."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    heads = draw.choice([1, 2, 3])
    patch = draw.choice([(1, 1, 1), (1, 2, 2), (1, 1, 2)])
    chunk, sink = draw.choice([1, 2, 3]), draw.choice([0, 0, 1, 2, 3, 4])
    window = draw.choice([None, sink + chunk, sink + chunk + 1, sink + chunk + 2, sink + chunk + 5])
    relative = draw.random() < 0.5
    channels = draw.choice([2, 4])
    shift = draw.choice([1.0, 3.0, 5.0, 8.0])
    steps = draw.choice([[1000], [1000, 500], [1000, 750, 500, 250], [900, 640, 33]])
    shape = Shape(
        dim=heads * draw.choice([4, 6, 8, 14, 20]),
        num_heads=heads,
        num_layers=draw.choice([1, 2, 3]),
        freq_dim=draw.choice([8, 18]),
        text_len=draw.choice([1, 5, 9]),
        patch=patch,
        out_dim=channels,
        eps=draw.choice([1e-6, 1e-5]),
    )
    text_dim, ffn = draw.choice([4, 7]), draw.choice([8, 30])
    dit = small_dit(
        seed,
        width=shape.dim,
        ffn_width=ffn,
        num_layers=shape.num_layers,
        num_heads=heads,
        in_channels=channels,
        out_channels=channels,
        patch_size=patch,
        text_width=text_dim,
        text_length=shape.text_len,
        frequency_width=shape.freq_dim,
    )
    weights = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    num_chunks = draw.choice([4, 7])
    size = (patch[1] * draw.choice([1, 2]), patch[2] * draw.choice([1, 3]))
    noise = torch.randn(1, num_chunks * chunk, channels, *size)
    renoise = torch.randn(num_chunks, len(steps) - 1, 1, chunk, channels, *size)
    context = torch.randn(1, draw.randint(1, shape.text_len), text_dim)
    shifted = [1000 * shift * s / (1 + (shift - 1) * s) for s in (step / 1000 for step in steps)]
    f_max = window - 1 if relative and window is not None else None
    with torch.no_grad():
        flows, latents = roll(
            weights, shape, context, noise, renoise, shifted,
            lambda t: nearest_sigma(t, shift), chunk, window, sink, f_max,
        )  # fmt: skip
    metadata = {
        "kind": "rollout",
        "dim": shape.dim,
        "ffn_dim": ffn,
        "num_layers": shape.num_layers,
        "num_heads": heads,
        "in_dim": channels,
        "out_dim": channels,
        "patch_size": ",".join(map(str, patch)),
        "text_dim": text_dim,
        "text_len": shape.text_len,
        "freq_dim": shape.freq_dim,
        "eps": shape.eps,
        "timestep_shift": shift,
        "denoising_steps": ",".join(map(str, steps)),
        "frames_per_chunk": chunk,
        "sink_frames": sink,
        "window_frames": -1 if window is None else window,
        "chunks": num_chunks,
        "context_timestep": 0,
        "rope": "relative, newest id at most window_frames-1" if relative else "absolute frame ids",
    }
    tensors = {f"state.{name}": tensor for name, tensor in weights.items()}
    tensors |= {"noise": noise, "context": context, "flows": flows, "latents": latents}
    tensors["timesteps"] = torch.tensor(shifted)
    if len(steps) > 1:
        tensors["renoise"] = renoise
    save_file(tensors, path, {name: str(value) for name, value in metadata.items()})
    return metadata


@pytest.mark.parametrize("seed", range(40))
def test_random_configurations_replay(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "recording.safetensors"
    metadata = record(path, seed)
    report = verify_file(path)
    assert report.passed, (report.parts, metadata)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("sink", [0, 1, 4])
def test_gradients_through_commits_equal_brute_force(relative: bool, sink: int) -> None:
    """The last chunk's gradients flow through commits and evictions to all weights and earlier chunks."""
    chunk, window, chunks = 2, sink + 5, 5
    dit = small_dit(3)
    config = HistoryConfig(
        window_frames=window,
        sink_frames=sink,
        chunk_frames=chunk,
        positions=Relative(f_max=window - 1) if relative else Absolute(),
    )
    torch.manual_seed(1)
    context = torch.randn(2, 4, 8)
    x = torch.randn(2, chunks * chunk, 3, 2, 3)

    def grads(out: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        names = [name for name, _ in dit.named_parameters()]
        found = torch.autograd.grad(out.square().sum(), [x, *dit.parameters()])
        return dict(zip(["x", *names], found, strict=True))

    ours_x = x.clone().requires_grad_()
    history = PureHistory(config, dit.cache_spec(), (2, 3))
    text = dit.encode_text(context)
    for c in range(chunks):
        flow, entries = dit(
            ours_x[:, c * chunk : (c + 1) * chunk], torch.zeros(2, chunk), text, history.view()
        )
        history = history.commit(entries)
        history.check_integrity()
    ours = grads(flow, ours_x)

    shape = Shape(24, 2, 2, 16, 6, (1, 1, 1), 3)
    weights = dict(dit.named_parameters())
    their_x = x.clone().requires_grad_()
    past = Past([[] for _ in range(2)])
    for c in range(chunks):
        see = visible(c * chunk, chunk, window, sink, window - 1 if relative else None)
        flow, left = forward(
            weights,
            shape,
            their_x[:, c * chunk : (c + 1) * chunk],
            torch.zeros(2, chunk),
            context,
            past,
            *see,
        )
        for layer, frames in zip(past.layers, left, strict=True):
            layer += frames
    theirs = grads(flow, their_x)
    for name, grad in theirs.items():
        torch.testing.assert_close(
            ours[name], grad, atol=1e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert float(ours["x"][:, 0].abs().max()) > 1e-6 if sink else True

"""Walks through clips: guided ones against plain ones, recomputed ones against remembered ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Relative
from longtake.stream.engine import Engine
from longtake.stream.state import PromptSwitch
from longtake.train.walk import GuidedWalk, Walk
from tiny_parts import small_pipeline
from toy_training import CAPTIONS, HISTORY, networks


@torch.no_grad()
def test_a_guided_walk_is_two_walks_in_one() -> None:
    module, latents = networks(), torch.randn(3, 6, 4, 4, 4)
    text = module.encode(CAPTIONS + [""] * 3)
    guided = GuidedWalk(module.dit, HISTORY, text, 3, 2.5, 4, 4)
    pair = [Walk(module.dit, HISTORY, module.encode(texts), 3, 4, 4) for texts in (CAPTIONS, [""] * 3)]
    for chunk in range(3):
        clean = latents[:, 2 * chunk : 2 * chunk + 2]
        noisy = torch.randn(6, 2, 4, 4, 4)
        sigma = torch.rand(6) * 0.9 + 0.1
        with_text, without = (walk.advance(noisy, sigma, clean) for walk in pair)
        expected = without + 2.5 * (with_text - without)
        torch.testing.assert_close(guided.predict(noisy, sigma), expected, atol=1e-4, rtol=1e-4)
        guided.commit(clean)


def _walked(recompute: bool, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], int]:
    """Gradients of a loss over four chunks, of which the window evicts, and the bytes kept for them."""
    module = networks()
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 8, 4, 4, 4, generator=generator)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        walk = Walk(module.dit, HISTORY, module.encode(CAPTIONS), 3, 4, 4, recompute=recompute)
        loss = torch.zeros(())
        for chunk in range(4):
            clean = latents[:, 2 * chunk : 2 * chunk + 2]
            noisy = clean.repeat(2, 1, 1, 1, 1) + torch.randn(6, 2, 4, 4, 4, generator=generator)
            sigma = torch.rand(6, generator=generator) * 0.9 + 0.1
            loss = loss + walk.advance(noisy, sigma, clean).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(module.parameters()))
    return gradients, sum(kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(dtype: torch.dtype | None) -> None:
    plain, plain_bytes = _walked(False, dtype)
    again, again_bytes = _walked(True, dtype)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)
    assert again_bytes < 0.5 * plain_bytes


@torch.no_grad()
@pytest.mark.parametrize("sink", ["keep", "reencode", "drop"])
@pytest.mark.parametrize("memory", ["keep", "rebuild", "reset"])
@pytest.mark.parametrize("window", ["keep", "reencode"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_switch_does_to_a_walk_what_it_does_to_a_stream(
    sink: Any, memory: Any, window: Any, at: int
) -> None:
    pipeline = small_pipeline(policy=EvolvingConfig(), positions=Relative(f_max=10))
    engine = Engine(pipeline)
    state = engine.open("a red ball", 3)
    text = pipeline.encode_prompt("a red ball")
    walk = Walk(pipeline.dit, pipeline.config.history, text, 1, *pipeline.latent_shape[2:])
    switch = PromptSwitch(text="green square", sink=sink, memory=memory, window=window)
    noisy = torch.randn(1, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    for chunk in range(at + 3):
        if chunk == at:
            text = pipeline.encode_prompt(switch.text)
            engine.set_prompt(state, switch)
            walk.switch(text, switch)
        [made] = engine.advance([state], decode=False)
        walk.commit(made.latents[None])
        if chunk >= at:
            view = engine.history.view([state.slot])
            flow, _ = pipeline.dit(noisy, noisy.new_full(noisy.shape[:2], 700.0), text, view)
            expected = noisy - 0.7 * flow
            torch.testing.assert_close(
                walk.predict(noisy, torch.tensor([0.7])), expected, atol=1e-4, rtol=1e-4
            )

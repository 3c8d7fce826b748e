"""What training takes, by torch's own counters, and clips that cost nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from longtake.stream.pipeline import Pipeline
from longtake.stream.session import Stream
from longtake.train.latents import Clips
from longtake.train.loop import Learner
from toy_training import CAPTIONS


def some_clips() -> Clips:
    torch.manual_seed(0)
    prompts = tuple(((0, caption),) for caption in CAPTIONS)
    return Clips(
        torch.randn(3, 6, 4, 4, 4).half(), torch.rand(3, 6, 4, 4).half(), prompts, (True,) * 3, (1,) * 3
    )


def counter() -> FlopCounterMode:
    """torch's counter, which does not know the CPU's fused attention."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
        return int(sdpa_flop_count(q, k, v))

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> int:
        return int(sdpa_backward_flop_count(grad, q, k, v))

    ops = torch.ops.aten
    mapping = {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def flops_of_a_chunk(pipeline: Pipeline) -> int:
    """Of one that has a past, text and autoencoder left out."""
    stream = Stream(pipeline, "a red ball", decode=False)
    for _ in range(6):
        next(stream)
    with counter() as counted:
        next(stream)
    return counted.get_total_flops()


def measured(learner: Learner, modules: list[nn.Module], draw: int, half: bool) -> tuple[int, int]:
    """FLOPs of a loss with its backward pass, and bytes that autograd kept beside weights."""
    weights = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with counter() as count:
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
        ):
            loss, _ = learner.loss(draw, 0.5)
        num_bytes = sum(kept.values())
        loss.backward()  # type: ignore[no-untyped-call]
    return count.get_total_flops(), num_bytes

"""What a loss of each layer's keys and values costs the whole network's flow, measured.

Layers do not count alike: in the small model the flow suffers a hundred times more from what the last layer
loses than from the second. So all layers are made latent at an ample rank, and then one after another at a
low one; how much further the flow is off then, for what that layer lost, is its weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longtake.convert.factor import Samples
from longtake.convert.flow_probe import FlowProbe
from longtake.convert.network import Plan, convert_layers, is_replaced, layer_gains
from longtake.convert.ranks import lost
from longtake.models.dit import DiT

_LEAST = 0.01
"""A weight is at least this share of the largest: what was measured at one rank is believed so far."""


@dataclass(frozen=True)
class LayerWeights:
    """A first-order account of the flow's error.

    Args:
        error: of the flow with all layers at an ample rank, as a share of its variance.
        gains: of every layer, see `ranks`. ``losses``: of every layer at the ample rank.
        weights: of every layer how much the flow's error grows with its loss.
    """

    error: float
    gains: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    weights: tuple[float, ...]

    def predicted(self, losses: Sequence[float]) -> float:
        """The flow's error where layers lose so much."""
        more = zip(self.weights, losses, self.losses, strict=True)
        return max(0.0, self.error + sum(weight * (loss - before) for weight, loss, before in more))


@dataclass(frozen=True)
class Weighing:
    """How layers are weighed.

    Args:
        dense: the network.
        samples: see `network.convert_layers`.
        probe: of the dense network.
        progress: told in words what goes on.
    """

    dense: DiT
    samples: list[Samples] | None
    probe: FlowProbe
    progress: Callable[[str], None]

    def layers(self, plan: Plan) -> LayerWeights:
        """Of what a plan makes; its ranks do not matter."""
        layers, state = plan.dense.num_layers, self.dense.state_dict()
        ample, low = self._ample(plan), max(1, plan.dense.width // 16)
        gains = tuple(layer_gains(plan, state, self.samples))
        of_ample, of_low = (self._by_layer(plan, rank, state) for rank in (ample, low))

        def error(lowered: int | None) -> float:
            ranks = [low if layer == lowered else ample for layer in range(layers)]
            chosen = [(of_low if layer == lowered else of_ample)[layer] for layer in range(layers)]
            return self._error(plan, ranks, chosen, state)

        base = error(None)
        before = tuple(lost(of_layer, ample) for of_layer in gains)
        weights = []
        for layer in range(layers):
            growth = lost(gains[layer], low) - before[layer]
            weights.append(max(0.0, error(layer) - base) / growth if growth > 0 else 0.0)
            told = f"the flow's error grows {weights[-1]:.3f} times its loss"
            self.progress(f"layer {layer + 1} of {layers}: {told}")
        least = _LEAST * max(weights)
        return LayerWeights(base, gains, before, tuple(max(least, weight) for weight in weights))

    def with_keys(self, weights: LayerWeights, plan: Plan) -> LayerWeights:
        """The same layers with the plan's other shared keys: keys and values that turn with no position, and
        what their loss costs, stay; what heads lose by sharing is measured anew.
        """
        ample, state = self._ample(plan), self.dense.state_dict()
        made = self._by_layer(plan, ample, state)
        return replace(weights, error=self._error(plan, [ample] * len(made), made, state))

    @staticmethod
    def _ample(plan: Plan) -> int:
        return max(2, 3 * plan.dense.width // 8)

    def _error(
        self,
        plan: Plan,
        ranks: list[int],
        layers: list[dict[str, Tensor]],
        state: Mapping[str, Tensor],
    ) -> float:
        """Of the flow with layers of these ranks and weights."""
        with torch.device("meta"):
            dit = DiT(plan.dense.replace(latent=plan.latent.replace(kv_rank=tuple(ranks))))
        kept = {name: tensor for name, tensor in state.items() if not is_replaced(name)}
        kind = self.dense.patch_embedding.weight.dtype
        weights = {name: tensor.to(kind) for each in layers for name, tensor in each.items()}
        dit.load_state_dict(kept | weights, assign=True)
        return self.probe.error_of(dit.eval().requires_grad_(False))

    def _by_layer(self, plan: Plan, rank: int, state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        one = Plan(plan.dense, plan.latent.replace(kv_rank=rank), plan.method, plan.seed)
        return [
            {f"blocks.{layer}.self_attn.{name}": tensor for name, tensor in made.weights.items()}
            for layer, made in convert_layers(one, state, self.samples)
        ]

"""Choosing how many rotary keys heads share of each band, with the ranks that a budget leaves beside them.

What one key for all heads loses no rank brings back; what a second takes of a budget is missing from ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from longtake.convert.layer_weights import LayerWeights, Weighing
from longtake.convert.network import Plan
from longtake.convert.ranks import lost
from longtake.convert.settings import ConvertConfig
from longtake.errors import ConfigError
from longtake.models.dit_config import DiTConfig


def weighed(
    config: ConvertConfig, dense: DiTConfig, weighing: Weighing, progress: Callable[[str], None]
) -> tuple[Plan, LayerWeights]:
    """What to make but for its ranks, and the weights by which those are to be chosen.

    Numbers of shared keys are tried from one on until the flow is predicted to be off further than with one
    less, or a budget has no room left.

    Args:
        config: a budget, with `rope_keys` a number or "auto".
        dense: the network's configuration. ``weighing``: of its layers.
        progress: told in words what goes on.
    """
    tried = range(1, dense.num_heads + 1) if config.rope_keys == "auto" else (config.rope_keys,)
    best: tuple[float, Plan, LayerWeights] | None = None
    weights: LayerWeights | None = None
    for keys in tried:
        trial = config.replace(rope_keys=keys)
        plan = Plan(dense, trial.latent(dense), config.method, config.seed)
        try:
            trial.check_budget(plan)
        except ConfigError:
            if best is None:
                raise
            break
        weights = weighing.layers(plan) if weights is None else weighing.with_keys(weights, plan)
        ranks = trial.chosen(plan, {}, None, weights).latent.ranks(dense.num_layers)
        losses = [lost(gains, rank) for gains, rank in zip(weights.gains, ranks, strict=True)]
        error = weights.predicted(losses)
        if len(tried) > 1:
            kind = "1 key" if keys == 1 else f"{keys} keys"
            progress(f"{kind} of each band: the flow is predicted to be off by {100 * error:.1f} %")
        if best is not None and error >= best[0]:
            break
        best = error, plan, weights
    assert best is not None, "the first is taken or refused"
    return best[1], best[2]

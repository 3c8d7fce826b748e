"""Named recipes: plain functions that return a complete configuration."""

from __future__ import annotations

from collections.abc import Callable

from longtake.errors import ConfigError, nearest
from longtake.recipes.small import tiny, tiny_128, tiny_latent, tiny_window
from longtake.recipes.wan import wan_1_3b_dmd, wan_1_3b_echo, wan_1_3b_echo_long, wan_1_3b_latent
from longtake.train.distil_recipe import DistillationRecipe
from longtake.train.recipe import Recipe

AnyRecipe = Recipe | DistillationRecipe

RECIPES: dict[str, Callable[[], AnyRecipe]] = {
    "tiny": tiny,
    "tiny-window": tiny_window,
    "tiny-128": tiny_128,
    "tiny-latent": tiny_latent,
    "wan-1.3b-dmd": wan_1_3b_dmd,
    "wan-1.3b-echo": wan_1_3b_echo,
    "wan-1.3b-echo-long": wan_1_3b_echo_long,
    "wan-1.3b-latent": wan_1_3b_latent,
}


def get_recipe(name: str) -> AnyRecipe:
    """The recipe of that name. Raises ConfigError with the nearest name where there is none."""
    if name not in RECIPES:
        raise ConfigError(f"unknown recipe {name!r}", nearest(name, RECIPES))
    return RECIPES[name]()

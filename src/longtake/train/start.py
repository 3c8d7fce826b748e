"""The file that a recipe's networks start from: what its `warm_start` names, converted where that is dense
and the recipe's attention is latent.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from longtake.convert.files import convert_bundle
from longtake.convert.settings import ConvertConfig
from longtake.errors import ConfigError
from longtake.io.checkpoints import read_safetensors, weights_digest
from longtake.models.latent_config import LatentConfig
from longtake.stream.bundle import read_card, resolve_model
from longtake.train.recipe import Recipe


def start_of(recipe: Recipe, out: Path, tell: Callable[[str], None]) -> Path | None:
    """The model file to start from; None for a start from scratch.

    A conversion is kept in `out`, under a name that changes with the dense model and with what is made of
    it, so that a run which is resumed does not convert again.

    Args:
        recipe: whose `warm_start` is asked for. ``out``: the run's directory.
        tell: how a conversion goes on, in words.

    Raises:
        CheckpointError: no such model, or one that cannot be read. ConfigError: latents that do not fit it.
    """
    if recipe.warm_start is None:
        return None
    path, latent = resolve_model(recipe.warm_start), recipe.dit_model.latent
    given = read_card(path).dit.latent
    if latent is None:
        return path
    if given is not None:
        _check_same(given, latent, recipe)
        return path
    weights = weights_digest(read_safetensors(path)[0])
    told = f"{weights} {read_card(path).dumps()} {latent.dumps()} {recipe.seed}"
    converted = out / f"converted-{hashlib.sha256(told.encode()).hexdigest()[:12]}.safetensors"
    if not converted.exists():
        out.mkdir(parents=True, exist_ok=True)
        config = _conversion(latent, recipe.seed)
        with torch.random.fork_rng():  # a run that finds it made draws the same numbers as one that makes it
            convert_bundle(path, converted, config, None, lambda line: tell(f"conversion: {line}"))
    return converted


def _check_same(given: LatentConfig, wanted: LatentConfig, recipe: Recipe) -> None:
    """Refuses latents of other sizes, and those that mean something else at the same sizes."""
    dit = recipe.dit_model
    head_dim = dit.width // dit.num_heads

    def sizes(latent: LatentConfig) -> dict[str, object]:
        return {
            "kv_rank": list(latent.ranks(dit.num_layers)),
            "query_rank": latent.query_rank,
            "nope_dim": latent.nope_dim,
            "rope_bands": [list(bands) for bands in latent.selected(head_dim)],
            "heads_mix": latent.heads_mix,
        }

    there, here = sizes(given), sizes(wanted)
    other = {name: value for name, value in there.items() if value != here[name]}
    if other:
        raise ConfigError(
            f"warm_start={recipe.warm_start!r} has latents of {other}, the recipe of "
            f"{ {name: here[name] for name in other} }",
            " ".join(f"--set 'dit_model.latent.{name}={json.dumps(value)}'" for name, value in other.items()),
        )


def _conversion(latent: LatentConfig, seed: int) -> ConvertConfig:
    return ConvertConfig(
        kv_rank=latent.kv_rank,
        query_rank=latent.query_rank,
        nope_dim=latent.nope_dim,
        rope_bands=latent.rope_bands,
        heads_mix=latent.heads_mix,
        path=latent.path,
        storage=latent.storage,
        key_storage=latent.key_storage,
        debias=latent.debias,
        seed=seed,
    )

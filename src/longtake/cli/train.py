"""``longtake train``: a named recipe, with changes, from its first stage to a model file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, TypeVar, get_args

import tyro
from pydantic import Field

from longtake.cli.evaluation import make_directory, tell
from longtake.config import Config
from longtake.errors import ConfigError, UsageError, nearest

ConfigT = TypeVar("ConfigT", bound=Config)


class Arguments(Config):
    """Train a model by a named recipe. A run that was stopped goes on where its output directory shows it
    was.

    Attributes:
        recipe: name of a recipe, for instance tiny.
        out: directory for checkpoints, logs and weights; runs/<recipe> where it is left out.
        stage: run these stages only, in the recipe's order; may be repeated. Those before must have left
            their weights in the output directory.
        set: change a setting of the recipe, e.g. windows.loop.num_steps=100; may be repeated.
        stop_after_seconds: stop each stage after this long, with a checkpoint to go on from.
        threads: CPU threads; torch's choice where it is left out.
        show: print the recipe with its changes as JSON, and train nothing.
        dry_run: print what each stage will take (parameters, memory, FLOPs), and train nothing.
        memory_gb: memory to count on, in GB (10^9 bytes); what is available here where it is left out.
    """

    recipe: Annotated[str, tyro.conf.Positional]
    out: Path | None = None
    stage: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    stop_after_seconds: float | None = Field(None, gt=0)
    threads: int | None = Field(None, ge=1)
    show: bool = False
    dry_run: bool = False
    memory_gb: float | None = Field(None, gt=0)


def run(arguments: Arguments) -> int:
    """Train; returns the exit code."""
    import torch

    from longtake.recipes import get_recipe
    from longtake.train.distil import distil
    from longtake.train.distil_recipe import DistillationRecipe
    from longtake.train.fit import this_machine
    from longtake.train.plan import Machine, plan_lines
    from longtake.train.run import train

    recipe = get_recipe(arguments.recipe)
    for change in arguments.set:
        key, equals, value = change.partition("=")
        if not equals:
            raise UsageError(
                f"--set {change!r} has no '='", "write KEY=VALUE, e.g. windows.loop.num_steps=100"
            )
        recipe = changed(recipe, key.strip(), value)
    valid: tuple[str, ...] = get_args(get_args(type(recipe).model_fields["stages"].annotation)[0])
    for name in arguments.stage:
        if name not in valid:
            raise UsageError(f"unknown stage {name!r}", nearest(name, valid))
    if arguments.show:
        print(recipe.dumps(), end="")
        return 0
    chosen = tuple(stage for stage in valid if stage in arguments.stage)
    if arguments.dry_run:
        wanted = chosen or recipe.stages
        for stage in wanted:
            plan = recipe.plan(stage, Machine(recipe.device, num_bytes=0))
            if plan is not None:
                print("\n".join(plan_lines(plan)))
        recipe.check(wanted, this_machine(recipe.device, arguments.memory_gb))
        return 0
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or Path("runs") / recipe.name
    make_directory(out)
    recipe.dump(out / "recipe.json")
    seconds, memory_gb = arguments.stop_after_seconds, arguments.memory_gb
    if isinstance(recipe, DistillationRecipe):
        figures = distil(recipe, out, chosen or None, seconds, memory_gb, tell)
    else:
        figures = train(recipe, out, chosen or None, seconds, memory_gb, tell)
    for figure, amount in figures.items():
        print(f"{figure}: {amount:g}", file=sys.stderr)
    print(out)
    return 0


def changed(config: ConfigT, key: str, text: str) -> ConfigT:
    """A validated copy of a config with one value, perhaps of a config inside it, changed.

    Args:
        config: any config.
        key: names joined by dots.
        text: the value as JSON, or as plain text where it is no JSON.

    Raises:
        ConfigError: no such key, naming the nearest, or a value that is refused.
    """
    name, dot, rest = key.partition(".")
    if name not in type(config).model_fields:
        raise ConfigError(
            f"{type(config).__name__} has no key {name!r}", nearest(name, type(config).model_fields)
        )
    if not dot:
        return config.replace(**{name: _value(text)})
    inner = getattr(config, name)
    if not isinstance(inner, Config):
        raise ConfigError(f"{type(config).__name__}.{name} has no keys inside", f"set {name} itself")
    return config.replace(**{name: changed(inner, rest, text)})


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text

"""A model with another policy of what becomes of its past, for comparisons at one budget."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Final

from longtake.eval.errors import EvalError
from longtake.history.base import HistoryConfig
from longtake.history.evolving import EvolvingConfig
from longtake.history.positions import Absolute, Relative
from longtake.history.window import WindowConfig
from longtake.stream.pipeline import Pipeline

OWN: Final = "own"
SWAPPED: Final = "swapped"
_NAME_LENGTH: Final = 24
_KEEPS_FRAMES: Final = ("key_frames", "most_attended")


def with_policy(pipeline: Pipeline, text: str) -> Pipeline:
    """A model with another policy.

    Args:
        pipeline: The model.
        text: "own" or "swapped" for its own; "off" or "prior" for a learned memory's other modes; "window"
            for none; "full" for an unlimited window, with ids that the model may never have seen; else a
            policy's kind, which has the model's own settings where its policy is of that kind. Kinds may
            have settings, "key_frames:stride=4,num_frames=3", of which "window_frames" and "f_max" are the
            window's and the positions'. A policy that keeps frames keeps as many as the model's own memory
            has, where nothing else is asked for.

    Raises:
        EvalError: No such policy, settings where there are none, or more frames than the ids of the model
            hold. ConfigError: Settings that do not fit.
    """
    history = pipeline.config.history
    kind, _, rest = text.partition(":")
    if rest and kind in (OWN, SWAPPED, "off", "prior", "full"):
        raise EvalError(f"{text!r}: {kind!r} has no settings", f"write {kind!r}")
    if kind in (OWN, SWAPPED):
        return pipeline
    if kind in ("off", "prior"):
        own = history.policy
        if not isinstance(own, EvolvingConfig):
            raise EvalError(
                f"{text!r} is a mode of a learned memory, which this model has not", "leave it out"
            )
        changed = history.replace(policy=own.replace(mode=kind))
    elif kind == "full":
        changed = history.replace(window_frames=None, positions=Absolute(), policy=WindowConfig())
    else:
        settings = _settings(rest, text)
        whole = json.loads(history.dumps())
        if "window_frames" in settings:
            whole["window_frames"] = settings.pop("window_frames")
        if "f_max" in settings:
            whole["positions"] = {"kind": "relative", "f_max": settings.pop("f_max")}
        grid = pipeline.dit.token_grid(*pipeline.latent_shape[2:])
        memory = pipeline.dit.policy(history.policy, grid).memory_grid
        if memory is not None and kind in _KEEPS_FRAMES:
            settings.setdefault("num_frames", memory.num_frames)
        before = whole["policy"] if whole["policy"]["kind"] == kind else {}
        whole["policy"] = {**before, "kind": kind, **settings}
        changed = HistoryConfig.loads(json.dumps(whole), source=f"--policies {text}")
        _check_room(pipeline, changed, text)
    return pipeline.with_history(changed)


def apart(policies: str) -> list[str]:
    """One each where several policies are written with commas between them, which settings and their values
    have too.
    """
    found, start, depth = [], 0, 0
    for place, sign in enumerate(policies):
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0 and re.match(r"\w+=", policies[place + 1 :]) is None:
            found.append(policies[start:place])
            start = place + 1
    return [text for text in (*found, policies[start:]) if text]


def short_name(policy: str) -> str:
    """What a policy is called in tables and files: letters, digits, dashes; a long one by its beginning and a
    digest of all.
    """
    name = re.sub(r"[^\w.]+", "-", policy).strip("-")
    if len(name) <= _NAME_LENGTH:
        return name
    return f"{name[: _NAME_LENGTH - 7]}-{hashlib.sha256(policy.encode()).hexdigest()[:6]}"


def _check_room(pipeline: Pipeline, history: HistoryConfig, text: str) -> None:
    """Refuses what needs ids that the model was not trained with, unless they are asked for."""
    grid = pipeline.dit.token_grid(*pipeline.latent_shape[2:])
    memory = pipeline.dit.policy(history.policy, grid).memory_grid
    if history.window_frames is None or not isinstance(history.positions, Relative):
        return
    needed = history.window_frames + (0 if memory is None else memory.num_frames) - 1
    if needed > history.positions.f_max:
        raise EvalError(
            f"{text!r} needs ids up to {needed}, and the model has them up to {history.positions.f_max}",
            f"ask for less, or add f_max={needed} to run it with ids that it has never seen",
        )


def _settings(text: str, whole: str) -> dict[str, object]:
    settings: dict[str, object] = {}
    for item in filter(None, re.split(r",(?=\w+=)", text)):  # commas within a list stay
        key, equals, value = item.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
        if not equals:
            raise EvalError(f"{item!r} in the policy {whole!r} has no value", "write KEY=VALUE")
    return settings

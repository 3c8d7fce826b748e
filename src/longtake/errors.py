"""Errors a user can cause, and only those. Every message quotes the offending value and names a remedy.

The command line prints ``str(error)`` on one line and exits with ``exit_code``. Our own bugs are assertions,
never a ``LongtakeError``.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class LongtakeError(Exception):
    """Base of all errors that are the user's to fix.

    Args:
        problem: what is wrong, quoting the value, e.g. ``"window_frames=4 < sink 3 + chunk 3"``.
        remedy: what to do about it, e.g. ``"use window_frames >= 6"``. Empty only where the problem says it.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy


class UsageError(LongtakeError):
    """The command line was used wrongly: an unknown command, option or value."""


class ConfigError(LongtakeError):
    """A configuration holds an unknown key, a wrong value, or two values that do not fit each other."""


class HistoryError(LongtakeError):
    """A history was asked for what it cannot hold: capacity, slots, frames or positions do not fit."""


class CheckpointError(LongtakeError):
    """A weight file is unreadable, of an unknown format, or does not match the model."""


class SnapshotError(LongtakeError):
    """A stream snapshot is damaged, or belongs to other weights or another configuration."""


class ModelError(LongtakeError):
    """A model was given inputs whose sizes it cannot take."""


class TrainingError(LongtakeError):
    """A training stage cannot go on: a diverged loss, or a checkpoint of another configuration."""


class PromptError(LongtakeError):
    """A prompt cannot be used."""


class VideoError(LongtakeError):
    """A video cannot be written or read."""


class PackageError(LongtakeError):
    """An optional package is not installed."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Text for a remedy: ``did you mean 'width'?``, or the valid names where none is near."""
    names = list(valid)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return "valid names: " + (", ".join(sorted(names)) or "none")

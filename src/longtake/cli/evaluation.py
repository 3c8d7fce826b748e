"""What the ``longtake eval`` and ``bench`` commands share: configs, progress, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.table import Table

from longtake.config import Config
from longtake.errors import UsageError

if TYPE_CHECKING:
    from longtake.eval.stats import Estimate

ConfigT = TypeVar("ConfigT", bound=Config)


def config_of(kind: type[ConfigT], arguments: Config) -> ConfigT:
    """The arguments that an evaluation's own config has fields for.

    An ``Arguments`` class repeats those fields because importing the config would load torch before
    ``--help``; a test keeps names and defaults equal.
    """
    return kind(**{name: getattr(arguments, name) for name in kind.model_fields})


class Progress:
    """Tells standard error about finished streams: one line a source and batch."""

    def __init__(self) -> None:
        self._began: dict[str, tuple[float, int]] = {}

    def __call__(self, source: str, finished: int, total: int) -> None:
        """``finished`` of the source's ``total`` streams are recorded."""
        now = time.monotonic()
        began, before = self._began.setdefault(source, (now, finished))
        left = ""
        if finished > before:
            left = f", about {(now - began) / (finished - before) * (total - finished):.0f} s left"
        print(f"{source}: {finished} of {total} streams{left}", file=sys.stderr, flush=True)


def write_report(report: Config, path: Path) -> None:
    """Write a report's JSON, making its directory.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        report.dump(path)
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}", "give another --out") from error


def check_writable(path: Path) -> None:
    """Make a report's directory and the file, before hours of work and not after.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}", "give another --out") from error


def tell(line: str) -> None:
    """A line about what is going on, to standard error."""
    print(line, file=sys.stderr, flush=True)


def make_directory(path: Path) -> None:
    """Make a directory for results, before hours of work and not after.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot create the directory {str(path)!r}: {error.strerror}", "give another --out"
        ) from error


def print_estimates(columns: Mapping[str, Mapping[str, Estimate]]) -> None:
    """A table of metrics (rows) by source (columns), each value with its 95 % interval."""
    table = Table(box=None, header_style="bold")
    table.add_column("metric", no_wrap=True)
    for name in columns:
        table.add_column(name, no_wrap=True)
    metrics = dict.fromkeys(metric for estimates in columns.values() for metric in estimates)
    for metric in metrics:
        if all(metric not in found or found[metric].value is None for found in columns.values()):
            continue  # another level's metric
        cells = []
        for estimates in columns.values():
            found = estimates.get(metric)
            if found is None or found.value is None:
                cells.append("-")
                continue
            interval = "" if found.interval is None else " [{:.3f}, {:.3f}]".format(*found.interval)
            cells.append(f"{found.value:.3f}{interval}")
        table.add_row(metric, *cells)
    Console(width=max(80, 24 + 26 * len(columns))).print(table)

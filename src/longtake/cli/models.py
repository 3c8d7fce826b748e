"""``longtake models``: what ``--model-path`` may name."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from longtake.cli import one_line
from longtake.config import Config
from longtake.errors import LongtakeError

if TYPE_CHECKING:
    from longtake.stream.bundle import ModelCard


class Arguments(Config):
    """List the models that come with the package, and describe model files of your own.

    Attributes:
        files: model files to list beside the shipped ones.
        format: a table to read, or JSON with full hashes.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")] = ()
    format: Literal["table", "json"] = "table"


def run(arguments: Arguments) -> int:
    """Print the list; returns the exit code: that of the last file which is no model, or 0."""
    from longtake.stream.bundle import read_card, shipped_models

    code, rows = 0, []
    for path in [*shipped_models().values(), *arguments.files]:
        try:
            rows.append(_row(path, read_card(path)))
        except LongtakeError as error:
            print("longtake: error:", one_line(error), file=sys.stderr)
            code = error.exit_code
    if arguments.format == "json":
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return code


def _row(path: Path, card: ModelCard) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "name": card.name,
        "level": card.level,
        "width": card.stream.width,
        "height": card.stream.height,
        "fps": card.stream.fps,
        "opening_steps": len((card.stream.opening_schedule or card.stream.schedule).steps),
        "steps": len(card.stream.schedule.steps),
        "num_bytes": path.stat().st_size,
        "sha256": digest,
        "path": str(path),
    }


def _steps(row: dict[str, Any]) -> str:
    opening, steps = row["opening_steps"], row["steps"]
    return str(steps) if opening == steps else f"{opening} to open, {steps}"


def _print_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        print("no models come with this package; train one with `longtake train`")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "world level", "size", "video", "steps", "sha256", "path"):
        table.add_column(heading, overflow="fold", no_wrap=heading != "path")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["level"]),
            f"{row['num_bytes'] / 1e6:.1f} MB",
            f"{row['width']}x{row['height']} at {row['fps']:g} fps",
            _steps(row),
            row["sha256"][:12],
            row["path"],
        )
    Console().print(table)

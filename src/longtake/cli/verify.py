"""``longtake verify``: golden recordings through the engine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field

from longtake.cli import one_line
from longtake.config import Config
from longtake.errors import LongtakeError, UsageError


class Arguments(Config):
    """Run golden recordings through the engine and print how far it is from them.

    Every recorded part gets a line with its largest absolute error. The exit code is 0 if all errors of all
    files are within the tolerance, 1 if one is not, 2 if a file cannot be read.

    Attributes:
        files: recordings in safetensors format.
        tolerance: largest absolute error allowed.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE...")]
    tolerance: float = Field(1e-4, ge=0)


def run(arguments: Arguments) -> int:
    """Verify the files; returns the exit code."""
    if not arguments.files:
        raise UsageError("longtake verify: FILE is missing", "name one or more recordings")
    from longtake.verify import verify_file

    code = 0
    for path in arguments.files:
        try:
            report = verify_file(path, arguments.tolerance)
        except LongtakeError as error:
            print("longtake: error:", one_line(error), file=sys.stderr)
            code = max(code, error.exit_code)
            continue
        print(f"{path} ({report.kind})")
        for part, worst in report.parts.items():
            verdict = "ok" if worst <= arguments.tolerance else "FAILED"
            print(f"  {part:<28} max abs error {worst:.3e}  {verdict}")
        code = max(code, 0 if report.passed else 1)
    print("all within" if code == 0 else "NOT all within", f"{arguments.tolerance:g}")
    return code

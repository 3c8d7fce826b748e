"""Arguments of one subcommand: tyro fills a config class; wrong use becomes one line that names what was
meant.

tyro explains errors in boxes of several lines. A script's log wants one line, so unknown options are found
before tyro sees them, and what tyro says of wrong values is unfolded.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from typing import Final, TypeVar, get_args, get_origin

import tyro

from longtake.config import Config
from longtake.errors import ConfigError, UsageError, nearest

ConfigT = TypeVar("ConfigT", bound=Config)

_HELP: Final = ("-h", "--help")
# The dashes are for terminals that take ASCII only.
_FRAME: Final = re.compile("[╭╮╰╯│─]+|-{5,}")
_CHOICE: Final = re.compile(r"invalid choice '(.*?)' for argument '(.*?)'\. Expected one of \((.*)\)")
_UNEXPECTED: Final = re.compile(r"^Unrecognized options: (.*)")
_MISSING: Final = re.compile(r"^Missing from .*?: (--[\w-]+|[A-Z_]+)")


def option(field_name: str) -> str:
    """How a field is spelled on the command line."""
    return "--" + field_name.replace("_", "-")


def parse(arguments: type[ConfigT], prog: str, argv: Sequence[str]) -> ConfigT | None:
    """The arguments as a config, or None after printing help.

    Args:
        arguments: a flat config class; its docstring is the help.
        prog: the command as the user types it.
        argv: what follows the command.

    Raises:
        UsageError: an unknown option, a missing or a wrong value.
    """
    if any(token in _HELP for token in argv):
        try:
            tyro.cli(arguments, prog=prog, args=["--help"], config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit:
            return None
        raise AssertionError("tyro prints help and exits")
    _refuse_unknown_options(arguments, prog, argv)
    argv = _split_numbers(arguments, argv)
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            return tyro.cli(arguments, prog=prog, args=argv, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit:
        raise _unfold(box.getvalue(), prog) from None
    except ConfigError as error:
        # "Arguments: seconds=-1.0 is refused" -> "--seconds=-1.0 is refused"
        problem = error.problem.removeprefix(f"{arguments.__name__}: ")
        name, equals, rest = problem.partition("=")
        if equals and name in arguments.model_fields:
            problem = f"{option(name)}={rest}"
        raise UsageError(f"{prog}: {problem}", error.remedy or f"see `{prog} --help`") from error


def _refuse_unknown_options(arguments: type[Config], prog: str, argv: Sequence[str]) -> None:
    options = [option(name) for name in arguments.model_fields]
    for token in argv:
        if token == "--":
            return
        name = token.split("=", 1)[0]
        if name.startswith("--") and name.replace("_", "-") not in options:
            raise UsageError(f"{prog}: unknown option {name!r}", nearest(name, options))


def _split_numbers(arguments: type[Config], argv: Sequence[str]) -> list[str]:
    """The same with numbers of a list apart that are written with commas between them: `--absence 1,2,5`."""
    lists = {
        option(name)
        for name, field in arguments.model_fields.items()
        if get_origin(field.annotation) is tuple and get_args(field.annotation)[0] in (int, float)
    }
    tokens: list[str] = []
    within = False
    for token in argv:
        name, equals, value = token.partition("=")
        if token.startswith("--"):
            within = name.replace("_", "-") in lists
            if within and equals and "," in value:
                tokens.append(name)
                token = value
        tokens += filter(None, token.split(",")) if within and not token.startswith("--") else [token]
    return tokens


def _unfold(box: str, prog: str) -> UsageError:
    """tyro's box as one line: its first section, without the frame."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # the first line is the title
        text = _FRAME.sub("", line).strip()
        if text:
            sections[-1].append(text)
        else:
            sections.append([])
    message = " ".join(next((section for section in sections if section), ["wrong use"])).rstrip(".")
    remedy = f"see `{prog} --help`"
    if match := _CHOICE.search(message):
        value, name, choices = match.groups()
        valid = re.findall(r"'(.*?)'", choices)
        return UsageError(f"{prog}: {name} cannot be {value!r}", nearest(value, valid))
    if match := _UNEXPECTED.search(message):
        return UsageError(
            f"{prog}: unexpected {match[1]!r}", f"put quotes round a value of several words; {remedy}"
        )
    if match := _MISSING.search(message):
        return UsageError(f"{prog}: {match[1]} is missing", remedy)
    return UsageError(f"{prog}: {message}", remedy)

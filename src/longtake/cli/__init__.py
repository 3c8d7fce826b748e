"""The ``longtake`` command: finds the subcommand, runs it, turns errors into one line and an exit code.

Exit codes: 0 done; 1 done, and the answer is no (``verify``); 2 wrong use, or an error that is the user's to
fix; 130 interrupted. Only the chosen subcommand's module is imported, and that one keeps torch out of its
parsing, so that help and wrong use answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from longtake import __version__
from longtake.errors import LongtakeError, UsageError, nearest

INTERRUPTED: Final = 130  # what a shell reports for a process that SIGINT ended


@dataclass(frozen=True)
class Command:
    """A subcommand: its line in ``longtake --help`` and the module with its ``Arguments`` and ``run``."""

    summary: str
    module: str


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "generate": Command(
            "turn a text prompt into a video, written as it is made", "longtake.cli.generate"
        ),
        "train": Command("train a model by a named recipe; an interrupted run resumes", "longtake.cli.train"),
        "convert": Command("give a dense model latent attention", "longtake.cli.convert"),
        "eval world": Command("score a model on the verifiable world", "longtake.cli.eval_world"),
        "eval vae": Command("measure what a model's autoencoder loses", "longtake.cli.eval_vae"),
        "eval interactive": Command(
            "score streams whose prompt keeps changing", "longtake.cli.eval_interactive"
        ),
        "eval recall": Command("test what a model knows of what left its view", "longtake.cli.eval_recall"),
        "eval gallery": Command(
            "write sample clips of a model next to real ones", "longtake.cli.eval_gallery"
        ),
        "eval conversion": Command(
            "measure what latent attention of one rank after another loses", "longtake.cli.eval_conversion"
        ),
        "eval detectors": Command(
            "measure the world's detectors where truth is known", "longtake.cli.eval_detectors"
        ),
        "bench cpu": Command("measure speed and memory on this machine's CPU", "longtake.cli.bench_cpu"),
        "bench memory": Command("measure what a learned memory costs", "longtake.cli.bench_memory"),
        "bench latent": Command("measure what latent attention saves and costs", "longtake.cli.bench_latent"),
        "bench wan": Command("measure a chunk at Wan2.1-1.3B's size on a GPU", "longtake.cli.bench_wan"),
        "verify": Command("compare the engine with golden recordings", "longtake.cli.verify"),
        "models": Command("list the models that can be used", "longtake.cli.models"),
        "world render": Command("write sample clips of the verifiable world", "longtake.cli.world_render"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name. Returns the exit code."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except LongtakeError as error:
        print("longtake: error:", one_line(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("longtake: interrupted", file=sys.stderr)
        return INTERRUPTED


def one_line(error: LongtakeError) -> str:
    """An error as a script's log wants it."""
    return " ".join(line.strip() for line in str(error).splitlines())


def _dispatch(argv: list[str]) -> int:
    if not argv:
        raise UsageError("no command is given", "see `longtake --help`")
    if argv[0] in ("-h", "--help"):
        print(_help("longtake", COMMANDS))
        return 0
    if argv[0] == "--version":
        print(f"longtake {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    group = {full: command for full, command in COMMANDS.items() if full.startswith(f"{name} ")}
    if group:
        if not rest:
            raise UsageError(f"{name!r} needs a second word", f"see `longtake {name} --help`")
        if rest[0] in ("-h", "--help"):
            print(_help(f"longtake {name}", group))
            return 0
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name not in COMMANDS:
        known = [full.split()[-1] for full in group] or list(
            dict.fromkeys(full.split()[0] for full in COMMANDS)
        )
        raise UsageError(f"unknown command {name.split()[-1]!r}", nearest(name.split()[-1], known))

    # Imported here: parsing needs pydantic and tyro, which `longtake --help` need not wait for.
    from longtake.cli.parse import parse

    module = importlib.import_module(COMMANDS[name].module)
    arguments = parse(module.Arguments, f"longtake {name}", rest)
    code: int = 0 if arguments is None else module.run(arguments)
    return code


def _help(prog: str, commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands)) + 2
    lines = [f"  {name:<{width}}{command.summary}" for name, command in commands.items()]
    return "\n".join(
        [
            f"usage: {prog} COMMAND [OPTIONS]",
            "",
            "Endless video from a text prompt, streamed chunk by chunk at constant cost.",
            "",
            "commands:",
            *lines,
            "",
            "`longtake COMMAND --help` lists a command's options; `longtake --version` prints the version.",
        ]
    )

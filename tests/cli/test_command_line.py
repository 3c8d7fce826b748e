"""The command line as a whole: help, wrong use in one line, and that neither waits for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from longtake import __version__
from longtake.cli import COMMANDS, main


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a wrong command line; returns its one line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("longtake: error: ")
    return err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"longtake {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_every_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    out, _ = capsys.readouterr()
    assert f"usage: longtake {name}" in out
    module = __import__(COMMANDS[name].module, fromlist=["Arguments"])
    for field in module.Arguments.model_fields:
        assert field.replace("_", "-") in out.lower().replace("_", "-")
    assert "longtake.cli" not in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command"),
        (["generat"], "'generat'; did you mean 'generate'?"),
        (["--verbose"], "unknown command '--verbose'"),
        (["world"], "'world' needs a second word"),
        (["world", "rendr"], "'rendr'; did you mean 'render'?"),
        (["bench", "gpu"], "'gpu'"),
        (["world", "render", "--levl", "2"], "'--levl'; did you mean '--level'?"),
        (["world", "render", "--num_scene=2"], "'--num_scene'; did you mean '--num-scenes'?"),
        (["world", "render", "--split", "heldot"], "--split cannot be 'heldot'; did you mean 'heldout'?"),
        (["world", "render", "--level", "4"], "--level cannot be '4'; valid names: 1, 2, 3"),
        (["world", "render", "--seconds", "-1"], "--seconds=-1.0 is refused: Input should be greater than 0"),
        (["world", "render", "--seconds", "soon"], "--seconds: could not convert string to float: 'soon'"),
        (["world", "render", "--seconds"], "Missing value for argument '--seconds'"),
        (["world", "render", "a", "b"], "unexpected 'a, b'; put quotes round"),
        (["verify"], "missing"),
    ],
)
def test_wrong_use_is_one_line_that_names_what_was_meant(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(argv, capsys)


def test_wrong_use_reads_the_same_on_a_terminal_without_unicode() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "longtake", "world", "render", "--seconds", "soon"],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        check=False,
    )
    assert result.returncode == 2
    assert b"could not convert string to float: 'soon'" in result.stderr
    assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["generate", "--help"], ["generate", "--promt", "x"]])
def test_help_and_wrong_use_do_not_wait_for_torch(argv: list[str]) -> None:
    code = (
        f"import sys; from longtake.cli import main; main({argv!r}); "
        "slow = {'torch', 'av', 'numpy', 'scipy', 'diffusers', 'transformers', 'matplotlib', 'rich'}; "
        "loaded = slow & set(sys.modules); sys.exit(str(loaded) if loaded else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

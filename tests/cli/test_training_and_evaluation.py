"""The commands that wrap training and evaluation: arguments reach their configs, reports are written and
told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longtake.cli import eval_detectors, eval_vae, eval_world, main
from longtake.cli.evaluation import Progress, tell
from longtake.cli.train import changed
from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.autoencoder import AutoencoderEvalConfig
from longtake.eval.detectors import DetectorEvalConfig
from longtake.eval.runner import WorldEvalConfig
from longtake.recipes import RECIPES, get_recipe
from model_file import write_model


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (eval_world.Arguments, WorldEvalConfig),
        (eval_vae.Arguments, AutoencoderEvalConfig),
        (eval_detectors.Arguments, DetectorEvalConfig),
    ],
)
def test_arguments_repeat_their_config_faithfully(arguments: type[Config], config: type[Config]) -> None:
    for name, field in config.model_fields.items():
        assert arguments.model_fields[name].default == field.default, name


def test_real_clips_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--scenes", "2", "--seconds", "2", "--window-seconds", "2", "--diversity-prompts", "0"]
    assert main(["eval", "world", *argv, "--ceiling-only", "--policy", "off", "--out", str(tmp_path)]) == 2
    assert "which asks no model" in capsys.readouterr().err
    assert main(["eval", "world", *argv, "--ceiling-only", "--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["config"]["scenes"] == 2
    assert summary["sources"]["truth"]["metrics"]["colour"]["value"] == 1.0
    assert (tmp_path / "report.html").is_file()
    out = capsys.readouterr().out
    assert "colour 1.000, required 0.97: met" in out
    assert "report.html" in out


def test_a_random_model_does_not_meet_the_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors")
    argv = ["--scenes", "2", "--seconds", "2", "--window-seconds", "2", "--diversity-prompts", "0"]
    common = ["eval", "world", *argv, "--model-path", str(model), "--out", str(tmp_path / "out")]
    assert main([*common, "--shard", "0/2"]) == 0
    assert "shard 0/2 is done" in capsys.readouterr().out
    assert not (tmp_path / "out" / "summary.json").exists()
    assert main([*common, "--shard", "1/2"]) == 0
    out, err = capsys.readouterr()
    assert "NOT met" in out
    assert "model: 1 of 1 streams" in err
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["sources"]) == {
        "model",
        "truth",
        "vae",
    }


def test_two_policies_of_one_model_are_compared_pair_by_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    argv = ["--scenes", "2", "--seconds", "2", "--window-seconds", "2", "--diversity-prompts", "0"]
    common = ["eval", "world", *argv, "--model-path", str(model)]
    ran = []
    for name, more in (("own", []), ("kept", ["--policy", "key_frames:stride=2,f_max=9"])):
        out = tmp_path / name
        against = ["--against", str(tmp_path / "own")] if ran else []
        assert main([*common, *more, *against, "--out", str(out)]) == 0
        ran.append(json.loads((out / "summary.json").read_text()))
    own, kept = (summary["sources"]["model"]["about"] for summary in ran)
    assert own["weights"] == kept["weights"]
    assert own["stream_config"] != kept["stream_config"]
    assert ran[1]["against"]["present"]["num"] == 2
    capsys.readouterr()
    for policy, refusal in (("swapped", "nothing to swap"), ("off", "is a mode of a learned memory")):
        assert main([*common, "--policy", policy, "--out", str(tmp_path / policy)]) == 2
        assert refusal in capsys.readouterr().err
        assert not (tmp_path / policy).exists()


def test_a_random_autoencoder_does_not_meet_the_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model.safetensors")
    argv = [
        "--scenes",
        "1",
        "--seconds",
        "2",
        "--model-path",
        str(model),
        "--out",
        f"{tmp_path}/new/vae.json",
    ]
    assert main(["eval", "vae", *argv]) == 0
    assert "bars not met: PSNR" in capsys.readouterr().out
    assert json.loads((tmp_path / "new" / "vae.json").read_text())["psnr_db"]["value"] < 30


def test_detectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--scenes", "2", "--seconds", "2", "--out", str(tmp_path / "detectors.json")]
    assert main(["eval", "detectors", *argv]) == 0
    assert (
        json.loads((tmp_path / "detectors.json").read_text())["accuracy"]["rendered"]["colour"]["value"]
        == 1.0
    )
    assert "blur_noise" in capsys.readouterr().out
    assert main(["eval", "detectors", *argv[:-1], "/proc/no/detectors.json"]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_progress_tells_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for finished in (4, 8):
        progress("model", finished, 12)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "model: 4 of 12 streams"
    assert lines[1].startswith("model: 8 of 12 streams, about 0 s left")


def test_settings_of_a_recipe_can_be_changed_at_any_depth(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = get_recipe("tiny")
    deep = changed(recipe, "windows.loop.num_steps", "7")
    assert deep.windows.loop.num_steps == 7
    assert deep.replace(windows=recipe.windows) == recipe
    assert changed(recipe, "stream.schedule.steps", "[1000, 400]").stream.schedule.steps == (1000, 400)
    assert changed(recipe, "name", "other").name == "other"
    for key, value, words in (
        ("windows.lop.num_steps", "7", "did you mean 'loop'"),
        ("seed.deeper", "7", "no keys inside"),
        ("windows.loop.num_steps", "many", "num_steps='many' is refused"),
    ):
        with pytest.raises(ConfigError, match=words):
            changed(recipe, key, value)

    assert main(["train", "tiny", "--show", "--set", "seed=5", "--set", "windows.loop.num_steps=9"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["seed"] == 5
    assert shown["windows"]["loop"]["num_steps"] == 9


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tny"], "unknown recipe 'tny'; did you mean 'tiny'?"),
        (["tiny", "--stage", "window"], "unknown stage 'window'; did you mean 'windows'?"),
        (["tiny", "--set", "seed"], "has no '='"),
        (["tiny", "--set", "sed=3"], "did you mean 'seed'"),
        ([], "missing"),
    ],
)
def test_wrong_training_commands(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_training_reports_its_directory_and_records_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def record(*arguments: object) -> dict[str, float]:
        calls.append(arguments)
        return {"psnr": 30.5}

    monkeypatch.setattr("longtake.train.run.train", record)
    out = tmp_path / "runs" / "mine"
    argv = [
        "--out",
        str(out),
        "--stage",
        "windows",
        "--stage",
        "vae",
        "--stop-after-seconds",
        "5",
        "--memory-gb",
        "2",
    ]
    assert main(["train", "tiny", *argv]) == 0
    printed, err = capsys.readouterr()
    assert printed == f"{out}\n"
    assert "psnr: 30.5" in err
    assert calls == [(RECIPES["tiny"](), out, ("vae", "windows"), 5.0, 2.0, tell)]
    assert json.loads((out / "recipe.json").read_text())["name"] == "tiny"

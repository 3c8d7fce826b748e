"""The evaluation commands beyond ``eval world``: arguments reach their configs, reports are written and
told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longtake.cli import eval_gallery, eval_interactive, eval_recall, main
from longtake.config import Config
from longtake.eval.gallery import GalleryConfig
from longtake.eval.interactive_records import InteractiveConfig
from longtake.eval.recall_records import RecallConfig
from model_file import write_model


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (eval_interactive.Arguments, InteractiveConfig),
        (eval_gallery.Arguments, GalleryConfig),
        (eval_recall.Arguments, RecallConfig),
    ],
)
def test_arguments_repeat_their_config_faithfully(arguments: type[Config], config: type[Config]) -> None:
    for name, field in config.model_fields.items():
        assert arguments.model_fields[name].default == field.default, name


def test_gallery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors", height=64, width=64)
    out = tmp_path / "out"
    argv = ["--clips", "1", "--worst", "1", "--pool", "1", "--levels", "2"]
    assert main(["eval", "gallery", *argv, "--model-path", str(model), "--out", str(out)]) == 0
    assert f"{out}/README.md: 0." in capsys.readouterr().out
    page = (out / "README.md").read_text()
    assert "--levels 2 --clips 1 --worst 1" in page
    assert "0 of 1 clips" in page


def test_interactive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors")
    out = tmp_path / "out"
    argv = ["--streams", "2", "--prompts", "2", "--seconds-each", "2", "--window", "keep"]
    assert main(["eval", "interactive", *argv, "--model-path", str(model), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "truth: all arrives after 0 frames (0.00 s), 90 % within 0 frames" in told
    assert "model: all arrives after never" in told
    summary = json.loads((out / "interactive.json").read_text())
    assert summary["sources"]["model"]["latency"]["all"]["never"]["value"] == 1
    assert "window keep" in summary["sources"]["model"]["about"]["switches"]
    assert main(["eval", "interactive", "--out", "/proc/none"]) == 2
    assert "cannot create the directory" in capsys.readouterr().err


def test_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors")
    out = tmp_path / "out"
    keeps = write_model(tmp_path / "keeps.safetensors", memory_at_switch="keep")
    policies = ["own", "key_frames:stride=2", f"keeps@{keeps}"]
    argv = ["--scenes", "2", "--absence", "1.5", "--policies", *policies]
    assert main(["eval", "recall", *argv, "--model-path", str(model), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "absence 1.5 windows" in told
    assert "chance, given presence" in told
    summary = json.loads((out / "recall.json").read_text())
    assert summary["test"] == "longtake-recall-v1"
    assert summary["sources"]["truth"]["absences"][0]["gated"]["recalled"]["value"] == 1
    assert "key_frames" in summary["sources"]["key_frames-stride-2"]["about"]["policy"]
    switches = {name: source["about"].get("switches", "") for name, source in summary["sources"].items()}
    assert "memory rebuild" in switches["own"]
    assert "memory keep" in switches["keeps"]
    assert main(["eval", "recall", "--policies", "off", "--model-path", str(model)]) == 2
    assert "is a mode of a learned memory" in capsys.readouterr().err


def test_level_3_needs_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "world", "--level", "3", "--seconds", "10"]) == 2
    assert "seconds=10 is too short for level 3" in capsys.readouterr().err


def test_the_autoencoder_on_level_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model.safetensors", height=64, width=64)
    report = tmp_path / "vae.json"
    argv = ["--level", "3", "--scenes", "3", "--seconds", "5", "--model-path", str(model)]
    assert main(["eval", "vae", *argv, "--out", str(report)]) == 0
    assert "bars not met: PSNR" in capsys.readouterr().out
    truth = json.loads(report.read_text())["truth"]
    assert truth["background"]["value"] == truth["binding"]["value"] == 1.0

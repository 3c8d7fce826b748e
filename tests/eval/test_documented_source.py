"""The example of docs/your-model.md runs as it is printed."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from longtake.eval.script import Script, scenes_for
from longtake.eval.summary import Summary
from longtake.eval.world import SUMMARY_NAME
from longtake.world import render

PAGE = Path(__file__).parents[2] / "docs" / "your-model.md"


def test_the_example_scores_videos_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "scenes=64" in code
    asked: list[int] = []

    def my_model(prompts: list[tuple[tuple[int, str], ...]], seeds: list[int], num_frames: int) -> NDArray:
        asked.extend(seeds)
        made = scenes_for([Script(each) for each in prompts], seeds, 1, 1.0)
        return np.stack([render(scene, 0, num_frames) for scene in made])

    monkeypatch.chdir(tmp_path)
    example = tmp_path / "example.py"
    example.write_text(code.replace("scenes=64", "scenes=1"), encoding="utf-8")
    runpy.run_path(str(example), {"my_model": my_model})
    assert len(asked) == 1
    summary = Summary.load(tmp_path / "outputs" / "mine" / SUMMARY_NAME)
    assert summary.subject == "mine"
    assert summary.sources["mine"].metrics["all_right"].value == 1

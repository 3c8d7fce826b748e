"""The detectors against the eye: 100 frames of a model's output, labelled without sight of their prompts.

`labelled_frames.png` holds them in rows of ten, as the first shipped model made them, rags and doubles
included. A shape of null is one that the eye would not name.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longtake.world.detect import Detections, detect
from longtake.world.vocabulary import BACKGROUNDS, COLOURS, SHAPES

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def labels() -> list[dict[str, object]]:
    loaded: list[dict[str, object]] = json.loads((DATA / "labelled_frames.json").read_text())
    return loaded


@pytest.fixture(scope="module")
def found() -> Detections:
    sheet = np.asarray(Image.open(DATA / "labelled_frames.png").convert("RGB"))
    return detect(sheet.reshape(10, 64, 10, 64, 3).transpose(0, 2, 1, 3, 4).reshape(100, 64, 64, 3))


def agreement(seen: list[object], labels: list[dict[str, object]], name: str) -> float:
    pairs = [(value, row[name]) for value, row in zip(seen, labels, strict=True) if row[name] is not None]
    return float(np.mean([value == label for value, label in pairs]))


def test_colour_and_background_are_what_the_eye_sees(
    found: Detections, labels: list[dict[str, object]]
) -> None:
    colours: list[object] = [COLOURS[index] for index in found.colour[:, 0]]
    backgrounds: list[object] = [BACKGROUNDS[index] for index in found.background]
    assert agreement(colours, labels, "colour") == 1
    assert agreement(backgrounds, labels, "background") == 1


def test_shape_and_number_err_towards_the_model_being_wrong(
    found: Detections, labels: list[dict[str, object]]
) -> None:
    shapes: list[object] = [SHAPES[index] if index >= 0 else None for index in found.shape[:, 0]]
    numbers: list[object] = [int(number) for number in found.num_objects]
    assert agreement(shapes, labels, "shape") >= 0.92  # wide squares read as circles, two-coloured as none
    assert agreement(numbers, labels, "num_objects") >= 0.94  # two colours in one object count twice
    assert all(number >= row["num_objects"] for number, row in zip(numbers, labels, strict=True))

"""``longtake eval gallery``: contact sheets and clips of a model next to real ones, failures included."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from longtake.cli.evaluation import Progress, config_of, make_directory
from longtake.config import Config


class Arguments(Config):
    """Write a gallery: the model next to real clips of the same prompts and seeds, drawn by chance.

    The output directory gets README.md, contact sheets and short clips, less than 1.5 MB in all. Each clip is
    labelled with its prompt and with what the detectors say of it; the worst of the pool follow. The same
    model, seed and machine give the same files.

    Attributes:
        levels: world levels, a section each.
        clips: shown of each level, drawn by chance.
        worst: shown of each level besides, the worst of the pool.
        pool: generated of each level.
        seed: chooses the prompts and the clips.
        out: directory for everything that is written; it is created.
        model_path: name of a model that `longtake models` lists, or path of a .safetensors file.
        split: combinations and wordings that training may see, those held out from it, or any.
        batch: streams generated together.
    """

    levels: tuple[Literal[1, 2, 3], ...] = (1,)
    clips: int = Field(10, ge=1)
    worst: int = Field(3, ge=0)
    pool: int = Field(32, ge=1)
    seed: int = Field(0, ge=0)
    out: Path = Path("docs/gallery")
    model_path: str = "tiny"
    split: Literal["train", "heldout", "any"] = "any"
    batch: int = Field(16, ge=1)


def run(arguments: Arguments) -> int:
    """Write the gallery; returns the exit code."""
    from longtake.eval.gallery import GalleryConfig, write_gallery
    from longtake.eval.model import ModelSource, ceilings
    from longtake.stream.bundle import load_model

    config = config_of(GalleryConfig, arguments)
    make_directory(arguments.out)
    model = load_model(arguments.model_path)
    subject = ModelSource(model.pipeline, model.card.name)
    levels = " ".join(map(str, config.levels))
    command = (
        f"longtake eval gallery --model-path {arguments.model_path} --levels {levels} --clips {config.clips} "
        f"--worst {config.worst} --pool {config.pool} --seed {config.seed} --split {config.split}"
    )
    total = write_gallery(
        config,
        subject,
        lambda level: ceilings(model.pipeline, level)[0],
        arguments.out,
        command,
        Progress(),
    )
    print(f"{arguments.out / 'README.md'}: {total / 1e6:.2f} MB in all")
    return 0

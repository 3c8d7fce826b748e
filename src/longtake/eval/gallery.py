"""A gallery of a model next to real clips of the same prompts and seeds, drawn by chance and not by hand.

Failures are shown and marked as the detectors find them; the worst clips of the pool get a section of their
own. The same model, seed and machine give the same files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.meter import Meter
from longtake.eval.runner import FIRST_EVAL_SEED, MAX_PANNING_SAMPLE_FRAMES, SEEDS_APART
from longtake.eval.score import Scores, score
from longtake.eval.script import Script
from longtake.eval.sheet import contact_sheet
from longtake.io.plot import pyplot
from longtake.io.video import VideoConfig, open_video
from longtake.world import FPS, VERSION, Split, sample_scene

if TYPE_CHECKING:
    from longtake.eval.source import VideoSource  # which imports torch; a command's help does without

Frames = NDArray[np.uint8]

JUDGED_BY: Final[Mapping[int, tuple[str, ...]]] = MappingProxyType(
    {
        1: ("present", "colour", "shape", "background", "motion"),
        2: ("binding", "background"),
        3: ("binding", "background", "switch", "shown", "return_present", "return_colour"),
    }
)
"""What decides at each level whether a clip is right."""
MIN_SHARE: Final = 0.9
"""A clip is right where each of these is at least this."""
SECONDS: Final[Mapping[int, float]] = MappingProxyType({1: 5.0, 2: 5.0, 3: 24.0})
"""Length of the clips by level: at level 3 every object that leaves at once has come back."""
COLUMNS: Final = 8
LABEL_WIDTH: Final = 88
SHEET_LEVELS: Final = 64
CRFS: Final = (24, 28, 32, 36, 40, 44)
"""Qualities of the clips, best first: the first one that keeps to the size is used."""
MAX_BYTES: Final = 1_500_000


class GalleryConfig(Config):
    """A gallery.

    Attributes:
        levels: World levels, a section each.
        clips: Shown of each level, drawn by chance.
        worst: Shown of each level besides, the worst of the pool.
        pool: Generated of each level.
        seed: Chooses the prompts and the clips.
        split: Which combinations and wordings: "train", "heldout" or "any".
        batch: Streams generated together.
    """

    levels: tuple[int, ...] = (1,)
    clips: int = Field(10, ge=1)
    worst: int = Field(3, ge=0)
    pool: int = Field(32, ge=1)
    seed: int = Field(0, ge=0)
    split: Split = "any"
    batch: int = Field(16, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> GalleryConfig:
        unknown = [level for level in self.levels if level not in SECONDS]
        if unknown or not self.levels:
            raise ConfigError(f"levels={self.levels} are no world levels", "use some of 1, 2, 3")
        if self.pool < self.clips:
            raise ConfigError(
                f"pool={self.pool} has no {self.clips} clips to show", f"use pool >= {self.clips}"
            )
        return self


@dataclass(frozen=True)
class Clip:
    """A clip of the pool.

    Attributes:
        number: In the pool, from 1.
        script: What was asked for.
        seed: Of its noise, and of what the real clip leaves open.
        frames: uint8 [T, H, W, 3] by source.
        scores: By source.
    """

    number: int
    script: Script
    seed: int
    frames: dict[str, Frames]
    scores: dict[str, Scores]


def write_gallery(
    config: GalleryConfig,
    subject: VideoSource,
    truths: Callable[[int], VideoSource],
    out: Path,
    command: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Writes `README.md`, and for each level contact sheets and clips (the model left, the real clip right).

    Args:
        config: What to show.
        subject: The model.
        truths: Real clips of a level, chunked like the model's.
        out: Directory; created if missing. Files of an earlier gallery are replaced or removed.
        command: How the gallery is made, for its page.
        progress: Called with ("level 1", finished, all) after every batch.

    Returns:
        Bytes written.

    Raises:
        EvalError: even the coarsest clips exceed `MAX_BYTES`.
    """
    pyplot()  # a missing package is told before the work, not after
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("level-*.png"), *out.glob("level-*.mp4")):
        old.unlink()
    videos: dict[str, Frames] = {}
    sections = []
    for level in config.levels:
        pool = _pool(config, level, subject, truths(level), progress)
        order = np.random.default_rng((config.seed, level)).permutation(len(pool))[: config.clips]
        shown = [pool[index] for index in sorted(order.tolist())]
        failed = [clip for clip in pool if faults(clip.scores[subject.name], level)]
        worst = sorted(failed, key=lambda clip: _merit(clip.scores[subject.name], level))[: config.worst]
        _sheet(shown, level, subject.name, out / f"level-{level}.png")
        if worst:
            _sheet(worst, level, subject.name, out / f"level-{level}-worst.png")
        for clip in [*shown, *worst]:
            videos[_video_name(level, clip)] = np.concatenate(list(clip.frames.values()), axis=2)
        sections.append(_section(level, subject.name, shown, worst, len(pool) - len(failed), len(pool)))
    page = _page(config, subject, sections, command)
    (out / "README.md").write_text(page, encoding="utf-8")
    return _write_videos(videos, out, MAX_BYTES)


def faults(scores: Scores, level: int) -> list[str]:
    """What of `JUDGED_BY` is below `MIN_SHARE`, each with its value; empty for a clip that is right."""
    return [
        f"{name.replace('_', ' ')} {value:.2f}"
        for name in JUDGED_BY[level]
        if (value := scores[name]) is not None and value < MIN_SHARE
    ]


def _merit(scores: Scores, level: int) -> float:
    known = [value for name in JUDGED_BY[level] if (value := scores[name]) is not None]
    return float(np.mean(known))


def _pool(
    config: GalleryConfig,
    level: int,
    subject: VideoSource,
    truth: VideoSource,
    progress: Callable[[str, int, int], None] | None,
) -> list[Clip]:
    num_frames = round(SECONDS[level] * FPS)
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    seeds = list(range(first, first + config.pool))
    scripts = [Script(sample_scene(seed, level, config.split).captions) for seed in seeds]
    scripts = [script.on(subject.chunking, num_frames) for script in scripts]
    clips: list[Clip] = []
    for begin in range(0, config.pool, config.batch):
        part = slice(begin, begin + config.batch)
        frames: dict[str, Frames] = {}
        scores: dict[str, list[Scores]] = {}
        for source in (subject, truth):
            chunks = list(source.generate(scripts[part], seeds[part], num_frames))
            frames[source.name] = np.concatenate(chunks, axis=1)[:, :num_frames]
            meter = Meter(num_frames, MAX_PANNING_SAMPLE_FRAMES if level == 3 else 4)
            meter.feed(frames[source.name])
            scores[source.name] = [
                score(measured, script, num_frames, source.chunking)[0]
                for measured, script in zip(meter.results(), scripts[part], strict=True)
            ]
        for row, (script, seed) in enumerate(zip(scripts[part], seeds[part], strict=True)):
            clips.append(
                Clip(
                    number=begin + row + 1,
                    script=script,
                    seed=seed,
                    frames={name: batch[row] for name, batch in frames.items()},
                    scores={name: listed[row] for name, listed in scores.items()},
                )
            )
        if progress is not None:
            progress(f"level {level}", len(clips), config.pool)
    return clips


def _verdict(scores: Scores, level: int) -> str:
    wrong = faults(scores, level)
    return f"WRONG: {', '.join(wrong)}" if wrong else "right"


def _sheet(clips: Sequence[Clip], level: int, subject: str, path: Path) -> None:
    """Two rows for each clip: the model, then the real one."""
    rows, labels, marked = [], [], []
    for clip in clips:
        for name, frames in clip.frames.items():
            title = "model" if name == subject else "real clip"
            lines = [f"{title}: {_verdict(clip.scores[name], level)}"]
            if name == subject:
                lines = [*textwrap.wrap(f"{clip.number}. {clip.script.text}", LABEL_WIDTH), *lines]
            rows.append(frames)
            labels.append("\n".join(lines))
            marked.append(bool(faults(clip.scores[name], level)))
    contact_sheet(rows, path, COLUMNS, labels, scale=1, marked=marked, levels=SHEET_LEVELS)


def _video_name(level: int, clip: Clip) -> str:
    return f"level-{level}-{clip.number:03d}.mp4"


def _section(
    level: int, subject: str, shown: Sequence[Clip], worst: Sequence[Clip], num_right: int, num: int
) -> str:
    rules = ", ".join(name.replace("_", " ") for name in JUDGED_BY[level])
    lines = [
        f"## World level {level}",
        "",
        f"{num_right} of {num} clips of {SECONDS[level]:g} s are right: {rules} at least {MIN_SHARE:g} each, "
        "where they apply.",
        "",
        f"### {len(shown)} drawn by chance",
        "",
        f"![level {level}, drawn by chance](level-{level}.png)",
        "",
        *_clip_table(level, subject, shown),
    ]
    if worst:
        lines += [
            "",
            f"### The {len(worst)} worst of {num}",
            "",
            f"![level {level}, the worst](level-{level}-worst.png)",
            "",
            *_clip_table(level, subject, worst),
        ]
    return "\n".join(lines)


def _clip_table(level: int, subject: str, clips: Sequence[Clip]) -> list[str]:
    rows = ["| clip | prompt | the model | the real clip |", "|---|---|---|---|"]
    for clip in clips:
        verdicts = [_verdict(clip.scores[name], level) for name in clip.frames]
        prompt = clip.script.text.replace("|", "<br>")
        rows.append(
            f"| [{clip.number}]({_video_name(level, clip)}) | {prompt} | " + " | ".join(verdicts) + " |"
        )
    return rows


def _page(config: GalleryConfig, subject: VideoSource, sections: Sequence[str], command: str) -> str:
    about = ", ".join(f"{key} `{value[:16]}`" for key, value in subject.about.items())
    return "\n".join(
        [
            "# Gallery",
            "",
            "The model next to real clips of the same prompts and seeds. Nothing is chosen by hand: of "
            f"each level's {config.pool} prompts (seed {config.seed}, split {config.split}) {config.clips} "
            "are drawn by chance, failures included, and the worst follow. Verdicts are the detectors'. In "
            "the clips the model is on the left.",
            "",
            f"Made by `{command}`: {about}, world {VERSION}.",
            "",
            "\n\n".join(sections),
            "",
        ]
    )


def _write_videos(videos: Mapping[str, Frames], out: Path, budget: int) -> int:
    """Writes the clips in the best quality that keeps the directory within the budget; returns its bytes."""
    for crf in CRFS:
        settings = VideoConfig(fps=FPS, crf=crf, preset="veryslow", keyframe_seconds=60)
        for name, frames in videos.items():
            with open_video(out / name, settings) as writer:
                writer.write(frames)
        files = [out / "README.md", *out.glob("level-*.png"), *out.glob("level-*.mp4")]
        total = sum(file.stat().st_size for file in files)
        if total <= budget:
            return total
    raise EvalError(
        f"the gallery takes {total / 1e6:.2f} MB, more than {budget / 1e6:g}",
        "use fewer --clips, --worst or --levels",
    )

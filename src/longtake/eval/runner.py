"""`longtake eval world`: prompts from the world, batched streams, detections, records that resume and merge.

One line of JSON per finished stream is appended to `<source>-<shard>of<shards>.jsonl`; a run that finds its
streams there skips them, and whichever run completes the last shard writes the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pydantic import Field, model_validator

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.diversity import start_of
from longtake.eval.meter import Measured, Meter
from longtake.eval.records import Shard, ShardedRecords
from longtake.eval.returns import LONGEST_ABSENCE_FRAMES
from longtake.eval.score import METRICS, Record, assign, picked, score
from longtake.eval.script import Script
from longtake.eval.sheet import SheetKeeper
from longtake.world import FPS, VERSION, Split, parse_caption, sample_scene
from longtake.world.captions import Attributes
from longtake.world.vocabulary import HELDOUT_COMBINATIONS

if TYPE_CHECKING:
    from longtake.eval.source import VideoSource  # which imports torch; a command's help does without

FIRST_EVAL_SEED: Final = 1 << 40
"""Scenes for evaluation start here, far from any seed that training counts up to."""
SEEDS_APART: Final = 1 << 20
"""Distance between the first scenes of two evaluation seeds, hence the largest number of scenes."""


DEFAULT_SECONDS: Final = {1: 5.0, 2: 5.0, 3: 40.0}
"""Length of the streams by level. At level 3 it is twice the longest absence from the view: whatever leaves
in the first half must be back by the end."""
MAX_PANNING_SAMPLE_FRAMES: Final = 2
"""Objects cross the edge of a panning view within a few frames."""


class WorldEvalConfig(Config):
    """An evaluation against the world.

    Attributes:
        level: World level of the prompts: 1, 2 (up to three objects, small ones, hills), or 3 (objects that
            leave a panning view and come back; prompt switches).
        scenes: Scripts (prompts, or prompts with switches); each is one stream.
        seconds: Length of every stream; None for 5, and 40 at level 3, which needs more than 20.
        seed: Chooses the scenes.
        split: Which combinations and wordings: "train", "heldout" (only held-out ones) or "any".
        sample_every_frames: Every n-th frame goes to the detectors; at level 3 every second one at least.
        window_seconds: Motion and drift are judged per window of this length.
        batch: Streams generated together.
        diversity_prompts: This many prompts are generated again, with other seeds and for one second.
        diversity_seeds: Seeds for each of these.

    Raises:
        ConfigError: At level 3, clips too short to tell what stays away from what is yet to come.
    """

    level: Literal[1, 2, 3] = 1
    scenes: int = Field(200, ge=1, le=SEEDS_APART)
    seconds: float | None = Field(None, ge=1.0)
    seed: int = Field(0, ge=0)
    split: Split = "any"
    sample_every_frames: int = Field(4, ge=1, le=6)
    window_seconds: float = Field(5.0, ge=2.0)
    batch: int = Field(16, ge=1)
    diversity_prompts: int = Field(8, ge=0)
    diversity_seeds: int = Field(16, ge=2)

    @model_validator(mode="after")
    def _long_enough(self) -> WorldEvalConfig:
        if self.level == 3 and self.num_frames <= LONGEST_ABSENCE_FRAMES:
            longest = LONGEST_ABSENCE_FRAMES / FPS
            raise ConfigError(
                f"seconds={self.length_seconds:g} is too short for level 3: objects leave the view for up to "
                f"{longest:g} s, and none could be told to be missing",
                f"use seconds > {longest:g}; {DEFAULT_SECONDS[3]:g} is the default",
            )
        return self

    @property
    def length_seconds(self) -> float:
        """Length of every stream, the level's default filled in."""
        return DEFAULT_SECONDS[self.level] if self.seconds is None else self.seconds

    @property
    def num_frames(self) -> int:
        """Frames of every stream."""
        return round(self.length_seconds * FPS)

    @property
    def detect_every_frames(self) -> int:
        """Every n-th frame goes to the detectors, the level considered."""
        if self.level == 3:
            return min(self.sample_every_frames, MAX_PANNING_SAMPLE_FRAMES)
        return self.sample_every_frames


@dataclass(frozen=True)
class Job:
    """One stream to generate."""

    kind: str
    index: int
    seed: int
    script: Script
    num_frames: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the stream within an evaluation."""
        return (self.kind, self.index, self.seed)


def jobs(config: WorldEvalConfig) -> list[Job]:
    """All streams of an evaluation, scenes first."""
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    scripts = [
        Script(sample_scene(first + i, config.level, config.split).captions) for i in range(config.scenes)
    ]
    listed = [Job("scene", i, first + i, script, config.num_frames) for i, script in enumerate(scripts)]
    for index in range(min(config.diversity_prompts, config.scenes)):
        opening = Script.of(scripts[index].prompts[0][1])
        for again in range(config.diversity_seeds):
            seed = first + index + (again + 1) * SEEDS_APART // (config.diversity_seeds + 1)
            listed.append(Job("diversity", index, seed, opening, min(FPS, config.num_frames)))
    return listed


def comparable(config: WorldEvalConfig) -> WorldEvalConfig:
    """The config without what changes no result."""
    return config.replace(batch=WorldEvalConfig().batch)


def pairable(config: WorldEvalConfig) -> WorldEvalConfig:
    """The config without what changes no scene's result, nor which scenes come first."""
    plain = WorldEvalConfig()
    return comparable(config).replace(
        scenes=plain.scenes, diversity_prompts=plain.diversity_prompts, seconds=config.length_seconds
    )


class Named(Protocol):
    """What identifies a source of videos: see `VideoSource`."""

    @property
    def name(self) -> str:
        """Short name."""
        ...

    @property
    def about(self) -> dict[str, str]:
        """Provenance."""
        ...


def fingerprint(config: WorldEvalConfig, source: Named) -> dict[str, object]:
    """What two runs must share for their records to be put together."""
    return {
        "config": comparable(config).digest(),
        "world": VERSION,
        "metrics": list(METRICS),
        "source": source.name,
        "about": source.about,
    }


def evaluate(
    config: WorldEvalConfig,
    source: VideoSource,
    out: Path,
    shard: Shard | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Generates, measures and records this shard's streams, skipping those already recorded.

    Args:
        config: What to evaluate.
        source: Where the videos come from.
        out: Directory for the records; created if missing.
        shard: Which part of the streams; all by default.
        progress: Called with (finished, all) streams of the shard after every batch.

    Returns:
        The shard's records.

    Raises:
        EvalError: `out` holds records of another evaluation, or cannot be written.
    """
    shard = shard or Shard()
    file = _records(config, source, out, shard)
    mine = shard.of(jobs(config))
    found = {(record.kind, record.index, record.seed): record for record in file.resume()}
    records = [found[job.key] for job in mine if job.key in found]
    todo = [job for job in mine if job.key not in found]
    for batch in _batches(todo, config.batch):
        keeper = None if sheet_path(out, source.name).exists() else SheetKeeper(batch[0].num_frames)
        fresh = _run_batch(config, source, batch, keeper)
        file.append(fresh)
        records += fresh
        if keeper is not None:
            keeper.write(sheet_path(out, source.name), [job.script.text for job in batch])
        if progress is not None:
            progress(len(records), len(mine))
    return records


def merge(config: WorldEvalConfig, source: Named, out: Path) -> list[Record] | None:
    """The records of all shards in job order, or None while some are missing."""
    recorded = _records(config, source, out, Shard()).read()
    found = {(record.kind, record.index, record.seed): record for record in recorded}
    keys = [job.key for job in jobs(config)]
    return [found[key] for key in keys] if all(key in found for key in keys) else None


def _batches(todo: Sequence[Job], size: int) -> Iterable[list[Job]]:
    """Jobs of equal length, up to `size` at once."""
    for num_frames in dict.fromkeys(job.num_frames for job in todo):
        same = [job for job in todo if job.num_frames == num_frames]
        for begin in range(0, len(same), size):
            yield same[begin : begin + size]


def _run_batch(
    config: WorldEvalConfig, source: VideoSource, batch: Sequence[Job], keeper: SheetKeeper | None
) -> list[Record]:
    num_frames = batch[0].num_frames
    meter = Meter(num_frames, config.detect_every_frames)
    scripts = [job.script.on(source.chunking, num_frames) for job in batch]
    for chunk_bthwc in source.generate(scripts, [job.seed for job in batch], num_frames):
        meter.feed(chunk_bthwc)
        if keeper is not None:
            keeper.feed(chunk_bthwc)
        if meter.done:
            break
    return [
        _record(config, source, job, script, measured)
        for job, script, measured in zip(batch, scripts, meter.results(), strict=True)
    ]


def _record(
    config: WorldEvalConfig, source: VideoSource, job: Job, script: Script, measured: Measured
) -> Record:
    window_frames = round(config.window_seconds * FPS)
    scores, windows, returned = score(measured, script, window_frames, source.chunking)
    asked = [parse_caption(text) for _, text in script.prompts]
    first_sn = assign(measured.detections, asked[0])[:, :1]
    start = None
    if first_sn.shape[1]:
        center_s2 = picked(measured.detections.center_xy, first_sn[:, 0])
        radius_s = picked(measured.detections.radius, first_sn[:, 0])
        start = start_of(center_s2, radius_s, measured.frames)
    return Record(
        kind=job.kind,
        index=job.index,
        seed=job.seed,
        prompts=script.prompts,
        heldout=any(_is_heldout(item) for item in asked),
        scores=scores,
        windows=windows,
        returns=returned,
        start=start,
    )


def _is_heldout(asked: Attributes) -> bool:
    combinations = {(item.colour, item.shape, item.motion) for item in asked.objects}
    return bool(combinations & HELDOUT_COMBINATIONS)


def sheet_path(out: Path, name: str) -> Path:
    """Where the contact sheet of a source's first videos lies."""
    return out / f"sheet-{name}.png"


def _records(config: WorldEvalConfig, source: Named, out: Path, shard: Shard) -> ShardedRecords[Record]:
    return ShardedRecords(out, source.name, shard, Record, fingerprint(config, source))

"""`longtake eval world`: prompts from the world, batched streams, detections, records that resume and merge.

One line of JSON per finished stream is appended to `<source>-<shard>of<shards>.jsonl`; a run that finds its
streams there skips them, and whichever run completes the last shard writes the report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from pydantic import Field

from longtake.config import Config
from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.meter import Meter
from longtake.eval.score import Record, score
from longtake.eval.sheet import SheetKeeper
from longtake.world import FPS, VERSION, Split, parse_caption, sample_scene
from longtake.world.vocabulary import HELDOUT_COMBINATIONS, REFERENCE_HEIGHT

if TYPE_CHECKING:
    from longtake.eval.source import VideoSource  # which imports torch; a command's help does without

FIRST_EVAL_SEED: Final = 1 << 40
"""Scenes for evaluation start here, far from any seed that training counts up to."""
SEEDS_APART: Final = 1 << 20
"""Distance between the first scenes of two evaluation seeds, hence the largest number of scenes."""


class WorldEvalConfig(Config):
    """An evaluation against the world.

    Attributes:
        level: World level of the prompts: 1, or 2 (up to three objects, small ones, hills).
        scenes: Prompts; each is one stream.
        seconds: Length of every stream.
        seed: Chooses the scenes.
        split: Which combinations and wordings: "train", "heldout" (only held-out ones) or "any".
        sample_every_frames: Every n-th frame goes to the detectors.
        window_seconds: Motion and drift are judged per window of this length.
        batch: Streams generated together.
        diversity_prompts: This many prompts are generated again, with other seeds and for one second.
        diversity_seeds: Seeds for each of these.
    """

    level: Literal[1, 2] = 1
    scenes: int = Field(200, ge=1, le=SEEDS_APART)
    seconds: float = Field(5.0, ge=1.0)
    seed: int = Field(0, ge=0)
    split: Split = "any"
    sample_every_frames: int = Field(4, ge=1, le=6)
    window_seconds: float = Field(5.0, ge=2.0)
    batch: int = Field(16, ge=1)
    diversity_prompts: int = Field(8, ge=0)
    diversity_seeds: int = Field(4, ge=2)

    @property
    def num_frames(self) -> int:
        """Frames of every stream."""
        return round(self.seconds * FPS)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads "i/n", i from 0.

        Raises:
            EvalError: Not of that form, or i is not below n.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise EvalError(f"shard {text!r} is not i/n with 0 <= i < n", "use for instance 0/4")
        return cls(int(index), int(count))


@dataclass(frozen=True)
class Job:
    """One stream to generate."""

    kind: str
    index: int
    seed: int
    prompt: str
    num_frames: int

    @property
    def key(self) -> tuple[str, int, int]:
        """Identifies the stream within an evaluation."""
        return (self.kind, self.index, self.seed)


def jobs(config: WorldEvalConfig) -> list[Job]:
    """All streams of an evaluation, scenes first."""
    first = FIRST_EVAL_SEED + config.seed * SEEDS_APART
    prompts = [sample_scene(first + i, config.level, config.split).caption for i in range(config.scenes)]
    listed = [Job("scene", i, first + i, text, config.num_frames) for i, text in enumerate(prompts)]
    for index in range(min(config.diversity_prompts, config.scenes)):
        for again in range(config.diversity_seeds):
            seed = first + index + (again + 1) * SEEDS_APART // (config.diversity_seeds + 1)
            listed.append(Job("diversity", index, seed, prompts[index], min(FPS, config.num_frames)))
    return listed


def fingerprint(config: WorldEvalConfig, source: VideoSource) -> dict[str, object]:
    """What two runs must share for their records to be put together."""
    comparable = config.replace(batch=WorldEvalConfig().batch)  # the batch changes no result
    return {"config": comparable.digest(), "world": VERSION, "source": source.name, "about": source.about}


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
    path = _records_path(out, source.name, shard)
    mine = jobs(config)[shard.index :: shard.count]
    records = _resume(path, fingerprint(config, source))
    done = {(record.kind, record.index, record.seed) for record in records}
    todo = [job for job in mine if job.key not in done]
    with path.open("a", encoding="utf-8") as file:
        for batch in _batches(todo, config.batch):
            keeper = None if sheet_path(out, source.name).exists() else SheetKeeper(batch[0].num_frames)
            for record in _run_batch(config, source, batch, keeper):
                file.write(record.model_dump_json() + "\n")
                records.append(record)
            if keeper is not None:
                keeper.write(sheet_path(out, source.name), [job.prompt for job in batch])
            file.flush()
            os.fsync(file.fileno())
            if progress is not None:
                progress(len(records), len(mine))
    return records


def merge(config: WorldEvalConfig, source: VideoSource, out: Path) -> list[Record] | None:
    """The records of all shards in job order, or None while some are missing."""
    expected = fingerprint(config, source)
    found: dict[tuple[str, int, int], Record] = {}
    for path in sorted(out.glob(f"{source.name}-*of*.jsonl")):
        for record in _read(path, expected):
            found[(record.kind, record.index, record.seed)] = record
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
    meter = Meter(batch[0].num_frames, config.sample_every_frames)
    chunks = source.generate([job.prompt for job in batch], [job.seed for job in batch], batch[0].num_frames)
    for chunk_bthwc in chunks:
        meter.feed(chunk_bthwc)
        if keeper is not None:
            keeper.feed(chunk_bthwc)
        if meter.done:
            break
    records = []
    for job, measured in zip(batch, meter.results(), strict=True):
        wanted = parse_caption(job.prompt)
        scores, windows = score(measured, wanted, round(config.window_seconds * FPS))
        first = measured.detections.center_xy[0, 0] * REFERENCE_HEIGHT
        seen = measured.detections.num_objects[0] > 0
        combinations = {(item.colour, item.shape, item.motion) for item in wanted.objects}
        records.append(
            Record(
                kind=job.kind,
                index=job.index,
                seed=job.seed,
                prompt=job.prompt,
                heldout=bool(combinations & HELDOUT_COMBINATIONS),
                scores=scores,
                windows=windows,
                first_center=(float(first[0]), float(first[1])) if seen else None,
            )
        )
    return records


def sheet_path(out: Path, name: str) -> Path:
    """Where the contact sheet of a source's first videos lies."""
    return out / f"sheet-{name}.png"


def _records_path(out: Path, name: str, shard: Shard) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvalError(f"cannot create the directory {str(out)!r}: {error.strerror}") from error
    return out / f"{name}-{shard.index}of{shard.count}.jsonl"


def _resume(path: Path, expected: dict[str, object]) -> list[Record]:
    """Earlier records; a line cut off by a crash is dropped from the file."""
    if not path.exists():
        path.write_text(json.dumps(expected) + "\n", encoding="utf-8")
        return []
    records = _read(path, expected)
    lines = [json.dumps(expected), *(record.model_dump_json() for record in records)]
    partial = path.with_suffix(".part")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)
    return records


def _read(path: Path, expected: dict[str, object]) -> list[Record]:
    lines = path.read_text(encoding="utf-8").split("\n")
    try:
        header = json.loads(lines[0])
    except ValueError as error:
        raise EvalError(f"{str(path)!r} is no file of records", "use another --out") from error
    different = [name for name in expected if header.get(name) != expected[name]]
    if different:
        raise EvalError(
            f"{str(path)!r} holds records with another {', '.join(different)}",
            "use another --out or delete the file",
        )
    records = []
    for number, line in enumerate(lines[1:-1], start=2):  # the last piece is empty, or was cut off
        try:
            records.append(Record.loads(line, source=f"{path}:{number}"))
        except ConfigError as error:
            raise EvalError(error.problem, f"delete line {number}") from error
    return records

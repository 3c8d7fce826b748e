"""`longtake eval recall`: is what left the view for longer than the window still known when it comes back?

One line of JSON per finished stream is appended to `recall-<source>-<shard>of<shards>.jsonl`; a run that
finds its streams there, or in another shard's file, skips them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from longtake.eval.errors import EvalError
from longtake.eval.meter import Meter
from longtake.eval.recall_plot import draw
from longtake.eval.recall_records import (
    NAME,
    SAMPLE_EVERY_FRAMES,
    RecallConfig,
    RecallRecord,
    header_of,
    record_of,
    scenes_of,
)
from longtake.eval.recall_summary import RecallSummary, summarize
from longtake.eval.recall_videos import RecallVideos
from longtake.eval.records import Shard, ShardedRecords
from longtake.eval.script import Script
from longtake.eval.sheet import SheetKeeper
from longtake.io.plot import pyplot
from longtake.world import VERSION
from longtake.world.recall import RecallScene

SUMMARY_NAME: Final = "recall.json"
PNG_NAME: Final = "recall.png"
SHEET_COLUMNS: Final = 24


def run_recall(
    config: RecallConfig,
    sources: Sequence[RecallVideos],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    shard: Shard | None = None,
) -> RecallSummary | None:
    """Tests every source on one shard's scenes; the last shard to finish writes `recall.json` and
    `recall.png`.

    Args:
        config: What to test.
        sources: The subject first, whose window lengths are counted in; then others and real clips.
        out: Directory; created if missing.
        progress: Called with a source's name and its (finished, all) streams of the shard after every batch.
        shard: Which part of the scenes, pairs kept together; all by default.

    Returns:
        The summary, or None while scenes of other shards are missing.

    Raises:
        EvalError: `out` holds records of another test, or sources whose chunks differ. PackageError:
            matplotlib (extra `eval`) is missing.
    """
    pyplot()  # a missing package is told before the work, not after
    shard = shard or Shard()
    chunking = sources[0].chunking
    window = chunking.window_frames
    if window is None:
        raise EvalError(
            "an absence is counted in windows, and the model's is unlimited", "test another model"
        )
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise EvalError(f"sources {names} share a name", "name each policy once")
    aspect = sources[0].aspect
    scenes = {
        length: scenes_of(config, length, window, chunking.boundary, aspect) for length in config.absence
    }
    files = {}
    for source in sources:
        theirs = source.chunking
        if (theirs.first_frames, theirs.frames) != (chunking.first_frames, chunking.frames):
            raise EvalError(f"{source.name} makes chunks of another length", "compare models of equal chunks")
        if source.aspect != aspect:
            raise EvalError(f"{source.name} makes pictures of another shape", "compare models of one shape")
        for listed in scenes.values():
            source.check(listed)
        header = {**header_of(config, chunking, aspect), "source": source.name, "about": source.about}
        files[source.name] = ShardedRecords(out, f"recall-{source.name}", shard, RecallRecord, header)
    found = {name: file.resume() for name, file in files.items()}  # refused before anything is filmed
    for source in sources:
        file = files[source.name]
        _film(config, source, scenes, file, _by_scene(found[source.name]), shard, out, progress)
    records = {name: _complete(scenes, _by_scene(file.read())) for name, file in files.items()}
    complete = {name: listed for name, listed in records.items() if listed is not None}
    if len(complete) < len(records):
        return None
    generator = hashlib.sha256(repr(list(scenes.values())).encode()).hexdigest()
    summary = RecallSummary(
        test=NAME,
        generator=generator,
        config=config,
        world_version=VERSION,
        window_frames=window,
        subject=names[0],
        sources=summarize(complete, {source.name: source.about for source in sources}),
    )
    summary.dump(out / SUMMARY_NAME)
    draw(summary, out / PNG_NAME)
    return summary


_Found = dict[tuple[float, int], RecallRecord]
"""Records by absence and scene."""


def _by_scene(records: Sequence[RecallRecord]) -> _Found:
    """The records by absence and scene."""
    return {(record.absence, record.index): record for record in records}


def _complete(scenes: Mapping[float, Sequence[RecallScene]], found: _Found) -> list[RecallRecord] | None:
    """The records of all scenes in order, or None while some are missing."""
    wanted = [(absence, index) for absence, listed in scenes.items() for index in range(len(listed))]
    return [found[key] for key in wanted] if all(key in found for key in wanted) else None


def _film(
    config: RecallConfig,
    source: RecallVideos,
    scenes: Mapping[float, Sequence[RecallScene]],
    file: ShardedRecords[RecallRecord],
    found: _Found,
    shard: Shard,
    out: Path,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Films and records the shard's scenes that no shard has recorded."""
    mine = {absence: shard.of(_pairs(len(listed))) for absence, listed in scenes.items()}
    wanted = [(absence, index) for absence, pairs in mine.items() for pair in pairs for index in pair]
    for absence, listed in scenes.items():
        sheet = out / f"recall-{source.name}-{absence:g}.png"
        for indices in _batches(config, absence, mine[absence], found):
            batch = [listed[index] for index in indices]
            num_frames = max(made.num_frames for made in batch)
            meter = Meter(num_frames, SAMPLE_EVERY_FRAMES)
            keeper = SheetKeeper(num_frames, SHEET_COLUMNS)
            for chunk_bthwc in source.film(batch, num_frames):
                meter.feed(chunk_bthwc)
                keeper.feed(chunk_bthwc)
                if meter.done:
                    break
            fresh = [
                record_of(index, absence, made, measured)
                for index, made, measured in zip(indices, batch, meter.results(), strict=True)
            ]
            file.append(fresh)
            found |= _by_scene(fresh)
            if not sheet.exists():
                keeper.write(sheet, [Script(made.scene.captions).text for made in batch])
            if progress is not None:
                progress(source.name, sum(key in found for key in wanted), len(wanted))


def _pairs(count: int) -> list[list[int]]:
    """Indices of scenes whose memories a control exchanges."""
    return [list(range(first, min(first + 2, count))) for first in range(0, count, 2)]


def _batches(
    config: RecallConfig, absence: float, pairs: Sequence[list[int]], found: _Found
) -> Iterator[list[int]]:
    """Indices of scenes that are not recorded, whole pairs together."""
    missing = [pair for pair in pairs if any((absence, index) not in found for index in pair)]
    size = max(1, config.batch // 2)
    for begin in range(0, len(missing), size):
        yield [index for pair in missing[begin : begin + size] for index in pair]

"""The interactive test: streams whose prompt is switched every few seconds, as a user would.

Measured are adherence to each prompt while it is in force, and *switch latency*: frames from the one where a
switch takes effect until the first one from which what the new prompt asks for holds for `HOLD_FRAMES`.

Legend: b streams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from longtake.eval.interactive_plot import draw
from longtake.eval.interactive_records import (
    MAX_PROMPTS,
    InteractiveConfig,
    InteractiveRecord,
    InteractiveSummary,
    record_of,
)
from longtake.eval.interactive_summary import summarize_source
from longtake.eval.meter import Meter
from longtake.eval.records import Shard, ShardedRecords
from longtake.eval.runner import FIRST_EVAL_SEED, SEEDS_APART
from longtake.eval.script import Script
from longtake.eval.sheet import SheetKeeper
from longtake.io.plot import pyplot
from longtake.world import FPS, VERSION, sample_scene

if TYPE_CHECKING:
    from longtake.eval.source import VideoSource  # which imports torch; a command's help does without

SUMMARY_NAME: Final = "interactive.json"
PNG_NAME: Final = "interactive.png"
SHEET_COLUMNS: Final = 24
SHEET_ROWS: Final = 8


def scripts_of(config: InteractiveConfig) -> list[tuple[int, Script]]:
    """Seed and script of every stream."""
    listed = []
    for index in range(config.streams):
        first = FIRST_EVAL_SEED + config.seed * SEEDS_APART + index * MAX_PROMPTS
        texts = [
            sample_scene(first + number, config.level, config.split).caption
            for number in range(config.prompts)
        ]
        starts = [round(number * config.seconds_each * FPS) for number in range(config.prompts)]
        listed.append((first, Script(tuple(zip(starts, texts, strict=True)))))
    return listed


def run_interactive(
    config: InteractiveConfig,
    sources: Sequence[VideoSource],
    out: Path,
    progress: Callable[[str, int, int], None] | None = None,
    shard: Shard | None = None,
) -> InteractiveSummary | None:
    """Tests every source on one shard's streams; the last shard to finish writes `interactive.json` and
    `interactive.png`.

    Streams that are recorded in `out` are not generated again; more of them can be added.

    Args:
        config: What to test.
        sources: The model first, then real clips to compare with.
        out: Directory; created if missing.
        progress: Called with a source's name and its (finished, all) streams of the shard after every batch.
        shard: Which part of the streams; all by default.

    Returns:
        The summary, or None while streams of other shards are missing.

    Raises:
        EvalError: `out` holds records of another test. PackageError: matplotlib (extra `eval`) is missing.
    """
    pyplot()  # a missing package is told before the work, not after
    shard = shard or Shard()
    files = {source.name: _file(config, source, out, shard) for source in sources}
    found = {name: file.resume() for name, file in files.items()}  # refused before anything is generated
    for source in sources:
        _generate(config, source, files[source.name], found[source.name], shard, out, progress)
    records = {}
    for source in sources:
        done = {record.index: record for record in files[source.name].read()}
        if not all(index in done for index in range(config.streams)):
            return None
        records[source.name] = [done[index] for index in range(config.streams)]
    summary = InteractiveSummary(
        config=config,
        world_version=VERSION,
        sources={source.name: summarize_source(records[source.name], source.about) for source in sources},
    )
    summary.dump(out / SUMMARY_NAME)
    draw(config, records, summary, out / PNG_NAME)
    return summary


def _file(
    config: InteractiveConfig, source: VideoSource, out: Path, shard: Shard
) -> ShardedRecords[InteractiveRecord]:
    plain = InteractiveConfig()  # neither the batch nor how many streams there are changes a stream
    header = {
        "config": config.replace(batch=plain.batch, streams=plain.streams).digest(),
        "world": VERSION,
        "source": source.name,
        "about": source.about,
    }
    return ShardedRecords(out, f"interactive-{source.name}", shard, InteractiveRecord, header)


def _generate(
    config: InteractiveConfig,
    source: VideoSource,
    file: ShardedRecords[InteractiveRecord],
    recorded: Sequence[InteractiveRecord],
    shard: Shard,
    out: Path,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Generates and records the shard's streams that no shard has recorded."""
    mine = shard.of([(index, *item) for index, item in enumerate(scripts_of(config))])
    done = {record.index for record in recorded}
    todo = [item for item in mine if item[0] not in done]
    sheet = out / f"interactive-{source.name}.png"
    for begin in range(0, len(todo), config.batch):
        batch = todo[begin : begin + config.batch]
        scripts = [script.on(source.chunking, config.num_frames) for _, _, script in batch]
        meter = Meter(config.num_frames, 1)
        keeper = SheetKeeper(config.num_frames, SHEET_COLUMNS, SHEET_ROWS)
        for chunk_bthwc in source.generate(scripts, [seed for _, seed, _ in batch], config.num_frames):
            meter.feed(chunk_bthwc)
            keeper.feed(chunk_bthwc)
            if meter.done:
                break
        file.append(
            record_of(index, seed, script, measured, source.chunking.frames)
            for (index, seed, _), script, measured in zip(batch, scripts, meter.results(), strict=True)
        )
        if not sheet.exists():
            keeper.write(sheet, [script.text for script in scripts])
        if progress is not None:
            left = len(todo) - begin - len(batch)
            progress(source.name, len(mine) - left, len(mine))

"""An evaluation from end to end: the subject and its ceilings, then the summary and the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longtake.errors import ConfigError
from longtake.eval.errors import EvalError
from longtake.eval.records import Shard
from longtake.eval.report import write_report
from longtake.eval.runner import WorldEvalConfig, evaluate, merge, pairable, sheet_path
from longtake.eval.source import VideoSource
from longtake.eval.summary import Other, Summary, summarize
from longtake.io.plot import pyplot

SUMMARY_NAME = "summary.json"
Progress = Callable[[str, int, int], None]
"""Called with a source's name and its (finished, all) streams."""


def run_world_eval(
    config: WorldEvalConfig,
    subject: VideoSource,
    ceilings: tuple[VideoSource, ...],
    out: Path,
    shard: Shard | None = None,
    progress: Progress | None = None,
    against: Path | None = None,
) -> Summary | None:
    """Evaluates one shard of every source; the last shard to finish writes `summary.json` and the report.

    Args:
        config: What to evaluate.
        subject: The source under evaluation.
        ceilings: Sources to compare with, as a rule `TruthSource` and the autoencoder's
            `ReconstructionSource`; they are given the same prompts and seeds.
        out: Directory for records, summary and report.
        shard: Which part; all by default.
        progress: Told about every finished batch.
        against: Directory of a finished evaluation to compare with: of the same scenes, by whatever model or
            sampler (paired by scene), or of the same subject on other scenes of the same level, as a rule
            another split.

    Returns:
        The summary, or None while other shards are missing.

    Raises:
        EvalError: `out` holds records of another evaluation, or `against` none to compare with.
            PackageError: matplotlib (extra `eval`) is missing.
    """
    pyplot()  # a missing package is told before hours of work, not after
    other = None if against is None else _other(config, subject, against)
    sources = (subject, *ceilings)
    for source in sources:
        tell = None if progress is None else _bound(progress, source.name)
        evaluate(config, source, out, shard, tell)
    merged = {source.name: merge(config, source, out) for source in sources}
    complete = {name: records for name, records in merged.items() if records is not None}
    if len(complete) < len(sources):
        return None
    about = {source.name: source.about for source in sources}
    summary = summarize(config, subject.name, complete, about, other)
    summary.dump(out / SUMMARY_NAME)
    sheets = {source.name: sheet_path(out, source.name) for source in sources}
    write_report(summary, out, {name: path for name, path in sheets.items() if path.exists()})
    return summary


def _other(config: WorldEvalConfig, subject: VideoSource, out: Path) -> Other:
    """The records of an evaluation in another directory."""
    try:
        finished = Summary.load(out / SUMMARY_NAME)
    except ConfigError as error:
        raise EvalError(
            f"{str(out)!r} holds no finished evaluation to compare with: {error.problem}",
            "give the --out of one that has ended",
        ) from error
    if finished.config.level != config.level:
        raise EvalError(
            f"{str(out)!r} is of level {finished.config.level}, and this one of level {config.level}",
            "compare evaluations of one level",
        )
    theirs = Recorded(finished.subject, finished.sources[finished.subject].about)
    paired = pairable(finished.config) == pairable(config)
    if not paired and theirs != Recorded(subject.name, subject.about):
        raise EvalError(
            f"{str(out)!r} is of {theirs.about} on other scenes, and this one of {subject.about}",
            "compare evaluations of one model, or of the same scenes",
        )
    records = merge(finished.config, theirs, out)
    if records is None:
        raise EvalError(f"records are missing in {str(out)!r}", "run that evaluation again")
    return Other(records, paired)


@dataclass(frozen=True)
class Recorded:
    """A source that was evaluated before."""

    name: str
    about: dict[str, str]


def _bound(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda finished, total: progress(name, finished, total)

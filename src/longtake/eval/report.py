"""The one-page report of an evaluation: a PNG with the table and the curves, and an HTML page around it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from longtake.eval.bars import Bar
from longtake.eval.score import PROPORTIONS
from longtake.eval.stats import Estimate
from longtake.eval.summary import Summary
from longtake.io.plot import pyplot

PNG_NAME = "report.png"
HTML_NAME = "report.html"
_CURVES = ("present", "colour", "shape", "background", "binding", "motion")
_ERRORS = ("background_error", "colour_error")


def write_report(summary: Summary, out: Path, sheets: dict[str, Path]) -> None:
    """Writes `report.png` and `report.html` into `out`.

    Args:
        summary: The figures.
        out: An existing directory.
        sheets: Contact sheets by source name, lying in `out`; shown in the HTML.

    Raises:
        PackageError: matplotlib is not installed.
    """
    _draw(summary, out / PNG_NAME)
    (out / HTML_NAME).write_text(_page(summary, sheets), encoding="utf-8")


def show(value: Estimate, metric: str) -> str:
    """An estimate as text: percent for shares, plain numbers for magnitudes."""
    if value.value is None:
        return "-"
    scale, form, unit = (100, ".1f", " %") if metric in PROPORTIONS else (1, ".3g", "")
    told = f"{scale * value.value:{form}}{unit}"
    if value.interval is None:
        return told
    low, high = value.interval
    return f"{told} [{scale * low:{form}}, {scale * high:{form}}]"


def _title(summary: Summary) -> str:
    config = summary.config
    return (
        f"World level {config.level}: {config.scenes} scenes of {config.length_seconds:g} s, "
        f"seed {config.seed}, split {config.split} "
        f"(world {summary.world_version}, config {summary.config_digest[:12]})"
    )


def _rows(summary: Summary) -> list[list[str]]:
    required = {bar.metric: bar for bar in summary.bars}
    rows = []
    for metric in summary.sources[summary.subject].metrics:
        if all(source.metrics[metric].value is None for source in summary.sources.values()):
            continue  # another level's metric
        cells = [show(source.metrics[metric], metric) for source in summary.sources.values()]
        bar = required.pop(metric, None)
        rows.append([metric, *cells, "" if bar is None else _verdict(bar)])
    for bar in required.values():
        value = "-" if bar.value is None else f"{bar.value:.3g}"
        rows.append([bar.metric, value, *[""] * (len(summary.sources) - 1), _verdict(bar)])
    return rows


def heldout_rows(summary: Summary) -> list[list[str]]:
    """Metric, seen, held out and their difference, of the subject; empty where a split has one of them."""
    subject = summary.sources[summary.subject]
    return [
        [
            metric,
            show(subject.seen[metric], metric),
            show(subject.heldout[metric], metric),
            show(value, metric),
        ]
        for metric, value in subject.generalization.items()
        if value.value is not None
    ]


def _ratio_rows(summary: Summary) -> list[list[str]]:
    """Magnitudes of each source over those of real clips."""
    sources = summary.sources.values()
    names = summary.sources[summary.subject].ratios
    return [
        [metric, *[show(source.ratios[metric], "") for source in sources]]
        for metric in names
        if summary.sources[summary.subject].ratios[metric].value is not None
    ]


def _verdict(bar: Bar) -> str:
    return f"{'<=' if bar.at_most else '>='} {bar.required:.3g}: {'met' if bar.met else 'NOT met'}"


def _draw(summary: Summary, path: Path) -> None:
    plt = pyplot()
    rows = _rows(summary)
    figure = plt.figure(figsize=(11, 5 + 0.27 * len(rows)), dpi=100)
    grid = figure.add_gridspec(2, 2, height_ratios=[0.27 * len(rows) + 0.5, 4])
    figure.suptitle(_title(summary), fontsize=11)
    top = figure.add_subplot(grid[0, :])
    top.axis("off")
    header = ["metric", *summary.sources, "bar"]
    table = top.table(rows, colLabels=header, loc="center", cellLoc="left")
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.25)
    _curves(figure.add_subplot(grid[1, 0]), summary, _CURVES, "share right")
    _curves(figure.add_subplot(grid[1, 1]), summary, _ERRORS, "mean absolute error of 255")
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path)
    plt.close(figure)


def _curves(axes: Any, summary: Summary, metrics: tuple[str, ...], label: str) -> None:
    """Each metric over the windows of the clip: the subject as a line with its interval, ceilings dashed."""
    length = summary.config.window_seconds
    for number, metric in enumerate(metrics):
        colour = f"C{number}"
        for name, source in summary.sources.items():
            known = [
                (length * (index + 0.5), window[metric])
                for index, window in enumerate(source.windows)
                if window[metric].value is not None
            ]
            if not known:
                continue
            times = [time for time, _ in known]
            values = [item.value for _, item in known]
            if name == summary.subject:
                axes.plot(times, values, color=colour, marker="o", markersize=3, label=metric)
                axes.fill_between(
                    times,
                    [item.low for _, item in known],
                    [item.high for _, item in known],
                    color=colour,
                    alpha=0.15,
                )
            else:
                axes.plot(times, values, color=colour, linestyle="--", linewidth=0.8)
    axes.set_xlabel(f"seconds (windows of {length:g} s; dashed: ceilings)")
    axes.set_ylabel(label)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)


def _page(summary: Summary, sheets: dict[str, Path]) -> str:
    tables = [_table(["metric", *summary.sources, "bar"], _rows(summary))]
    if ratios := _ratio_rows(summary):
        tables.append("<h2>Magnitudes over those of real clips</h2>")
        tables.append(_table(["metric", *summary.sources], ratios))
    if heldout := heldout_rows(summary):
        tables.append("<h2>Combinations held out from training</h2>")
        tables.append(_table(["metric", "seen", "held out", "difference"], heldout))
    if summary.against:
        other = [[metric, show(value, metric)] for metric, value in summary.against.items() if value.num]
        tables.append("<h2>Against the other run</h2>")
        tables.append(_table(["metric", "this run less the other"], other))
    about = "\n".join(
        f"<li><b>{html.escape(name)}</b>: "
        + html.escape(", ".join(f"{key} {value}" for key, value in source.about.items()))
        + "</li>"
        for name, source in summary.sources.items()
    )
    named = [(html.escape(name), html.escape(path.name)) for name, path in sheets.items()]
    pictures = "\n".join(f'<h2>{name}</h2><img src="{file}" alt="frames of {name}">' for name, file in named)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(_title(summary))}</title>
<style>body{{font-family:sans-serif;margin:2em}}table{{border-collapse:collapse}}
td,th{{border:1px solid #ccc;padding:2px 8px;text-align:left}}img{{max-width:100%}}</style></head>
<body><h1>{html.escape(_title(summary))}</h1>
<ul>{about}</ul>
{"".join(tables)}
<img src="{PNG_NAME}" alt="table and curves">
{pictures}
</body></html>
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "\n".join(line(row, "td") for row in rows) + "</table>"

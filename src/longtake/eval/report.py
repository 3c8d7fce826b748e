"""The one-page report of an evaluation: a PNG with the table and the curves, and an HTML page around it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from longtake.eval.lazy import pyplot
from longtake.eval.score import PROPORTIONS
from longtake.eval.stats import Estimate
from longtake.eval.summary import Bar, Summary

PNG_NAME = "report.png"
HTML_NAME = "report.html"
_CURVES = ("present", "colour", "shape", "background", "motion")
_ERRORS = ("background_error", "colour_error")


def write_report(summary: Summary, out: Path, sheets: dict[str, Path]) -> None:
    """Writes `report.png` and `report.html` into `out`.

    Args:
        summary: The figures.
        out: An existing directory.
        sheets: Contact sheets by source name, lying in `out`; shown in the HTML.

    Raises:
        EvalError: matplotlib is not installed.
    """
    _draw(summary, out / PNG_NAME)
    (out / HTML_NAME).write_text(_page(summary, sheets), encoding="utf-8")


def show(value: Estimate, metric: str) -> str:
    """An estimate as text: percent for shares, plain numbers for magnitudes."""
    if value.value is None or value.low is None or value.high is None:
        return "-"
    if metric in PROPORTIONS:
        return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"
    return f"{value.value:.3g} [{value.low:.3g}, {value.high:.3g}]"


def _title(summary: Summary) -> str:
    config = summary.config
    return (
        f"World level {config.level}: {config.scenes} scenes of {config.seconds:g} s, seed {config.seed}, "
        f"split {config.split} (world {summary.world_version}, config {summary.config_digest[:12]})"
    )


def _rows(summary: Summary) -> list[list[str]]:
    required = {bar.metric: bar for bar in summary.bars}
    rows = []
    for metric in summary.sources[summary.subject].metrics:
        cells = [show(source.metrics[metric], metric) for source in summary.sources.values()]
        bar = required.pop(metric, None)
        rows.append([metric, *cells, "" if bar is None else _verdict(bar)])
    for bar in required.values():
        value = "-" if bar.value is None else f"{bar.value:.3g}"
        rows.append([bar.metric, value, *[""] * (len(summary.sources) - 1), _verdict(bar)])
    return rows


def _verdict(bar: Bar) -> str:
    return f"{'<=' if bar.at_most else '>='} {bar.required:.3g}: {'met' if bar.met else 'NOT met'}"


def _draw(summary: Summary, path: Path) -> None:
    plt = pyplot()
    figure = plt.figure(figsize=(11, 12), dpi=100)
    grid = figure.add_gridspec(3, 2, height_ratios=[4, 2, 0.01])
    figure.suptitle(_title(summary), fontsize=11)
    top = figure.add_subplot(grid[0, :])
    top.axis("off")
    header = ["metric", *summary.sources, "bar"]
    table = top.table(_rows(summary), colLabels=header, loc="center", cellLoc="left")
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
    cells = ["metric", *summary.sources, "bar"]
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in cells)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(summary)
    )
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
<table><tr>{head}</tr>
{body}
</table>
<img src="{PNG_NAME}" alt="table and curves">
{pictures}
</body></html>
"""

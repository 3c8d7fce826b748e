"""The picture of a recall test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longtake.eval.recall_summary import AbsenceFigures, RecallSummary
from longtake.eval.stats import Estimate
from longtake.io.plot import pyplot

PANELS = (("recalled", "colour and shape are back"), ("place", "back in its place, of what is present"))


def draw(summary: RecallSummary, path: Path) -> None:
    """Panels of shares against the length of the absence, and of differences from the first source (paired),
    with 95 % intervals.

    Args:
        summary: the figures.
        path: of the PNG.
    """
    plt = pyplot()
    compared = len(summary.sources) > 1
    windows = [item.windows for item in _subject(summary)]
    size = (5.5 * (len(PANELS) + compared), 4)
    figure, axes = plt.subplots(1, len(PANELS) + compared, figsize=size, dpi=100, sharex=True)
    for (metric, title), panel in zip(PANELS, axes, strict=False):
        for number, (name, source) in enumerate(summary.sources.items()):
            _line(panel, windows, [item.gated[metric] for item in source.absences], name, number)
        if metric != "recalled":
            chances = [(item.windows, item.chance.get(metric)) for item in _subject(summary)]
            panel.plot(
                [x for x, value in chances if value is not None],
                [value for _, value in chances if value is not None],
                color="0.6",
                linestyle="--",
                label="chance",
            )
        panel.set_title(title, fontsize=9)
        panel.set_ylim(-0.02, 1.02)
    if compared:
        for number, (name, source) in enumerate(summary.sources.items()):
            if name != summary.subject:
                _line(axes[-1], windows, [item["recalled"] for item in source.less_subject], name, number)
        axes[-1].set_title(f"colour and shape are back, less {summary.subject}, paired", fontsize=9)
        axes[-1].set_ylim(-1.02, 1.02)
    for panel in axes:
        panel.set_xscale("log")
        panel.set_xticks(windows)
        panel.set_xticklabels([f"{item.windows:g}\n{item.seconds:.0f} s" for item in _subject(summary)])
        panel.minorticks_off()
        panel.set_xlabel("absence (windows, seconds)")
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"share; {summary.config.scenes} scenes each, gated")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _line(panel: Any, windows: Sequence[float], items: Sequence[Estimate], name: str, number: int) -> None:
    """One source's figures by absence; where there are too few scenes for an interval, the value alone."""
    points = [
        (x, item.value, *(item.interval or (item.value, item.value)))
        for x, item in zip(windows, items, strict=True)
        if item.value is not None
    ]
    panel.errorbar(
        [x for x, *_ in points],
        [value for _, value, _, _ in points],
        yerr=[[value - low for _, value, low, _ in points], [high - value for _, value, _, high in points]],
        marker="o",
        markersize=3,
        capsize=2,
        label=name,
        linestyle=":" if name == "truth" else "-",
        color=f"C{number}",
    )


def _subject(summary: RecallSummary) -> tuple[AbsenceFigures, ...]:
    return summary.sources[summary.subject].absences

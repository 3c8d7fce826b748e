"""The picture of a recall test."""

from __future__ import annotations

from pathlib import Path

from longtake.eval.recall_summary import AbsenceFigures, RecallSummary
from longtake.io.plot import pyplot

PANELS = (("recalled", "colour and shape are back"), ("place", "back in its place, of what is present"))


def draw(summary: RecallSummary, path: Path) -> None:
    """Two panels of shares against the length of the absence, with 95 % intervals.

    Args:
        summary: the figures.
        path: of the PNG.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 4), dpi=100, sharex=True)
    for (metric, title), panel in zip(PANELS, axes, strict=True):
        for number, (name, source) in enumerate(summary.sources.items()):
            points = [(item.windows, item.gated[metric]) for item in source.absences]
            known = [(x, item) for x, item in points if item.value is not None]
            x = [x for x, _ in known]
            y = [item.value or 0.0 for _, item in known]
            low = [value - (item.low or 0.0) for value, (_, item) in zip(y, known, strict=True)]
            high = [(item.high or 0.0) - value for value, (_, item) in zip(y, known, strict=True)]
            style = {"linestyle": ":" if name == "truth" else "-", "color": f"C{number}"}
            panel.errorbar(x, y, yerr=[low, high], marker="o", markersize=3, capsize=2, label=name, **style)
        if metric != "recalled":
            chances = [(item.windows, item.chance.get(metric)) for item in _subject(summary)]
            panel.plot(
                [x for x, value in chances if value is not None],
                [value for _, value in chances if value is not None],
                color="0.6",
                linestyle="--",
                label="chance",
            )
        panel.set_xscale("log")
        panel.set_xticks([item.windows for item in _subject(summary)])
        panel.set_xticklabels([f"{item.windows:g}\n{item.seconds:.0f} s" for item in _subject(summary)])
        panel.minorticks_off()
        panel.set_xlabel("absence (windows, seconds)")
        panel.set_title(title, fontsize=9)
        panel.set_ylim(-0.02, 1.02)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"share; {summary.config.scenes} scenes each, gated")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _subject(summary: RecallSummary) -> tuple[AbsenceFigures, ...]:
    return summary.sources[summary.subject].absences

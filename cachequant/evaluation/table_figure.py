"""Quality against speed-up: ours on the left, what the paper reports on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cachequant.evaluation.plots import MARKERS, PALETTE
from cachequant.evaluation.tables import TITLES, Comparison, Figures

Points = list[tuple[str, float, float]]
"""Row, speed-up, quality."""


def points(rows: Mapping[str, Figures], quality: str) -> Points:
    """The rows that have both numbers."""
    return [(name, row["speedup"], row[quality]) for name, row in rows.items() if {"speedup", quality} <= set(row)]


def table_figure(comparisons: Sequence[Comparison]) -> Figure:
    """Two panels a part; a row keeps its colour and marker in both."""
    figure = Figure(figsize=(11, 4.2 * len(comparisons)), layout="constrained")
    axes = figure.subplots(len(comparisons), 2, squeeze=False)
    for comparison, (left, right) in zip(comparisons, axes, strict=True):
        names = [row.name for row in comparison.part.rows]
        _draw(left, points(comparison.ours, comparison.quality), names)
        _draw(right, points(comparison.paper, comparison.part.quality), names)
        left.set_title(f"{comparison.part.name}: ours")
        right.set_title(f"{comparison.part.name}: the paper")
        left.set_ylabel(TITLES[comparison.quality])
        right.set_ylabel(TITLES[comparison.part.quality])
    return figure


def _draw(axes: Axes, drawn: Points, names: Sequence[str]) -> None:
    for name, x, y in drawn:
        place = names.index(name)
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[(place // len(PALETTE)) % len(MARKERS)]
        axes.plot([x], [y], color=colour, marker=marker, markersize=7, linestyle="", label=name)
    axes.axvline(1.0, color="#999999", linewidth=1, linestyle=":")
    axes.set_xlabel("speed-up over full (×)")
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    if drawn:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        axes.text(0.5, 0.5, "no row has both", ha="center", transform=axes.transAxes)

"""Figures of schedules, of errors along the trajectory, and of quality against speed."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from cachequant.evaluation.rows import FULL, Row, full_row, speed_up
from cachequant.schedule import uniform_schedule
from cachequant.storage import write_atomically
from cachequant.types import Schedule

# Okabe and Ito's palette, distinct for the colour-blind too; a row keeps its colour in every figure.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NAMED = {"full": "#000000", "uniform": "#767676", "naive": "#E69F00", "dps": "#56B4E9"}
NAMED |= {"dec_cache": "#009E73", "paper": "#0072B2", "cachequant": "#D55E00"}
NAMED |= {"cache alone": "#CC79A7", "cache corrected": "#009E73", "uncorrected": "#E69F00"}  # of `cachequant report`
MARKERS = ("o", "s", "^", "D", "v", "P")
DPI = 150
STEP_LABEL = "sampler step (0 is the noisiest)"


def schedule_figure(schedules: dict[str, Schedule], step_costs: Tensor | None) -> Figure:
    """Refresh steps of each schedule on its own line, beside uniform's, and above them what a step costs.

    Args:
        schedules: name -> schedule. Where none is named "uniform", that of the first one's interval is added.
        step_costs: [T] distance of each step's feature to the step before, in the feature's units; the first
            value is not drawn, as nothing is before it. None leaves the curve out.
    """
    if "uniform" not in schedules:
        first = next(iter(schedules.values()))
        schedules = {"uniform": uniform_schedule(first.num_steps, first.interval), **schedules}
    lines_height = 0.7 + 0.38 * len(schedules)
    if step_costs is None:
        figure = Figure(figsize=(8, lines_height), layout="constrained")
        _draw_refreshes(figure.subplots(), schedules)
        return figure
    figure = Figure(figsize=(8, 2.2 + lines_height), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, lines_height])
    steps = range(1, len(step_costs))
    costs = step_costs.detach().cpu().double()[1:].tolist()
    upper.plot(steps, costs, color="#333333", linewidth=1.5, marker="o", markersize=2.5)
    upper.set_ylabel("distance to the feature\nof the step before")
    upper.set_ylim(bottom=0)
    _style(upper)
    _draw_refreshes(lower, schedules)
    return figure


def error_figure(errors: dict[str, Tensor]) -> Figure:
    """Relative error of x_t to the full-precision trajectory.

    Args:
        errors: row name -> [T] ‖x_t - x_t of full‖ / ‖x_t of full‖ after each step. A log axis has no zero:
            such values are left out, and rows that hold no other.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    drawn = {name: error.detach().cpu().double() for name, error in errors.items() if (error > 0).any()}
    for i, (name, error) in enumerate(drawn.items()):
        values = error.where(error > 0, math.nan).tolist()
        every = max(1, len(values) // 12)
        axes.plot(
            values, label=name, color=_colour(name, i), linewidth=1.6,
            marker=MARKERS[i % len(MARKERS)], markersize=4.5, markevery=(i % every, every),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("relative error of $x_t$ (share of its norm)")
    if drawn:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _step_axis(axes)
    _style(axes)
    return figure


def curve_figure(curves: dict[str, dict[int, float]], label: str) -> Figure:
    """Positive numbers by sampler step on a log axis, one line per name; steps that a curve lacks are bridged.

    Args:
        curves: name -> step -> value.
        label: what the values are, with their unit.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        steps = sorted(s for s in curve if curve[s] > 0)
        axes.plot(
            steps, [curve[s] for s in steps], label=name, color=_colour(name, i), linewidth=1.4,
            marker=MARKERS[i % len(MARKERS)], markersize=3,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    _step_axis(axes)
    _style(axes)
    return figure


def quality_figure(rows: Sequence[Row]) -> Figure:
    """PSNR against speed-up, a labelled point for each row; rows equal to `full` stand on the upper edge."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    full = full_row(rows)
    points = [(row, speed_up(row, full), row.psnr_or_infinity) for row in rows]
    drawn = [(row, x, y) for row, x, y in points if x is not None and y is not None and not math.isnan(y)]
    axes.set_xlim(0, 1.15 * max([1.0, *(x for _, x, _ in drawn)]))  # room for the name of a row at 1×
    low, high = _padded([y for _, _, y in drawn if math.isfinite(y)])
    axes.set_ylim(low, high)
    axes.axvline(1.0, color="#999999", linewidth=1, linestyle=":")
    places = _spread([min((y - low) / (high - low), 1.0) for _, _, y in drawn], 0.08)
    for i, ((row, x, y), place) in enumerate(zip(drawn, places, strict=True)):
        _draw_point(axes, i, row.name, (x, min(y, high)), y == math.inf, place)
    axes.set_xlabel(f"speed-up over {FULL} (×, wall-clock)")
    axes.set_ylabel(f"PSNR to {FULL} (dB)")
    _style(axes)
    return figure


def points_figure(
    groups: dict[str, list[tuple[float, float]]],
    x_label: str,
    y_label: str,
    joined: bool = False,
    logarithmic: str = "",
) -> Figure:
    """Points (x, y) of several groups, each with a colour and a marker of its own.

    Args:
        groups: name -> points.
        x_label, y_label: what the axes are, with their units.
        joined: draw a line through the points of a group.
        logarithmic: axes with a logarithmic scale: "", "x", "y" or "xy".
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(groups.items()):
        x, y = zip(*points, strict=True)
        marker = MARKERS[i % len(MARKERS)]
        line = "-" if joined else ""
        axes.plot(x, y, color=_colour(name, i), marker=marker, markersize=6, linestyle=line, label=name, alpha=0.85)
    for axis in logarithmic:
        axes.set(**{f"{axis}scale": "log"})
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend(frameon=False)
    _style(axes)
    return figure


def figure_png(figure: Figure) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor="white")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    write_atomically(path, lambda p: figure.savefig(p, format="png", dpi=DPI, facecolor="white"))


def _draw_refreshes(axes: Axes, schedules: dict[str, Schedule]) -> None:
    last = max(schedule.num_steps for schedule in schedules.values()) - 1
    for i, (name, schedule) in enumerate(schedules.items()):
        axes.hlines(i, 0, schedule.num_steps - 1, color="#cccccc", linewidth=1, zorder=1)
        colour = _colour(name, i)
        axes.vlines(schedule.refresh_steps, i - 0.32, i + 0.32, color=colour, linewidth=2.2, label=name)
    labels = [f"{name} ({len(schedule.refresh_steps)})" for name, schedule in schedules.items()]
    axes.set_yticks(range(len(schedules)), labels)
    axes.set_ylim(len(schedules) - 0.4, -0.6)
    axes.set_xlim(-0.02 * last - 0.5, 1.02 * last + 0.5)
    axes.set_ylabel("refresh steps\n(count)")
    _step_axis(axes)
    _style(axes)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _draw_point(axes: Axes, i: int, name: str, xy: tuple[float, float], equal: bool, place: float) -> None:
    """A marker with its name: beside it where the images equal `full`'s, else beyond the right edge.

    There a thin line joins the two, and the name stands at height `place` (0 bottom, 1 top).
    """
    colour = _colour(name, i)
    axes.plot(*xy, color=colour, marker=MARKERS[i % len(MARKERS)], markersize=8, linestyle="", clip_on=False)
    if equal:
        text, where, units, line = f"{name} (∞ dB)", (9.0, 0.0), "offset points", None
    else:
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6}
        text, where, units = name, (1.03, place), "axes fraction"
    axes.annotate(text, xy, where, textcoords=units, va="center", annotation_clip=False, arrowprops=line)


def _padded(values: list[float]) -> tuple[float, float]:
    """Limits with a tenth of room below and a quarter above; 0 to 1 where there is no value."""
    if not values:
        return 0.0, 1.0
    span = max(max(values) - min(values), 1.0)
    return min(values) - 0.1 * span, max(values) + 0.25 * span


def _spread(places: list[float], gap: float) -> list[float]:
    """The places moved apart to `gap` at least, downward from the highest, then upward from 0; order kept."""
    order = sorted(range(len(places)), key=lambda i: -places[i])
    moved = list(places)
    for above, i in pairwise(order):
        moved[i] = min(moved[i], moved[above] - gap)
    floor = 0.0
    for i in reversed(order):
        moved[i] = max(moved[i], floor)
        floor = moved[i] + gap
    return moved


def _colour(name: str, i: int) -> str:
    return NAMED.get(name, PALETTE[i % len(PALETTE)])


def _step_axis(axes: Axes) -> None:
    axes.set_xlabel(STEP_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _style(axes: Axes) -> None:
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

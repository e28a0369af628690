"""Figures: what is drawn is what was given."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from cachequant.evaluation.plots import error_figure, quality_figure, save_figure, schedule_figure
from cachequant.evaluation.rows import Row
from cachequant.schedule import uniform_schedule
from cachequant.types import Schedule

PLANNED = Schedule((0, 3, 9, 14), 20, 5)
FULL = Row("full", 0.0, None, 1.0, 1.0, 10e9, 9_000_000, 12.0)
ROWS = [
    FULL,
    Row("naive", 5.0, 17.0, 0.70, 0.2, 3e9, 2_000_000, 4.0),
    Row("dps", 4.0, 17.1, 0.72, 0.2, 3e9, 2_000_000, 4.0),
    Row("paper", 2.0, 17.2, 0.80, 0.2, 3e9, 2_000_000, 4.0),
    Row("cachequant", 1.0, 27.0, 0.95, 0.2, 3e9, 2_000_000, 5.0),
]


def ticks(axes: Axes) -> dict[str, list[float]]:
    """Schedule name -> positions of its upright lines."""
    found = {}
    for lines in axes.collections:
        assert isinstance(lines, LineCollection)
        if not str(lines.get_label()).startswith("_"):
            found[str(lines.get_label())] = [float(segment[0][0]) for segment in lines.get_segments()]
    return found


def rendered(figure: Figure, path: Path) -> np.ndarray:
    """Pixels [H, W, 3] of the saved figure."""
    save_figure(figure, path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_each_schedule_has_its_refreshes_on_its_own_line() -> None:
    (axes,) = schedule_figure({"dps": PLANNED}, None).axes
    assert ticks(axes) == {"uniform": [0, 5, 10, 15], "dps": [0, 3, 9, 14]}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["uniform (4)", "dps (4)"]
    heights = [c.get_segments()[0][:, 1].mean() for c in axes.collections if len(c.get_segments()) > 1]
    assert heights == pytest.approx([0.0, 1.0])
    assert axes.yaxis_inverted()  # the first on top


def test_a_uniform_schedule_that_is_given_is_not_added() -> None:
    (axes,) = schedule_figure({"dps": PLANNED, "uniform": uniform_schedule(20, 4)}, None).axes
    assert list(ticks(axes)) == ["dps", "uniform"]
    assert ticks(axes)["uniform"] == [0, 4, 8, 12, 16]


def test_the_costs_stand_above_on_the_same_axis() -> None:
    costs = torch.linspace(5, 1, 20)
    upper, lower = schedule_figure({"dps": PLANNED}, costs).axes
    (curve,) = upper.lines
    assert list(curve.get_xdata()) == list(range(1, 20))
    np.testing.assert_allclose(curve.get_ydata(), costs[1:])
    assert upper.get_shared_x_axes().joined(upper, lower)
    assert upper.get_position().y0 > lower.get_position().y1
    assert "step" in lower.get_xlabel() and "distance" in upper.get_ylabel()
    low, high = lower.get_xlim()
    assert low < 0 and high > 19


def test_errors_are_drawn_on_a_log_axis_without_zeros() -> None:
    error = torch.tensor([0.0, 0.001, 0.01, 0.1])
    (axes,) = error_figure({"full": torch.zeros(4), "paper": error, "cachequant": error / 2}).axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.lines] == ["paper", "cachequant"]
    drawn = np.asarray(axes.lines[0].get_ydata())
    assert math.isnan(drawn[0])
    np.testing.assert_allclose(drawn[1:], error[1:], rtol=1e-6)
    legend = axes.get_legend()
    assert legend is not None and [t.get_text() for t in legend.get_texts()] == ["paper", "cachequant"]


def test_points_stand_at_speed_up_and_psnr() -> None:
    (axes,) = quality_figure(ROWS).axes
    points = [line for line in axes.lines if line.get_marker() != "None"]
    places = [(float(p.get_xdata()[0]), float(p.get_ydata()[0])) for p in points]
    upper_edge = axes.get_ylim()[1]  # where an infinite PSNR stands
    np.testing.assert_allclose(places, [(1, upper_edge), (3, 17.0), (3, 17.1), (3, 17.2), (2.4, 27.0)])
    low, high = axes.get_xlim()
    assert low <= 1.0 and high > 3.0
    assert [t.get_text() for t in axes.texts] == ["full (∞ dB)", "naive", "dps", "paper", "cachequant"]
    assert axes.get_ylabel().endswith("(dB)") and "×" in axes.get_xlabel()


def test_labels_of_near_points_do_not_overlap() -> None:
    figure = quality_figure(ROWS)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    # The text alone: an annotation's own extent spans its line too.
    boxes = [super(type(t), t).get_window_extent(renderer) for t in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0) for box in boxes)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(sorted(boxes, key=lambda b: -b.y0)))


def test_a_name_keeps_its_colour_in_every_figure() -> None:
    (errors,) = error_figure({"cachequant": torch.ones(3)}).axes
    (quality,) = quality_figure(ROWS).axes
    (schedules,) = schedule_figure({"cachequant": PLANNED}, None).axes
    ticks_of = [c for c in schedules.collections if c.get_label() == "cachequant"]
    assert errors.lines[0].get_color() == quality.lines[-1].get_color()
    tick_colour = "#" + "".join(f"{round(255 * v):02X}" for v in ticks_of[0].get_colors()[0][:3])
    assert tick_colour == errors.lines[0].get_color()


@pytest.mark.parametrize(
    "figure",
    [
        lambda: schedule_figure({"one": Schedule((0,), 1, 1)}, torch.zeros(1)),
        lambda: error_figure({}),
        lambda: error_figure({"full": torch.zeros(5)}),
        lambda: error_figure({"naive": torch.tensor([0.1, math.nan, math.inf])}),
        lambda: quality_figure([]),
        lambda: quality_figure([FULL]),
        lambda: quality_figure(ROWS[1:]),
        lambda: quality_figure([FULL, replace(ROWS[1], psnr=math.nan), replace(ROWS[2], psnr=None)]),
    ],
)
def test_little_or_broken_data_still_makes_a_picture(figure, tmp_path: Path) -> None:
    assert rendered(figure(), tmp_path / "figure.png").shape[2] == 3


def test_a_saved_figure_is_a_png_and_leaves_nothing_else(tmp_path: Path) -> None:
    pixels = rendered(schedule_figure({"cachequant": PLANNED}, None), tmp_path / "out" / "schedule.png")
    assert (tmp_path / "out" / "schedule.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["schedule.png"]
    assert (pixels[0] == 255).all()  # white ground
    vermilion = (np.abs(pixels.astype(int) - [0xD5, 0x5E, 0x00]).max(axis=2) < 8).any(axis=0)  # [W]
    assert np.count_nonzero(np.diff(vermilion.astype(int)) == 1) == len(PLANNED.refresh_steps)


def test_pyplot_and_its_global_state_are_not_used() -> None:
    program = """
import io, sys, torch
from cachequant.evaluation.plots import error_figure
error_figure({"naive": torch.ones(3)}).savefig(io.BytesIO(), format="png")
sys.exit("matplotlib.pyplot" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

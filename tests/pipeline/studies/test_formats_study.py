"""The study of formats: R² by its definition, and its rows on a toy network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cachequant.config import RunConfig
from cachequant.correction import Moments, fit_affine
from cachequant.errors import UserError
from cachequant.pipeline.context import Context
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies.formats import FORMATS, by_layer, measure, plot, r_squared, study, summary
from cachequant.pipeline.studies.subject import StudySubject

Configure = Callable[..., RunConfig]


def test_r_squared_by_its_definition() -> None:
    random = torch.Generator().manual_seed(0)
    pairs = {step: torch.randn(2, 40, 3, generator=random).double() + step for step in (0, 4)}
    moments, made, exact, corrected = {}, [], [], []
    for step, (noise, y) in pairs.items():
        x = 0.8 * y + 0.3 * noise + 0.1
        moments[step] = Moments()
        moments[step].update((x,), y, 1)
        fit = fit_affine(x, y)
        made.append(x)
        exact.append(y)
        corrected.append(x * fit.scale + fit.shift)
    y = torch.cat(exact)
    varies = (y - y.mean(0)).square().sum()
    before, after = r_squared(moments)
    assert before == pytest.approx(float(1 - (torch.cat(made) - y).square().sum() / varies), rel=1e-6)
    assert after == pytest.approx(float(1 - (torch.cat(corrected) - y).square().sum() / varies), rel=1e-6)
    assert after > before


def test_every_layer_in_every_format(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    stages = Stages.at(Context.of(pipe, configure("quant.rounding_samples=2")), tmp_path, quiet=True)
    names = ("INT8", "W4A8", "FP8 E4M3", "log2 4-bit weights")
    rows = measure(stages, {name: FORMATS[name] for name in names})
    layers = {row.layer for row in rows}
    assert len(rows) == len(names) * len(layers) and len(layers) > 20
    assert all(row.before <= row.after + 1e-9 <= 1 + 1e-6 for row in rows)
    mean = {name: sum(row.before for row in rows if row.format == name) / len(layers) for name in names}
    assert mean["INT8"] > mean["FP8 E4M3"] > mean["W4A8"] > mean["log2 4-bit weights"] > 0
    assert [line[0] for line in summary(rows)] == list(names)
    table = by_layer(rows)
    assert table.columns == ("layer", *names) and {line[0] for line in table.lines} == layers
    for row in rows[::17]:
        (line,) = [each for each in table.lines if each[0] == row.layer]
        shown = line[1 + names.index(row.format)]
        assert [float(part) for part in shown.split(" → ")] == pytest.approx([row.before, row.after], abs=5.1e-6)
    curves = plot(rows).axes[0].get_lines()
    assert len(curves) == 2 * len(names) and all(len(c.get_xdata()) == len(layers) for c in curves)
    assert not any(type(m).__name__ == "QuantLayer" for m in pipe.unet.modules())


def test_without_quantisation_there_is_no_format_to_study(pipe: Any, configure: Configure, tmp_path: Path) -> None:
    stages = Stages.at(Context.of(pipe, configure("quant.enabled=false")), tmp_path, quiet=True)
    with pytest.raises(UserError, match=r"quant\.enabled is false.*set it to true"):
        study(StudySubject(stages, None, tmp_path), 2)

"""Formats under the same fit: how much of each layer's product a format keeps, before and after its correction.

The correction needs pairs (rounded product, exact product) and nothing else of a format, so that any quantiser can stand in:
the paper's third open question. R² of a layer is 1 - Σ (y - ŷ)² / Σ (y - ȳ_c)² over its output channels c, all executed
steps t, samples and pixels: first with ŷ the rounded product itself, then a₂[t, c]·ŷ + b₂[t, c] (CacheQuant equation 11).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cachequant.correction import Moments
from cachequant.errors import UserError
from cachequant.pipeline.stages import Stages
from cachequant.pipeline.studies.findings import Findings, Table
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.pipeline.walk import Walk
from cachequant.quant.convert import install
from cachequant.quant.layers import Mode

FORMATS: dict[str, dict[str, Any]] = {
    "INT8": {},
    "W4A8": {"weight_bits": 4, "rounding": "nearest"},
    "W4A8 compensated": {"weight_bits": 4, "rounding": "compensated"},
    "W4A4": {"weight_bits": 4, "activation_bits": 4, "rounding": "nearest"},
    "FP8 E4M3": {"weight_format": "fp8", "activation_format": "fp8"},
    "FP8 weights": {"weight_format": "fp8"},
    "log2 weights": {"weight_format": "log2"},
    "log2 4-bit weights": {"weight_format": "log2", "weight_bits": 4},
    "log2 activations": {"activation_format": "log2"},
}
"""What is compared: name -> changes of `QuantConfig`, everything else at 8 bits."""

PLAIN: dict[str, Any] = {
    "weight_bits": 8, "activation_bits": 8, "weight_format": "int", "activation_format": "int", "budget": None,
    "bits_map": {},
}  # fmt: skip


@dataclass(frozen=True)
class FormatRow:
    """One layer in one format.

    Attributes:
        format: of `FORMATS`.
        layer: its name.
        before: R² of the rounded product.
        after: R² of the corrected one, fitted on the same samples (two numbers per channel and step).
    """

    format: str
    layer: str
    before: float
    after: float


def study(subject: StudySubject, count: int) -> Findings:
    """R² of every layer in every format; nothing is drawn, so that `count` is not needed.

    Raises:
        UserError: nothing is quantised.
    """
    if not subject.context.config.quant.enabled:
        raise UserError("quant.enabled is false, so that no layer has a format: set it to true to compare formats")
    rows = measure(subject.stages)
    table = Table("R² of the layers' products", COLUMNS, summary(rows))
    note = ("How to read it", (__doc__ or "").strip())
    figures = {"Unexplained share of each layer": plot(rows)}
    title = "Number formats under the same fit"
    return Findings(title, [note], [table], figures, {"rows": [asdict(row) for row in rows]}, details=[by_layer(rows)])


def measure(stages: Stages, formats: Mapping[str, dict[str, Any]] = FORMATS) -> list[FormatRow]:
    """R² of every quantised layer in every format, on the calibration inputs of all steps.

    Args:
        stages: of a configuration; each format's grids are filed there, nothing current is computed again.
        formats: names and what they change.
    """
    return [row for name, changes in formats.items() for row in _format_rows(stages, name, changes)]


@torch.no_grad()
def _format_rows(stages: Stages, name: str, changes: dict[str, Any]) -> list[FormatRow]:
    config = stages.context.config
    quant = replace(config.quant, **{**PLAIN, **changes})
    quant = replace(quant, recon=replace(quant.recon, enabled=False))
    context = replace(stages.context, config=replace(config, quant=quant))
    own = replace(stages, context=context)
    (calibration, _), (schedule, _), (correction, _) = own.calibration(), own.schedule(), own.cache_correction()
    state, _ = own.quant()
    assert state is not None, "stage 4 of an enabled quantisation"
    walk = Walk(context, calibration, schedule, correction)
    cache = walk.fresh_cache()
    handle = install(context.adapter.denoiser, replace(state, operands={}), cache)
    context.adapter.rebuild()
    handle.set_mode(Mode.PAIR)
    try:
        for _ in walk.run(cache, f"pairs of {name}"):
            pass
        return [FormatRow(name, layer, *r_squared(module.moments)) for layer, module in handle.layers.items()]
    finally:
        handle.remove()
        context.adapter.rebuild()


def r_squared(moments: Mapping[int, Moments]) -> tuple[float, float]:
    """(before, after) of one layer from its sums of every step."""
    pooled = torch.stack([sums.gram for sums in moments.values() if sums.gram is not None]).sum(0)  # [C, F+2, F+2]
    varies = pooled[:, -2, -2] - pooled[:, -2, -1].square() / pooled[:, -1, -1]  # [C] Σ (y - ȳ)²
    left = corrected = 0.0
    for sums in moments.values():
        count = float(sums.gram[0, -1, -1]) if sums.gram is not None else 0.0
        left += count * float(sums.error().sum())
        corrected += count * float(sums.error(sums.solve()).sum())
    total = max(float(varies.sum()), 1e-30)
    return 1 - left / total, 1 - corrected / total


def summary(rows: list[FormatRow]) -> list[list[str]]:
    """A line per format: median and smallest R² before and after, and the share of the error that the fit removes."""
    lines = []
    for name in dict.fromkeys(row.format for row in rows):
        mine = [row for row in rows if row.format == name]
        before, after = (torch.tensor([getattr(row, key) for row in mine]) for key in ("before", "after"))
        removed = 1 - (1 - after).sum() / (1 - before).sum().clamp(min=1e-30)
        worst = mine[int(before.argmin())].layer
        numbers = [before.median(), after.median(), before.min(), after.min()]
        lines.append([name, *(f"{float(n):.5f}" for n in numbers), f"{float(removed):.1%}", worst])
    return lines


def by_layer(rows: list[FormatRow]) -> Table:
    """A line per layer: R² before → after its correction in every format."""
    formats = tuple(dict.fromkeys(row.format for row in rows))
    cells = {(row.layer, row.format): f"{row.before:.5f} → {row.after:.5f}" for row in rows}
    layers = dict.fromkeys(row.layer for row in rows)
    lines = [[layer, *(cells.get((layer, name), "–") for name in formats)] for layer in layers]
    return Table("R² of each layer, before → after", ("layer", *formats), lines)


COLUMNS = ("format", "median R²", "after", "least R²", "after", "error removed", "least in")
"""Headings of `summary`."""


def plot(rows: list[FormatRow]) -> Any:
    """A matplotlib figure: unexplained share 1 - R² of the layers of each format, in rising order, before and after."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(row.format for row in rows)):
        mine = [row for row in rows if row.format == name]
        for key, style in (("before", "-"), ("after", ":")):
            values = sorted(max(1 - getattr(row, key), 1e-9) for row in mine)
            axes.plot(values, style, color=f"C{index}", label=name if key == "before" else None)
    axes.set(yscale="log", xlabel="layers, the best first", ylabel="unexplained share 1 - R²")
    axes.set_title("Layer products in each format, before (solid) and after (dotted) their correction")
    axes.legend()
    return figure

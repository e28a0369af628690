"""The page of `cachequant report`, from what was found."""

from __future__ import annotations

import io
import json
import platform
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cachequant import __version__
from cachequant.api import disable, enable, find
from cachequant.api import report as running_report
from cachequant.config import config_to_dict
from cachequant.evaluation.errors import path_error
from cachequant.evaluation.grid import AMPLIFICATION, difference, image_grid
from cachequant.evaluation.html import (
    facts_block,
    figures_block,
    results_block,
    sections_block,
    table_block,
    views_block,
    write_page,
)
from cachequant.evaluation.plots import curve_figure, error_figure, figure_png, quality_figure, schedule_figure
from cachequant.evaluation.rows import FULL, Row
from cachequant.pipeline.sample import Samples
from cachequant.plan import Plan
from cachequant.quant.deploy import Deployment
from cachequant.types import LayerQuant

TILE = 192
"""Pixels of an image on the page, at most; smaller ones are enlarged to at least half of it."""
ROWS = {
    FULL: "the pretrained model, every step in full, float32",
    "cache alone": "the plan's schedule, the reused feature as it is, no quantisation",
    "cache corrected": "the same with the correction of the cached feature",
    "uncorrected": "schedule and quantisation without any correction",
}


@dataclass(frozen=True)
class PageContent:
    """What the page shows.

    Attributes:
        name: of the plan that the page is about.
        plans: name -> plan, that one first.
        rows: measured numbers, `full` first.
        samples: row -> images and trajectories.
        costs: [T] distance of each step's feature to the step before, or None.
        curves: name -> step -> relative error of the feature on calibration data; {} where it is not known.
        pipe: the untouched pipeline.
    """

    name: str
    plans: dict[str, Plan]
    rows: list[Row]
    samples: dict[str, Samples]
    costs: Tensor | None
    curves: dict[str, dict[int, float]]
    pipe: Any


def write_plan_page(content: PageContent, out: Path) -> None:
    """Write the page atomically.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    plan = content.plans[content.name]
    running, backends = _running(content.pipe, plan)
    explanations = {**ROWS, content.name: "the plan"}
    explanations |= {name: "another plan of this run" for name in list(content.plans)[1:]}
    meanings = "\n".join(f"{row.name}: {explanations[row.name]}" for row in content.rows)
    blocks = [
        results_block(content.rows),
        sections_block([("What the rows are", meanings)]),
        _pictures(content.samples),
        figures_block("Schedule and errors", _figures(content)),
        facts_block("What runs where", [(line[:12].strip(), line[12:].strip()) for line in running.splitlines()]),
        *_layers(plan, backends),
        facts_block("How it was made", _facts(content, plan).items()),
        facts_block("Configuration", _flat(config_to_dict(plan.config)), folded=True),
    ]
    write_page(out, f"{plan.config.model.name or plan.identity.model}: {content.name}", blocks)


def _running(pipe: Any, plan: Plan) -> tuple[str, dict[str, str]]:
    """The library's own report of the plan on this pipeline, and the backend of every quantised layer."""
    with redirect_stdout(io.StringIO()):  # it is on the page
        enable(pipe, plan, plan.config.backend)
    try:
        state = find(pipe)
        assert state is not None
        names = plan.quant.layers if plan.quant else ()
        simulated = state.network.reasons if isinstance(state.network, Deployment) else {}
        backends = {name: "simulated" if name in simulated else state.backend.name for name in names}
        return running_report(pipe), backends
    finally:
        disable(pipe)


def _pictures(samples: dict[str, Samples]) -> str:
    """Images of every row side by side, and their differences to the untouched model's."""
    exact = samples[FULL].images
    images = {row: _tiles(made.images) for row, made in samples.items()}
    others = {row: _tiles(difference(made.images, exact)) for row, made in samples.items() if row != FULL}
    caption = f"Absolute difference to {FULL}, times {AMPLIFICATION:g}"
    views = {
        "images": ("The same noise in every row; the first is the untouched model", _png(image_grid(images, 1))),
        f"difference to {FULL}": (caption, _png(image_grid(others, 1))),
    }
    return views_block("Images", views)


def _tiles(images: Tensor) -> Tensor:
    """[n, C, H, W] enlarged by repetition or made smaller by averaging, to show well."""
    size = max(images.shape[-2:])
    if size > TILE:
        return F.interpolate(images, scale_factor=TILE / size, mode="area")
    factor = max(1, -(-TILE // (2 * size)))
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def _figures(content: PageContent) -> dict[str, bytes]:
    """Caption -> PNG."""
    schedules = {name: plan.schedule for name, plan in content.plans.items()}
    paths = {row: made.trajectory for row, made in content.samples.items() if made.trajectory is not None}
    errors = {row: path_error(path, paths[FULL]) for row, path in paths.items() if row != FULL}
    costs = "" if content.costs is None else "Distance between neighbouring features on calibration data, and "
    figures = {
        f"{costs}the steps that run the whole network".capitalize(): schedule_figure(schedules, content.costs),
        f"Error of x_t against {FULL}'s trajectory, accumulated over the sampler's steps": error_figure(errors),
    }
    if content.curves:
        label = "relative error (share of the norm)"
        figures["Error of the cached feature at each step on calibration data"] = curve_figure(content.curves, label)
    figures[f"Closeness to {FULL}'s images against measured speed"] = quality_figure(content.rows)
    return {caption: figure_png(figure) for caption, figure in figures.items()}


def _layers(plan: Plan, backends: dict[str, str]) -> list[str]:
    """Quantised layers by backend with their bytes, and each of them."""
    if plan.quant is None:
        return []
    columns = ("backend", "layers", "weights as integers", "in float32")
    sums = []
    for backend in dict.fromkeys(backends.values()):
        layers = [layer for name, layer in plan.quant.layers.items() if backends[name] == backend]
        sizes = [sum(_bytes(layer)[i] for layer in layers) for i in (0, 1)]
        sums.append((backend, str(len(layers)), *(f"{size:,} bytes" for size in sizes)))
    each = [_layer_line(name, layer, plan, backends[name]) for name, layer in plan.quant.layers.items()]
    names = ("layer", "backend", "bits", "inputs", "runs at", "corrected at", "bytes", "float32")
    return [
        table_block("Layers by backend", columns, sums),
        table_block(f"All {len(each)} quantised layers", names, each, folded=True),
    ]


def _layer_line(name: str, layer: LayerQuant, plan: Plan, backend: str) -> list[str]:
    weights, floats = _bytes(layer)
    bits = " and ".join(dict.fromkeys(f"W{w.bits}A{x.bits}" for w, x in zip(layer.weights, layer.inputs, strict=True)))
    steps, corrected = len(layer.inputs[0].steps), len(plan.correction.layers.get(name, {}))
    inputs = " + ".join(map(str, layer.widths))
    return [name, backend, bits, inputs, f"{steps} steps", f"{corrected} steps", f"{weights:,}", f"{floats:,}"]


def _bytes(layer: LayerQuant) -> tuple[int, int]:
    """Of its weights: packed integers, and float32."""
    counts = [(grid.values.numel(), grid.bits) for grid in layer.weights]
    return sum(-(-count * bits // 8) for count, bits in counts), sum(4 * count for count, _ in counts)


def _facts(content: PageContent, plan: Plan) -> dict[str, str]:
    """Provenance of the plan, and of this page's numbers."""
    schedule, device = plan.schedule, content.pipe.device
    facts = {
        "model": f"{plan.identity.model}, weights {plan.identity.weights}",
        "sampler": f"{plan.identity.scheduler}, {schedule.num_steps} evaluations, guidance {plan.identity.guidance}",
        "images": f"{len(content.samples[FULL].images)} a row, from seed {plan.config.sample.seed}",
    }
    if schedule.cost is not None and schedule.uniform_cost is not None:
        facts["schedule objective"] = f"{schedule.cost:.6g}, uniform {schedule.uniform_cost:.6g}"
    if not content.curves:
        facts["calibration data"] = "not at hand: stage outputs of this plan are not beside it"
    facts |= {f"plan: {key}": _text(value) for key, value in plan.provenance.items()}
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts["drawn on"] = f"{device} ({gpu}), {torch.get_num_threads()} threads"
    facts["drawn with"] = f"cachequant {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return facts


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()

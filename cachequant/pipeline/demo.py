"""The whole main job on the embedded miniature: six stages, then every row from the same noise, and a page that shows it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cachequant import __version__
from cachequant.config import load_config, repository_folder
from cachequant.evaluation.features import FashionCNN, extract_features, load_feature_network
from cachequant.evaluation.grid import image_grid, save_image
from cachequant.evaluation.html import write_report
from cachequant.evaluation.paired import feature_distance, psnr, ssim
from cachequant.evaluation.plots import error_figure, quality_figure, save_figure, schedule_figure
from cachequant.evaluation.rows import Row, format_table, rows_to_json
from cachequant.kernels.backend import choose_backend
from cachequant.models.adapter import device_of
from cachequant.models.cost import float_bytes, plan_bytes, run_macs
from cachequant.models.loading import load_pipeline
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import evaluation_macs
from cachequant.pipeline.sample import Samples, draw
from cachequant.pipeline.stages import Stages
from cachequant.plan import Plan
from cachequant.storage import make_folder, save_json
from cachequant.types import Schedule

METHODS = {"naive": "naive", "dps": "dps", "dec_cache": "dec_cache", "paper": "paper", "cachequant": "best"}
"""Row of the table -> method of configs/method."""

EXPLANATIONS = {
    "full": "the pretrained model, every step in full, float32",
    "naive": "uniform caching and W8A8 next to each other, no correction",
    "dps": "naive with the paper's schedule: dynamic programming on the L1 distance of features",
    "dec_cache": "dps with the paper's correction of the cached feature",
    "paper": "CacheQuant as published: dec_cache with the correction of the quantised products",
    "cachequant": "our default: corrections fitted on the accelerated model's own path, forecast from two features",
}


@dataclass(frozen=True)
class Outcome:
    """One row with what it is drawn from."""

    row: Row
    samples: Samples
    plan: Plan | None
    step_costs: Tensor | None


def run_demo(folder: Path, device: str = "auto", overrides: list[str] | None = None) -> list[Row]:
    """Run everything, write grid.png, schedule.png, error.png, quality.png, report.html and metrics.json, print the table.

    Args:
        folder: where they go; stage outputs are kept in it too, so that a second run resumes.
        device: of `load_pipeline`.
        overrides: `key=value` changes of configs/fashion.yaml.

    Raises:
        UserError: an impossible configuration or an unwritable folder.
    """
    make_folder(folder)
    config_path = repository_folder() / "configs" / "fashion.yaml"
    base = load_config(config_path, overrides)
    pipe = load_pipeline(base.model, device)
    network = load_feature_network().to(pipe.device)
    seeds = list(range(base.sample.seed, base.sample.seed + base.sample.count))
    outcomes: dict[str, Outcome] = {}
    for name in ("full", *METHODS):
        config = load_config(config_path, [*(overrides or []), f"method={METHODS.get(name, 'naive')}"])
        context = Context.of(pipe, config)
        _say(f"— {name}: {EXPLANATIONS[name]}")
        plan, costs = (None, None) if name == "full" else _plan(context, folder)
        samples = draw(context, plan, seeds, name, record=True)
        reference = outcomes["full"].samples if outcomes else samples
        row = _measure(name, context, plan, samples, reference, network)
        outcomes[name] = Outcome(row, samples, plan, costs)
    _write(folder, outcomes, pipe)
    rows = [o.row for o in outcomes.values()]
    print(format_table(rows))
    return rows


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _plan(context: Context, folder: Path) -> tuple[Plan, Tensor]:
    """Stages 1 to 5 of one method (ours is saved), and the distance of each step's feature to the step before [T]."""
    stages = Stages.at(context, folder / "stages")
    calibration, _ = stages.calibration()
    plan, _ = stages.plan()
    if context.config.method == "best":
        plan.save(folder / "plan")
    return plan, calibration.neighbour


def _measure(
    name: str, context: Context, plan: Plan | None, samples: Samples, full: Samples, network: FashionCNN
) -> Row:
    """All numbers of one row; images are compared with the full-precision ones of the same noise."""
    features = [extract_features(network, s.images * 2 - 1, 64, context.pipe.device) for s in (samples, full)]
    equal = name == "full"
    full_macs, cached_macs = evaluation_macs(context)
    total = float_bytes(context.adapter.denoiser)
    return Row(
        name,
        feature_distance=float(feature_distance(*features).mean()),
        psnr=None if equal else float(psnr(samples.images, full.images, 1.0).mean()),
        ssim=float(ssim(samples.images, full.images, 1.0).mean()),
        full_step_share=plan.schedule.full_step_share if plan else 1.0,
        macs=run_macs(full_macs, cached_macs, plan, context.num_steps),
        bytes=plan_bytes(total, plan) if plan else total,
        seconds=samples.seconds,
    )


def _write(folder: Path, outcomes: dict[str, Outcome], pipe: Any) -> None:
    """Pictures, numbers and the page."""
    rows = [o.row for o in outcomes.values()]
    save_image(image_grid({name: o.samples.images[:8] for name, o in outcomes.items()}), folder / "grid.png")
    schedules: dict[str, Schedule] = {n: outcomes[n].plan.schedule for n in ("paper", "cachequant")}  # type: ignore[union-attr]
    save_figure(schedule_figure(schedules, outcomes["paper"].step_costs), folder / "schedule.png")
    save_figure(error_figure({n: _path_error(o.samples, outcomes["full"].samples) for n, o in outcomes.items()}),
                folder / "error.png")  # fmt: skip
    save_figure(quality_figure(rows), folder / "quality.png")
    save_json(folder / "metrics.json", rows_to_json(rows))
    captions = {
        "grid.png": "The same noise in every row; the first is the untouched model",
        "error.png": "Error of x_t against the full-precision trajectory, accumulated over the sampler's steps",
        "schedule.png": "Distance between neighbouring features, and the steps that run the whole network",
        "quality.png": "Closeness to the full-precision images against measured speed",
    }
    figures = {text: (folder / name).read_bytes() for name, text in captions.items()}
    sections = [("What the rows are", "\n".join(f"{n}: {text}" for n, text in EXPLANATIONS.items()))]
    write_report(folder / "report.html", "CacheQuant demo", rows, figures, sections, _facts(outcomes, pipe))


def _path_error(samples: Samples, full: Samples) -> Tensor:
    """‖x_t - x_t of full‖ / ‖x_t of full‖ at every evaluation: [T]."""
    assert samples.trajectory is not None and full.trajectory is not None
    difference = (samples.trajectory - full.trajectory).flatten(1).norm(dim=1)
    return difference / full.trajectory.flatten(1).norm(dim=1)


def _facts(outcomes: dict[str, Outcome], pipe: Any) -> dict[str, str]:
    """Provenance: plan, versions, machine, costs of the schedule."""
    plan = outcomes["cachequant"].plan
    assert plan is not None
    backend = choose_backend(plan.config.backend, device_of(pipe.unet))
    measured = plan.provenance["measured"]
    share = measured["dps_seconds"] / measured["trajectories_seconds"]
    return {
        "model": f"{plan.identity.model} {plan.identity.weights[:16]}",
        "sampler": f"{plan.identity.scheduler}, {plan.schedule.num_steps} evaluations",
        "images": f"{len(outcomes['full'].samples.images)} per row, from the same noise",
        "calibration": f"{plan.config.calibration.samples} trajectories, seed {plan.config.calibration.seed}",
        "schedule objective": f"{plan.schedule.cost:.6g}, uniform {plan.schedule.uniform_cost:.6g}",
        "DPS cost": f"{share:.1%} of the trajectories' time, ring of {measured['ring_bytes'] / 1e6:.1f} MB",
        "device": f"{pipe.device}, {torch.get_num_threads()} threads, {platform.machine()}",
        "kernels": f"{backend.name}: {backend.note}",
        "versions": f"cachequant {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
    }

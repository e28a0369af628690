"""How much the schedule matters, and which cost knows: uniform, power and random schedules against DPS under every cost.

Every schedule gets the configuration's own corrections and quantisation, fitted for it, and is judged by the images of
noise that no calibration has seen. Random ones are drawn evenly from all that DPS may choose from. A cost is worth what its
rank correlation with the measured error is over the random schedules, which no cost has picked.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.costs import COSTS
from cachequant.errors import UserError
from cachequant.evaluation.paired import finite_psnr
from cachequant.evaluation.plots import points_figure, schedule_figure
from cachequant.pipeline.calibrate import ContextBands, SamplerGains, new_band
from cachequant.pipeline.context import Context
from cachequant.pipeline.effect import effect_weights
from cachequant.pipeline.hook import Call
from cachequant.pipeline.sample import draw
from cachequant.pipeline.studies.findings import Findings, Table
from cachequant.pipeline.studies.subject import StudySubject
from cachequant.schedule import (
    best_schedule,
    group_costs,
    power_schedule,
    random_schedule,
    schedule_cost,
    uniform_schedule,
)
from cachequant.storage import load_json, load_tensors, save_json, save_tensors
from cachequant.types import Schedule

RANDOM = 20
POWERS = (("noisy end", 0.0), ("middle", 0.5), ("clean end", 1.0))
"""Where DeepCache's non-uniform schedule is dense, as a share of the run."""


@dataclass(frozen=True)
class Measured:
    """A schedule with its objective under every cost and what it gave.

    Attributes:
        schedule: the steps.
        objectives: cost -> value, infinite where a group is longer than any that DPS may choose.
        error: mean squared error of the images to full precision's, [0, 1] units.
        psnr: their mean PSNR in dB.
    """

    schedule: Schedule
    objectives: dict[str, float]
    error: float
    psnr: float


def study(subject: StudySubject, count: int) -> Findings:
    """Measure every schedule on `count` images; each is filed, so that an interrupted study goes on.

    Raises:
        UserError: every step is full, so that there is but one schedule.
    """
    steps, interval = subject.context.num_steps, subject.context.config.cache.interval
    if uniform_schedule(steps, interval, subject.context.config.cache.refreshes).full_step_share == 1:
        raise UserError(
            f"cache.interval is {interval} of {steps} steps, so that all are full: raise it to compare schedules"
        )
    tables = cost_tables(subject)
    groups = {name: group_costs(*table, COSTS[name].coherent) for name, table in tables.items()}
    context, seeds = subject.judging(count)
    exact = draw(context, None, seeds, "full").images
    found: dict[str, Measured] = {}
    for name, schedule in tqdm(candidates(subject.context, tables).items(), "schedules", leave=False, disable=None):
        error, decibels = judge(subject, schedule, context, seeds, exact)
        objectives = {cost: schedule_cost(group, schedule) for cost, group in groups.items()}
        found[name] = Measured(schedule, objectives, error, decibels)
    return _findings(subject, found, count)


def candidates(context: Context, tables: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Schedule]:
    """Uniform, power at three places, the optimum of each cost, and `RANDOM` feasible ones."""
    steps, interval, power = context.num_steps, context.config.cache.interval, context.config.schedule.power
    groups = context.refreshes
    found = {"uniform": uniform_schedule(steps, interval, groups)}
    found |= {f"power, {w}": power_schedule(steps, interval, share * steps, power, groups) for w, share in POWERS}
    for name, (band, weights) in tables.items():
        found[f"dps {name}"] = best_schedule(band, interval, weights, groups, COSTS[name].coherent)
    return found | {f"random {seed}": random_schedule(steps, interval, seed, groups) for seed in range(RANDOM)}


def judge(
    subject: StudySubject, schedule: Schedule, context: Context, seeds: list[int], exact: Tensor
) -> tuple[float, float]:
    """Mean squared error and PSNR of the images of a schedule with everything else fitted for it."""
    stages = replace(subject.stages, chosen=schedule)

    def compute() -> tuple[float, float]:
        images = draw(context, stages.plan()[0], seeds, "schedule").images
        return float((images - exact).square().mean()), float(finite_psnr(images, exact, 1.0).mean())

    def save(folder: Path, value: tuple[float, float]) -> None:
        save_json(folder / "judged.json", {"error": value[0], "psnr": value[1]})

    def load(folder: Path) -> tuple[float, float]:
        record = load_json(folder / "judged.json")
        return record["error"], record["psnr"]

    config = subject.context.config
    inputs = {
        "parent": stages.calibration_key(), "refresh_steps": list(schedule.refresh_steps), "seeds": [seeds[0], len(seeds)],
        "correction": asdict(config.correction), "quant": asdict(config.quant), "backend": config.backend,
    }  # fmt: skip
    return stages.store.obtain(6, "judged", inputs, compute, save, load)[0]


def cost_tables(subject: StudySubject) -> dict[str, tuple[Tensor, Tensor]]:
    """Band [T, L, …] and weights [T] of every cost, from one set of full-precision trajectories."""

    def save(folder: Path, value: dict[str, Tensor]) -> None:
        save_tensors(folder / "costs.safetensors", value)

    def load(folder: Path) -> dict[str, Tensor]:
        return load_tensors(folder / "costs.safetensors")

    inputs = {
        "parent": subject.stages.calibration_key(), "costs": {name: asdict(cost) for name, cost in COSTS.items()},
        "bits": subject.context.config.quant.activation_bits,
    }  # fmt: skip
    flat, _ = subject.stages.store.obtain(1, "costs", inputs, lambda: _gather(subject.context), save, load)
    return {name: (flat[_band_name(name)], flat[cost.weight]) for name, cost in COSTS.items()}


def _band_name(name: str) -> str:
    return f"{COSTS[name].error}{' rounded' if COSTS[name].rounded else ''}"


def _gather(context: Context) -> dict[str, Tensor]:
    """Every band that some cost needs, and every weight."""
    bands = {_band_name(name): ContextBands(partial(new_band, context, cost)) for name, cost in COSTS.items()}
    cache, gains = FeatureCache(uniform_schedule(context.num_steps, 1)), SamplerGains(context)

    def step(call: Call) -> Tensor:
        """In full; the feature goes into every band of its context."""
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        for band in bands.values():
            band.update(call.context, feature)
        if call.opens:
            gains.update(cache.step, call, output, feature)
        return output

    context.trajectories(step, cache, context.seeds(), "1 costs")
    ones = torch.ones(context.num_steps, dtype=torch.float64)
    weights = {"none": ones, "sampler": gains.weights(), "effect": effect_weights(context)}
    return weights | {name: band.pooled().values for name, band in bands.items()}


def rank_correlations(found: dict[str, Measured]) -> dict[str, float | None]:
    """Spearman's correlation of each cost with the measured error over the random schedules; None where all are alike."""
    drawn = [m for name, m in found.items() if name.startswith("random")]
    errors = [m.error for m in drawn]
    return {cost: _rank_correlation([m.objectives[cost] for m in drawn], errors) for cost in COSTS}


def _rank_correlation(first: list[float], second: list[float]) -> float | None:
    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 < len(set(second)) else None


def _ratio(value: float, base: float) -> float | None:
    """A quotient, where there is one."""
    return value / base if isfinite(base) and base > 0 else None


def _findings(subject: StudySubject, found: dict[str, Measured], count: int) -> Findings:
    ranks = rank_correlations(found)
    random_errors = sorted(m.error for name, m in found.items() if name.startswith("random"))
    named = {name: m for name, m in found.items() if not name.startswith("random")}
    lines = []
    for name, m in sorted(named.items(), key=lambda item: item[1].error):
        beaten = sum(m.error < e for e in random_errors) / len(random_errors)
        cost = name.removeprefix("dps ")
        ratio = _ratio(m.objectives[cost], found["uniform"].objectives[cost]) if cost in COSTS else None
        rank, steps = ranks.get(cost), ", ".join(map(str, m.schedule.refresh_steps))
        texts = [f"{m.psnr:.2f}", f"{m.error:.3g}", f"{beaten:.0%}", "–" if ratio is None else f"{ratio:.3f}"]
        lines.append([name, *texts, "–" if rank is None else f"{rank:+.2f}", steps])
    spread = [m.psnr for name, m in found.items() if name.startswith("random")]
    lines.append(["random, best to worst", f"{max(spread):.2f} to {min(spread):.2f}", *["–"] * 5])
    columns = (
        "schedule",
        "PSNR dB",
        "squared error",
        "random beaten",
        "objective/uniform",
        "rank correlation",
        "full steps",
    )
    known = {cost: rank for cost, rank in ranks.items() if rank is not None}
    best = max(known, key=known.__getitem__, default=subject.context.config.schedule.cost)
    shown = {"uniform": found["uniform"].schedule}
    shown |= {name: m.schedule for name, m in named.items() if name.startswith("dps")}
    groups = {
        "random": [(m.objectives[best], m.error) for name, m in found.items() if name.startswith("random")],
        "uniform": [(found["uniform"].objectives[best], found["uniform"].error)],
        "DPS": [(m.objectives[best], m.error) for name, m in named.items() if name.startswith("dps")],
    }
    figures = {
        "Schedules of every cost": schedule_figure(shown, None),
        f"Measured error against the {best} cost{', which predicts it best' if known else ''}": points_figure(
            {name: finite for name, points in groups.items() if (finite := [p for p in points if isfinite(p[0])])},
            f"objective of the {best} cost",
            "mean squared error of the images",
        ),
    }
    interval = subject.context.config.cache.interval
    notes = [
        ("What was measured", f"{len(found)} schedules of interval {interval}, each with the configuration's own "
         f"corrections fitted for it, on {count} images of unseen noise against full precision. {RANDOM} are random."),
        ("How to read it", "“random beaten” is the share of random schedules with a larger error. “objective/uniform” is "
         "the schedule's own cost over that of the uniform schedule. “rank correlation” is of the cost with the error over "
         "the random schedules: +1 knows the order, 0 knows nothing, below 0 misleads."),
    ]  # fmt: skip
    records = {
        name: {
            "psnr": m.psnr,
            "error": m.error,
            "refresh_steps": list(m.schedule.refresh_steps),
            "costs": {cost: value if isfinite(value) else None for cost, value in m.objectives.items()},
        }
        for name, m in found.items()
    }
    numbers = {"schedules": records, "rank_correlation": ranks}
    title = f"Schedule sensitivity: {subject.context.config.model.name}, N = {interval}"
    return Findings(title, notes, [Table("Schedules", columns, lines)], figures, numbers)

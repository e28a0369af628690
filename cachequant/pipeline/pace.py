"""A time budget becomes a number of refreshes before anything is calibrated; the rest of the plan follows from that."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from cachequant.budget import Allowance, refreshes_within
from cachequant.config import CacheConfig
from cachequant.pipeline.at_work import backend_of
from cachequant.pipeline.context import Context
from cachequant.pipeline.machine import machine_name
from cachequant.pipeline.step_times import StepTimes, measure_step_times
from cachequant.pipeline.store import StageStore
from cachequant.storage import load_json, save_json


def within_budget(context: Context, store: StageStore) -> tuple[Context, Allowance | None]:
    """The context with `cache.refreshes` and `cache.interval` = ceil(T / refreshes) in place of a budget.

    Step times are measured once for a run folder, machine, backend and batch, and kept as part of stage 1. The number of
    refreshes is exact where each adds the same time; else it is the number that fits wherever they are, and the allowance,
    None without a budget, tells the schedule how to use the rest.

    Raises:
        UserError: the budget is below the fastest plan of a single refresh.
    """
    cache, steps = context.config.cache, context.num_steps
    refreshes, allowance = cache.refreshes, None
    if cache.budget_ms is not None or cache.speedup is not None:
        allowance = step_times(context, store).allowance(cache.budget_ms, cache.speedup)
        cached = sum(allowance.cached) / steps
        added = max(f - c for f, c in zip(allowance.full, allowance.cached, strict=True))
        refreshes = refreshes_within(steps, cached + added, cached, allowance.budget)
    if refreshes is None:
        return context, None
    paced = replace(cache, refreshes=refreshes, interval=-(-steps // refreshes), budget_ms=None, speedup=None)
    return replace(context, config=replace(context.config, cache=paced)), allowance


def step_times(context: Context, store: StageStore) -> StepTimes:
    """Measured times of this configuration's steps on this machine."""
    config = context.config
    cache, untouched = config.cache, config.cache.speedup is not None  # a step's cost depends on nothing else of it
    same = CacheConfig(branch=cache.branch, span=cache.span, feature_bits=cache.feature_bits)
    inputs = {
        "identity": asdict(context.identity),
        "timesteps": list(context.timesteps),
        "sampler": asdict(config.sampler),
        "cache": asdict(same),
        "correction": asdict(config.correction),
        "quant": asdict(config.quant),
        "batch": config.sample.batch_size,
        "machine": f"{machine_name(context.pipe.device)}, {torch.get_num_threads()} threads",
        "backend": backend_of(context).name,
        "untouched": untouched,
    }

    def save(folder: Path, value: StepTimes) -> None:
        save_json(folder / "times.json", asdict(value))

    def load(folder: Path) -> StepTimes:
        record = load_json(folder / "times.json")
        return StepTimes(tuple(record["full"]), tuple(record["cached"]), record["overhead"], record["untouched"])

    found, _ = store.obtain(1, "step_times", inputs, lambda: measure_step_times(context, untouched), save, load)
    return found

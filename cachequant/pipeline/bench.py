"""Ways to run one model side by side in one process: whole sampling runs, interleaved, medians."""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.pipeline.at_work import at_work, backend_of
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import first_call
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.machine import processor_name, versions
from cachequant.pipeline.timing_plan import timing_plan
from cachequant.plan import Plan
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction

MODES = ("fp32", "compile", "openvino", "int8", "cache", "cachequant")
NOTES = {
    "fp32": "the model in float32, every step in full",
    "compile": "torch.compile of the model in float32, every step in full",
    "openvino": "the same layers quantised in OpenVINO, every step in full",
    "int8": "quantised, every step in full",
    "cache": "float32, cached steps with their corrections",
    "cachequant": "cached steps and integers with all corrections",
}


@dataclass
class Times:
    """Milliseconds of one mode, one entry per evaluation or run."""

    full: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def row(self, mode: str) -> dict[str, Any]:
        """Medians; None where the mode has no such step."""
        return {
            "mode": mode,
            "ms_per_step": statistics.median(self.step),
            "ms_full_step": statistics.median(self.full) if self.full else None,
            "ms_cached_step": statistics.median(self.cached) if self.cached else None,
        }


def run_bench(context: Context, modes: tuple[str, ...], rounds: int = 3) -> dict[str, Any]:
    """Measure every mode in turn, `rounds` times over: {rows: [{mode, ms_per_step, ms_full_step, ms_cached_step}], …}.

    A run is the pipeline's own loop with its scheduler, guidance and corrections, up to the last step; nothing is decoded.
    `ms_per_step` is a run's time over its evaluations, for a batch of `sample.batch_size` images.

    Args:
        context: pipeline and configuration.
        modes: of MODES.
        rounds: runs of each mode.

    Raises:
        UserError: unknown mode, or one that does not run here.
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise UserError(f"modes has {unknown or 'nothing'}, expected some of {','.join(MODES)}: correct --modes")
    plan = timing_plan(context, first_call(context))
    times = {mode: Times() for mode in modes}
    makers = {mode: _maker(mode, context, plan) for mode in modes}
    for _ in range(rounds):
        for mode in modes:
            with makers[mode]() as (step, cache):
                _time_run(context, mode, step, cache, times[mode])
    return {"rows": [times[mode].row(mode) for mode in modes], **_facts(context, plan, rounds)}


def format_bench(result: dict[str, Any]) -> str:
    """The table, each mode against the first one."""
    rows, base = result["rows"], result["rows"][0]
    lines = [f"{'mode':<12}{'ms/step':>10}{'full':>10}{'cached':>10}   against {base['mode']}: per step, full step"]
    for row in rows:
        cells = [
            f"{row[k]:10.1f}" if row[k] is not None else f"{'–':>10}"
            for k in ("ms_per_step", "ms_full_step", "ms_cached_step")
        ]
        full = f"{base['ms_full_step'] / row['ms_full_step']:.2f}×" if row["ms_full_step"] else "–"
        lines.append(f"{row['mode']:<12}{''.join(cells)}   {base['ms_per_step'] / row['ms_per_step']:.2f}×, {full}")
    return "\n".join(lines)


def _run(context: Context, step: StepFunction, cache: FeatureCache, label: str) -> None:
    size = context.config.sample.batch_size
    seeds = list(range(context.config.sample.seed, context.config.sample.seed + size))
    context.trajectories(step, cache, seeds, label, size)


def _time_run(context: Context, mode: str, step: StepFunction, cache: FeatureCache, times: Times) -> None:
    """One whole run; its first evaluation is done twice and the first time, which warms up, does not count."""
    warm, spent = 0.0, 0.0

    def timed(call: Call) -> Tensor:
        """One evaluation, whose time is noted."""
        nonlocal warm
        if warm == 0.0:
            start = time.perf_counter()
            step(call)
            cache.features.clear()
            warm = time.perf_counter() - start
        refresh, start = cache.must_refresh, time.perf_counter()
        output = step(call)
        (times.full if refresh else times.cached).append(1e3 * (time.perf_counter() - start))
        return output

    start = time.perf_counter()
    with torch.no_grad():
        _run(context, timed, cache, mode)
    spent = time.perf_counter() - start - warm
    times.step.append(1e3 * spent / context.num_steps)


Maker = Callable[[], Any]


def _maker(mode: str, context: Context, plan: Plan) -> Maker:
    """What sets a mode up and takes it down again: a context manager of (step, cache)."""
    every = uniform_schedule(context.num_steps, 1)
    if mode == "compile":
        return _called(context, _compiled(context))
    if mode == "openvino":
        from cachequant.evaluation.openvino import compile_openvino

        call = first_call(context)
        assert plan.quant is not None
        run = compile_openvino(
            context.adapter.denoiser, plan.quant, call.x, torch.as_tensor(call.timestep), _tensors(call.kwargs)
        )
        return _called(context, lambda c: run(c.x, torch.as_tensor(c.timestep), _tensors(c.kwargs)))
    plans = {
        "fp32": replace(plan, schedule=every, correction=Correction(), quant=None),
        "int8": replace(plan, schedule=every, correction=Correction()),
        "cache": replace(plan, quant=None),
        "cachequant": plan,
    }
    return _accelerated(context, plans[mode])


def _accelerated(context: Context, plan: Plan) -> Maker:
    """A plan at work, by the configuration's backend."""

    @contextmanager
    def make() -> Iterator[tuple[StepFunction, FeatureCache]]:
        """The denoiser with the plan attached, taken off again at the end."""
        with at_work(context, plan) as running:
            yield running.step, running.cache

    return make


def _called(context: Context, run: StepFunction) -> Maker:
    """A function that computes every step in full."""

    @contextmanager
    def make() -> Iterator[tuple[StepFunction, FeatureCache]]:
        yield run, FeatureCache(uniform_schedule(context.num_steps, 1))

    return make


def _compiled(context: Context) -> StepFunction:
    """torch.compile of the denoiser's own forward."""
    denoiser: Any = context.adapter.denoiser
    forward = torch.compile(lambda x, t, kwargs: type(denoiser).forward(denoiser, x, t, **kwargs, return_dict=False)[0])

    def run(call: Call) -> Tensor:
        with warnings.catch_warnings():  # Inductor's, about its own settings
            warnings.simplefilter("ignore")
            return forward(call.x, call.timestep, _tensors(call.kwargs))

    return run


def _tensors(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}


def _facts(context: Context, plan: Plan, rounds: int) -> dict[str, Any]:
    """Everything that a number needs beside it."""
    backend = backend_of(context)
    return {
        "model": context.config.model.name,
        "batch": context.config.sample.batch_size,
        "evaluations": context.num_steps,
        "full_steps_with_cache": len(plan.schedule.refresh_steps),
        "interval": context.config.cache.interval,
        "rounds": rounds,
        "backend": f"{backend.name}: {backend.note}",
        "plan": "activation grids of one evaluation, corrections that change nothing: the times of a calibrated plan",
        "machine": f"{processor_name()}, {platform.machine()}, {platform.system()}",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }

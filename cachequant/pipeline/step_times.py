"""Measured times of full and cached evaluations, from which a time budget becomes a number of refreshes."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachequant.budget import Allowance
from cachequant.cache.feature_cache import FeatureCache
from cachequant.models.adapter import device_of, on_card
from cachequant.pipeline.at_work import at_work
from cachequant.pipeline.context import Context
from cachequant.pipeline.first_calls import first_call
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.timing_plan import timing_plan
from cachequant.plan import Plan
from cachequant.schedule import uniform_schedule
from cachequant.types import Correction


@dataclass(frozen=True)
class StepTimes:
    """Milliseconds of one batch of `sample.batch_size` images.

    Attributes:
        full, cached: [T] of a full and of a cached evaluation at each step, as the plan will run.
        overhead: of a whole run outside the network (scheduler, guidance).
        untouched: of a whole run of the untouched model, None where it was not asked for.
    """

    full: tuple[float, ...]
    cached: tuple[float, ...]
    overhead: float
    untouched: float | None = None

    def allowance(self, budget_ms: float | None, speedup: float | None) -> Allowance:
        """What the network may take of a whole run's `budget_ms`, or of the untouched model's time / `speedup`."""
        if budget_ms is None:
            assert self.untouched is not None and speedup is not None, "a speed-up is over the untouched model's time"
            budget_ms = self.untouched / speedup
        return Allowance(self.full, self.cached, budget_ms - self.overhead)


@torch.no_grad()
def measure_step_times(context: Context, untouched: bool) -> StepTimes:
    """A whole run of the accelerated model with every second step cached, and with `untouched` one of the model as it is.

    Decoding is left out. Evaluations of equally many rows take equal time, the median of theirs; a pipeline that drops its
    guidance on the way has steps of two prices.
    """
    steps = context.num_steps
    config = replace(context.config, cache=replace(context.config.cache, interval=min(2, steps)))
    alternate = replace(context, config=config)
    plan = timing_plan(alternate, first_call(alternate))
    whole, rows, kinds = _time_run(alternate, plan)
    spent = sum(sum(times) for by_rows in kinds.values() for times in by_rows.values())
    price = {kind: {n: statistics.median(times) for n, times in by_rows.items()} for kind, by_rows in kinds.items()}
    full, cached = (tuple(_price(price.get(kind, price[True]), n) for n in rows) for kind in (True, False))
    plain = replace(plan, schedule=uniform_schedule(steps, 1), correction=Correction(), quant=None)
    baseline = _time_run(context, plain)[0] if untouched else None
    return StepTimes(full, cached, max(0.0, whole - spent), baseline)


def _price(by_rows: dict[int, float], rows: int) -> float:
    """Of evaluations with so many rows, else in proportion to those of the nearest number."""
    nearest = min(by_rows, key=lambda n: abs(n - rows))
    return by_rows[nearest] * rows / nearest


Kinds = dict[bool, dict[int, list[float]]]


def _time_run(context: Context, plan: Plan) -> tuple[float, list[int], Kinds]:
    """A whole run in milliseconds, rows of each evaluation, and times by (whether it was full, rows)."""
    card = device_of(context.adapter.denoiser)
    with at_work(context, plan) as running, on_card(card):
        clock = _Clock(running.step, running.cache, card.type == "cuda")
        settings = context.config.sample
        seeds = list(range(settings.seed, settings.seed + settings.batch_size))
        start = clock.now()
        context.trajectories(clock, running.cache, seeds, "1 step times", len(seeds))
        return clock.now() - start - clock.warming, *clock.found()


class _Clock:
    """Takes the step and its time; the first evaluation is done twice and the first time, which warms up, does not count."""

    def __init__(self, step: StepFunction, cache: FeatureCache, cuda: bool) -> None:
        self._step, self._cache, self._cuda = step, cache, cuda
        self._rows: dict[int, int] = defaultdict(int)
        self._times: dict[int, float] = defaultdict(float)
        self._full: dict[int, bool] = {}
        self.warming = 0.0

    def now(self) -> float:
        """Milliseconds, with the device's queue drained."""
        if self._cuda:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def __call__(self, call: Call) -> Tensor:
        if not self._full:
            start = self.now()
            self._step(call)
            self._cache.features.clear()
            self.warming = self.now() - start
        step, start = self._cache.step, self.now()
        if call.opens:
            self._full[step] = self._cache.must_refresh
        output = self._step(call)
        self._times[step] += self.now() - start
        self._rows[step] += len(call.x)
        return output

    def found(self) -> tuple[list[int], Kinds]:
        """Rows of each evaluation, and its times by kind and rows."""
        kinds: Kinds = defaultdict(lambda: defaultdict(list))
        for step, full in self._full.items():
            kinds[full][self._rows[step]].append(self._times[step])
        return [self._rows[step] for step in sorted(self._rows)], kinds

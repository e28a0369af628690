"""Stage 1: full-precision trajectories, the distances that DPS needs, calibration inputs, and the schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachequant.budget import Allowance, solve_budget
from cachequant.cache.feature_cache import FeatureCache
from cachequant.costs import COSTS, Band, Cost, band_for
from cachequant.pipeline.context import Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.effect import effect_weights
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.held_out import HeldOut
from cachequant.pipeline.hook import Call
from cachequant.pipeline.inputs import KeptInputs, StepInput
from cachequant.pipeline.spread import Spread, denoised_factors
from cachequant.schedule import best_schedule, group_costs, power_schedule, uniform_schedule
from cachequant.types import Correction, Schedule


@dataclass(frozen=True)
class Calibration:
    """What the trajectories of stage 1 leave behind.

    Attributes:
        band: [T, L] or [T, L, L + 1] errors of reuse, of `cachequant.costs.band_for`.
        cost: its name.
        weights: [T] what an error at each step counts, ones where the cost has no weight.
        spread: [T, C] deviation of the denoised predictions of `Context.paired_seeds`.
        inputs: one entry per step, rows evenly spaced over all samples.
        measured: seconds of the trajectories and of DPS, peak bytes of the ring.
    """

    band: Tensor
    cost: str
    weights: Tensor
    spread: Tensor
    inputs: tuple[StepInput, ...]
    measured: dict[str, float]

    @property
    def neighbour(self) -> Tensor:
        """[T] error of reusing the feature of one step before; zeros where nothing can be reused."""
        alone = self.band if self.band.dim() == 2 else self.band[:, :, 0]
        return alone[:, min(1, alone.shape[1] - 1)]


def gather(context: Context) -> Calibration:
    """Sample in full precision and stream features into the band; T feature maps are never held at once."""
    config, settings = context.config, context.config.calibration
    cost = COSTS[config.schedule.cost]
    bands = ContextBands(lambda: new_band(context, cost))
    cache = FeatureCache(uniform_schedule(context.num_steps, 1))
    gains = SamplerGains(context) if cost.weight == "sampler" else None
    rows = max(settings.refresh_inputs, settings.cached_inputs)
    inputs = KeptInputs(context.num_steps, settings.samples, min(settings.batch_size, settings.samples), rows)
    spread, paired_batches = Spread(denoised_factors(context)), -(-len(context.paired_seeds) // settings.batch_size)
    clock, begun = _Stopwatch(context), 0  # batches so far
    measured_batches = -(-(settings.dps_samples or settings.samples) // settings.batch_size)

    def step(call: Call) -> Tensor:
        """Full precision; its feature goes into its context's band, its input is kept."""
        nonlocal begun
        begun += call.opens and cache.step == 0
        inputs.take(cache.step, call)
        with clock.part("trajectories"):
            output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        if begun <= paired_batches:
            spread.update(cache.step, call.x, output)
        if begun > measured_batches:
            return output
        with clock.part("dps"):
            thin = cost.error == "l2" and gains is not None  # an estimate anyway: half the rows will do
            bands.update(call.context, feature[::2] if thin else feature)
            if gains is not None and call.opens:
                gains.update(cache.step, call, output, feature)
        return output

    context.trajectories(step, cache, context.seeds(), "1 calibrate")
    weights = torch.ones(context.num_steps, dtype=torch.float64) if gains is None else gains.weights()
    if cost.weight == "effect":
        with clock.part("effects"):
            weights = effect_weights(context)
    pooled = bands.pooled()
    measured = {f"{name}_seconds": value for name, value in clock.seconds.items()}
    measured["ring_bytes"] = float(pooled.peak_bytes)
    return Calibration(pooled.values, config.schedule.cost, weights, spread.deviation, inputs.joined(), measured)


def new_band(context: Context, cost: Cost) -> Band:
    """What streams one guidance context's features for a cost."""
    config = context.config
    return band_for(
        cost, context.num_steps, config.cache.interval, context.adapter.channel_dim, config.quant.activation_bits
    )


class ContextBands:
    """A band for every guidance context, so that no feature is compared with another context's; together in the end.

    Args:
        make: an empty band.
    """

    def __init__(self, make: Callable[[], Band]) -> None:
        self._make, self._bands = make, dict[Hashable, Band]()

    def update(self, context: Hashable, feature: Tensor) -> None:
        """Take the feature of a context's next step."""
        if context not in self._bands:
            self._bands[context] = self._make()
        self._bands[context].update(feature)

    def pooled(self) -> Band:
        """All of them as one, to be asked for once."""
        pooled, *others = self._bands.values()
        for band in others:
            pooled.merge(band)
        return pooled


class SamplerGains:
    """Weight of a feature error at each step by what it does to the final sample.

    A prediction error δε at step t moves x̄ = x/√ᾱ by (σ_t - σ_{t+1})·δε, σ = √(1/ᾱ - 1) (DDIM, Song et al. 2021,
    equation 13). For data of variance v the probability-flow path scales as √(σ² + v), so that move reaches the sample
    with the factor √(v / (σ_{t+1}² + v)). The feature enters through the measured gain ‖δε‖² / ‖δX‖² of reusing the
    feature of one step before, on every `share`-th row at every `stride`-th step; it changes slowly.
    """

    def __init__(self, context: Context, share: int = 4, stride: int = 5) -> None:
        self.context, self.share, self.stride = context, share, stride
        self._gain = torch.zeros(context.num_steps, dtype=torch.float64)
        self._passes = torch.zeros(context.num_steps)
        self._variance: list[float] = []
        self._previous: Tensor | None = None

    def update(self, step: int, call: Call, output: Tensor, feature: Tensor) -> None:
        """Measure the gain with one cached step on a fraction of the batch, where it is this step's turn."""
        if step == self.context.num_steps - 1:
            self._variance.append(float(call.x.float().var()))
        if step % self.stride > 1:
            return
        rows = slice(None, None, self.share)
        if step % self.stride == 1 and self._previous is not None:
            part = call.rows(rows)
            reused = self.context.adapter.cached(part.x, part.timestep, None, self._previous, None, **part.kwargs)
            change = (feature[rows] - self._previous).double().square().sum()
            self._gain[step] += float((reused - output[rows]).double().square().sum() / change.clamp(min=1e-30))
            self._passes[step] += 1
        self._previous = feature[rows].clone()

    def weights(self) -> Tensor:
        """[T] float64; see the class."""
        sigma = sampler_sigmas(self.context)  # [T + 1]
        variance = sum(self._variance) / len(self._variance)
        move = (sigma[:-1] - sigma[1:]).square() * variance / (sigma[1:].square() + variance)
        measured = self._passes > 0
        if not measured.any():  # a single evaluation: there is nothing to reuse
            return move
        steps = torch.arange(len(measured))
        nearest = (steps[:, None] - steps[measured]).abs().argmin(1)  # [T] index of the closest measured step
        return move * (self._gain[measured] / self._passes[measured])[nearest]


def sampler_sigmas(context: Context) -> Tensor:
    """σ = √(1/ᾱ - 1) at every evaluation and at the end (0): [T + 1] float64."""
    alphas = context.pipe.scheduler.alphas_cumprod.double().cpu()
    alpha = alphas[torch.tensor(context.timesteps)]
    return torch.cat([(1 / alpha - 1).sqrt(), torch.zeros(1, dtype=torch.float64)])


def choose_schedule(context: Context, calibration: Calibration, allowance: Allowance | None = None) -> Schedule:
    """The schedule that the configuration asks for, with its objective beside the uniform one's.

    An allowance frees the number of refreshes where their prices differ; a forecast's cost, which knows the group before,
    keeps the number that fits anywhere.
    With `schedule.fallback` DPS must also win on held-out noise: both schedules are fitted and run on a few samples, and
    the one whose samples are closer to full precision is kept.
    """
    config, num_steps = context.config, context.num_steps
    interval = config.cache.interval
    groups = context.refreshes
    if config.schedule.kind == "power":
        return power_schedule(num_steps, interval, config.schedule.center, config.schedule.power, groups)
    coherent = COSTS[calibration.cost].coherent
    best = best_schedule(calibration.band, interval, calibration.weights, groups, coherent)
    if allowance is not None and not allowance.equal and calibration.band.dim() == 2:
        best = budget_schedule(calibration, interval, allowance, best.uniform_cost)
    uniform = uniform_schedule(num_steps, interval, groups)
    uniform = replace(uniform, cost=best.uniform_cost, uniform_cost=best.uniform_cost)
    if config.schedule.kind == "uniform" or best.refresh_steps == uniform.refresh_steps:
        return uniform
    if config.schedule.fallback:
        trial = ScheduleTrial(context)
        return best if trial.error(best) <= trial.error(uniform) else uniform
    return best


def budget_schedule(
    calibration: Calibration, interval: int, allowance: Allowance, uniform_cost: float | None
) -> Schedule:
    """The best schedule within an allowance, with groups as long as those of the interval may be."""
    costs = group_costs(calibration.band, calibration.weights, COSTS[calibration.cost].coherent)
    full, cached = (torch.tensor(each, dtype=torch.float64) for each in (allowance.full, allowance.cached))
    found = solve_budget(costs, full, cached, allowance.budget, math.ceil(interval / 2))
    return Schedule(found.refresh_steps, len(costs), interval, found.cost, uniform_cost)


class ScheduleTrial:
    """Error of a schedule on held-out noise, fitted and measured on a quarter of the samples of stage 2, at least four."""

    def __init__(self, context: Context, share: int = 4) -> None:
        calibration = context.config.calibration
        count = max(4, len(context.fresh_seeds) // share)
        small = replace(context.config, calibration=replace(calibration, dec_samples=count))
        self.context = replace(context, config=small)
        self.held_out = HeldOut(self.context, count)

    def error(self, schedule: Schedule) -> float:
        """Error of the final images (`HeldOut`), with the cached feature corrected where the configuration says so."""
        context, settings = self.context, self.context.config.correction
        fits = settings.cache
        maps = solve_maps(gather_moments(context, schedule), settings.ridge, settings.inflation) if fits else {}
        return self.held_out.error(schedule, Correction(maps))


class _Stopwatch:
    """Seconds spent in named parts, with the device's queue drained at the borders."""

    def __init__(self, context: Context) -> None:
        self._cuda = next(context.adapter.denoiser.parameters()).is_cuda
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", 0.0

    def part(self, name: str) -> _Stopwatch:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + self._now() - self._start

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

"""Stage 1: full-precision trajectories, the distances that DPS needs, calibration inputs, and the schedule."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.errors import UserError
from cachequant.pipeline.context import HELD_OUT, Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.features import gather_moments
from cachequant.pipeline.hook import Call, StepFunction
from cachequant.pipeline.spread import Spread, denoised_factors
from cachequant.pipeline.step import accelerated_step
from cachequant.schedule import DistanceBand, dps_schedule, num_groups, power_schedule, uniform_schedule
from cachequant.types import Correction, Schedule


@dataclass(frozen=True)
class StepInput:
    """Inputs of one evaluation, kept for stage 4.

    Attributes:
        x: [n, C, H, W] rows of x_t.
        timestep: training timestep.
        kwargs: conditioning of the same rows.
    """

    x: Tensor
    timestep: Tensor
    kwargs: dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What the trajectories of stage 1 leave behind.

    Attributes:
        band: [T, L] distances of `DistanceBand`.
        cost: how they were measured.
        weights: [T] weight of a squared feature error at each step under the "sampler" cost, else ones.
        spread: [T, C] deviation of the denoised predictions.
        inputs: one entry per step, rows evenly spaced over the calibration batch.
        measured: seconds of the trajectories and of DPS, peak bytes of the ring.
    """

    band: Tensor
    cost: str
    weights: Tensor
    spread: Tensor
    inputs: tuple[StepInput, ...]
    measured: dict[str, float]


def gather(context: Context) -> Calibration:
    """Sample in full precision and stream features into the band; T feature maps are never held at once."""
    config = context.config
    cost = "l1" if config.schedule.cost == "l1" else "l2"
    band = DistanceBand(context.num_steps, config.cache.interval, cost)
    cache = FeatureCache(uniform_schedule(context.num_steps, 1))
    gains = SamplerGains(context) if config.schedule.cost == "sampler" else None
    inputs: list[list[StepInput]] = [[] for _ in context.timesteps]
    spread = Spread(denoised_factors(context))
    rows = max(config.calibration.refresh_inputs, config.calibration.cached_inputs)
    clock = _Stopwatch(context)

    def step(call: Call) -> Tensor:
        """Full precision; its feature goes into the band, its input is kept."""
        inputs[cache.step].append(keep_rows(call, rows))
        with clock.part("trajectories"):
            output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        spread.update(cache.step, call.x, output)
        with clock.part("dps"):
            band.update(feature if gains is None else feature[::2])  # an estimate anyway: half the rows will do
            if gains is not None:
                gains.update(cache.step, call, output, feature)
        return output

    for _ in context.run(step, cache, context.seeds(), "1 calibrate"):
        pass
    weights = torch.ones(context.num_steps, dtype=torch.float64) if gains is None else gains.weights()
    measured = {f"{name}_seconds": value for name, value in clock.seconds.items()}
    measured["ring_bytes"] = float(band.peak_bytes)
    return Calibration(band.values, cost, weights, spread.deviation, tuple(_join(i, rows) for i in inputs), measured)


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
        kwargs = {k: v[rows] if isinstance(v, Tensor) and len(v) == len(call.x) else v for k, v in call.kwargs.items()}
        if step % self.stride == 1 and self._previous is not None:
            reused = self.context.adapter.cached(call.x[rows], call.timestep, None, self._previous, None, **kwargs)
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


def choose_schedule(context: Context, calibration: Calibration) -> Schedule:
    """The schedule that the configuration asks for, with its objective beside the uniform one's.

    With `schedule.fallback` DPS must also win on held-out noise: both schedules are fitted and run on a few samples, and
    the one whose samples are closer to full precision is kept.
    """
    config, num_steps = context.config, context.num_steps
    if config.schedule.kind == "power":
        return power_schedule(num_steps, config.cache.interval, config.schedule.center, config.schedule.power)
    band = DistanceBand(num_steps, config.cache.interval, calibration.cost)
    band.values = calibration.band
    groups = num_groups(config.sampler.steps, config.cache.interval)
    best = dps_schedule(band, calibration.weights, groups)
    uniform = uniform_schedule(num_steps, config.cache.interval, groups)
    uniform = replace(uniform, cost=best.uniform_cost, uniform_cost=best.uniform_cost)
    if config.schedule.kind == "uniform" or best.refresh_steps == uniform.refresh_steps:
        return uniform
    if config.schedule.fallback:
        error = HeldOut(context)
        return best if error.of(best) <= error.of(uniform) else uniform
    return best


class HeldOut:
    """Error of a schedule on noise that its fit has not seen, with a quarter of the calibration's samples."""

    def __init__(self, context: Context, share: int = 4) -> None:
        calibration = context.config.calibration
        count = max(2, calibration.samples // share)
        small = replace(context.config, calibration=replace(calibration, samples=count, batch_size=count))
        self.context, self.seeds = replace(context, config=small), context.seeds(HELD_OUT, count)
        self.exact = self._images(_full_step(self.context), uniform_schedule(context.num_steps, 1))

    def of(self, schedule: Schedule) -> float:
        """Mean squared error of the final images, fitted on calibration noise and run on the held-out one."""
        context, settings = self.context, self.context.config.correction
        fits = settings.cache
        maps = solve_maps(gather_moments(context, schedule), settings.ridge, settings.inflation) if fits else {}
        cache = FeatureCache(schedule, keep=2)
        made = self._images(accelerated_step(context.adapter, cache, Correction(maps)), schedule, cache)
        return float((made - self.exact).square().mean())

    def _images(self, step: StepFunction, schedule: Schedule, cache: FeatureCache | None = None) -> Tensor:
        batches = self.context.run(step, cache or FeatureCache(schedule), self.seeds, "1 held out")
        return torch.cat(list(batches))


def _full_step(context: Context) -> StepFunction:
    """Every evaluation in full."""
    return lambda call: context.adapter.full(call.x, call.timestep, **call.kwargs)[0]


def keep_rows(call: Call, count: int) -> StepInput:
    """Evenly spaced rows of one call (they span both guidance halves).

    Raises:
        UserError: nested conditioning (SDXL's added_cond_kwargs), which cannot be cut into rows yet.
    """
    total = len(call.x)
    nested = [name for name, value in call.kwargs.items() if isinstance(value, dict | list | tuple) and value]
    if nested:
        raise UserError(
            f"this pipeline passes {nested[0]} as a {type(call.kwargs[nested[0]]).__name__}, expected plain tensors: "
            "it is not supported yet"
        )
    rows = torch.linspace(0, total - 1, min(count, total)).round().long()
    kwargs = {
        k: v[rows.to(v.device)].cpu() for k, v in call.kwargs.items() if isinstance(v, Tensor) and len(v) == total
    }
    return StepInput(call.x[rows.to(call.x.device)].cpu(), torch.as_tensor(call.timestep).cpu(), kwargs)


def _join(parts: list[StepInput], count: int) -> StepInput:
    """Evenly spaced rows of all batches together, the same ones at every step."""
    x = torch.cat([p.x for p in parts])
    rows = torch.linspace(0, len(x) - 1, min(count, len(x))).round().long()
    kwargs = {k: torch.cat([p.kwargs[k] for p in parts])[rows] for k in parts[0].kwargs}
    return StepInput(x[rows], parts[0].timestep, kwargs)


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

"""Stage 2: the statistics of true against reused features, streamed while sampling; no feature map is stored.

Two kinds of trajectory feed the same sums:

* `full_precision` (the paper): x_t follows the full-precision model; the pair is (X at src(t), X at t).
* `free_running` (ours): x_t follows the accelerated model. At every cached step the full-precision model is evaluated at
  that x_t too, its feature is the target, and the fit is used before the sampler takes the step. The corrections so see
  the drift that they will meet, which the paper never measures.

The pairs of all guidance contexts are pooled. Where they are two calls, the first one free-runs on the fit of its own pairs.
"""

from __future__ import annotations

from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.types import Schedule


def calibration_cache(context: Context, schedule: Schedule) -> FeatureCache:
    """The cache of a calibration's trajectories, which holds features as the plan's runs will."""
    config = context.config
    keep = 2 if config.correction.forecast else 1
    return FeatureCache(schedule, keep, context.adapter.channel_dim, config.cache.feature_bits)


def regressors(cache: FeatureCache, forecast: bool) -> tuple[Tensor, ...]:
    """Features that predict this step's: the last refresh and, with a forecast, the one before where it exists."""
    return cache.readable[: 2 if forecast else 1]


def gather_moments(context: Context, schedule: Schedule) -> dict[int, Moments]:
    """Sums per cached step and channel from trajectories of fresh noise: step -> [C, F+2, F+2]."""
    settings, seeds, dim = context.config.correction, context.fresh_seeds, context.adapter.channel_dim
    cache = calibration_cache(context, schedule)
    moments: dict[int, Moments] = {}
    free = settings.trajectory == "free_running"
    # free-running, the fit of a step must be complete before any sample takes it: one batch, evaluated in chunks
    size, network = (len(seeds), Chunks.of(context, len(seeds))) if free else (None, Chunks(context.adapter))

    def step(call: Call) -> Tensor:
        """Add this step's pair; free-running, also take the step with the fit so far."""
        output, feature = network.full(call)
        if cache.must_refresh:
            cache.store(feature)
            return output
        sums = moments.setdefault(cache.step, Moments())
        sums.update(regressors(cache, settings.forecast), feature, dim)
        if not free:
            return output
        fitted = sums.solve(settings.ridge, settings.inflation).to(call.x.device, call.x.dtype)
        return network.cached(call, cache.reuse(fitted))

    context.trajectories(step, cache, seeds, "2 features", size)
    return moments

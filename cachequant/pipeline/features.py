"""Stage 2: the statistics of true against reused features, streamed while sampling; no feature map is stored.

Two kinds of trajectory feed the same sums:

* `full_precision` (the paper): x_t follows the full-precision model; the pair is (X at src(t), X at t).
* `free_running` (ours): x_t follows the accelerated model. At every cached step the full-precision model is evaluated at
  that x_t too, its feature is the target, and the fit is used before the sampler takes the step. The corrections so see
  the drift that they will meet, which the paper never measures.
"""

from __future__ import annotations

from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments
from cachequant.pipeline.context import FRESH, Context
from cachequant.pipeline.hook import Call
from cachequant.types import Schedule


def regressors(cache: FeatureCache, forecast: bool) -> tuple[Tensor, ...]:
    """Features that predict this step's: the last refresh and, with a forecast, the one before where it exists."""
    return tuple(cache.features[: 2 if forecast else 1])


def gather_moments(context: Context, schedule: Schedule) -> dict[int, Moments]:
    """Sums per cached step and channel from trajectories of fresh noise: step -> [C, F+2, F+2]."""
    settings = context.config.correction
    cache = FeatureCache(schedule, keep=2 if settings.forecast else 1)
    moments: dict[int, Moments] = {}
    free = settings.trajectory == "free_running"

    def step(call: Call) -> Tensor:
        """Add this step's pair; free-running, also take the step with the fit so far."""
        output, feature = context.adapter.full(call.x, call.timestep, **call.kwargs)
        if cache.must_refresh:
            cache.store(feature)
            return output
        sums = moments.setdefault(cache.step, Moments())
        sums.update(regressors(cache, settings.forecast), feature)
        if not free:
            return output
        fitted = sums.solve(settings.ridge, settings.inflation).to(call.x.device, call.x.dtype)
        return context.adapter.cached(call.x, call.timestep, None, cache.reuse(fitted), **call.kwargs)

    seeds = context.seeds(FRESH)
    size = len(seeds) if free else None  # the fit of a step must be complete before any sample takes it
    for _ in context.run(step, cache, seeds, "2 features", size):
        pass
    return moments

"""Stage 5: DEC for quantisation, on the scales that will be used (CacheQuant equation 11).

Two kinds of trajectory, as in stage 2. On `full_precision` ones (the paper) each corrected layer's integer product is
regressed on its exact product of the same input. `free_running` (ours) regresses on the layer's output in the
full-precision network at the accelerated model's own x_t, layer after layer within the step, each fit in use before the
next layer is reached, and refits the cached feature's map on the way.
"""

from __future__ import annotations

from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments
from cachequant.pipeline.context import FRESH, Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.features import regressors
from cachequant.pipeline.hook import Call
from cachequant.quant.convert import QuantizedNetwork, install
from cachequant.quant.layers import Mode
from cachequant.types import AffineMap, Correction, QuantState, Schedule


def fit_quantised(context: Context, schedule: Schedule, correction: Correction, state: QuantState) -> Correction:
    """The correction with a₂, b₂ for every corrected layer and executed step (and a refitted cache part if free-running)."""
    settings = context.config.correction
    if settings.layers == "none" and settings.trajectory == "full_precision":
        return correction
    adapter = context.adapter
    cache = FeatureCache(schedule, keep=2 if settings.forecast else 1)
    handle = install(adapter.denoiser, state, cache, correction=correction)
    adapter.rebuild()
    try:
        if settings.trajectory == "full_precision":
            return _teacher_forced(context, cache, correction, handle)
        return _free_running(context, cache, correction, handle)
    finally:
        handle.remove()
        adapter.rebuild()


def corrected_layers(context: Context, handle: QuantizedNetwork) -> tuple[str, ...]:
    """Names of the layers whose products are corrected."""
    kind = context.config.correction.layers
    if kind == "all":
        return tuple(handle.layers)
    found = context.adapter.consumers() if kind == "consumers" else ()
    return tuple(consumer.name for consumer in found if consumer.name in handle.layers)


def gather_products(
    context: Context, cache: FeatureCache, correction: Correction, handle: QuantizedNetwork
) -> dict[str, dict[int, Moments]]:
    """Layer -> step -> sums of (integer product, exact product) over full-precision trajectories: the paper's stage 5."""
    adapter, names = context.adapter, corrected_layers(context, handle)
    handle.set_mode(Mode.FLOAT)

    def step(call: Call) -> Tensor:
        """Full precision leads; where it would be cached, the corrected shallow network is measured beside it."""
        refresh = cache.must_refresh
        handle.set_mode(Mode.PAIR if refresh else Mode.FLOAT, names)
        output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
        if refresh:
            cache.store(feature)
            return output
        handle.set_mode(Mode.PAIR, names)
        affine = correction.cache.get(cache.step)
        reused = cache.reuse(None if affine is None else affine.to(call.x.device, call.x.dtype))
        adapter.cached(call.x, call.timestep, None, reused, **call.kwargs)
        return output

    for _ in context.run(step, cache, context.seeds(FRESH), "5 dec quant"):
        pass
    return {name: dict(sorted(handle.layers[name].moments.items())) for name in names}


def _teacher_forced(
    context: Context, cache: FeatureCache, correction: Correction, handle: QuantizedNetwork
) -> Correction:
    """Solve the paper's regressions, layer by layer and step by step."""
    sums, ridge = gather_products(context, cache, correction, handle), context.config.correction.ridge
    return Correction(correction.cache, {name: solve_maps(moments, ridge) for name, moments in sums.items()})


def _free_running(
    context: Context, cache: FeatureCache, correction: Correction, handle: QuantizedNetwork
) -> Correction:
    """Sequential local fits along the accelerated model's own trajectory."""
    adapter, settings, names = context.adapter, context.config.correction, corrected_layers(context, handle)
    maps: dict[int, AffineMap] = {}
    for name in names:
        handle.layers[name].ridge = settings.ridge

    def step(call: Call) -> Tensor:
        """Full precision at the accelerated model's x_t is the target; the accelerated step, fitted to it, leads."""
        handle.set_mode(Mode.FLOAT)
        handle.set_mode(Mode.RECORD, names)
        _, target = adapter.full(call.x, call.timestep, **call.kwargs)
        handle.set_mode(Mode.QUANTIZED)
        handle.set_mode(Mode.FIT, names)
        if cache.must_refresh:
            output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
            cache.store(feature)
            return output
        if settings.cache:
            sums = Moments()
            sums.update(regressors(cache, settings.forecast), target)
            fitted = sums.solve(settings.ridge, settings.inflation)
            maps[cache.step] = fitted.to(call.x.device, call.x.dtype)
        return adapter.cached(call.x, call.timestep, None, cache.reuse(maps.get(cache.step)), **call.kwargs)

    seeds = context.seeds(FRESH)
    for _ in context.run(step, cache, seeds, "5 dec quant", len(seeds)):
        pass
    layers = {n: {s: m.to("cpu") for s, m in sorted(handle.layers[n].corrections.items())} for n in names}
    return Correction({s: m.to("cpu") for s, m in maps.items()}, layers)

"""Stage 5: DEC for quantisation, on the scales that will be used (CacheQuant equation 11).

Two kinds of trajectory, as in stage 2. On `full_precision` ones (the paper) each corrected layer's integer product is
regressed on its exact product of the same input. `free_running` (ours) regresses on the layer's output in the
full-precision network at the accelerated model's own x_t, layer after layer within the step, each fit in use before the
next layer is reached, refits the cached feature's map on the way, and last maps the prediction itself (ours).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.features import calibration_cache, regressors
from cachequant.pipeline.held_out import HeldOut
from cachequant.pipeline.hook import Call
from cachequant.pipeline.prediction import PredictionFit
from cachequant.quant.convert import QuantizedNetwork, install
from cachequant.quant.layers import Mode
from cachequant.types import AffineMap, Correction, QuantState, Schedule

OUTPUTS, CLEARLY, JUDGED = ("spread", "least_squares", "refreshes"), 0.95, 16
"""What `correction.output=auto` chooses from, the share of the first one's error that another must stay under, and on how
many samples this is measured."""


def fit_quantised(
    context: Context, schedule: Schedule, correction: Correction, state: QuantState | None, spread: Tensor
) -> Correction:
    """The correction with a₂, b₂ for every corrected layer and executed step.

    If free-running, with a refitted cache part and the map of the prediction. Without quantisation (`state` None) only that
    last one is left to fit. Its noise is that of stage 1, whose `spread` [T, C] (`Spread.deviation`) it keeps.
    """
    settings = context.config.correction
    if settings.trajectory == "full_precision" and (state is None or settings.layers == "none"):
        return correction
    if state is None and settings.output == "none":
        return correction
    adapter = context.adapter
    cache = calibration_cache(context, schedule)
    handle = install(adapter.denoiser, state or QuantState(), cache, correction=correction)
    adapter.rebuild()
    try:
        if settings.trajectory == "full_precision":
            return _teacher_forced(context, cache, correction, handle)
        return _free_running(context, cache, handle, spread)
    finally:
        handle.remove()
        adapter.rebuild()


def fit_output(
    context: Context, schedule: Schedule, correction: Correction, state: QuantState | None, spread: Tensor
) -> tuple[Correction, dict[str, float]]:
    """`fit_quantised`, and with `correction.output=auto` the choice of what maps the prediction: (correction, errors).

    Each of `OUTPUTS` is fitted, and run on as many samples of held-out noise as it is fitted on, `JUDGED` at most. The first
    one is kept unless another's images are nearer to full precision by `CLEARLY`: it keeps the spread of the images, which a
    squared error does not see. The errors are empty where nothing was chosen. Ours, not in the paper.
    """
    settings = context.config.correction
    if settings.output != "auto":
        return fit_quantised(context, schedule, correction, state, spread), {}
    held_out = HeldOut(context, min(JUDGED, len(context.paired_seeds)))
    fits, errors = dict[str, Correction](), dict[str, float]()
    for output in OUTPUTS:
        config = replace(context.config, correction=replace(settings, output=output))
        fits[output] = fit_quantised(replace(context, config=config), schedule, correction, state, spread)
        errors[output] = held_out.error(schedule, fits[output], state)
    nearest = min(OUTPUTS, key=errors.__getitem__)
    return fits[nearest if errors[nearest] < CLEARLY * errors[OUTPUTS[0]] else OUTPUTS[0]], errors


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

    context.trajectories(step, cache, context.fresh_seeds, "5 dec quant")
    return {name: dict(sorted(handle.layers[name].moments.items())) for name in names}


def _teacher_forced(
    context: Context, cache: FeatureCache, correction: Correction, handle: QuantizedNetwork
) -> Correction:
    """Solve the paper's regressions, layer by layer and step by step."""
    sums, ridge = gather_products(context, cache, correction, handle), context.config.correction.ridge
    return Correction(correction.cache, {name: solve_maps(moments, ridge) for name, moments in sums.items()})


def _free_running(context: Context, cache: FeatureCache, handle: QuantizedNetwork, spread: Tensor) -> Correction:
    """Sequential local fits along the accelerated model's own trajectory."""
    settings, names, seeds = context.config.correction, corrected_layers(context, handle), context.paired_seeds
    network = Chunks(context.adapter) if settings.layers == "all" else Chunks.of(context, len(seeds))
    maps: dict[int, AffineMap] = {}
    sums: dict[int, Moments] = {}
    predictions = PredictionFit(context, spread)
    for name in names:
        layer = handle.layers[name]
        layer.ridge, layer.held_out, layer.samples = settings.ridge, settings.held_out, len(seeds)

    def step(call: Call) -> Tensor:
        """Full precision at the accelerated model's x_t is the target; the accelerated step, fitted to it, leads."""
        for name in names:
            handle.layers[name].start_fit(new_step=call.opens)
        handle.set_mode(Mode.FLOAT)
        handle.set_mode(Mode.RECORD, names)
        exact, target = network.full(call)
        if settings.cache and not cache.must_refresh:
            pooled = sums.setdefault(cache.step, Moments())
            pooled.update(regressors(cache, settings.forecast), target, context.adapter.channel_dim)
            maps[cache.step] = pooled.solve(settings.ridge, settings.inflation).to(call.x.device, call.x.dtype)
        handle.set_mode(Mode.QUANTIZED)
        handle.set_mode(Mode.FIT, names)
        output, feature = _accelerated(network, call, cache, maps)
        if network.count > 1 and names:  # the first chunks ran on a fit that had not seen the last
            handle.set_mode(Mode.QUANTIZED)
            output, feature = _accelerated(network, call, cache, maps)
        if feature is not None:
            cache.store(feature)
            if not handle.layers:  # nothing was rounded
                return output
        return predictions.fit(cache.step, call.x, output, exact, cached=feature is None)

    context.trajectories(step, cache, seeds, "5 dec quant", len(seeds))
    layers = {n: {s: m.to("cpu") for s, m in sorted(handle.layers[n].corrections.items())} for n in names}
    return Correction(_on_cpu(maps), layers, _on_cpu(predictions.maps))


def _on_cpu(maps: dict[int, AffineMap]) -> dict[int, AffineMap]:
    return {step: affine.to("cpu") for step, affine in maps.items()}


def _accelerated(
    network: Chunks, call: Call, cache: FeatureCache, maps: dict[int, AffineMap]
) -> tuple[Tensor, Tensor | None]:
    """One step of the accelerated network: its output, and the feature of a refresh."""
    if cache.must_refresh:
        return network.full(call)
    return network.cached(call, cache.reuse(maps.get(cache.step))), None

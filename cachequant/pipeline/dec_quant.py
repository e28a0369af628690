"""Stage 5: DEC for quantisation, on the scales that will be used (CacheQuant equation 11).

Two kinds of trajectory, as in stage 2. On `full_precision` ones (the paper) each corrected layer's integer product is
regressed on its exact product of the same input. `free_running` (ours) regresses on the layer's output in the
full-precision network at the accelerated model's own x_t, layer after layer within the step, each fit in use before the
next layer is reached, refits the cached feature's map on the way, and last maps the prediction itself (ours).
"""

from __future__ import annotations

from torch import Tensor

from cachequant.cache.feature_cache import FeatureCache
from cachequant.correction import Moments, solve_prediction
from cachequant.pipeline.context import FRESH, Context
from cachequant.pipeline.dec_cache import solve_maps
from cachequant.pipeline.features import regressors
from cachequant.pipeline.hook import Call
from cachequant.pipeline.spread import denoised_factors
from cachequant.pipeline.step import correct_prediction
from cachequant.quant.convert import QuantizedNetwork, install
from cachequant.quant.layers import Mode
from cachequant.types import AffineMap, Correction, QuantState, Schedule


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
    cache = FeatureCache(schedule, keep=2 if settings.forecast else 1)
    handle = install(adapter.denoiser, state or QuantState(), cache, correction=correction)
    adapter.rebuild()
    try:
        if settings.trajectory == "full_precision":
            return _teacher_forced(context, cache, correction, handle)
        return _free_running(context, cache, handle, spread)
    finally:
        handle.remove()
        adapter.rebuild()


def corrected_layers(context: Context, handle: QuantizedNetwork) -> tuple[str, ...]:
    """Names of the layers whose products are corrected."""
    kind = context.config.correction.layers
    if kind == "all":
        return tuple(handle.layers)
    return tuple(n for n in context.adapter.consumers() if n in handle.layers) if kind == "consumers" else ()


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


def _free_running(context: Context, cache: FeatureCache, handle: QuantizedNetwork, spread: Tensor) -> Correction:
    """Sequential local fits along the accelerated model's own trajectory."""
    adapter, settings, names = context.adapter, context.config.correction, corrected_layers(context, handle)
    maps: dict[int, AffineMap] = {}
    predictions = PredictionFit(context, spread)
    for name in names:
        handle.layers[name].ridge = settings.ridge

    def step(call: Call) -> Tensor:
        """Full precision at the accelerated model's x_t is the target; the accelerated step, fitted to it, leads."""
        handle.set_mode(Mode.FLOAT)
        handle.set_mode(Mode.RECORD, names)
        exact, target = adapter.full(call.x, call.timestep, **call.kwargs)
        handle.set_mode(Mode.QUANTIZED)
        handle.set_mode(Mode.FIT, names)
        if cache.must_refresh:
            output, feature = adapter.full(call.x, call.timestep, **call.kwargs)
            cache.store(feature)
            if not handle.layers:  # nothing was rounded
                return output
            return predictions.fit(cache.step, call.x, output, exact, keep_spread=False)
        if settings.cache:
            sums = Moments()
            sums.update(regressors(cache, settings.forecast), target)
            fitted = sums.solve(settings.ridge, settings.inflation)
            maps[cache.step] = fitted.to(call.x.device, call.x.dtype)
        reused = cache.reuse(maps.get(cache.step))
        output = adapter.cached(call.x, call.timestep, None, reused, **call.kwargs)
        return predictions.fit(cache.step, call.x, output, exact, keep_spread=True)

    seeds = context.seeds()
    for _ in context.run(step, cache, seeds, "5 dec quant", len(seeds)):
        pass
    layers = {n: {s: m.to("cpu") for s, m in sorted(handle.layers[n].corrections.items())} for n in names}
    return Correction(_on_cpu(maps), layers, _on_cpu(predictions.maps))


class PredictionFit:
    """Fits the map of each step's prediction and uses it at once.

    Args:
        context: tells `correction.output`: none leaves every prediction as it is.
        spread: [T, C] deviation of the denoised predictions on full-precision trajectories of the same noise.
    """

    def __init__(self, context: Context, spread: Tensor) -> None:
        self._settings, self._spread = context.config.correction, spread
        self._factors = denoised_factors(context).tolist() if self._settings.output == "spread" else []
        self.maps: dict[int, AffineMap] = {}

    def fit(self, step: int, x: Tensor, made: Tensor, exact: Tensor, keep_spread: bool) -> Tensor:
        """The accelerated prediction `made` mapped towards `exact`, both [B, C, H, W] at the same x_t `x` [B, C', H, W].

        `keep_spread` on cached steps: a refresh is the model itself, of which only the rounding is corrected.
        """
        if self._settings.output == "none":
            return made
        shared = min(made.shape[1], x.shape[1])
        sums = Moments()
        sums.update((made[:, :shared], x[:, :shared]), exact[:, :shared])
        if keep_spread and self._settings.output == "spread":
            solved = solve_prediction(sums, self._settings.ridge, tuple(self._factors[step]), self._spread[step])
        else:
            solved = solve_prediction(sums, self._settings.ridge)
        self.maps[step] = solved.to(x.device, x.dtype)
        return correct_prediction(made, x, self.maps[step])


def _on_cpu(maps: dict[int, AffineMap]) -> dict[int, AffineMap]:
    return {step: affine.to("cpu") for step, affine in maps.items()}

"""Stage 4: integer weights, and a scale and zero point for every activation at every executed step."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cachequant.cache.feature_cache import FeatureCache
from cachequant.config import QuantConfig
from cachequant.models.adapter import Adapter
from cachequant.pipeline.calibrate import Calibration
from cachequant.pipeline.chunks import Chunks
from cachequant.pipeline.context import Context
from cachequant.pipeline.features import calibration_cache
from cachequant.pipeline.hook import Call
from cachequant.pipeline.inputs import StepInput, spread
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.layers import Mode
from cachequant.types import AffineMap, Correction, QuantState, Schedule


def layer_plans(adapter: Adapter, config: QuantConfig) -> dict[str, LayerPlan]:
    """Which layers are quantised and how: everything Conv2d / Linear, by structure and never by list index.

    First and last convolution take `ends_bits` for both operands, or stay as they are with None.
    """
    ends, time, splits = adapter.end_names(), adapter.time_names(), adapter.splits()
    plans = {}
    for name, module in adapter.denoiser.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear) or (name in time and not config.time_embedding):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or module.groups != 1):
            continue
        if name in ends:
            if config.ends_bits is not None:
                plans[name] = LayerPlan(config.ends_bits, config.ends_bits)
            continue
        plans[name] = LayerPlan(config.weight_bits, config.activation_bits, splits.get(name, 0))
    return plans


def quantise_weights(context: Context) -> QuantState:
    """Integer weights of every planned layer, with activation tables still empty."""
    config = context.config.quant
    plans = layer_plans(context.adapter, config)
    return fresh_state(context.adapter.denoiser, plans, config.weight_search, config.weight_symmetric)


@torch.no_grad()
def calibrate_quantisers(
    context: Context,
    calibration: Calibration,
    schedule: Schedule,
    correction: Correction,
    weights: QuantState | None = None,
) -> QuantState:
    """Run the cached, corrected network on the calibration inputs step by step and search every grid once.

    Differs from the released code: the values of all mini-batches of a step are searched together instead of averaging
    their scales exponentially, and layers that a cached step does not reach have no row there. `weights` are those of
    `quantise_weights`, made here if absent.
    """
    adapter, config = context.adapter, context.config
    device = next(adapter.denoiser.parameters()).device
    cache = calibration_cache(context, schedule)
    state = weights or quantise_weights(context)
    handle = install(
        adapter.denoiser,
        state,
        cache,
        config.quant.activation_search,
        attention_bits=config.quant.attention_bits,
    )
    adapter.rebuild()
    handle.set_mode(Mode.OBSERVE)
    sizes = (config.calibration.refresh_inputs, config.calibration.cached_inputs)
    try:
        for step in tqdm(range(context.num_steps), desc="4 quant params", unit="step", leave=False, disable=None):
            count = sizes[0] if schedule.is_refresh(step) else sizes[1]
            rows = calibration.inputs[step].rows(count, device)
            _observe(Chunks.of(context, len(rows.x)), cache, correction, rows)
            handle.finish_step(step)
            cache.advance(schedule.is_refresh(step))
        return handle.state
    finally:
        handle.remove()
        adapter.rebuild()


def _observe(network: Chunks, cache: FeatureCache, correction: Correction, rows: StepInput) -> None:
    """One step of the network that will be quantised, in full precision, on some rows."""
    call = Call(rows.x, rows.timestep, dict(rows.kwargs))
    if cache.must_refresh:
        _, feature = network.full(call)
        cache.store(feature)
        return
    affine = correction.cache.get(cache.step)
    reused = cache.reuse(None if affine is None else _on(affine, rows.x))
    network.cached(call, reused[spread(len(reused), len(rows.x)).to(reused.device)])


def _on(affine: AffineMap, x: Tensor) -> AffineMap:
    return affine.to(x.device, x.dtype)

"""A plan that takes exactly the time of a calibrated one and is made from a single evaluation."""

from __future__ import annotations

from dataclasses import replace

import torch

from cachequant.cache.feature_cache import FeatureCache
from cachequant.pipeline.context import Context
from cachequant.pipeline.hook import Call
from cachequant.pipeline.quant_params import quantise_weights
from cachequant.plan import Plan
from cachequant.quant.convert import install
from cachequant.quant.layers import Mode
from cachequant.schedule import uniform_schedule
from cachequant.types import AffineMap, Correction, QuantState


@torch.no_grad()
def timing_plan(context: Context, call: Call) -> Plan:
    """Uniform schedule, activation grids of one evaluation, corrections that change nothing but are computed.

    What a step costs depends on none of the values: these are the times of a calibrated plan, and not its images.

    Args:
        context: pipeline and configuration; says which layers are quantised and which corrections there are.
        call: the evaluation that the grids are searched on.
    """
    config = context.config
    schedule = uniform_schedule(context.num_steps, config.cache.interval)
    cached = [step for step in range(context.num_steps) if not schedule.is_refresh(step)]
    channels = call.x.shape[1]
    correction = Correction(
        {step: _identity(context.adapter.width, config.correction.forecast) for step in cached}
        if config.correction.cache
        else {},
        {},
        {step: _identity(channels, True) for step in range(context.num_steps)}
        if config.correction.output != "none"
        else {},
    )
    quant = _observe(context, call) if config.quant.enabled else None
    return Plan(config, context.identity, context.timesteps, schedule, correction, quant)


def _identity(channels: int, forecast: bool) -> AffineMap:
    same = AffineMap.identity(channels)
    return replace(same, previous=torch.zeros(channels)) if forecast else same


def _observe(context: Context, call: Call) -> QuantState:
    """Integer weights, and grids of every activation of one full evaluation."""
    adapter, quant = context.adapter, replace(context.config.quant, weight_search="minmax", activation_search="minmax")
    light = replace(context, config=replace(context.config, quant=quant))
    handle = install(
        adapter.denoiser, quantise_weights(light), FeatureCache(uniform_schedule(1, 1)), "minmax",
        attention_bits=quant.attention_bits,
    )  # fmt: skip
    adapter.rebuild()
    handle.set_mode(Mode.OBSERVE)
    try:
        adapter.full(call.x, call.timestep, **call.kwargs)
        handle.finish_step(0)
        return handle.state
    finally:
        handle.remove()
        adapter.rebuild()

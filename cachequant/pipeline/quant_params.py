"""Stage 4: integer weights, and a scale and zero point for every activation at every executed step."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from cachequant.config import QuantConfig
from cachequant.config_values import parse_bits
from cachequant.errors import UserError
from cachequant.models.adapter import Adapter
from cachequant.pipeline.calibrate import Calibration
from cachequant.pipeline.context import Context
from cachequant.pipeline.walk import Walk
from cachequant.quant.convert import LayerPlan, fresh_state, install
from cachequant.quant.layers import Mode
from cachequant.types import Correction, QuantState, Schedule


def layer_plans(adapter: Adapter, config: QuantConfig) -> dict[str, LayerPlan]:
    """Which layers are quantised and how: everything Conv2d / Linear, by structure and never by list index.

    First and last convolution take `ends_bits` for both operands, or stay as they are with None. `bits_map` goes before all.

    Raises:
        UserError: a pattern of `bits_map` that no layer has.
    """
    ends, time, splits = adapter.end_names(), adapter.time_names(), adapter.splits()
    plans, used = {}, set[str]()
    for name, module in adapter.denoiser.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or module.groups != 1):
            continue
        pattern, split = mapped(name, config), splits.get(name, 0)
        if pattern is not None:
            used.add(pattern)
            bits = parse_bits(config.bits_map[pattern])
            if bits is not None:
                plans[name] = LayerPlan(*bits, split)
        elif name in ends:
            if config.ends_bits is not None:
                plans[name] = LayerPlan(config.ends_bits, config.ends_bits)
        elif name not in time or config.time_embedding:
            formats = (config.weight_format, config.activation_format)
            plans[name] = LayerPlan(config.weight_bits, config.activation_bits, split, *formats)
    if unused := [pattern for pattern in config.bits_map if pattern not in used]:
        raise UserError(
            f"quant.bits_map has {unused[0]!r}, which fits no layer that an earlier pattern leaves, expected a pattern of "
            f"names such as {next(iter(plans), 'conv_in')}: correct or remove it"
        )
    return {name: replace(plan, symmetric=config.symmetric(plan.weight_bits)) for name, plan in plans.items()}


def mapped(name: str, config: QuantConfig) -> str | None:
    """The first pattern of `bits_map` that fits a layer's name, or None."""
    return next((pattern for pattern in config.bits_map if fnmatchcase(name, pattern)), None)


def quantise_weights(context: Context) -> QuantState:
    """Integer weights of every planned layer, with activation tables still empty."""
    config = context.config.quant
    plans = layer_plans(context.adapter, config)
    return fresh_state(context.adapter.denoiser, plans, config.weight_search)


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
    adapter, quant = context.adapter, context.config.quant
    walk, state = Walk(context, calibration, schedule, correction), weights or quantise_weights(context)
    cache = walk.fresh_cache()
    handle = install(adapter.denoiser, state, cache, quant.activation_search, attention_bits=quant.attention_bits)
    adapter.rebuild()
    handle.set_mode(Mode.OBSERVE)
    try:
        for step in walk.run(cache, "4 quant params"):
            handle.finish_step(step)
        return handle.state
    finally:
        handle.remove()
        adapter.rebuild()

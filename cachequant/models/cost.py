"""What a plan costs by count: multiply-accumulates per image and bytes of the denoiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cachequant.models.adapter import Adapter
from cachequant.plan import Plan
from cachequant.storage import pack_correction, pack_quant, pack_weights
from cachequant.types import LayerQuant, QuantState


def step_macs(adapter: Adapter, x: Tensor, timestep: Tensor, kwargs: dict[str, Tensor]) -> tuple[float, float]:
    """Multiply-accumulates of a full and of a cached step for one sample (convolutions, linear layers, attention).

    Args:
        adapter: of the unquantised denoiser.
        x: [1, C, H, W].
        timestep, kwargs: of one evaluation.
    """
    with torch.no_grad():
        with FlopCounterMode(display=False) as full:
            _, feature = adapter.full(x, timestep, **kwargs)
        with FlopCounterMode(display=False) as cached:
            adapter.cached(x, timestep, None, feature, None, **kwargs)
    return full.get_total_flops() / 2, cached.get_total_flops() / 2


def run_macs(full: float, cached: float, plan: Plan | None, num_steps: int) -> float:
    """Multiply-accumulates of a whole run of one sample; `plan` None runs every step in full."""
    refreshes = len(plan.schedule.refresh_steps) if plan else num_steps
    return full * refreshes + cached * (num_steps - refreshes)


def float_bytes(denoiser: nn.Module) -> int:
    """Bytes of the untouched weights in float32."""
    return sum(p.numel() * 4 for p in denoiser.parameters())


def weight_bytes(layer: LayerQuant) -> int:
    """Bytes of a layer's integer weights with their grids, as stored."""
    return _bytes(pack_weights(QuantState({"": layer})))


def plan_bytes(float_total: int, plan: Plan) -> int:
    """Bytes under a plan: packed integers with all tables and corrections, plus what stays in float32.

    Args:
        float_total: `float_bytes` of the denoiser.
        plan: what replaces part of it.
    """
    total = float_total + _bytes(pack_correction(plan.correction))
    if plan.quant is None:
        return total
    for name, layer in plan.quant.layers.items():  # one layer at a time: a plan may be read lazily
        total += _bytes(pack_quant(QuantState({name: layer})))
        total -= sum(4 * grid.values.numel() for grid in layer.weights)
    return total + _bytes(pack_quant(QuantState({}, plan.quant.operands)))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())

"""The checkpoint layout of the INT8 package torch_quantizer: written from a plan's integers, and read back.

Per layer: `int_weight` int8 [O, I] or [O, kh, kw, I] (symmetric per channel), `act_delta` and `act_zp` [T] of an activation
q = clip(round(x / delta + zp), -128, 127), `act_times_weight_delta` [T, O] = delta·s_w, `zp_times_weight_channel_sum`
[T, O] = zp·Σ w, `bias` [O]. Its layers count steps downwards: row T - 1 is the first evaluation.
"""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor

from cachequant.errors import UserError
from cachequant.types import ActivationTable, LayerQuant, QuantState, WeightGrid

BUFFERS = ("int_weight", "act_delta", "act_zp", "act_times_weight_delta", "zp_times_weight_channel_sum")
"""What a quantised layer has, beside a bias."""

HALF_GRID = 128
"""What its zero points are lower than ours: its integers are signed."""

ALIGNMENT = 32
"""Its kernels take input and output channels in multiples of this."""


def unsupported(layer: LayerQuant) -> str | None:
    """Why torch_quantizer cannot hold a layer; None where it can."""
    if len(layer.weights) > 1:
        return "its input is quantised in two halves"
    (weight,), (table,) = layer.weights, layer.inputs
    if table.bits != 8:
        return f"{table.bits}-bit activations, expected 8"
    outputs, inputs = weight.values.shape[:2]
    if outputs % ALIGNMENT or inputs % ALIGNMENT:
        return f"{inputs} input and {outputs} output channels, expected multiples of {ALIGNMENT}"
    centred = _centred(weight)
    if centred.min() < -128 or centred.max() > 127:
        return "asymmetric weights"
    return None


def to_buffers(layer: LayerQuant, bias: Tensor | None, num_steps: int) -> dict[str, Tensor]:
    """A supported layer's buffers, float32 where torch_quantizer casts them itself.

    A step that the plan has no row for (a deep layer that it does not run) takes the row before.

    Args:
        layer: integers and table.
        bias: [O] or None.
        num_steps: T.

    Raises:
        UserError: the layer is not supported.
    """
    reason = unsupported(layer)
    if reason is not None:
        raise UserError(f"torch_quantizer cannot hold this layer ({reason}): leave it out or quantise it differently")
    (weight,), (table,) = layer.weights, layer.inputs
    known = table.steps.tolist()
    rows = [max(bisect_right(known, step) - 1, 0) for step in reversed(range(num_steps))]  # row T - 1 is step 0
    delta, zero = table.scale[rows].float(), table.zero_point[rows].float() - HALF_GRID  # [T]
    values = _centred(weight).to(torch.int8)
    sums = values.flatten(1).long().sum(1).float()  # [O]
    return {
        "int_weight": values.permute(0, 2, 3, 1).contiguous() if values.dim() == 4 else values,
        "act_delta": delta,
        "act_zp": zero,
        "act_times_weight_delta": delta[:, None] * weight.scale.float(),
        "zp_times_weight_channel_sum": zero[:, None] * sums,
        "bias": torch.zeros(len(sums)) if bias is None else bias.detach().float(),
    }


def from_buffers(buffers: dict[str, Tensor]) -> tuple[LayerQuant, Tensor | None]:
    """(layer, bias) of one layer's buffers, a table row for every step.

    Raises:
        UserError: a buffer is missing, or they contradict each other.
    """
    missing = [name for name in BUFFERS if name not in buffers]
    if missing:
        raise UserError(f"a torch_quantizer layer lacks {', '.join(missing)}: expected {', '.join(BUFFERS)}")
    values = buffers["int_weight"]
    delta, zero = buffers["act_delta"].float().flatten(), buffers["act_zp"].float().flatten()  # [T]
    product, sums = buffers["act_times_weight_delta"].float(), values.flatten(1).long().sum(1).float()
    scale = (product / delta[:, None]).median(0).values  # [O]; every row gives the same but for rounding
    expected = zero[:, None] * sums
    if not torch.allclose(product, delta[:, None] * scale, rtol=2e-3, atol=1e-6):  # act_delta may be in half precision
        raise UserError(
            "act_times_weight_delta is not act_delta times one scale per channel: the checkpoint is damaged"
        )
    if not torch.allclose(buffers["zp_times_weight_channel_sum"].float(), expected, rtol=1e-3, atol=0.5):
        raise UserError(
            "zp_times_weight_channel_sum does not belong to int_weight and act_zp: the checkpoint is damaged"
        )
    if values.dim() == 4:
        values = values.permute(0, 3, 1, 2).contiguous()
    grid = WeightGrid((values.int() + HALF_GRID).to(torch.uint8), scale, torch.full_like(scale, HALF_GRID), 8)
    steps = torch.arange(len(delta), dtype=torch.int32)
    table = ActivationTable(steps, delta.flip(0), zero.flip(0) + HALF_GRID, 8)
    return LayerQuant((grid,), (table,), (values.shape[1],)), buffers.get("bias")


def from_checkpoint(content: dict[str, Tensor]) -> tuple[QuantState, dict[str, Tensor]]:
    """Integers and biases by layer name from a torch_quantizer state dict; other parameters in it are left alone.

    Raises:
        UserError: there is no quantised layer, or one is damaged.
    """
    ending = f".{BUFFERS[0]}"
    names = [key.removesuffix(ending) for key in content if key.endswith(ending)]
    if not names:
        raise UserError(f"the checkpoint holds no '*{ending}', expected torch_quantizer's: convert the model with it")
    layers, biases = {}, {}
    for name in names:
        own = {buffer: content[f"{name}.{buffer}"] for buffer in (*BUFFERS, "bias") if f"{name}.{buffer}" in content}
        layers[name], bias = from_buffers(own)
        if bias is not None:
            biases[name] = bias
    return QuantState(layers), biases


def to_checkpoint(
    state: QuantState, biases: dict[str, Tensor], num_steps: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict that `torch_quantizer.real_quant` loads, and why layers were left out of it.

    Args:
        state: integers by layer name.
        biases: by layer name; a layer without one gets zeros.
        num_steps: T.
    """
    content: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, layer in state.layers.items():
        reason = unsupported(layer)
        if reason is not None:
            reasons[name] = reason
            continue
        made = to_buffers(layer, biases.get(name), num_steps)
        content |= {f"{name}.{buffer}": value for buffer, value in made.items()}
    return content, reasons


def _centred(weight: WeightGrid) -> Tensor:
    """int32 q - z [O, I, ...]."""
    return weight.values.int() - weight.zero_point.int().view(-1, *[1] * (weight.values.dim() - 1))

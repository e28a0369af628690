"""torch_quantizer's layout, on synthetic checkpoints: its formula on its buffers against ours on the plan's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.errors import UserError
from cachequant.kernels import torch_quantizer as tq
from cachequant.types import ActivationTable, LayerQuant, QuantState, WeightGrid

STEPS = 4


def layer(*window: int, zero: float = 128.0, steps: tuple[int, ...] = (0, 1, 2, 3), channels: int = 32) -> LayerQuant:
    torch.manual_seed(3)
    values = torch.randint(0, 256, (64, channels, *window), dtype=torch.uint8)
    weight = WeightGrid(values, torch.rand(64) * 0.01, torch.full((64,), zero), 8)
    rows = len(steps)
    table = ActivationTable(
        torch.tensor(steps, dtype=torch.int32),
        0.01 + torch.rand(rows) * 0.1,
        torch.randint(20, 200, (rows,)).float(),
        8,
    )
    return LayerQuant((weight,), (table,), (channels,))


def theirs(x: Tensor, buffers: dict[str, Tensor], step: int) -> Tensor:
    """(acc - zp·Σ w)·delta·s_w + bias with signed activations, padded with zp; row T - 1 is step 0."""
    row = STEPS - 1 - step
    delta, zp = buffers["act_delta"][row], buffers["act_zp"][row]
    q = (x / delta + zp).round().clamp(-128, 127).double()
    weight = buffers["int_weight"].double()
    if weight.dim() == 4:
        q = F.pad(q, (1, 1, 1, 1), value=float(zp))
        acc = F.conv2d(q, weight.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        acc = q @ weight.t()
    return (acc - buffers["zp_times_weight_channel_sum"][row]) * buffers["act_times_weight_delta"][row] + buffers[
        "bias"
    ]


def ours(x: Tensor, state: LayerQuant, bias: Tensor, step: int) -> Tensor:
    """(q - z)·(q_w - z_w)·s·s_w + bias, padded with 0."""
    (weight,), (table,) = state.weights, state.inputs
    row = table.steps.tolist().index(step)
    scale, zero = table.scale[row], table.zero_point[row]
    q = ((x / scale + zero).round().clamp(0, 255) - zero).double()
    centred = weight.values.double() - weight.zero_point.double().view(-1, *[1] * (weight.values.dim() - 1))
    acc = F.conv2d(q, centred, padding=1).permute(0, 2, 3, 1) if centred.dim() == 4 else q @ centred.t()
    return acc * (scale * weight.scale) + bias


@pytest.mark.parametrize("window", [(), (3, 3)])
def test_both_formulas_give_the_same_outputs_at_every_step(window):
    state, bias = layer(*window), torch.randn(64)
    buffers = tq.to_buffers(state, bias, STEPS)
    x = torch.randn(2, 32, 5, 4) * 3 if window else torch.randn(6, 32) * 3
    for step in range(STEPS):
        torch.testing.assert_close(theirs(x, buffers, step), ours(x, state, bias, step), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("window", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("half", [False, True])
def test_round_trip(window, half):
    """Also from the half-precision copy of the activations' parameters that torch_quantizer keeps."""
    state, bias = layer(*window), torch.randn(64)
    buffers = tq.to_buffers(state, bias, STEPS)
    if half:
        buffers |= {name: buffers[name].half() for name in ("act_delta", "act_zp")}
    found, found_bias = tq.from_buffers(buffers)
    assert torch.equal(found.weights[0].values, state.weights[0].values)
    assert torch.equal(found.inputs[0].zero_point, state.inputs[0].zero_point)
    rtol = 1e-3 if half else 1e-6
    torch.testing.assert_close(found.weights[0].scale, state.weights[0].scale, rtol=rtol, atol=0)
    torch.testing.assert_close(found.inputs[0].scale, state.inputs[0].scale, rtol=rtol, atol=0)
    assert torch.equal(found_bias, bias)


def test_a_step_that_is_not_run_takes_the_row_before():
    state = layer(steps=(0, 2))
    delta = tq.to_buffers(state, None, STEPS)["act_delta"].flip(0)
    first, second = state.inputs[0].scale
    assert torch.equal(delta, torch.stack([first, first, second, second]))


def test_checkpoints():
    split = LayerQuant(layer().weights * 2, layer().inputs * 2, (32, 32))
    state = QuantState({"a.b": layer(), "c": layer(3, 3), "asymmetric": layer(zero=100.0), "split": split})
    content, reasons = tq.to_checkpoint(state, {"a.b": torch.ones(64)}, STEPS)
    assert reasons == {"asymmetric": "asymmetric weights", "split": "its input is quantised in two halves"}
    found, biases = tq.from_checkpoint({**content, "conv_in.weight": torch.ones(1)})
    assert set(found.layers) == {"a.b", "c"}
    assert torch.equal(biases["a.b"], torch.ones(64)) and not biases["c"].any()
    assert torch.equal(found.layers["c"].weights[0].values, state.layers["c"].weights[0].values)


def test_limits_are_named():
    assert "multiples of 32" in str(tq.unsupported(layer(channels=20)))
    with pytest.raises(UserError, match="asymmetric weights"):
        tq.to_buffers(layer(zero=90.0), None, STEPS)


@pytest.mark.parametrize(
    ("name", "change"),
    [("act_times_weight_delta", 1.1), ("zp_times_weight_channel_sum", -2.0)],
)
def test_contradicting_buffers_are_refused(name, change):
    buffers = tq.to_buffers(layer(), None, STEPS)
    buffers[name][0] *= change
    with pytest.raises(UserError, match=name):
        tq.from_buffers(buffers)
    del buffers[name]
    with pytest.raises(UserError, match=f"lacks {name}"):
        tq.from_buffers(buffers)


def test_other_checkpoints_are_refused():
    with pytest.raises(UserError, match="holds no"):
        tq.from_checkpoint({"weight": torch.ones(1)})

"""torch_quantizer's layout, on synthetic checkpoints: its formula on its buffers against ours on the plan's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cachequant.errors import UserError
from cachequant.kernels import torch_quantizer as tq
from cachequant.kernels.reference import Geometry
from cachequant.kernels.torch_quantizer import Held
from cachequant.types import ActivationTable, AffineMap, LayerQuant, WeightGrid

STEPS = 4
CONV = Geometry(True, padding=(1, 1))


def layer(
    *window: int, zero: float = 128.0, steps: tuple[int, ...] = (0, 1, 2, 3), channels: int = 32, bits: int = 8
) -> LayerQuant:
    torch.manual_seed(3)
    values = torch.randint(0, 2**bits, (64, channels, *window), dtype=torch.uint8)
    weight = WeightGrid(values, torch.rand(64) * 0.01, torch.full((64,), zero), bits)
    rows = len(steps)
    table = ActivationTable(
        torch.tensor(steps, dtype=torch.int32),
        0.01 + torch.rand(rows) * 0.1,
        torch.randint(20, 200, (rows,)).float(),
        8,
    )
    return LayerQuant((weight,), (table,), (channels,))


def maps(*steps: int) -> dict[int, AffineMap]:
    torch.manual_seed(5)
    return {step: AffineMap(0.5 + torch.rand(64), 10 * torch.randn(64)) for step in steps}


def changed(state: LayerQuant, **values: Any) -> LayerQuant:
    """The layer with another weight grid (`weight`) or table (`table`), by their fields."""
    weight = replace(state.weights[0], **values.get("weight", {}))
    return replace(state, weights=(weight,), inputs=(replace(state.inputs[0], **values.get("table", {})),))


def theirs(x: Tensor, buffers: dict[str, Tensor], step: int) -> Tensor:
    """(acc - zp·Σ w)·delta·s_w + bias with signed activations, padded with zp; row T - 1 is step 0."""
    row = STEPS - 1 - step
    delta, zp = buffers["act_delta"][row].double(), buffers["act_zp"][row].double()
    q = (x.double() / delta + zp).round().clamp(-128, 127)
    weight = buffers["int_weight"].double()
    if weight.dim() == 4:
        q = F.pad(q, (1, 1, 1, 1), value=float(zp))
        acc = F.conv2d(q, weight.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        acc = q @ weight.t()
    return (acc - buffers["zp_times_weight_channel_sum"][row]) * buffers["act_times_weight_delta"][row] + buffers[
        "bias"
    ]


def ours(x: Tensor, held: Held, step: int) -> Tensor:
    """a·(q - z)·(q_w - z_w)·s·s_w + b + bias, padded with 0; s as half precision has it."""
    (weight,), (table,) = held.layer.weights, held.layer.inputs
    row = table.steps.tolist().index(step)
    scale, zero = table.scale[row].half().double(), table.zero_point[row]
    q = (x.double() / scale + zero).round().clamp(0, 255) - zero
    centred = weight.values.double() - weight.zero_point.double().view(-1, *[1] * (weight.values.dim() - 1))
    acc = F.conv2d(q, centred, padding=1).permute(0, 2, 3, 1) if centred.dim() == 4 else q @ centred.t()
    affine = held.maps.get(step, AffineMap.identity(64))
    assert held.bias is not None
    return acc * (scale * weight.scale) * affine.scale + affine.shift + held.bias


@pytest.mark.parametrize("window", [(), (3, 3)])
@pytest.mark.parametrize("corrected", [(), (1, 3)])
@pytest.mark.parametrize("bits", [8, 4])
def test_both_formulas_give_the_same_outputs_at_every_step(
    window: tuple[int, ...], corrected: tuple[int, ...], bits: int
) -> None:
    """To float32's rounding of the buffers; corrected steps too, whose offset is of the size of the output."""
    held = Held(layer(*window, bits=bits, zero=2.0 ** (bits - 1)), torch.randn(64), maps(*corrected))
    assert tq.unsupported(held, CONV if window else Geometry(False), STEPS) is None
    buffers = tq.to_buffers(held, STEPS)
    x = torch.randn(2, 32, 5, 4) * 3 if window else torch.randn(6, 32) * 3
    for step in range(STEPS):
        torch.testing.assert_close(theirs(x, buffers, step), ours(x, held, step), rtol=1e-5, atol=1e-4)


def test_a_correction_is_in_the_buffers_and_not_dropped() -> None:
    """Without it the same step gives another output, by a·p + b - p."""
    held = Held(layer(), torch.zeros(64), maps(2))
    x, plain = torch.randn(6, 32), tq.to_buffers(replace(held, maps={}), STEPS)
    product = theirs(x, plain, 2)
    affine = held.maps[2]
    expected = product * affine.scale + affine.shift
    torch.testing.assert_close(theirs(x, tq.to_buffers(held, STEPS), 2), expected, rtol=1e-5, atol=1e-4)
    assert float((expected - product).abs().max()) > 1
    torch.testing.assert_close(theirs(x, tq.to_buffers(held, STEPS), 1), theirs(x, plain, 1))


@pytest.mark.parametrize("window", [(), (1, 1), (3, 3)])
@pytest.mark.parametrize("corrected", [(), (0, 2)])
def test_round_trip(window: tuple[int, ...], corrected: tuple[int, ...]) -> None:
    held = Held(layer(*window), torch.randn(64), maps(*corrected))
    content = tq.to_checkpoint({"a.b": held}, STEPS)
    assert {key for key in content if "correction" in key} == ({f"a.b.{n}" for n in tq.FOLDED} if corrected else set())
    found = tq.from_checkpoint({**content, "conv_in.weight": torch.ones(1)})["a.b"]
    assert torch.equal(found.layer.weights[0].values, held.layer.weights[0].values)
    assert torch.equal(found.layer.inputs[0].zero_point, held.layer.inputs[0].zero_point)
    assert torch.equal(found.layer.inputs[0].scale, held.layer.inputs[0].scale.half().float())
    torch.testing.assert_close(found.layer.weights[0].scale, held.layer.weights[0].scale, rtol=1e-6, atol=0)
    assert found.bias is not None and held.bias is not None and torch.equal(found.bias, held.bias)
    assert set(found.maps) == set(corrected)
    for step in corrected:
        assert torch.equal(found.maps[step].scale, held.maps[step].scale)
        assert torch.equal(found.maps[step].shift, held.maps[step].shift)


def test_a_checkpoint_of_its_own_is_read() -> None:
    """Which multiplies an unrounded delta by the weights' scales, in float32."""
    held = Held(layer(), torch.randn(64))
    buffers, (table,) = tq.to_buffers(held, STEPS), held.layer.inputs
    delta = table.scale.flip(0)
    product = delta[:, None] * held.layer.weights[0].scale
    for kept in (delta, delta.half()):
        found = tq.from_buffers({**buffers, "act_delta": kept, "act_times_weight_delta": product})
        torch.testing.assert_close(found.layer.weights[0].scale, held.layer.weights[0].scale, rtol=1e-3, atol=0)
        torch.testing.assert_close(found.layer.inputs[0].scale, table.scale, rtol=1e-3, atol=0)


def test_a_step_that_is_not_run_takes_the_row_before() -> None:
    held = Held(layer(steps=(0, 2)))
    delta = tq.to_buffers(held, STEPS)["act_delta"].flip(0)
    first, second = held.layer.inputs[0].scale.half()
    assert torch.equal(delta, torch.stack([first, first, second, second]))


SPLIT = LayerQuant(layer().weights * 2, layer().inputs * 2, (32, 32))
PLAIN = layer()
LIMITS: list[tuple[Held, Geometry, str]] = [
    (Held(SPLIT), CONV, "its input is quantised in two halves"),
    (Held(layer(3, 3)), replace(CONV, groups=2), "2 groups, expected 1"),
    (Held(layer(3, 3)), replace(CONV, dilation=(2, 2)), "dilation 2, expected 1"),
    (Held(layer(3, 3)), replace(CONV, padding="same"), "padding 'same', expected numbers"),
    (Held(layer(3, 3)), replace(CONV, padding=(1, 0)), "other padding of rows than of columns"),
    (
        Held(layer(channels=20)),
        Geometry(False),
        "20 input and 64 output channels, expected multiples of 32",
    ),
    (Held(layer(zero=90.0)), Geometry(False), "asymmetric weights, expected those of quant.weight_symmetric"),
    (Held(changed(PLAIN, weight={"format": "log2"})), Geometry(False), "log2 weights, expected integers"),
    (Held(changed(PLAIN, table={"format": "fp8"})), Geometry(False), "fp8 activations, expected integers"),
    (Held(changed(PLAIN, table={"bits": 4})), Geometry(False), "4-bit activations, expected 8"),
    (
        Held(changed(PLAIN, table={"steps": torch.zeros(0), "scale": torch.zeros(0), "zero_point": torch.zeros(0)})),
        Geometry(False),
        "its input was never calibrated",
    ),
    (Held(layer(steps=(0, 9))), Geometry(False), "a grid of step 9, expected steps below 4"),
    (
        Held(changed(PLAIN, table={"scale": torch.full((4,), 1e-7)})),
        Geometry(False),
        "an activation scale that half precision does not hold",
    ),
    (
        Held(changed(PLAIN, table={"scale": torch.full((4,), 1e6)})),
        Geometry(False),
        "an activation scale that half precision does not hold",
    ),
    (Held(PLAIN, maps=maps(7)), Geometry(False), "a correction of step 7, expected steps below 4"),
    (
        Held(PLAIN, maps={1: AffineMap(torch.ones(64), torch.ones(64), torch.ones(64))}),
        Geometry(False),
        "a correction that reads two products",
    ),
    (
        Held(PLAIN, maps={1: AffineMap(torch.zeros(64), torch.ones(64))}),
        Geometry(False),
        "a correction whose factor is 0 or whose offset is out of float32's range",
    ),
    (
        Held(PLAIN, maps={1: AffineMap(torch.full((64,), 1e-30), torch.full((64,), 1e9))}),
        Geometry(False),
        "a correction whose factor is 0 or whose offset is out of float32's range",
    ),
]


@pytest.mark.parametrize(("held", "geometry", "reason"), LIMITS, ids=[reason[:30] for _, _, reason in LIMITS])
def test_every_limit_has_its_reason(held: Held, geometry: Geometry, reason: str) -> None:
    assert tq.unsupported(held, geometry, STEPS) == reason


@pytest.mark.parametrize(
    ("name", "change"),
    [("act_times_weight_delta", 1.1), ("zp_times_weight_channel_sum", -2.0)],
)
@pytest.mark.parametrize("corrected", [(), (2,)])
def test_contradicting_buffers_are_refused(name: str, change: float, corrected: tuple[int, ...]) -> None:
    content = tq.to_checkpoint({"a": Held(layer(), maps=maps(*corrected))}, STEPS)
    content[f"a.{name}"][0] *= change
    with pytest.raises(UserError, match=f"layer a: {name}"):
        tq.from_checkpoint(content)
    del content[f"a.{name}"]
    with pytest.raises(UserError, match=f"layer a: it lacks {name}"):
        tq.from_checkpoint(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("int_weight", torch.zeros(64, 32)),
        ("int_weight", torch.zeros(64, dtype=torch.int8)),
        ("act_delta", torch.zeros(STEPS)),
        ("act_delta", torch.full((STEPS,), torch.nan)),
        ("act_zp", torch.full((STEPS,), 0.5)),
        ("act_zp", torch.full((STEPS,), 128.0)),
        ("act_times_weight_delta", torch.ones(STEPS, 3)),
        ("zp_times_weight_channel_sum", torch.full((STEPS, 64), torch.inf)),
        ("bias", torch.ones(3)),
        ("correction_scale", torch.zeros(STEPS, 64)),
    ],
)
def test_buffers_of_another_form_are_refused(name: str, value: Tensor) -> None:
    content = tq.to_checkpoint({"a": Held(layer(), maps=maps(1))}, STEPS)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        tq.from_checkpoint({**content, f"a.{name}": value})


def test_other_checkpoints_are_refused() -> None:
    with pytest.raises(UserError, match="holds no"):
        tq.from_checkpoint({"weight": torch.ones(1)})

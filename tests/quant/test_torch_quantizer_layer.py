"""Layers on torch_quantizer's modules (a stand-in of their formula) against the simulated backend's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cachequant.errors import UserError
from cachequant.kernels.backend import TORCH_QUANTIZER, Backend
from cachequant.kernels.reference import product
from cachequant.kernels.torch_quantizer import Held
from cachequant.quant.convert import LayerPlan, fresh_state
from cachequant.quant.deploy import Deployment, attach
from cachequant.quant.layers import Layer, QuantLayer, quantize_weight
from cachequant.quant.torch_quantizer_layer import TorchQuantizerLayer
from cachequant.types import ActivationTable, AffineMap, Correction, LayerQuant, QuantState
from tests import torch_quantizer_stand_in
from tests.quant.layer_cases import clock, conv, generator

STEPS = (0, 2, 3)
CPU = torch.device("cpu")
HALF = 2.0**-11
"""Relative rounding error of half precision."""


@pytest.fixture(autouse=True)
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_quantizer_stand_in.install(monkeypatch)


def source(kind: str, bias: bool = True) -> Layer:
    wide: dict[str, Any] = {"in_channels": 32, "out_channels": 64, "bias": bias}
    torch.manual_seed(1)
    return {
        "linear": lambda: nn.Linear(32, 64, bias=bias),
        "3x3": lambda: conv(**wide),
        "strided": lambda: conv(**wide, stride=2),
        "unpadded": lambda: conv(**wide, padding=0),
        "1x1": lambda: conv(**wide, kernel_size=1, padding=0),
    }[kind]()


def held(layer: Layer, corrected: tuple[int, ...] = (), exact: bool = True) -> Held:
    """The layer at symmetric 8 bits; `exact`: on grids whose scales half precision holds."""
    draw = generator(2)
    scale = 0.01 + 0.05 * torch.rand(len(STEPS), generator=draw)
    zero = torch.randint(40, 200, (len(STEPS),), generator=draw).float()
    table = ActivationTable(torch.tensor(STEPS).int(), scale.half().float() if exact else scale, zero, 8)
    grid = quantize_weight(layer.weight, 8, "minmax", symmetric=True)
    maps = {s: AffineMap(0.5 + torch.rand(64, generator=draw), 3 * torch.randn(64, generator=draw)) for s in corrected}
    return Held(LayerQuant((grid,), (table,), (32,)), layer.bias, maps)


def shape_of(layer: Layer) -> tuple[int, ...]:
    return (3, 7, 32) if isinstance(layer, nn.Linear) else (2, 32, 6, 5)


def inputs(layer: Layer, state: Held, row: int) -> Tensor:
    """Half-precision values up to two steps beyond the grid, none nearer than 0.3 steps to a rounding border."""
    table, draw, shape = state.layer.inputs[0], generator(row), shape_of(layer)
    scale, zero = float(table.scale[row]), float(table.zero_point[row])
    integers = torch.randint(int(-zero) - 2, int(255 - zero) + 3, shape, generator=draw).float()
    return (scale * (integers + 0.2 * torch.rand(shape, generator=draw) - 0.1)).half()


def both(layer: Layer, state: Held) -> Iterator[tuple[int, Any, Any]]:
    """(row, theirs, simulated) with the clock at each step, the last first."""
    time = clock(steps=6)
    one = TorchQuantizerLayer(layer, state, time, CPU)
    other = QuantLayer(layer, state.layer, time, dict(state.maps))
    for row in reversed(range(len(STEPS))):
        time.step = STEPS[row]
        yield row, one, other


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "3x3", "strided", "unpadded", "1x1"])
@pytest.mark.parametrize("corrected", [(), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_equal_integers_give_equal_outputs_but_for_half_precision(
    kind: str, corrected: tuple[int, ...], bias: bool
) -> None:
    """Borders, corrections and bias included; steps come in any order, and twice, as with guidance in two calls."""
    layer = source(kind, bias)
    state = held(layer, corrected)
    for row, theirs, simulated in both(layer, state):
        x = inputs(layer, state, row)
        expected = simulated(x.float())
        for found in (theirs(x.float()), theirs(x).float()):
            tolerance = HALF * expected.abs() + 1e-5 * expected.abs().max()
            assert found.shape == expected.shape and bool(((found - expected).abs() <= tolerance).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "3x3"])
def test_any_input_gives_at_most_neighbouring_integers(kind: str) -> None:
    """|Δout| ≤ Σ|w|·(δ + 255·2⁻¹¹·δ): an integer may be the next one, and δ itself is rounded. The mean is far below."""
    layer = source(kind)
    state = held(layer, exact=False)
    for row, theirs, simulated in both(layer, state):
        table, (grid,) = state.layer.inputs[0], state.layer.weights
        x = (4 * torch.randn(shape_of(layer), generator=generator(row))).half()
        column = (-1, *[1] * (layer.weight.dim() - 1))
        weight = (grid.values.float() - 128) * grid.scale.view(column)
        ones = torch.ones_like(x, dtype=torch.float32)
        bound = product(ones, weight.abs(), simulated.geometry) * float(table.scale[row]) * (1 + 255 * HALF)
        expected = simulated(x.float())
        error = (theirs(x.float()) - expected).abs()
        assert bool((error <= bound + HALF * expected.abs() + 1e-4).all())
        assert float(error.mean()) < float((simulated(x.float()) - layer(x.float())).abs().mean())


@torch.no_grad()
def test_a_tensor_whose_channels_come_last_is_read_as_what_it_is() -> None:
    layer = source("3x3")
    state = held(layer)
    for row, theirs, _ in both(layer, state):
        x = inputs(layer, state, row)
        assert torch.equal(theirs(x.contiguous(memory_format=torch.channels_last)), theirs(x))


def network(unaligned: int = 0) -> nn.Sequential:
    """Two convolutions; the bias of the first is not small beside its product."""
    torch.manual_seed(0)
    first = nn.Conv2d(32, 64, 3, padding=1)
    nn.init.constant_(first.bias, 2.0)
    return nn.Sequential(first, nn.Conv2d(64, 32 + unaligned, 1), nn.Flatten())


def state_of(model: nn.Module, symmetric: bool = True) -> QuantState:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    table = ActivationTable(torch.tensor([0]).int(), torch.tensor([0.0625]), torch.tensor([128.0]), 8)
    made = fresh_state(model, dict.fromkeys(names, LayerPlan(8, 8, symmetric=symmetric)), "minmax").layers
    return QuantState({name: replace(layer, inputs=(table,)) for name, layer in made.items()})


def attached(model: nn.Module, state: QuantState, correction: Correction | None = None) -> Deployment:
    handle = attach(model, state, clock(steps=6), correction or Correction(), Backend(TORCH_QUANTIZER, ""))
    assert isinstance(handle, Deployment)
    return handle


@torch.no_grad()
def test_what_it_cannot_run_is_simulated_and_named_with_corrections_on_both() -> None:
    model = network(unaligned=5)
    maps = {"0": {0: AffineMap(torch.full((64,), 0.5), torch.ones(64))}, "1": {0: AffineMap.identity(37)}}
    maps["1"][0] = AffineMap(torch.full((37,), 2.0), torch.ones(37))
    x = torch.randn(1, 32, 4, 4)
    before = model(x)
    handle = attached(model, state_of(model), Correction(layers=maps))
    assert list(handle.integer) == ["0"] and set(handle.replaced) == {"0", "1"}
    assert handle.reasons == {"1": "64 input and 37 output channels, expected multiples of 32"}
    middle = 0.5 * (before_layer(handle, "0", x) - bias_of(handle, "0")) + 1 + bias_of(handle, "0")
    expected = 2.0 * (before_layer(handle, "1", middle) - bias_of(handle, "1")) + 1 + bias_of(handle, "1")
    found = model(x)
    uncorrected = float((before - expected.flatten(1)).abs().mean())
    assert float((found - expected.flatten(1)).abs().mean()) < 0.05 * uncorrected
    handle.remove()
    assert torch.equal(model(x), before)


def before_layer(handle: Deployment, name: str, x: Tensor) -> Tensor:
    return handle.replaced[name](x)


def bias_of(handle: Deployment, name: str) -> Tensor:
    bias: Any = handle.replaced[name].bias
    return bias.view(1, -1, 1, 1)


def test_where_it_can_run_nothing_the_network_stays_and_the_line_says_why() -> None:
    model = network()
    before = list(model)
    with pytest.raises(UserError, match=r"none of the plan's 2 layers \(2 of them: asymmetric.*weight_symmetric=true"):
        attached(model, state_of(model, symmetric=False))
    assert list(model) == before


@torch.no_grad()
def test_a_network_that_is_made_half_keeps_its_buffers_and_one_that_is_moved_is_refused() -> None:
    model = network()
    handle = attached(model, state_of(model))
    x = torch.randn(1, 32, 4, 4)
    expected = model(x.half())
    assert torch.equal(model.half()(x.half()), expected)
    with pytest.raises(UserError, match=r"expected it to stay there: call cachequant\.disable"):
        model.to("meta")
    handle.remove()
    assert all(p.dtype == torch.float16 for p in model.parameters())


class Older(nn.Module):
    """A module of the same name that holds no such buffers."""

    def __init__(self, org_module: Any, n_bits: int = 8, num_steps: int = 1) -> None:
        super().__init__()


@pytest.mark.parametrize("other", [Older, nn.Identity, lambda: None])
def test_another_version_of_the_package_is_one_line_and_the_network_stays(
    monkeypatch: pytest.MonkeyPatch, other: Any
) -> None:
    torch_quantizer_stand_in.install(monkeypatch, qconv2d_8bit=other)
    model = network()
    before = list(model)
    with pytest.raises(UserError, match=r"has another qconv2d_8bit \(.*\): install github\.com/ThisisBillhe"):
        attached(model, state_of(model))
    assert list(model) == before

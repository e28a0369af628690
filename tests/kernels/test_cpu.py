"""oneDNN's integers against float64 arithmetic on the same grids, at both ends of everything."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cachequant.cache.feature_cache import FeatureCache
from cachequant.kernels.backend import choose_backend
from cachequant.kernels.cpu import unavailable, unsupported
from cachequant.kernels.reference import Geometry
from cachequant.quant.deployed import IntegerLayer
from cachequant.quant.layers import Layer, QuantLayer
from cachequant.schedule import uniform_schedule
from cachequant.types import ActivationTable, AffineMap, LayerQuant, WeightGrid

needs_int8 = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SEEDS, ENDS = st.integers(0, 2**31 - 1), st.sampled_from([0, 1, 100, 128, 254, 255])


def state(layer: Layer, widths: tuple[int, ...], zeros: tuple[int, int], bits: int, seed: int) -> LayerQuant:
    """Random integers that reach both ends of the grid, weight zero points and activation zero points as given."""
    draw = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    grids = []
    for part in layer.weight.split(widths, dim=1):
        values = torch.randint(0, top + 1, part.shape, generator=draw, dtype=torch.uint8)
        values.flatten()[0], values.flatten()[-1] = 0, top
        scale = torch.rand(len(part), generator=draw) * 0.01 + 1e-3
        grids.append(WeightGrid(values, scale, torch.full((len(part),), float(min(zeros[0], top))), bits))
    table = ActivationTable(torch.tensor([0]), torch.tensor([0.05]), torch.tensor([float(zeros[1])]), 8)
    return LayerQuant(tuple(grids), tuple(table for _ in widths), widths)


def assert_equals_the_simulation(
    layer: Layer, quant: LayerQuant, x: torch.Tensor, maps: dict[int, AffineMap] | None = None
) -> None:
    """The deployed layer equals the simulated one within 1e-5 of its largest term."""
    clock = FeatureCache(uniform_schedule(4, 2))
    with torch.no_grad():
        found = IntegerLayer(layer, quant, clock, maps)(x)
        expected = QuantLayer(layer, quant, clock, maps)(x)
    assert found.shape == expected.shape and found.dtype == x.dtype
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@needs_int8
@settings(deadline=None, max_examples=60)
@given(
    SEEDS, st.integers(1, 3), st.integers(1, 37), st.integers(1, 35), st.sampled_from([1, 3, 5]), st.integers(1, 2),
    st.integers(1, 2), st.integers(5, 11), ENDS, ENDS, st.sampled_from([4, 8]), st.booleans(), st.floats(0.1, 30),
)  # fmt: skip
def test_convolutions_equal_the_simulated_ones(
    seed: int, batch: int, inner: int, outer: int, kernel: int, stride: int, dilation: int, size: int, weight_zero: int,
    zero: int, bits: int, bias: bool, spread: float,
) -> None:  # fmt: skip
    """Random shapes, strides and zero points; a large spread saturates both ends of the activation grid."""
    torch.manual_seed(seed)
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(inner, outer, kernel, stride, padding, dilation, bias=bias)
    x = torch.randn(batch, inner, size, size + 1) * spread
    assert_equals_the_simulation(layer, state(layer, (inner,), (weight_zero, zero), bits, seed), x)


@needs_int8
@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), ENDS, ENDS, st.sampled_from([(5,), (2, 3), (1, 2, 3)]))
def test_linear_layers_equal_the_simulated_ones(
    seed: int, inner: int, outer: int, weight_zero: int, zero: int, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(inner, outer)
    assert_equals_the_simulation(
        layer, state(layer, (inner,), (weight_zero, zero), 8, seed), torch.randn(*shape, inner) * 5
    )


@needs_int8
@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]), ENDS, ENDS)
def test_both_halves_of_a_split_layer_and_its_correction(
    seed: int, first: int, second: int, kernel: int, weight_zero: int, zero: int
) -> None:
    """a₂, b₂ touch the first half's product only, whatever offsets its weights need."""
    torch.manual_seed(seed)
    layer = nn.Conv2d(first + second, 9, kernel, padding=kernel // 2)
    maps = {0: AffineMap(torch.randn(9), torch.randn(9))}
    x = torch.randn(2, first + second, 6, 5)
    assert_equals_the_simulation(layer, state(layer, (first, second), (weight_zero, zero), 8, seed), x, maps)


@pytest.mark.parametrize("padding", ["same", "valid"])
@needs_int8
def test_named_padding(padding: str) -> None:
    layer = nn.Conv2d(6, 5, 3, padding=padding)
    assert_equals_the_simulation(layer, state(layer, (6,), (90, 17), 8, 0), torch.randn(2, 6, 7, 7))


def test_what_cannot_run_says_why() -> None:
    grids = (WeightGrid(torch.zeros(4, 2, 2, 2, dtype=torch.uint8), torch.ones(4), torch.zeros(4), 8),)
    assert unsupported(grids, Geometry(True, groups=2)) == "2 groups"
    assert "even kernel" in str(unsupported(grids, Geometry(True, padding="same")))
    assert unsupported(grids, Geometry(True, padding="valid")) is None


def test_a_gpu_gets_the_simulation_and_the_reason() -> None:
    found = choose_backend("auto", torch.device("cuda"))
    assert found.name == "simulated" and "on cuda" in found.note
